"""Finding components: lazily, in two stages, with failures kept as data.

`altx.discovery` names the installed plugins. A plugin's entry module is imported when one of its names is needed; a
plugin that fails stays in the list with its error and hurts nobody. Never imports torch.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from typing import Any

import pluggy

from altx import hookspecs
from altx.discovery import ALLOW, BUILTIN, GROUP, Plugin, discover, exists
from altx.errors import AltxError, AmbiguousComponent, BrokenPlugin, UnknownComponent, describe, remedy, shown
from altx.spec import API_VERSION, ComponentSpec, FeedForwardSpec, Kind, MemorySpec, MixerSpec, RouterSpec

__all__ = ["GROUP", "KINDS", "Component", "Kind", "Plugin", "Registry", "default", "describe"]

SUPPORTED = (API_VERSION, API_VERSION - 1)
HEAVY = ("torch", "numpy", "scipy", "pandas", "transformers", "triton", "jax", "tensorflow")
"""What a plugin's entry module has no business importing: each costs every command a good part of a second."""
MAX_SPECS = 1000
MAX_ERRORS = 10


KINDS = (
    Kind("mixer", "altx_token_mixers", MixerSpec),
    Kind("feed-forward", "altx_feed_forwards", FeedForwardSpec),
    Kind("memory", "altx_memories", MemorySpec),
    Kind("router", "altx_routers", RouterSpec),
)


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
        command = self.spec.install or f"pip install --force-reinstall {self.plugin.distribution}"
        with self.guard(f"{self}: its {role} {target!r} cannot be imported", hint=f"reinstall it: {command}"):
            return getattr(importlib.import_module(module), attribute)

    @contextmanager
    def guard(self, what: str, *, error: type[AltxError] = BrokenPlugin, hint: str = "") -> Iterator[None]:
        """Code of the plugin runs inside: whatever it raises becomes an error that names it.

        That includes SystemExit and other exceptions that no `except Exception` catches, but not KeyboardInterrupt:
        it is not known from a user's Ctrl-C. What is an AltxError already says what the user can do, and keeps its
        type and its words.

        Args:
            what: what is wrong then, and where.
            error: what to raise.
            hint: what to do; default: ask the plugin's authors.
        """
        try:
            yield
        except KeyboardInterrupt:
            raise
        except AltxError as raised:
            if self.plugin.distribution in str(raised):
                raise
            raise _renamed(raised, f"{self}: {raised.what}") from raised
        except BaseException as raised:
            hint = hint or remedy(raised, self.remedy)
            raise error(f"{what}: {describe(raised)}", hint=f"{hint}\n{SEE_WHERE}") from raised

    @property
    def remedy(self) -> str:
        """What to do about a defect of the plugin."""
        return f"update it (pip install --upgrade {self.plugin.distribution}), or tell its authors"

    def missing(self) -> str | None:
        """Which of its import strings leads nowhere, in words, as far as that shows without importing anything."""
        for role in self.spec.roles:
            target = getattr(self.spec, role)
            module, _, attribute = target.partition(":")
            loaded = sys.modules.get(module)
            if hasattr(loaded, attribute) if loaded else exists(module):
                continue
            what = f"the module {module} has no {attribute}" if loaded else f"there is no module {module}"
            return f"its {role} {target!r} leads nowhere: {what}"
        return None


SEE_WHERE = "ALTX_DEBUG=1 shows where it failed"


def _renamed(error: AltxError, what: str) -> AltxError:
    """An error of the same type with other words."""
    new = type(error).__new__(type(error))
    AltxError.__init__(new, what, hint=error.hint)
    return new


