"""Every op on a GPU: is it right there, how fast is it, and what would the hardware allow.

    python benchmarks/gpu.py [OP ...] [--dtype bfloat16] [--rounds 20] [--skip-verify] [--json benchmarks/gpu.json]

First every backend that runs on CUDA is compared with the float64 reference, gradients included. Then the ops'
workloads for CUDA are timed, forward and forward+backward, beside what is installed of fla, mamba-ssm and
causal-conv1d, which are backends too, torch's own chunked form, and causal attention of the same shape.

Two times are given: eager, as a model calls it, and replayed as a CUDA graph, which is the kernels' own. Inputs are
random, and as many copies take turns as it needs to be larger than twice the L2 cache. A floor is what the compulsory
bytes take at the bandwidth of a copy, or the operations at the rate of a matrix product, measured in the same run;
training counts as three times the forward pass. What failed to verify is timed too, and marked.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

# Else fla hands calls on to other libraries.
os.environ["FLA_DISABLE_BACKEND_DISPATCH"] = "1"

import torch
from torch import Tensor

from altx_kernels import ops
from altx_kernels.bench import MODES, Rates, measure_rates
from altx_kernels.examples import Workload
from altx_kernels.op import REFERENCE, Op
from altx_kernels.trees import leaves, map_leaves
from altx_kernels.verify import verify

MODULES = (
    "altx_kernels.causal_conv1d", "altx_kernels.gated_rms_norm", "altx_kernels.linear_recurrence",
    "altx_kernels.delta_rule",
    "altx_mamba.kernels.selective_scan", "altx_mamba.kernels.ssd", "altx_mamba.kernels.mamba3",
)  # fmt: skip
PACKAGES = ("torch", "triton", "altx", "altx-mamba", "fla-core", "mamba-ssm", "causal-conv1d")
Arguments = dict[str, Any]


def found() -> dict[str, str]:
    """Versions of what is compared, by package."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def verified(op: Op[Any]) -> dict[str, str]:
    """What is wrong with each backend that runs on CUDA, "" if nothing, by name."""
    wrong: dict[str, str] = {}
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for finding in verify(op, [name for name in op.backends if name != REFERENCE], dtypes=dtypes, devices=["cuda"]):
        print(f"  {finding} ({finding.calls} calls, error {finding.error:.2g})", flush=True)
        if finding.calls:
            wrong[finding.backend] = "; ".join(
                filter(None, [wrong.get(finding.backend, ""), *map(str, finding.failures)])
            )
    return wrong


def copies(workload: Workload, dtype: torch.dtype) -> list[Arguments]:
    """The workload's arguments, so many times that what one call left in the L2 cache is gone at its next turn."""
    device = torch.device("cuda")
    first = workload.arguments(device, dtype)
    size = sum(value.nbytes for value in leaves(dict(first)).values())
    number = 1 + 2 * torch.cuda.get_device_properties(0).L2_cache_size // max(size, 1)

    def another(name: str, value: Tensor) -> Tensor:
        return value.detach().clone().requires_grad_(value.requires_grad)

    return [first] + [map_leaves(another, dict(first)) for _ in range(min(number, 64))]


def call(fn: Callable[..., Any], mode: str) -> Callable[[Arguments], None]:
    """One call of a backend, with gradients of all that requires them if the mode says so."""

    def forward(arguments: Arguments) -> None:
        with torch.no_grad():
            fn(**arguments)

    def both(arguments: Arguments) -> None:
        outputs = [o for o in leaves(fn(**arguments), "output").values() if o.requires_grad]
        wanted = [value for value in leaves(dict(arguments)).values() if value.requires_grad]
        torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs], allow_unused=True)

    return forward if mode == "forward" else both


def timed(run: Callable[[], None], calls: int, rounds: int) -> float:
    """Median milliseconds of one of the `calls` that `run` makes."""
    times: list[float] = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def milliseconds(
    fn: Callable[[Arguments], None], turns: list[Arguments], rounds: int
) -> tuple[float, float | None, str]:
    """Eager, as a CUDA graph (None if it cannot be captured), and why not."""

    def all_turns() -> None:
        for arguments in turns:
            fn(arguments)

    for _ in range(3):
        all_turns()
    torch.cuda.synchronize()
    eager = timed(all_turns, len(turns), rounds)
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            all_turns()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_turns()
    except Exception as error:
        torch.cuda.synchronize()
        return eager, None, f"no graph: {str(error).splitlines()[0]}"
    return eager, timed(graph.replay, len(turns), rounds), ""


