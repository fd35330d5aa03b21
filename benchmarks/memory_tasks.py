"""What a memory lets a model learn: models with one, trained beside the same backbone without it.

    python benchmarks/memory_tasks.py [copy] [recall] [needle] [--models NAME ...] [--seeds 0 1 2] [--steps N]
        [--json FILE]

--json adds to what is in the file; results of the same task, model and seed take the place of those there.

copy: 8-bit vectors are repeated after a delimiter, lengths 1 to 20; wrong bits of a sequence (Graves et al. 2014, 4.1).
The setting is that of the paper and of pytorch-ntm: memory 128 x 20, one head that reads and one that writes, an LSTM
of 100 units, RMSProp with momentum 0.9 and rate 1e-4, gradients clipped to +-10, one sequence a step. The control is
three layers of LSTM, 256 wide (the paper's width).

recall: 8 pairs of a key and a value, then every key again in another order; the part of the values that follow rightly.
Two blocks of LSTM and feed-forward, 64 wide, the second with a memory attached, that of the DNC or the Neural State
Machine, once token by token and once as its defaults are; the control, 80 wide, has more parameters and no memory.

needle: 4 keys, each with its value behind it, somewhere in filler, 16 tokens of filler more, and the 4 keys in another
order; the part of the values that follow rightly. Two blocks of attention and feed-forward, 32 wide, the first over 2
tokens and the second over 16: a question sees no needle. The second has a Titans memory attached; the control, 40 wide,
has more parameters and no memory. Both are trained with up to F tokens of filler around the needles, F growing to 120
in the first 500 steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altx import registry
from altx.compose import compose
from altx.layer import StepInfo
from altx.model import Model

PLUGINS = registry.Registry(
    [*metadata.entry_points(group=registry.GROUP), metadata.EntryPoint("lstm", "lstm", registry.GROUP)]
)
BITS = 8
PAIRS, KEYS = 8, 32
NEEDLES, WORDS, FILLER, SIGHT = 4, 8, 16, 16
"""Needles of a sequence; keys, and as many values; fillers; how many tokens back the attention of `needle` sees."""
LONGEST = 120


def copy_batch(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bits, a delimiter, silence (B, 2 L + 1, 9), and the bits (B, L, 8) that are due in the silence."""
    bits = torch.randint(2, (batch, length, BITS), generator=generator).float()
    x = torch.zeros(batch, 2 * length + 1, BITS + 1)
    x[:, :length, :BITS], x[:, length, BITS] = bits, 1
    return x, bits


def wrong_bits(model: Model, x: Tensor, bits: Tensor) -> Tensor:
    """(B,) bits of each sequence that are on the wrong side of one half."""
    with torch.no_grad():
        y = model(x).y[:, -bits.shape[1] :]
    return ((y > 0) != (bits > 0.5)).sum((1, 2)).float()


def copy_model(name: str, seed: int) -> Model:
    """`ntm`, or the control `lstm`."""
    ends = {"input": {"kind": "vectors", "size": BITS + 1}, "head": {"kind": "vectors", "size": BITS}}
    plain = {"mixer": "lstm", "feed_forward": "none", "norm": "none", "final_norm": "none", **ends}
    if name == "lstm":
        return compose({**plain, "dim": 256, "layers": 3}, seed=seed, plugins=PLUGINS)
    memory = {"name": "ntm", "slots": 128, "width": 20}
    return compose(
        {**plain, "dim": 100, "layers": 1, "memory": memory, "attach": "controller"}, seed=seed, plugins=PLUGINS
    )


