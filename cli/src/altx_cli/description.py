"""What a model is made of and what it costs: as plain data, and as text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from altx_cli.output import count, plural, size, table

if TYPE_CHECKING:
    from altx.layer import Layer
    from altx.measure import Costs
    from altx.model import Model
    from altx.resolve import Blueprint, Branch

LARGE = 500_000_000
"""Parameters above which a model is not given weights only to learn more about it."""

HORIZONS = {"1k": 1024, "64k": 65536}
"""Sequence lengths for which the state's size is told."""


def describe(blueprint: Blueprint) -> dict[str, Any]:
    """What the model is made of and what it costs, as plain data."""
    from altx import recipe
    from altx.compose import build
    from altx.measure import costs, num_parameters

    model = build(blueprint, device="meta")
    try:
        total = costs(model)
    except RuntimeError:
        # Some part looks at values, which tensors on meta do not have.
        if num_parameters(model) <= LARGE:
            model = build(blueprint, seed=0)
            total = costs(model)
        else:
            total = _measured(costs, model)
    streams = model.capabilities.streaming != "none"
    return {
        "parameters": total.parameters,
        "dim": blueprint.config.dim,
        "layers": len(blueprint.blocks),
        "causal": blueprint.config.causal,
        "streaming": model.capabilities.streaming,
        "growth": model.capabilities.growth,
        "plugins": _plugins(blueprint),
        "table": _rows(model, blueprint),
        "state_bytes": total.state_bytes,
        "state_bytes_per_token": total.state_bytes_per_token,
        "state_bytes_at": {n: model.init_state(1, capacity=n).bytes() for n in HORIZONS.values()} if streams else None,
        "flops_per_token": total.flops_per_token,
        "notes": list(blueprint.notes),
        "config": recipe.dump(blueprint.config),
    }


def _measured(measure: Callable[..., Costs], module: Layer | Model, *args: Any) -> Costs:
    """Costs of a model or a layer; where it cannot be run, its FLOPs are NaN."""
    from altx.measure import Costs, num_parameters, state_growth

    try:
        return measure(module, *args)
    except RuntimeError:
        return Costs(num_parameters(module), *state_growth(module), math.nan)


def _rows(model: Model, blueprint: Blueprint) -> list[dict[str, Any]]:
    """Costs of every sublayer; blocks that are alike share their rows."""
    from altx.measure import branch_layers, layer_costs

    measured: dict[Any, dict[str, Any]] = {}
    shared: dict[str, Any] = {}
    length = min(64, model.capabilities.max_len or 64)
    blocks: list[list[dict[str, Any]]] = [[] for _ in blueprint.blocks]
    for block, sublayer, layer in branch_layers(model, blueprint):
        branch = blueprint.blocks[block][sublayer]
        shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
        key = (_identity(branch), shapes)
        if key not in measured:
            cost = _measured(layer_costs, layer, blueprint.config.dim, length, shared)
            measured[key] = {
                "sublayer": sublayer,
                "component": label(branch),
                "adapters": [*branch.adapters, *(["bidirectional"] if branch.turned else [])],
                "parameters": cost.parameters,
                "state_bytes": cost.state_bytes,
                "state_bytes_per_token": cost.state_bytes_per_token,
                "flops_per_token": cost.flops_per_token,
            }
        blocks[block].append(measured[key] | {"sublayer": sublayer})
    alike: list[tuple[list[dict[str, Any]], list[int]]] = []
    for index, rows in enumerate(blocks):
        known = next((indices for other, indices in alike if other == rows), None)
        if known is None:
            alike.append((rows, [index]))
        else:
            known.append(index)
    return [{"blocks": indices, **row} for rows, indices in alike for row in rows]


def _identity(branch: Branch) -> tuple[Any, ...]:
    """What a branch is, wherever it stands."""
    parts = [part for part in (branch.part, branch.memory) if part]
    return (
        *((part.component.qualified, part.config.model_dump_json()) for part in parts),
        branch.attach, branch.adapters, branch.turned, branch.depths, branch.kv_sharing,
        tuple(map(_identity, branch.targets)),
    )  # fmt: skip


