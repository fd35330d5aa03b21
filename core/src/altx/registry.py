"""Finding plugins and their components: lazily, in two stages, with failures kept as data.

Metadata of installed distributions names the plugins (entry-point group `altx.plugins`). A plugin's
entry module is imported when one of its names is needed; a plugin that fails stays in the list with its
error and hurts nobody. Never imports torch.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from types import ModuleType
from typing import Any

import pluggy

from altx import hookspecs
from altx.errors import AltxError, AmbiguousComponent, BrokenPlugin, UnknownComponent
from altx.spec import API_VERSION, ComponentSpec, FeedForwardSpec, MemorySpec, MixerSpec, RouterSpec

GROUP = "altx.plugins"
ALLOW = "ALTX_PLUGINS"
BUILTIN = "altx"
SUPPORTED = (API_VERSION, API_VERSION - 1)


@dataclass(frozen=True)
class Kind:
    """A kind of component: the hook that offers it and the record that describes it."""

    name: str
    hook: str
    spec: type[ComponentSpec]


KINDS = (
    Kind("mixer", "altx_token_mixers", MixerSpec),
    Kind("feed-forward", "altx_feed_forwards", FeedForwardSpec),
    Kind("memory", "altx_memories", MemorySpec),
    Kind("router", "altx_routers", RouterSpec),
)


@dataclass
class Plugin:
    """An installed plugin and what became of it.

    Args:
        name: entry-point name.
        distribution: the package that installed it.
        version: that package's version.
        module: its entry module.
        status: "not loaded", "ok", "broken", "incompatible" (wants another altx) or "disabled" (ALTX_PLUGINS).
        errors: what went wrong, in words; a plugin may be "ok" and still have offered one bad spec.
        seconds: time its entry module took to import.
    """

    name: str
    distribution: str
    version: str
    module: str
    status: str = "not loaded"
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


@dataclass(frozen=True)
class Component:
    """A component that can be used: its record and the plugin that offers it."""

    spec: ComponentSpec
    plugin: Plugin

    @property
    def name(self) -> str:
        """Short name."""
        return self.spec.name

    @property
    def qualified(self) -> str:
        """`distribution:name`, which is never ambiguous."""
        return f"{self.plugin.distribution}:{self.spec.name}"

    def __str__(self) -> str:
        return f"{self.spec.kind} {self.spec.name!r} of {self.plugin}"

    def load(self, role: str) -> Any:
        """Import what one of the record's import strings names.

        Args:
            role: "build", "config", "capabilities", ...

        Raises:
            BrokenPlugin: if it cannot be imported.
        """
        target = getattr(self.spec, role)
        module, _, attribute = target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (Exception, SystemExit) as error:
            command = self.spec.install or f"pip install --force-reinstall {self.plugin.distribution}"
            raise BrokenPlugin(
                f"{self}: its {role} {target!r} cannot be imported: {describe(error)}", hint=f"reinstall it: {command}"
            ) from error


def describe(error: BaseException) -> str:
    """An exception in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