class Registry:
    """The components of all installed plugins.

    Args:
        entry_points: where to look instead of the installed distributions; for tests.
        allow: names of the only plugins to load, or None for all; default: the variable ALTX_PLUGINS.
    """

    def __init__(
        self, entry_points: Iterable[metadata.EntryPoint] | None = None, allow: Sequence[str] | None = None
    ) -> None:
        self._manager = pluggy.PluginManager("altx")
        self._manager.add_hookspecs(hookspecs)
        self._kinds = {kind.name: kind for kind in KINDS}
        self._components: list[Component] = []
        self._asked: list[tuple[Plugin, object]] = []
        self.plugins = [_builtin(), *discover(entry_points, allow)]
        """Every installed plugin, loaded or not."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds of component."""
        return tuple(self._kinds)

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
        if kind is None:
            return None
        if (known := kind.replace("_", "-")) not in self._kinds:
            self.load_all()  # a plugin may add it
        if known in self._kinds:
            return known
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
        before, start = sys.modules.keys() & set(HEAVY), time.perf_counter()
        try:
            module: Any = importlib.import_module(plugin.module.partition(":")[0])
            for attribute in filter(None, plugin.module.partition(":")[2].split(".")):
                module = getattr(module, attribute)
            if other := self._manager.get_name(module):
                plugin.fail(f"its entry point {plugin.module!r} is that of {other}")
                return
            self._manager.register(module, name=f"{plugin.distribution}:{plugin.name}")
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            _broken(plugin, describe(error), error)
            return
        finally:
            plugin.seconds = time.perf_counter() - start
            plugin.heavy = tuple(name for name in HEAVY if name in sys.modules and name not in before)
        plugin.status = "ok"
        if not self._manager.get_hookcallers(module):
            plugin.fail("it implements no hook; is @altx.hookimpl missing?")
        self._add_kinds(plugin, module)
        if self._unknown_hook(module):
            self.load_all()  # a plugin that was not loaded yet may add the kind
        if unknown := self._unknown_hook(module):
            self._manager.unregister(module)
            close = difflib.get_close_matches(unknown, [k.hook for k in self._kinds.values()], n=1, cutoff=0.8)
            what = f"did you mean {close[0]!r}?" if close else "is a plugin missing that adds a kind?"
            plugin.fail(f"unknown hook {unknown!r}; {what}")
            return
        for kind in self._kinds.values():
            self._collect(plugin, module, kind)
        self._asked.append((plugin, module))

    def _unknown_hook(self, module: object) -> str:
        """The name of a hook that the module implements and nobody calls, such as a misspelt one; else nothing."""
        for caller in self._manager.get_hookcallers(module) or []:
            optional = all(i.optionalhook for i in caller.get_hookimpls() if i.plugin is module)
            if caller.spec is None and not optional:
                return caller.name
        return ""

    def _add_kinds(self, plugin: Plugin, module: object) -> None:
        """Know the kinds that a plugin adds, and what plugins that were loaded before it offer of them."""
        for kind in self._ask(plugin, module, "altx_kinds"):
            if not isinstance(kind, Kind):
                plugin.fail(f"altx_kinds() returned {shown(kind)}, not a Kind")
            elif reason := kind.problem():
                plugin.fail(f"kind {shown(kind.name)}: {reason}")
            elif kind.name in self._kinds or getattr(getattr(self._manager.hook, kind.hook, None), "spec", None):
                plugin.fail(f"kind {kind.name!r}: there is one with that name or with the hook {kind.hook!r} already")
            else:
                # Not all that the module declares: pluggy would verify and keep hooks of kinds that were refused.
                hooks = type("Hooks", (), {kind.hook: staticmethod(getattr(kind.hookspecs, kind.hook))})
                with suppress(pluggy.PluginValidationError):  # an implementation with arguments fails when it is asked
                    self._manager.add_hookspecs(hooks)
                self._kinds[kind.name] = kind
                for earlier, its_module in self._asked:
                    self._collect(earlier, its_module, kind)

    def _ask(self, plugin: Plugin, module: object, hook: str) -> list[Any]:
        """What a plugin's implementation of a hook returns; nothing if it has none or that fails."""
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        found: list[Any] = []
        for implementation in caller.get_hookimpls():
            if implementation.plugin is not module:
                continue
            try:
                offered: Any = implementation.function()
                found += islice(offered, MAX_SPECS + 1)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                _broken(plugin, f"{hook}() raised {describe(error)}", error)
                return []
        if len(found) > MAX_SPECS:
            plugin.fail(f"{hook}() offers more than {MAX_SPECS} components")
            return []
        return found

    def _collect(self, plugin: Plugin, module: object, kind: Kind) -> None:
        for spec in self._ask(plugin, module, kind.hook):
            if len(plugin.errors) >= MAX_ERRORS:
                plugin.fail("and more", status=plugin.status)
                return
            try:
                self._accept(plugin, kind, spec)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                _broken(plugin, f"reading what {kind.hook}() returned raised {describe(error)}", error)

    def _accept(self, plugin: Plugin, kind: Kind, spec: Any) -> None:
        """Keep what a hook returned, or say why it cannot be used."""
        if not isinstance(spec, kind.spec):
            plugin.fail(f"{kind.hook}() returned {shown(spec)}, not a {kind.spec.__name__}")
        elif isinstance(spec.api_version, int) and spec.api_version not in SUPPORTED:
            reason, remedy = _wrong_version(plugin, spec)
            plugin.fail(reason, status="incompatible", remedy=remedy)
        elif spec.kind != kind.spec.kind:
            plugin.fail(f"{kind.hook}() returned a record of kind {shown(spec.kind)}")
        elif problem := kind.spec.problem(spec):
            plugin.fail(f"{kind.name} {shown(spec.name)}: {problem}")
        elif any(c.plugin is plugin and c.spec.kind == kind.name and c.name == spec.name for c in self._components):
            plugin.fail(f"{kind.name} {spec.name!r} is offered twice")
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
                lines.append(f"{plugin} did not load completely: {plugin.errors[0]}; {plugin.remedy}")
            elif plugin.status == "disabled":
                lines.append(f"{plugin} is disabled by {ALLOW}")
        return UnknownComponent(f"no plugin offers a {what} {shown(name)}", hint="\n".join(lines))


def _broken(plugin: Plugin, reason: str, error: BaseException) -> None:
    import traceback

    plugin.fail(reason)
    plugin.traceback = "".join(traceback.format_exception(error))


def _wrong_version(plugin: Plugin, spec: ComponentSpec) -> tuple[str, str]:
    """What is wrong with a record for another version of altx, and what to do."""
    wants = f"{spec.kind} {shown(spec.name)} was written for plugin API {spec.api_version}, this altx supports "
    if spec.api_version > API_VERSION:
        return f"{wants}{API_VERSION}: upgrade altx", "pip install --upgrade altx"
    return f"{wants}{API_VERSION}: upgrade the plugin", f"pip install --upgrade {plugin.distribution}"


def _builtin() -> Plugin:
    from altx import __version__

    return Plugin("altx", BUILTIN, __version__, "altx.builtin")


@functools.cache
def default() -> Registry:
    """The registry of this process."""
    return Registry()