def label(branch: Branch) -> str:
    """A branch in a few words: `mamba + ntm (residual)`, `topk over 8 x swiglu`, `hash over 3 depths of attention`."""
    text = branch.part.component.name
    if branch.memory:
        text += f" + {branch.memory.component.name} ({branch.attach})"
    if branch.depths:
        text += f" over {plural(branch.depths, 'depth')} of {', '.join(map(label, branch.targets))}"
        text += " with shared keys and values" * branch.kv_sharing
    elif branch.targets:
        counts: dict[str, int] = {}
        for target in map(label, branch.targets):
            counts[target] = counts.get(target, 0) + 1
        text += " over " + ", ".join(f"{n} x {target}" for target, n in counts.items())
    return text


def _plugins(blueprint: Blueprint) -> dict[str, str]:
    """Versions of the packages that the parts came from."""

    def walk(branch: Branch) -> list[Any]:
        own = [part.component.plugin for part in (branch.part, branch.memory) if part]
        return own + [plugin for target in branch.targets for plugin in walk(target)]

    found = [plugin for block in blueprint.blocks for branch in block for plugin in walk(branch)]
    found += [blueprint.memory.component.plugin] if blueprint.memory else []
    return dict(sorted((plugin.distribution, plugin.version) for plugin in found))


def summary(report: dict[str, Any]) -> list[str]:
    """The model and its costs, for a person."""
    config = report["config"]
    vocab = f" over {config['input']['vocab']} tokens" if config["input"]["kind"] == "tokens" else ""
    title = (
        f"{'causal' if report['causal'] else 'bidirectional'} {config['head']['kind'].replace('-', ' ')}{vocab}: "
        f"{count(report['parameters'])} parameters, dim {report['dim']}, {plural(report['layers'], 'layer')}"
    )
    rows = [_row(row) for row in report["table"]]
    own = {
        key: sum(row[key] * len(row["blocks"]) for row in report["table"]) for key in ("parameters", "flops_per_token")
    }
    rest = [
        f"{report['parameters'] - own['parameters']:,}",
        "",
        count(report["flops_per_token"] - own["flops_per_token"]),
    ]
    memory = ", memory" if "stack_memory" in config else ""
    rows += [["", f"embedding, norms{memory} and head", *rest]]
    rows += [["", "total", f"{report['parameters']:,}", "", count(report["flops_per_token"])]]
    header = ("block", "component", "parameters", "state", "FLOPs/token")
    lines = [title, "", *table(rows, header, right=(2, 3, 4)), "", *_state(report)]
    lines += [f"plugins  {', '.join(f'{name} {version}' for name, version in report['plugins'].items())}"]
    return lines + [f"note     {note}" for note in report["notes"]]


def _blocks(indices: list[int]) -> str:
    """`0`, `0-3 each`, `0,2,4 each`, or how many they are."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    text = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return (text if len(text) <= 16 else f"{len(indices)} blocks") + " each" * (len(indices) > 1)


def _row(row: dict[str, Any]) -> list[str]:
    wrapped = {"pad": "padded", "replay": "prefix replay", "bidirectional": "both directions"}
    adapters = "".join(f" [{wrapped.get(name, name)}]" for name in row["adapters"])
    return [
        _blocks(row["blocks"]) if row["sublayer"] == 0 else "",
        row["component"] + adapters,
        f"{row['parameters']:,}",
        _bytes(row["state_bytes"], row["state_bytes_per_token"]),
        count(row["flops_per_token"]),
    ]


def _bytes(fixed: int | None, growth: float | None) -> str:
    """A state's size in a few words."""
    if fixed is None:
        return "no streaming"
    parts = [size(fixed)] if fixed or not growth else []
    return " + ".join(parts + ([f"{size(growth)}/token"] if growth else [])) if fixed or growth else "-"


def _state(report: dict[str, Any]) -> list[str]:
    """The state's size, and how it grows."""
    fixed, growth, sizes = report["state_bytes"], report["state_bytes_per_token"], report["state_bytes_at"]
    if fixed is None:
        return ["state    none: the model looks at whole sequences and does not stream"]
    if not any(sizes.values()):
        return ["state    none: nothing is carried from token to token"]
    if {fixed} == set(sizes.values()):
        return [f"state    {size(fixed)} per sequence, constant"]
    grows = "grows up to its window" if report["growth"] == "window" else f"grows by {size(growth)} per token"
    at = ", ".join(f"{size(sizes[n])} at {name} tokens" for name, n in HORIZONS.items())
    return [f"state    {f'{size(fixed)} per sequence, ' if fixed else ''}{grows}: {at}"]
