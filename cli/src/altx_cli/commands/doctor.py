"""`altx doctor`: what is installed, what works, and what to do about what does not."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from typing import Any

from altx_cli import external
from altx_cli.options import Json
from altx_cli.output import emit, table

MEASURE = """
import importlib, json, sys, time
import altx.registry
start = time.perf_counter()
try:
    importlib.import_module(sys.argv[1])
finally:
    seconds = time.perf_counter() - start
    print("\\n" + json.dumps({"ms": 1000 * seconds, "torch": "torch" in sys.modules}))
"""
"""Imports a plugin's entry module in a process of its own, where nothing else has imported torch."""


def doctor(as_json: Json = False) -> None:
    """Report on torch, native kernels, plugins and environment."""
    report = describe()
    if as_json:
        emit(report)
    else:
        print("\n".join(_text(report)))


def describe() -> dict[str, Any]:
    """The installation as plain data."""
    import altx

    return {
        "altx": altx.__version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "torch": _torch(),
        "native": _native(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("ALTX_")},
        **_plugins(),
        "pins_error": _pins_error(),
        "commands": _commands(),
    }


def _torch() -> dict[str, Any]:
    from altx.registry import describe as in_one_line

    try:
        import torch
    except (Exception, SystemExit) as error:
        return {"error": in_one_line(error), "remedy": "install it as https://pytorch.org/get-started says"}
    cuda = torch.cuda.is_available()
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "threads": torch.get_num_threads(),
    }


def _native() -> dict[str, Any]:
    """Whether kernels in C run here, tried with a small one, and what they are made with."""
    from altx.registry import describe as in_one_line

    try:
        from altx_kernels.native import state
    except (Exception, SystemExit) as error:  # they need torch
        return {"problem": in_one_line(error), "compiler": None, "cache": None}
    return state.describe()


def _pins_error() -> dict[str, str] | None:
    """What is wrong with ALTX_KERNEL, or None; without torch that is not known."""
    if not os.environ.get("ALTX_KERNEL") or "torch" not in sys.modules:
        return None
    from altx.errors import AltxError
    from altx_cli.ops import load_ops
    from altx_kernels import KernelError

    try:
        load_ops()
    except KernelError as error:
        return {"what": error.what, "hint": error.hint}
    except AltxError:
        pass  # of the plugins, which are reported below
    return None


def _plugins() -> dict[str, Any]:
    from altx import registry
    from altx.errors import AltxError

    try:
        plugins = registry.default()
    except AltxError as error:
        return {"plugins": [], "plugins_error": {"what": error.what, "hint": error.hint}}
    plugins.load_all()
    return {"plugins": [_plugin(plugin) for plugin in plugins.plugins], "plugins_error": None}


def _plugin(plugin: Any) -> dict[str, Any]:
    measured = {"ms": None, "torch": None} if plugin.status == "disabled" else _measure(plugin.module.partition(":")[0])
    remedy = {
        "broken": f"pip install --force-reinstall {plugin.distribution}, or leave it out with ALTX_PLUGINS",
        "disabled": f"add {plugin.name} to ALTX_PLUGINS",
    }
    return {
        "plugin": plugin.distribution,
        "version": plugin.version,
        "status": plugin.status,
        "import_ms": measured["ms"],
        "imports_torch": measured["torch"],
        "errors": plugin.errors,
        "remedy": remedy.get(plugin.status, ""),
    }


def _measure(module: str) -> dict[str, Any]:
    """Milliseconds that a module takes to import, and whether it brings torch."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, module], capture_output=True, text=True, timeout=60, check=False
        )
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return {"ms": None, "torch": None}


def _commands() -> list[dict[str, Any]]:
    """Commands that other packages add, and why one cannot be used."""
    return [
        {"command": name, "from": list(map(external.owner, points)), "problem": external.problem(name, points)}
        for name, points in external.offers().items()
    ]


def _native_facts(native: dict[str, Any]) -> list[list[str]]:
    if native["problem"]:
        rows = [["native", f"not usable, kernels run in PyTorch: {native['problem']}"]]
    else:
        threads = "1 thread" if native["threads"] == 1 else f"{native['threads']} threads"
        rows = [["native", f"{native['variant']}, {threads}"]]
    if compiler := native["compiler"]:
        rows += [["compiler", f"{compiler['command']} ({compiler['version']})"]]
    else:
        rows += [["compiler", "none"]]
    if cache := native["cache"]:
        if "problem" in cache:
            rows += [["cache", f"refused: {cache['problem']}; {cache['remedy']}"]]
        elif not native["problem"] and not native["library"]:
            rows += [["cache", f"{cache['path'] or 'none'}: cannot be written to; every process compiles anew"]]
        else:
            rows += [["cache", f"{cache['path']}: {cache['libraries']} compiled, {cache['bytes'] / 1e6:.1f} MB"]]
    return rows


def _text(report: dict[str, Any]) -> list[str]:
    torch = report["torch"]
    facts = [
        ["altx", report["altx"]],
        ["python", f"{report['python']} ({report['executable']})"],
        ["platform", report["platform"]],
        ["torch", torch.get("version") or f"not usable: {torch['error']}; {torch['remedy']}"],
    ]
    if "version" in torch:
        gpus = ", ".join(torch["gpus"]) or (
            f"none seen (CUDA {torch['cuda']})" if torch["cuda"] else "none (CPU build)"
        )
        facts += [["gpu", gpus], ["threads", str(torch["threads"])]]
    facts += _native_facts(report["native"])
    facts += [[name, repr(value)] for name, value in report["environment"].items()]
    lines = [*table(facts), ""]
    if error := report["pins_error"]:
        lines += [error["what"], f"  {error['hint']}", ""]
    if error := report["plugins_error"]:
        return [*lines, f"plugins cannot be read: {error['what']}", f"  {error['hint']}"]
    rows = [
        [
            f"{p['plugin']} {p['version']}",
            p["status"],
            "" if p["import_ms"] is None else f"{p['import_ms']:.0f} ms",
            "imports torch, which slows every command down" if p["imports_torch"] else "",
        ]
        for p in report["plugins"]
    ]
    lines += table(rows, ("plugin", "status", "import", ""), right=(2,))
    for plugin in report["plugins"]:
        for error in plugin["errors"]:
            lines += ["", f"{plugin['plugin']} {plugin['version']}: {error}", f"  {plugin['remedy']}".rstrip()]
    if report["commands"]:
        rows = [[c["command"], " and ".join(c["from"]), c["problem"] or "ok"] for c in report["commands"]]
        lines += ["", *table(rows, ("command", "from", "status"))]
    return lines
