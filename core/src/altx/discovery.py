"""Which plugins are installed, by the metadata of distributions alone: nothing of a plugin is imported.

A distribution that is damaged, installed twice or points where it must not is a broken plugin with a reason; it never
keeps the others from being found. Never imports torch.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from altx.errors import AltxError, describe, printable

GROUP = "altx.plugins"
ALLOW = "ALTX_PLUGINS"
BUILTIN = "altx"
OURS = ("altx", "altx_cli", "altx_kernels")
ENTRY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
DISTRIBUTION = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
VERSION = re.compile(r"[0-9][0-9A-Za-z.+!-]{0,63}")
POINT = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*)(:[A-Za-z_][\w.]*)?(?:\s*\[.*\])?")


def canonical(distribution: str) -> str:
    """A distribution's name as altx lists it, whichever way it is spelt (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


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
        heavy: slow packages that came with it, such as torch, unless something else had imported them before.
        remedy: what to do about the errors.
        traceback: of the exception that broke it, for its author.
    """

    name: str
    distribution: str
    version: str
    module: str
    status: str = "not loaded"
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0
    heavy: tuple[str, ...] = ()
    remedy: str = ""
    traceback: str = ""

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"

    def fail(self, reason: str, *, remedy: str = "", status: str = "broken") -> None:
        """Note what is wrong with it, and what to do."""
        self.status = status
        self.errors.append(reason)
        self.remedy = remedy or self.remedy or (
            f"reinstall it: pip install --force-reinstall {self.distribution}, or leave it out with {ALLOW}"
        )  # fmt: skip


def discover(
    entry_points: Iterable[metadata.EntryPoint] | None = None, allow: Sequence[str] | None = None
) -> list[Plugin]:
    """Every installed plugin.

    Args:
        entry_points: where to look instead of the installed distributions; for tests.
        allow: names of plugins or of their distributions, to the exclusion of the others; default: the variable
            ALTX_PLUGINS, or all.

    Raises:
        AltxError: if one of those is not installed.
    """
    if allow is None and (listed := os.environ.get(ALLOW)) is not None:
        allow = [name.strip() for name in listed.split(",") if name.strip()]
    if entry_points is None:
        plugins = installed()
    else:
        plugins = [_plugin(point, *_identity(point.dist, point)) for point in entry_points]
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
                plugin.status, plugin.errors, plugin.remedy = "disabled", [], f"add {plugin.name} to {ALLOW}"
    return plugins


def installed(group: str = GROUP) -> list[Plugin]:
    """What the installed distributions offer as entry points of a group, with what is wrong with them."""
    return [plugin for copies in _copies(group).values() for plugin in _of_one(copies)]


@dataclass(frozen=True)
class _Copy:
    """One distribution on the path, with its entry points or what is wrong with them."""

    found: metadata.Distribution
    name: str
    version: str
    points: list[metadata.EntryPoint]
    problem: str = ""


def _copies(group: str) -> dict[str, list[_Copy]]:
    """Distributions with entry points of a group by name, each as often as it is on the path, in the path's order."""
    copies: dict[str, list[_Copy]] = {}
    for found in metadata.distributions():
        points: list[metadata.EntryPoint] = []
        problem = ""
        try:
            # Most distributions have none; to parse what they do have would take most of the time.
            if group not in (found.read_text("entry_points.txt") or ""):
                continue
            points = [point for point in found.entry_points if point.group == group]
        except Exception as error:
            problem = f"its entry points cannot be read: {describe(error)}"
        if points or problem:
            name, version, unnamed = _identity(found, points[0] if points else None)
            copies.setdefault(name, []).append(_Copy(found, name, version, points, problem or unnamed))
    return copies


def _identity(found: Any, point: metadata.EntryPoint | None) -> tuple[str, str, str]:
    """Name and version of a distribution, and what is wrong with them. Its metadata is read once: that is slow."""
    top = re.split(r"[.:]", point.value, maxsplit=1)[0] if point else ""
    guess = re.sub(r"[^a-z0-9]+", "-", top.lower()).strip("-")[:100] or "unknown"
    if found is None:
        return guess, "unknown", ""
    try:
        facts = found.metadata
        name = canonical(facts.get("Name") or "")
        version = facts.get("Version") or ""
    except Exception as error:
        return guess, "unknown", f"its metadata cannot be read: {describe(error)}"
    if not DISTRIBUTION.fullmatch(name) or len(name) > 100:
        return guess, "unknown", f"its metadata names it {name[:100]!r}, which is no name of a distribution"
    if not VERSION.fullmatch(version):
        return name, "unknown", f"its metadata says that its version is {version[:100]!r}, which is none"
    return name, version, ""


def _of_one(copies: list[_Copy]) -> Iterator[Plugin]:
    """The plugins of one distribution."""
    # Beside its metadata an editable install may leave those of an earlier build in the source tree.
    copies = [copy for copy in copies if _installed(copy.found)] or copies
    versions = dict.fromkeys(copy.version for copy in copies)
    first = copies[0]
    if not first.points:
        yield _plugin(metadata.EntryPoint(first.name, "", GROUP), first.name, first.version, first.problem)
        return
    twice = {name for name, n in Counter(point.name for point in first.points).items() if n > 1}
    for name in dict.fromkeys(point.name for copy in copies for point in copy.points):
        same = [point for copy in copies for point in copy.points if point.name == name]
        plugin = _plugin(same[0], first.name, first.version, first.problem)
        if len(versions) > 1:
            places = " and ".join(f"{copy.version} in {copy.found.locate_file('')}" for copy in copies)
            plugin.fail(
                f"several versions of it are installed: {places}",
                remedy=f"pip uninstall {first.name}, until none is left, then pip install {first.name}",
            )
        elif name in twice:
            values = " and ".join(repr(point.value) for point in first.points if point.name == name)
            plugin.fail(f"its entry point {name!r} is there twice: {values}")
        yield plugin


def _installed(found: metadata.Distribution) -> bool:
    try:
        return found.read_text("METADATA") is not None
    except Exception:
        return True


def _plugin(point: metadata.EntryPoint, distribution: str, version: str, problem: str) -> Plugin:
    matched = POINT.fullmatch(point.value)
    module = matched[1] + (matched[2] or "") if matched else ""
    plugin = Plugin(printable(point.name, 64), distribution, version, module)
    if problem:
        plugin.fail(problem)
    elif distribution == BUILTIN:
        plugin.fail(f"{BUILTIN!r} is the name of altx itself", remedy="rename the distribution, e.g. altx-NAME")
    elif not ENTRY.fullmatch(point.name):
        plugin.fail(f"its entry point has the name {point.name[:100]!r}, which is none")
    elif not matched:
        plugin.fail(f"its entry point {point.value[:100]!r} is not 'module' or 'module:attribute'")
    elif matched[1].partition(".")[0] in OURS:
        plugin.fail(
            f"its entry point {point.value!r} is a module of altx itself",
            remedy=f"its authors must name a module of their own; until then pip uninstall {distribution}",
        )
    return plugin


def exists(name: str) -> bool:
    """Whether a module can be found; the packages that it is in are not imported for that."""
    path: Any = None
    top, *rest = name.split(".")
    full = ""
    for step in (top, *rest):
        full = f"{full}.{step}" if full else step
        if module := sys.modules.get(full):
            path = getattr(module, "__path__", ())
            continue
        try:
            specs = (finder.find_spec(full, path) for finder in sys.meta_path)
            found = next((spec for spec in specs if spec), None)
        except Exception:
            return False
        if found is None:
            return False
        path = found.submodule_search_locations or ()
    return True
