"""The ops of this installation: altx's own, and those that plugins bring."""

from __future__ import annotations

import difflib
import importlib
import os
import pkgutil
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from altx_kernels import KernelError, Op, ops
from altx_kernels.op import VARIABLE, parse_pins

NO_OPS = ("native", "gpu")
"""Packages of altx_kernels that serve ops and hold none."""


def load_ops() -> tuple[Mapping[str, Op[Any]], list[dict[str, str]]]:
    """Import what brings ops: the packages of altx_kernels, and what the installed components build.

    Returns:
        The ops by name, and what could not be imported: who offers it, and the reason.

    Raises:
        KernelError: if ALTX_KERNEL names an op or a backend that does not exist.
    """
    import altx_kernels
    from altx import registry
    from altx.errors import AltxError

    problems = []
    for module in pkgutil.iter_modules(altx_kernels.__path__, "altx_kernels."):
        if module.ispkg and module.name.rpartition(".")[2] not in NO_OPS:
            try:
                importlib.import_module(module.name)
            except Exception as error:
                problems.append({"from": module.name, "reason": registry.describe(error)})
    plugins = registry.default()
    for component in plugins.components():
        try:
            component.load("build")
        except AltxError as error:
            problems.append({"from": str(component), "reason": error.what.removeprefix(f"{component}: ")})
    problems += [
        {"from": str(plugin), "reason": reason} for plugin in plugins.plugins for reason in plugin.errors
    ]  # fmt: skip
    _check_pins()
    return MappingProxyType(dict(sorted(ops().items()))), problems


def origin(op: Op[Any]) -> tuple[str, str]:
    """The package that an op came with, and its version."""
    import altx
    from altx import registry

    module = str(getattr(op.reference, "__module__", "")).partition(".")[0]
    for plugin in registry.default().plugins:
        if plugin.module.partition(":")[0].partition(".")[0] == module:
            return plugin.distribution, plugin.version
    return ("altx", altx.__version__) if module == "altx_kernels" else (module, "")


def select(known: Mapping[str, Op[Any]], names: Iterable[str], backends: Iterable[str] = ()) -> list[Op[Any]]:
    """The ops that are asked for, all if none is, as far as they have one of the backends.

    Raises:
        KernelError: for a name that no op has, and a backend that none of them has.
    """
    names, backends = list(names), list(backends)
    for name in names:
        if name not in known:
            raise KernelError(f"there is no op {name!r}", hint=_nearest(name, known))
    chosen = [known[name] for name in dict.fromkeys(names)] or list(known.values())
    for backend in backends:
        if not any(backend in op.backends for op in chosen):
            has = dict.fromkeys(name for op in chosen for name in op.backends)
            raise KernelError(
                f"{', '.join(names) or 'no op'} has {'no ' if names else 'a '}backend {backend!r}",
                hint=_nearest(backend, has),
            )
    return [op for op in chosen if not backends or any(backend in op.backends for backend in backends)]


def _check_pins() -> None:
    """Refuse names in ALTX_KERNEL that nothing has; an op by itself sees only its own."""
    if not (text := os.environ.get(VARIABLE)):
        return
    everywhere, by_op = parse_pins(text)
    for name, backend in by_op.items():
        if name not in ops():
            raise KernelError(f"{VARIABLE}={text}: there is no op {name!r}", hint=_nearest(name, ops()))
        if backend not in ops()[name].backends:
            raise KernelError(
                f"{VARIABLE}={text}: op {name!r} has no backend {backend!r}",
                hint=_nearest(backend, ops()[name].backends),
            )
    known = dict.fromkeys(backend for op in ops().values() for backend in op.backends)
    if everywhere and everywhere not in known:
        raise KernelError(f"{VARIABLE}={text}: no op has a backend {everywhere!r}", hint=_nearest(everywhere, known))


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"there are {', '.join(known) or 'none'}"
