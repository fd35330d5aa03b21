"""`altx doctor`: what is installed, what works, and what to do about what does not."""

from __future__ import annotations

import difflib
import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from altx_cli import external
from altx_cli.options import Json
from altx_cli.output import DEBUG, emit, table

if TYPE_CHECKING:
    from altx.registry import Registry

VARIABLES = ("ALTX_CACHE", "ALTX_DEBUG", "ALTX_KERNEL", "ALTX_NATIVE", "ALTX_PLUGINS")
"""The environment variables that altx reads."""
FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16",
    "asimd", "fphp", "sve", "sve2", "bf16",
)  # fmt: skip
PACKAGES = (
    "pip", "numpy", "pluggy", "pydantic", "typer", "safetensors", "PyYAML", "rich", "triton", "mamba-ssm",
    "causal-conv1d", "flash-attn", "flash-linear-attention", "fla-core", "torch-geometric", "transformers",
)  # fmt: skip

MEASURE = """
import importlib, json, sys, time
import altx.registry
start = time.perf_counter()
try:
    importlib.import_module(sys.argv[1])
finally:
    seconds = time.perf_counter() - start
    heavy = [name for name in altx.registry.HEAVY if name in sys.modules]
    print("\\n" + json.dumps({"ms": 1000 * seconds, "heavy": heavy}))
"""
"""Imports a plugin's entry module in a process of its own, where nothing else has imported torch."""
SLOW_MS = 50
"""Milliseconds of import above which a plugin is told to be slow; one that imports nothing heavy takes one or two."""
NOTHING: dict[str, Any] = {"ms": None, "heavy": []}
"""What is known of the import of a plugin that cannot be imported."""


def doctor(as_json: Json = False) -> None:
    """Report on torch, native kernels, plugins and environment."""
    report = describe()
    if as_json:
        emit(report)
    else:
        print("\n".join(_text(report)))


def describe() -> dict[str, Any]:
    """The installation as plain data, in which the user's home is `~`: it is made to be shown to others."""
    import altx

    report = {
        "altx": altx.__version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "cpu": _cpu(),
        "packages": _packages(),
        "torch": _torch(),
        "native": _native(),
        "environment": {name: _value(name) for name in sorted(os.environ) if name.startswith("ALTX_")},
        **_plugins(),
        "pins_error": _pins_error(),
        "commands": _commands(),
    }
    return cast(dict[str, Any], _at_home(report))


def _at_home(value: Any) -> Any:
    """The value with the user's home directory shortened in every text."""
    home = os.path.expanduser("~").rstrip("/")
    if isinstance(value, str):
        return re.sub(rf"{re.escape(home)}(?![\w.-])", "~", value) if len(home) > 1 else value
    if isinstance(value, dict):
        return {key: _at_home(each) for key, each in value.items()}
    return [_at_home(each) for each in value] if isinstance(value, list) else value


def _value(name: str) -> str:
    """A variable's value if altx reads it; others may hold anything."""
    if name in VARIABLES:
        return os.environ[name]
    close = difflib.get_close_matches(name, VARIABLES, n=1, cutoff=0.8)
    return f"is set, and not read by altx; {close[0]} is" if close else "is set, and not read by altx"


def _cpu() -> dict[str, Any]:
    """The processor's name, its cores, and the instruction sets that kernels care about, as far as Linux tells."""
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            key, _, text = line.partition(":")
            facts.setdefault(key.strip(), text.strip())
    except OSError:
        pass
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return {
        "name": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "features": [name for name in FEATURES if name in flags],
    }


def _packages() -> dict[str, str]:
    """Versions of what altx needs and of what its kernels can use, as installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


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
    _examine(plugins)
    return {"plugins": [_plugin(plugin) for plugin in plugins.plugins], "plugins_error": None}


def _examine(plugins: Registry) -> None:
    """Ask each component for its config and its promises, and note with its plugin what is wrong with them."""
    from altx.part import examine

    for component in plugins.components():
        reason = examine(component)
        if reason and reason not in component.plugin.errors:
            component.plugin.fail(reason, remedy=component.remedy, status=component.plugin.status)


def _plugin(plugin: Any) -> dict[str, Any]:
    measured = dict(NOTHING) if plugin.status == "disabled" else _measure(plugin.module.partition(":")[0])
    return {
        "plugin": plugin.distribution,
        "version": plugin.version,
        "status": plugin.status,
        "import_ms": measured["ms"],
        "heavy": measured["heavy"],
        "errors": plugin.errors,
        "remedy": plugin.remedy,
        "traceback": plugin.traceback,
    }


def _measure(module: str) -> dict[str, Any]:
    """Milliseconds that a module takes to import, and the slow packages that come with it."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, module], capture_output=True, text=True, timeout=60, check=False
        )
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return dict(NOTHING)


def _commands() -> list[dict[str, Any]]:
    """Commands that other packages add, and why one cannot be used."""
    return [
        {"command": name, "from": list(map(str, points)), "problem": external.problem(name, points)}
        for name, points in external.offers().items()
    ]


def _slow(plugin: dict[str, Any]) -> str:
    """What is wrong with the time that a plugin takes to import: every command that names a component waits for it."""
    if plugin["heavy"]:
        return f"imports {', '.join(plugin['heavy'])}, which slows every command down"
    return "slows every command down" if (plugin["import_ms"] or 0) > SLOW_MS else ""


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
        ["cpu", f"{report['cpu']['name']}, {report['cpu']['cores']} cores; {' '.join(report['cpu']['features'])}"],
        ["packages", ", ".join(f"{name} {version}" for name, version in report["packages"].items())],
        ["torch", torch.get("version") or f"not usable: {torch['error']}; {torch['remedy']}"],
    ]
    if "version" in torch:
        gpus = ", ".join(torch["gpus"]) or (
            f"none seen (CUDA {torch['cuda']})" if torch["cuda"] else "none (CPU build)"
        )
        facts += [["gpu", gpus], ["threads", str(torch["threads"])]]
    facts += _native_facts(report["native"])
    facts += [[name, value if name not in VARIABLES else repr(value)] for name, value in report["environment"].items()]
    lines = [*table(facts, fold=0), ""]
    if error := report["pins_error"]:
        lines += [error["what"], f"  {error['hint']}", ""]
    if error := report["plugins_error"]:
        return [*lines, f"plugins cannot be read: {error['what']}", f"  {error['hint']}"]
    rows = [
        [
            f"{p['plugin']} {p['version']}",
            p["status"],
            "" if p["import_ms"] is None else f"{p['import_ms']:.0f} ms",
            _slow(p),
        ]
        for p in report["plugins"]
    ]
    lines += table(rows, ("plugin", "status", "import", ""), right=(2,))
    for plugin in report["plugins"]:
        for error in plugin["errors"]:
            lines += ["", f"{plugin['plugin']} {plugin['version']}: {error}", f"  {plugin['remedy']}".rstrip()]
        if os.environ.get(DEBUG):
            lines += [f"  {line}" for line in plugin["traceback"].splitlines()]
    if report["commands"]:
        rows = [[c["command"], " and ".join(c["from"]), c["problem"] or "ok"] for c in report["commands"]]
        lines += ["", *table(rows, ("command", "from", "status"))]
    return lines