def copy(name: str, seed: int, steps: int, every: int = 500) -> dict[str, Any]:
    """Train on the copy task; steps are sequences."""
    model, draw = copy_model(name, seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-4, alpha=0.95, momentum=0.9)
    held_out = [copy_batch(16, length, torch.Generator().manual_seed(1000 + length)) for length in range(1, 21)]
    curve: list[tuple[int, float]] = []
    start = time.perf_counter()
    for step in range(1, steps + 1):
        x, bits = copy_batch(1, int(torch.randint(1, 21, (1,), generator=draw)), draw)
        loss = F.binary_cross_entropy_with_logits(model(x).y[:, -bits.shape[1] :], bits)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(model.parameters(), 10)
        optimizer.step()
        if step % every == 0 or step == steps:
            wrong = torch.cat([wrong_bits(model, *each) for each in held_out]).mean().item()
            curve.append((step, round(wrong, 3)))
            print(
                f"  {name} seed {seed} {step}: {wrong:.3f} wrong bits, {time.perf_counter() - start:.0f} s", flush=True
            )
    lengths = {}
    for length in (10, 20, 30, 40, 50, 80, 120):
        batch = copy_batch(50, length, torch.Generator().manual_seed(2000 + length))
        lengths[str(length)] = round(wrong_bits(model, *batch).mean().item(), 3)
    return {
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "first below 0.1": next((s for s, wrong in curve if wrong < 0.1), None),
        "wrong bits": curve,
        "wrong bits at length": lengths,
        "seconds": round(time.perf_counter() - start),
    }