def attention(q: Tensor, k: Tensor, v: Tensor, **unused: Any) -> Tensor:
    """Causal attention on the same q, k and v: what the recurrence stands in for."""
    heads = v.shape[2] // q.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q.repeat_interleave(heads, 2), k.repeat_interleave(heads, 2), v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def rows(op: Op[Any], dtype: torch.dtype, rates: Rates, rounds: int, wrong: dict[str, str]) -> list[dict[str, Any]]:
    """One row for each workload, mode and backend."""
    made = []
    for workload in op.workloads():
        if workload.device not in ("", "cuda"):
            continue
        turns = copies(workload, dtype)
        contenders = {n: b.fn for n, b in op.backends.items() if n != REFERENCE and b.reason(**turns[0]) is None}
        if op.name == "linear-recurrence":
            contenders["attention"] = attention
        costs = {"bytes": workload.bytes(dtype) / rates.bytes, "flops": workload.flops / rates.flops}
        bound = max(costs, key=lambda name: costs[name])
        for mode, factor in MODES.items():
            for name, fn in contenders.items():
                row: dict[str, Any] = {"op": op.name, "workload": workload.label, "mode": mode, "backend": name}
                row |= {"floor_ms": factor * costs[bound] * 1e3, "bound": bound, "wrong": wrong.get(name, "")}
                try:
                    eager, graph, note = milliseconds(call(fn, mode), turns, rounds)
                    best = graph or eager
                    row |= {"eager_ms": eager, "graph_ms": graph, "note": note, "of_floor": row["floor_ms"] / best}
                    row["gigabytes_per_second"] = factor * workload.bytes(dtype) / best / 1e6
                except Exception as error:
                    row["note"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                    torch.cuda.empty_cache()
                made.append(row)
                print(line(row), flush=True)
        del turns
        torch.cuda.empty_cache()
    return made


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    numbers = [row.get(name) for name in ("eager_ms", "graph_ms", "floor_ms")]
    cells = [f"{x:10.4f}" if x is not None else f"{'-':>10}" for x in numbers]
    share = f"{row['of_floor']:6.0%}" if "of_floor" in row else f"{'-':>6}"
    notes = "  WRONG" * bool(row["wrong"]) + f"  {row.get('note', '')}"
    what = f"{row['workload'][:46]:46} {row['mode'][7:] or 'forward':10} {row['backend']:14}"
    return f"{what} {' '.join(cells)} {share}{notes}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", nargs="*", help="names of ops; default: all")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--skip-verify", action="store_true")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("gpu.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device, and nothing to measure without one", file=sys.stderr)
        return 2
    for module in MODULES:
        import_module(module)
    chosen = {name: op for name, op in ops().items() if not options.op or name in options.op}
    if missing := set(options.op) - set(chosen):
        parser.error(f"no op {missing.pop()!r}; there are {', '.join(ops())}")
    dtype = getattr(torch, options.dtype)
    rates = measure_rates(torch.device("cuda"), dtype)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "python": platform.python_version(), "packages": found(),
        "cuda": torch.version.cuda, "dtype": options.dtype, "bytes_per_second": rates.bytes,
        "flops_per_second": rates.flops, "rows": [],
    }  # fmt: skip
    print(f"{report['device']}: copies {rates.bytes / 1e12:.2f} TB/s, products {rates.flops / 1e12:.0f} TFLOP/s")
    wrong: dict[str, dict[str, str]] = {}
    if not options.skip_verify:
        for name, op in chosen.items():
            print(f"{name}: compared with the float64 reference")
            wrong[name] = verified(op)
    print(f"{'workload':46} {'mode':10} {'backend':14} {'eager ms':>10} {'graph ms':>10} {'floor ms':>10} {'floor':>6}")
    for name, op in chosen.items():
        print(name)
        report["rows"] += rows(op, dtype, rates, options.rounds, wrong.get(name, {}))
        # After every op, so that what was measured is not lost to what fails later.
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(why for found in wrong.values() for why in found.values()))


if __name__ == "__main__":
    sys.exit(main())