class Registry:
    """The components of all installed plugins.

    Args:
        entry_points: where to look instead of the installed distributions; for tests.
        allow: names of the only plugins to load, or None for all; default: the variable ALTX_PLUGINS.
    """

    def __init__(
        self, entry_points: Iterable[metadata.EntryPoint] | None = None, allow: Sequence[str] | None = None
    ) -> None:
        if allow is None and (listed := os.environ.get(ALLOW)) is not None:
            allow = [name.strip() for name in listed.split(",") if name.strip()]
        self._manager = pluggy.PluginManager("altx")
        self._manager.add_hookspecs(hookspecs)
        self._kinds = {kind.name: kind for kind in KINDS}
        self._components: list[Component] = []
        self.plugins = [_builtin(), *_discover(entry_points, allow)]
        """Every installed plugin, loaded or not."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds of component."""
        return tuple(self._kinds)

    def add_kind(self, kind: Kind, hookspecs: ModuleType | type) -> None:
        """Add a kind of component with a hook of its own; before any plugin that implements it is loaded."""
        self._kinds[kind.name] = kind
        self._manager.add_hookspecs(hookspecs)

    def get(self, kind: str, name: str) -> Component:
        """One component by short or qualified name.

        A plugin whose entry point has the name is loaded first, the others only if it lacks the component.

        Raises:
            UnknownComponent: if nobody offers it.
            AmbiguousComponent: if several of the plugins loaded so far do.
        """
        distribution, _, short = name.rpartition(":")
        if distribution:
            self._load(plugin for plugin in self.plugins if plugin.distribution == distribution)
        else:
            self._load(plugin for plugin in self.plugins if plugin.name == short)
            if not self._matching(kind, short):
                self.load_all()
        found = [c for c in self._matching(kind, short) if distribution in ("", c.plugin.distribution)]
        if len(found) > 1:
            owners = " and ".join(str(component.plugin) for component in found)
            choices = " or ".join(repr(component.qualified) for component in found)
            raise AmbiguousComponent(f"{kind} {short!r} is provided by {owners}", hint=f"write {choices}")
        if not found:
            self.load_all()
            raise self._unknown(kind, name, [c for c in self._components if c.spec.kind == kind])
        return found[0]

    def find(self, name: str, kind: str | None = None) -> Component:
        """One component by short or qualified name, of whatever kind has it. Loads every plugin.

        Raises:
            UnknownComponent: if nobody offers it.
            AmbiguousComponent: if several kinds or several plugins do.
            AltxError: if there is no such kind.
        """
        kind = self._kind(kind)
        self.load_all()
        kinds = [
            k for k in self._kinds if any(c.spec.kind == k and name in (c.name, c.qualified) for c in self._components)
        ]
        if kind or len(kinds) == 1:
            return self.get(kind or kinds[0], name)
        if kinds:
            choices = " or ".join(f"--kind {k}" for k in kinds)
            raise AmbiguousComponent(
                f"{name!r} is the name of a {' and of a '.join(kinds)}", hint=f"say which: {choices}"
            )
        raise self._unknown("component", name, self._components)

    def _kind(self, kind: str | None) -> str | None:
        """A kind as it is spelt here; configs write feed_forward for feed-forward."""
        if kind is None or (known := kind.replace("_", "-")) in self._kinds:
            return kind and known
        raise AltxError(f"there is no kind {kind!r}", hint=f"the kinds are {', '.join(self._kinds)}")

    def _matching(self, kind: str, short: str) -> list[Component]:
        return [c for c in self._components if c.spec.kind == kind and c.name == short]

    def components(self, kind: str | None = None) -> list[Component]:
        """Every usable component, sorted by kind and name. Loads every plugin.

        Raises:
            AltxError: if there is no such kind.
        """
        kind = self._kind(kind)
        self.load_all()
        order = list(self._kinds)
        found = [c for c in self._components if kind in (None, c.spec.kind)]
        return sorted(found, key=lambda c: (order.index(c.spec.kind), c.name, c.plugin.distribution))

    def load_all(self) -> None:
        """Import every plugin's entry module, so that every component and every clash is known."""
        self._load(self.plugins)

    def _load(self, plugins: Iterable[Plugin]) -> None:
        for plugin in plugins:
            if plugin.status == "not loaded":
                self._load_one(plugin)

    def _load_one(self, plugin: Plugin) -> None:
        start = time.perf_counter()
        try:
            module: Any = importlib.import_module(plugin.module.partition(":")[0])
            for attribute in filter(None, plugin.module.partition(":")[2].split(".")):
                module = getattr(module, attribute)
            self._manager.register(module, name=f"{plugin.distribution}:{plugin.name}")
            self._refuse_unknown_hooks(module)
        except (Exception, SystemExit) as error:
            plugin.status, plugin.errors = "broken", [describe(error)]
            return
        finally:
            plugin.seconds = time.perf_counter() - start
        plugin.status = "ok"
        if not self._manager.get_hookcallers(module):
            plugin.status, plugin.errors = "broken", ["it implements no hook; is @altx.hookimpl missing?"]
        for kind in self._kinds.values():
            caller: pluggy.HookCaller = getattr(self._manager.hook, kind.hook)
            for implementation in caller.get_hookimpls():
                if implementation.plugin is module:
                    self._collect(plugin, kind, implementation.function)

    def _refuse_unknown_hooks(self, module: object) -> None:
        """A misspelt hook would never be called; say so instead."""
        for caller in self._manager.get_hookcallers(module) or []:
            optional = all(i.optionalhook for i in caller.get_hookimpls() if i.plugin is module)
            if caller.spec is None and not optional:
                close = difflib.get_close_matches(caller.name, [kind.hook for kind in self._kinds.values()], n=1)
                self._manager.unregister(module)
                raise AttributeError(
                    f"unknown hook {caller.name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
                )

    def _collect(self, plugin: Plugin, kind: Kind, hook: Callable[..., Any]) -> None:
        try:
            specs = list(hook())
        except (Exception, SystemExit) as error:
            plugin.status = "broken"
            plugin.errors.append(f"{kind.hook}() raised {describe(error)}")
            return
        for spec in specs:
            if not isinstance(spec, kind.spec):
                plugin.status = "broken"
                plugin.errors.append(f"{kind.hook}() returned {spec!r}, not a {kind.spec.__name__}")
            elif isinstance(spec.api_version, int) and spec.api_version not in SUPPORTED:
                plugin.status = "incompatible"
                plugin.errors.append(_wrong_version(spec))
            elif reason := spec.problem():
                plugin.status = "broken"
                plugin.errors.append(f"{kind.name} {spec.name!r}: {reason}")
            elif any(c.plugin is plugin and c.spec.kind == kind.name and c.name == spec.name for c in self._components):
                plugin.status = "broken"
                plugin.errors.append(f"{kind.name} {spec.name!r} is offered twice")
            else:
                self._components.append(Component(spec, plugin))

    def _unknown(self, what: str, name: str, candidates: list[Component]) -> AltxError:
        """The error for a name that none of the candidates has: the nearest names, and what did not load."""
        short = name.rpartition(":")[2]
        names = sorted({component.name for component in candidates})
        close = difflib.get_close_matches(short, names, n=3, cutoff=0.5)
        lines = [
            f"did you mean {' or '.join(map(repr, close))}?" if close else f"installed: {', '.join(names) or 'none'}"
        ]
        if elsewhere := [c for c in self._components if c.name == short and c not in candidates]:
            lines.append(f"there is a {elsewhere[0].spec.kind} of that name, from {elsewhere[0].plugin}")
        for plugin in self.plugins:
            if plugin.errors:
                lines.append(f"{plugin} did not load completely: {plugin.errors[0]}")
            elif plugin.status == "disabled":
                lines.append(f"{plugin} is disabled by {ALLOW}")
        return UnknownComponent(f"no plugin offers a {what} {name!r}", hint="\n".join(lines))


