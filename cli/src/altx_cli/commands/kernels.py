"""`altx kernels`: which backends serve each op here, whether they are right, and how fast they are."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from altx_cli import kernel_text
from altx_cli.main import Command
from altx_cli.options import Json
from altx_cli.output import emit, to_json

if TYPE_CHECKING:
    import torch

    from altx_kernels import Op
    from altx_kernels.bench import Timing
    from altx_kernels.verify import Finding

DTYPES = ("float64", "float32", "bfloat16", "float16")
Ops = Annotated[list[str] | None, typer.Argument(metavar="[OP]...", help="Names of ops; all if none is given.")]
Backends = Annotated[list[str] | None, typer.Option("--backend", metavar="NAME", help="Only this one. Repeatable.")]
Dtypes = Annotated[list[str] | None, typer.Option("--dtype", metavar="NAME", help=f"{', '.join(DTYPES)}. Repeatable.")]
Devices = Annotated[list[str] | None, typer.Option("--device", metavar="NAME", help="cpu or cuda. Repeatable.")]

kernels = typer.Typer(
    help="List, verify and time the numerical kernels.",
    rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True,
)  # fmt: skip


@kernels.command("list", cls=Command)
def list_ops(as_json: Json = False) -> None:
    """List the ops and the backends that serve them here."""
    from altx_cli.ops import load_ops

    known, problems = load_ops()
    report = {
        "pin": os.environ.get("ALTX_KERNEL") or None,
        "ops": [_describe(known[name]) for name in sorted(known)],
        "problems": problems,
    }
    if as_json:
        emit(report)
    else:
        print("\n".join(kernel_text.listing(report)))


@kernels.command("verify", cls=Command)
def verify_ops(
    names: Ops = None, backend: Backends = None, dtype: Dtypes = None, device: Devices = None, as_json: Json = False
) -> None:
    """Compare every backend with its reference.

    In every dtype and memory layout, with and without gradients; the reference runs in float64.
    Exit status 1 if one of them is wrong, or if nothing could be run.
    """
    dtypes = _dtypes(dtype or DTYPES)
    devices = _devices(device)

    from altx_cli.ops import load_ops, select
    from altx_kernels.verify import verify

    known, problems = load_ops()
    chosen = select(known, names or (), backend or ())
    found: list[Finding] = []
    for op in chosen:
        own = [name for name in backend if name in op.backends] if backend else None
        if not as_json:
            print(op.name, flush=True)
        results = list(verify(op, own, dtypes=dtypes, devices=devices))
        found += results
        if not as_json:
            print("\n".join([*(f"  {line}" for line in kernel_text.findings(results)), ""]), flush=True)
    totals = Counter(finding.status for finding in found)
    if as_json:
        results_json = [asdict(finding) | {"status": finding.status} for finding in found]
        passed = bool(totals["passed"]) and not totals["failed"]
        emit({"passed": passed, "results": results_json, "problems": problems})
    else:
        print("\n".join([*kernel_text.problems(problems), kernel_text.verdict(found, totals)]))
    if totals["failed"] or not totals["passed"]:
        raise typer.Exit(1)


@kernels.command("bench", cls=Command)
def bench_ops(
    names: Ops = None,
    backend: Backends = None,
    dtype: Dtypes = None,
    device: Devices = None,
    seconds: Annotated[float, typer.Option(metavar="N", min=0, help="Time for everything together.")] = 60.0,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads on the CPU; default: as many as torch uses.")
    ] = None,
    include_reference: Annotated[bool, typer.Option("--include-reference", help="Time the slow loops too.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the JSON object to a file too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time the backends side by side.

    Calls take turns. Beside them stand floors: what the machine reaches at copies and matrix products in the same run.
    """
    dtypes = _dtypes(dtype or ("float32",))
    devices = _devices(device)

    import torch

    from altx.errors import AltxError
    from altx_cli.ops import load_ops, select
    from altx_kernels.bench import bench

    if output and (output.is_dir() or not output.parent.is_dir()):
        raise AltxError(f"{output} cannot be written", hint="name a file in a directory that exists")
    known, problems = load_ops()
    chosen = select(known, names or (), backend or ())
    machine = {
        "torch": torch.__version__,
        "threads": threads or torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    timings = bench(
        chosen, backend, dtypes=dtypes, devices=devices, seconds=seconds, threads=threads,
        include_reference=include_reference,
    )  # fmt: skip
    found: list[Timing] = []
    for _, case in groupby(timings, key=lambda timing: (timing.op, timing.workload, timing.device, timing.dtype)):
        rows = list(case)
        found += rows
        if not as_json:
            print("\n".join([*kernel_text.case(rows), ""]), flush=True)
    report = {"machine": machine, "timings": [asdict(timing) for timing in found], "problems": problems}
    if output:
        output.write_text(to_json(report) + "\n", encoding="utf-8")
    if as_json:
        emit(report)
    else:
        print(
            "\n".join(
                [
                    *kernel_text.problems(problems),
                    *kernel_text.legend(found, machine),
                    *[f"wrote {output}"] * bool(output),
                ]
            )
        )


def _dtypes(names: Iterable[str]) -> list[torch.dtype]:
    names = list(names)
    if unknown := [name for name in names if name not in DTYPES]:
        raise typer.BadParameter(f"there is no dtype {unknown[0]!r} here; write one of {', '.join(DTYPES)}")
    import torch

    return [getattr(torch, name) for name in names]


def _devices(names: list[str] | None) -> list[str] | None:
    if unknown := [name for name in names or () if name not in ("cpu", "cuda")]:
        raise typer.BadParameter(f"there is no device {unknown[0]!r} here; write cpu or cuda")
    from altx.errors import AltxError
    from altx_kernels.verify import present_devices

    if missing := [name for name in names or () if name not in present_devices()]:
        raise AltxError(f"this machine has no {missing[0]} device", hint="altx doctor says what torch sees")
    return names


def _describe(op: Op[Any]) -> dict[str, Any]:
    """An op, its backends on this machine, and the choices made for one of its examples, as plain data."""
    from altx_cli.ops import origin
    from altx_kernels.verify import present_devices

    package, version = origin(op)
    return {
        "op": op.name,
        "summary": op.summary,
        "package": package,
        "version": version,
        "backends": [{"backend": name, "absent": backend.absent()} for name, backend in op.backends.items()],
        "choices": [
            {"device": device, "mode": mode} | _choice(op, device, mode == "training")
            for device in present_devices()
            for mode in ("inference", "training")
        ],
    }


def _choice(op: Op[Any], device: str, gradients: bool) -> dict[str, Any]:
    """The backend that one of the op's examples gets in float32, and why not another."""
    import torch

    from altx.registry import describe
    from altx_kernels import KernelError
    from altx_kernels.trees import map_leaves

    def place(name: str, value: torch.Tensor) -> torch.Tensor:
        moved = value.detach().to(device, torch.float32 if value.is_floating_point() else value.dtype)
        return moved.requires_grad_(gradients and value.requires_grad)

    try:
        if (example := next(iter(op.examples()), None)) is None:
            return _chosen(problem="the op has no examples to try")
        with torch.set_grad_enabled(gradients):
            choice = op.choose(**map_leaves(place, dict(example.arguments)))
        return _chosen(choice.backend, choice.pin, choice.refused)
    except KernelError as error:
        return _chosen(problem=error.what)
    except Exception as error:
        return _chosen(problem=describe(error))


def _chosen(
    backend: str | None = None, pin: str = "", refused: Mapping[str, str] = MappingProxyType({}), problem: str = ""
) -> dict[str, Any]:
    return {"backend": backend, "pin": pin or None, "refused": dict(refused), "problem": problem or None}