def recall_batch(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens: keys and values in turn, then the keys again (B, 3 PAIRS), and the values then due (B, PAIRS)."""
    keys = torch.stack([torch.randperm(KEYS, generator=generator)[:PAIRS] for _ in range(batch)])
    values = KEYS + torch.randint(KEYS, (batch, PAIRS), generator=generator)
    order = torch.stack([torch.randperm(PAIRS, generator=generator) for _ in range(batch)])
    told = torch.stack([keys, values], -1).flatten(1)
    return torch.cat([told, keys.gather(1, order)], 1), values.gather(1, order)


def recall_model(name: str, seed: int) -> Model:
    """`dnc`, `nsm`, `nsm-default`, or the control `lstm`."""
    plain = {
        "mixer": "lstm", "layers": 2, "input": {"kind": "tokens", "vocab": 2 * KEYS},
        "head": {"kind": "language-model", "tie": False},
    }  # fmt: skip
    if name == "lstm":
        return compose({**plain, "dim": 80}, seed=seed, plugins=PLUGINS)
    memory = {
        "dnc": {"name": "dnc", "slots": 32, "width": 32, "read_heads": 1},
        "nsm": {"name": "nsm", "slots": 64, "width": 32, "chunk": 1},
        "nsm-default": {"name": "nsm"},
    }[name]
    return compose({**plain, "dim": 64, "memory": ["none", memory]}, seed=seed, plugins=PLUGINS)


def recall(name: str, seed: int, steps: int, every: int = 100) -> dict[str, Any]:
    """Train on associative recall; steps are of 32 sequences."""
    model, draw = recall_model(name, seed), torch.Generator().manual_seed(seed)
    optimizer, weights = torch.optim.Adam(model.parameters(), lr=3e-3), model.loss_weights()
    asked, due = recall_batch(256, torch.Generator().manual_seed(999))
    curve: list[tuple[int, float]] = []
    start = time.perf_counter()
    for step in range(1, steps + 1):
        x, values = recall_batch(32, draw)
        out = model(x)
        loss = F.cross_entropy(out.y[:, -PAIRS:].flatten(0, 1), values.flatten())
        loss = loss + sum(weight * out.losses[key] for key, weight in weights.items())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.on_step(StepInfo(step, out.metrics))
        if step % every == 0 or step == steps:
            with torch.no_grad():
                right = (model(asked).y[:, -PAIRS:].argmax(-1) == due).float().mean().item()
            curve.append((step, round(right, 3)))
            print(f"  {name} seed {seed} {step}: {right:.3f} right, {time.perf_counter() - start:.0f} s", flush=True)
    return {
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "right": curve,
        "seconds": round(time.perf_counter() - start),
    }


def needle_batch(batch: int, filler: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Needles of two tokens among `filler` others, SIGHT more, and the keys again, and the values then due (B, 4)."""

    def some(count: int, of: int) -> Tensor:
        return torch.rand(batch, of, generator=generator).topk(count).indices

    keys, values = some(NEEDLES, WORDS), WORDS + torch.randint(WORDS, (batch, NEEDLES), generator=generator)
    length = filler + 2 * NEEDLES + SIGHT
    told = 2 * WORDS + torch.randint(FILLER, (batch, length), generator=generator)
    at = some(NEEDLES, filler + NEEDLES).sort().values + torch.arange(NEEDLES)
    told = told.scatter(1, at, keys).scatter(1, at + 1, values)
    order = some(NEEDLES, NEEDLES)
    return torch.cat([told, keys.gather(1, order)], 1), values.gather(1, order)


def needle_model(name: str, seed: int) -> Model:
    """`titans`, or the control `attention`."""
    mixers = [{"name": "attention", "window": window} for window in (2, SIGHT)]
    plain = {
        "mixer": mixers, "layers": 2, "input": {"kind": "tokens", "vocab": 2 * WORDS + FILLER},
        "head": {"kind": "language-model", "tie": False},
    }  # fmt: skip
    if name == "attention":
        return compose({**plain, "dim": 40}, seed=seed, plugins=PLUGINS)
    # A matrix. The gradient of the mean over 32 channels has 2/32 in it: with a rate of 16 one step writes all of v.
    memory = {"name": "titans", "heads": 1, "head_dim": 32, "depth": 1, "residual_norm": False, "max_lr": 16}
    return compose({**plain, "dim": 32, "memory": ["none", memory]}, seed=seed, plugins=PLUGINS)


def needle(name: str, seed: int, steps: int, every: int = 100) -> dict[str, Any]:
    """Train on needles in filler; steps are of 16 sequences."""
    model, draw = needle_model(name, seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def right(filler: int) -> float:
        asked, due = needle_batch(256, filler, torch.Generator().manual_seed(1000 + filler))
        with torch.no_grad():
            found = (model(asked).y[:, -NEEDLES:].argmax(-1) == due).float().mean().item()
        return round(found, 3)

    curve: list[tuple[int, float]] = []
    start = time.perf_counter()
    for step in range(1, steps + 1):
        longest = min(LONGEST, LONGEST * step // 500)
        x, values = needle_batch(16, int(torch.randint(longest + 1, (1,), generator=draw)), draw)
        loss = F.cross_entropy(model(x).y[:, -NEEDLES:].flatten(0, 1), values.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % every == 0 or step == steps:
            curve.append((step, right(LONGEST)))
            print(
                f"  {name} seed {seed} {step}: {curve[-1][1]:.3f} right, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    return {
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "right": curve,
        "right with filler": {str(filler): right(filler) for filler in (0, 120, 240, 480, 960)},
        "seconds": round(time.perf_counter() - start),
    }


TASKS = {
    "copy": (copy, ("ntm", "lstm"), 30_000),
    "recall": (recall, ("dnc", "nsm", "nsm-default", "lstm"), 1_500),
    "needle": (needle, ("titans", "attention"), 1_500),
}
"""By name: how to train, the models, and steps."""


def keep(path: Path, task: str, name: str, result: dict[str, Any]) -> None:
    """Put a result into the file, in the place of one of the same task, model and seed."""
    where = {"torch": torch.__version__, "threads": 1, "machine": platform.machine()}
    report = json.loads(path.read_text()) if path.exists() else {"where": where}
    models = report.setdefault(task, {})
    kept = {each["seed"]: each for each in models.get(name, [])} | {result["seed"]: result}
    models[name] = [kept[seed] for seed in sorted(kept)]
    text = json.dumps(report, indent=1)
    path.write_text(re.sub(r"\[\s+(\d+),\s+([\d.e-]+)\s+\]", r"[\1, \2]", text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"any of {', '.join(TASKS)}; all if none")
    parser.add_argument("--models", nargs="+", help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="instead of 30,000 (copy) and 1,500 (the others)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if unknown := set(args.tasks) - TASKS.keys():
        parser.error(f"there is no task {unknown.pop()!r}; there are {', '.join(TASKS)}")
    known = {name for task in args.tasks or TASKS for name in TASKS[task][1]}
    if unknown := set(args.models or ()) - known:
        parser.error(f"there is no model {unknown.pop()!r}; there are {', '.join(sorted(known))}")
    torch.set_num_threads(1)
    for task in args.tasks or TASKS:
        train, models, steps = TASKS[task]
        print(task)
        for name in models:
            for seed in args.seeds if name in (args.models or models) else ():
                result = train(name, seed, args.steps or steps)
                if args.json:
                    keep(args.json, task, name, result)


if __name__ == "__main__":
    main()
