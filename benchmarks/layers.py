"""Forward and backward time of each installed mixer's layer, side by side in one run, with floors.

    python benchmarks/layers.py [--dim 768] [--length 1024] [--batch 1] [--json out.json]

The floor is the time of the layer's own matrix products alone: plain `x @ W` for every weight matrix of the layer,
measured in the same run. Medians over interleaved rounds, so that a drift of the machine's speed meets all alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from altx import BuildContext, registry
from altx.compose import build_branch
from altx.config import ModelConfig, validate
from altx.context import Context
from altx.registry import Component
from altx.resolve import config_type, resolve


def mixer(component: Component, dim: int) -> tuple[nn.Module, Context]:
    """One layer of a mixer with its default settings, and the context it is for: causal, if it can be."""
    causal = component.load("capabilities")(config_type(component)()).causal
    data = {"dim": dim, "causal": causal, "blocks": [{"sublayers": [{"mixer": component.qualified}]}]}
    blueprint = resolve(validate(ModelConfig, data), registry.default())
    return build_branch(blueprint.blocks[0][0], BuildContext(dim=dim)), Context(causal=causal)


def products(layer: nn.Module, batch: int, length: int) -> Callable[[], Tensor]:
    """The matrix products that a layer's linear maps must do at the least."""
    weights = [m.weight for m in layer.modules() if isinstance(m, nn.Linear)]
    inputs = [torch.randn(batch * length, w.shape[1], requires_grad=True) for w in weights]
    return lambda: torch.stack([(x @ w.T).sum() for x, w in zip(inputs, weights, strict=True)]).sum()


def timed(call: Callable[[], Tensor], backward: bool) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    if backward:
        call().backward()
    else:
        with torch.no_grad():
            call()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    calls: dict[str, Callable[[], Tensor]] = {}
    x = torch.randn(args.batch, args.length, args.dim, requires_grad=True)
    for component in registry.default().components("mixer"):
        layer, ctx = mixer(component, args.dim)
        calls[component.name] = lambda layer=layer, ctx=ctx: layer(x, ctx).y.sum()  # type: ignore[misc]
        calls[f"{component.name}: its products"] = products(layer, args.batch, args.length)
    times: dict[str, dict[bool, list[float]]] = {name: {False: [], True: []} for name in calls}
    for round_ in range(args.rounds + 1):
        for name, call in calls.items():
            for backward in (False, True):
                spent = timed(call, backward)
                if round_:  # the first warms up
                    times[name][backward].append(spent)
    where = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    shape = f"dim {args.dim}, {args.length} tokens, batch {args.batch}"
    print(f"{shape}, float32, {where['threads']} threads, torch {where['torch']}")
    print(f"{'':<28}{'forward ms':>12}{'x floor':>9}{'fwd+bwd ms':>12}{'x floor':>9}")
    report = {}
    for name, spent in times.items():
        floor = times[name if name.endswith("products") else f"{name}: its products"]
        figures = [statistics.median(spent[backward]) for backward in (False, True)]
        ratios = [statistics.median(a / b for a, b in zip(spent[k], floor[k], strict=True)) for k in (False, True)]
        print(f"{name:<28}{figures[0]:>12.1f}{ratios[0]:>9.2f}{figures[1]:>12.1f}{ratios[1]:>9.2f}")
        report[name] = {"forward_ms": figures[0], "forward_backward_ms": figures[1], "over_floor": ratios}
    if args.json:
        args.json.write_text(
            json.dumps({"settings": vars(args) | {"json": None}, "where": where, "layers": report}, indent=2)
        )


if __name__ == "__main__":
    main()