def _wrong_version(spec: ComponentSpec) -> str:
    wants = f"{spec.kind} {spec.name!r} was written for plugin API {spec.api_version}, this altx supports {API_VERSION}"
    if spec.api_version > API_VERSION:
        return f"{wants}: upgrade altx (pip install --upgrade altx)"
    return f"{wants}: upgrade the plugin"


def _builtin() -> Plugin:
    from altx import __version__

    return Plugin("altx", BUILTIN, __version__, "altx.builtin")


def _discover(entry_points: Iterable[metadata.EntryPoint] | None, allow: Sequence[str] | None) -> list[Plugin]:
    """Plugins by metadata alone: nothing is imported."""
    found = metadata.entry_points(group=GROUP) if entry_points is None else entry_points
    plugins = []
    for point in found:
        dist = point.dist
        name, version = (dist.name, dist.version) if dist else (point.value.partition(".")[0], "unknown")
        plugins.append(Plugin(point.name, re.sub(r"[-_.]+", "-", name).lower(), version, point.value))
    plugins.sort(key=lambda plugin: (plugin.distribution, plugin.name))
    if allow is not None:
        names = {plugin.name for plugin in plugins} | {plugin.distribution for plugin in plugins}
        if missing := [name for name in allow if name not in names]:
            raise AltxError(
                f"{ALLOW} names {', '.join(map(repr, missing))}, which is not installed",
                hint=f"installed: {', '.join(sorted(names)) or 'none'}",
            )
        for plugin in plugins:
            if plugin.name not in allow and plugin.distribution not in allow:
                plugin.status = "disabled"
    return plugins


@functools.cache
def default() -> Registry:
    """The registry of this process."""
    return Registry()
