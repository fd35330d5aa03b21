"""Forward and backward time of every mixer's layer, beside its floor and the libraries people use, in one run.

    python benchmarks/layers.py [NAME ...] [--dim 768] [--length 1024] [--rounds 7] [--json out.json]

The floor is the time of the layer's own matrix products alone: plain `x @ W` for every weight matrix of the layer; of
routers, the experts' products with the tokens that each gets, or the targets with theirs. The
peers are in `peers/`, one file per plugin, with our weights and inputs; those that are not installed are left out.
Medians over interleaved rounds, so that a drift of the machine's speed meets all alike. A peer that takes over SLOW
seconds is timed once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers import Case, layer
from torch import Tensor, nn

from altx import registry

SLOW = 10.0
OURS, FLOOR = "altx", "its products"
Call = Callable[[], Any]


def products(modules: nn.Module, batch: int, length: int) -> Callable[[], Tensor]:
    """The matrix products that a layer's linear maps must do at the least."""
    weights = [m.weight for m in modules.modules() if hasattr(m, "weight") and isinstance(m, LINEAR)]
    inputs = [torch.randn(batch * length, w.shape[1], requires_grad=True) for w in weights]
    return lambda: torch.stack([(x @ w.T).sum() for x, w in zip(inputs, weights, strict=True)]).sum()


LINEAR: tuple[type, ...] = (nn.Linear,)
try:
    from torch_geometric.nn import Linear as GraphLinear

    LINEAR = (*LINEAR, GraphLinear)
except ImportError:
    pass


def once(call: Call) -> float:
    """Milliseconds of a call."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def medians(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, called in turns."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    slow = set()
    for name, call in calls.items():
        if (first := once(call)) > SLOW * 1e3:
            spent[name].append(first)
            slow.add(name)
    for _ in range(rounds):
        for name in calls.keys() - slow:
            spent[name].append(once(calls[name]))
    return {name: statistics.median(times) for name, times in spent.items()}


def forward(call: Callable[[], Tensor]) -> Call:
    def run() -> None:
        with torch.no_grad():
            call()

    return run


def training(call: Callable[[], Tensor]) -> Call:
    return lambda: call().sum().backward()


def all_cases(dim: int, length: int) -> list[Case]:
    """Those with peers, then the mixers that no file of peers has."""
    found: list[Case] = []
    for file in sorted((Path(__file__).parent / "peers").glob("[a-z]*.py")):
        found += importlib.import_module(f"peers.{file.stem}").cases(dim, length)
    named = {case.name.partition(" ")[0].partition("[")[0] for case in found}
    for component in registry.default().components("mixer"):
        if component.name not in named:
            ours = layer(component.qualified, dim)
            found.append(Case(component.name, lambda x, ours=ours: ours(x).y, ours))  # type: ignore[misc]
    return found


def measured(case: Case, dim: int, length: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of one layer and its peers, and what follows from them."""
    x = torch.randn(1, length, dim, requires_grad=True)
    calls = {OURS: lambda: case.ours(x), FLOOR: case.floor or products(case.modules, 1, length)}
    calls |= {name: lambda peer=peer: peer(x) for name, peer in case.peers.items()}  # type: ignore[misc]
    report: dict[str, Any] = {}
    for mode, wrap in (("forward", forward), ("forward+backward", training)):
        times = medians({name: wrap(call) for name, call in calls.items()}, rounds)
        ratios = {f"x faster than {peer}": times[peer] / times[OURS] for peer in case.peers}
        report[mode] = {"ms": times, "x products": times[OURS] / times[FLOOR], **ratios}
    if case.peers and case.exact:
        with torch.no_grad():
            ours = case.ours(x)
            differences = {name: (peer(x) - ours).abs().max().item() for name, peer in case.peers.items()}
        report["largest difference"] = differences
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases that start with one of these; default: all")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    where = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    print(
        f"width {args.dim}, {args.length} tokens, batch 1, float32, {where['threads']} threads, torch {where['torch']}"
    )
    print(f"{'':<28}{'forward ms':>12}{'x floor':>9}{'fwd+bwd ms':>12}{'x floor':>9}  peers (times as long)")
    report = {}
    for case in all_cases(args.dim, args.length):
        if args.names and not case.name.startswith(tuple(args.names)):
            continue
        found = report[case.name] = measured(case, args.dim, args.length, args.rounds)
        figures = [found[mode] for mode in ("forward", "forward+backward")]
        line = "".join(f"{f['ms'][OURS]:>12.1f}{f['x products']:>9.2f}" for f in figures)
        peers = ", ".join(
            f"{name} {figures[0][f'x faster than {name}']:.1f} / {figures[1][f'x faster than {name}']:.1f}"
            for name in case.peers
        )
        print(f"{case.name:<28}{line}  {peers}", flush=True)
    if args.json:
        settings = {"dim": args.dim, "length": args.length, "rounds": args.rounds}
        args.json.write_text(json.dumps({"settings": settings, "where": where, "layers": report}, indent=2) + "\n")


if __name__ == "__main__":
    main()
