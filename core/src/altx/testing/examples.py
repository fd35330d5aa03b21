"""The input that broke a law, as a person reads it, and as lines of Python that show it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from altx.model import Model
from altx.testing.case import SEED, Case, Subject
from altx.testing.check import Check
from altx.testing.graphs import edges_of
from altx.testing.shrink import Breach
from altx.testing.streaming import order_of
from altx.testing.trial import Trial

LEGEND = {"x": "x a token", "R": "R starts a fresh sequence", ".": ". masked", "r": "r masked, with a reset"}


def example(
    subject: str | Subject | Model,
    *,
    dim: int | None = None,
    batch: int = 1,
    length: int = 1,
    kind: str | None = None,
    config: Mapping[str, Any] | None = None,
    bare: bool = False,
) -> tuple[nn.Module, Tensor]:
    """What the kit checks, and what it feeds it: a layer in float64 in eval mode, and x (B, T, D).

    Args:
        subject: as a failed check names it: a component, with what it was checked as, such as "ntm[controller]".
        dim: width; default that of the check.
        batch, length: of x.
        kind: needed where several kinds have a component of that name.
        config: its settings.
        bare: the memory itself instead of a layer.

    Raises:
        AltxError: if there is no such subject, or it cannot be that wide.
    """
    from altx.testing import runner

    if isinstance(subject, Model):
        subject = runner.of_model(subject)
    if isinstance(subject, str):
        subject = runner.subject(subject, kind, config, dim=dim)
    case, trial = Case(subject), Trial(("x" * length,) * batch)
    return (case.memory, case.told(trial)) if bare else (case.layer, case.x(trial))


def describe(check: Check, case: Case, trial: Trial, breach: Breach) -> str:
    """The input, where the difference begins, and how to see it again."""
    lines = [*_input(check, case, trial, breach)] if check.trials else []
    if breach.detail:
        lines += _field("found", breach.detail)
    return "\n".join([*lines, *_field("try it", python(check, case, trial, breach) or _again(check, case))])


def _input(check: Check, case: Case, trial: Trial, breach: Breach) -> list[str]:
    x = case.told(trial) if _of_memory(check, trial, breach) else case.x(trial)
    kind = str(x.dtype).removeprefix("torch.")
    lines = _field("input", f"x {tuple(x.shape)} in {kind}, random with seed {SEED}: the smallest found")
    symbols = [symbol for symbol in LEGEND if symbol in "".join(trial.rows)]
    legend = [LEGEND[symbol] for symbol in symbols] if symbols != ["x"] else []
    legend += [f"| {check.bar}"] if len(trial.parts) > 1 else []
    if legend and trial.length:
        for number, picture in enumerate(trial.picture()):
            lines.append(f"{'':<10}row {number}   {picture}")
        lines.append(f"{'':<10}        {', '.join(legend)}")
    return lines


def _field(name: str, text: str) -> list[str]:
    lines = text.splitlines()
    return [f"{'' if number else name:<10}{line}".rstrip() for number, line in enumerate(lines)]


def _again(check: Check, case: Case) -> str:
    if command := case.subject.command:
        return f"{command} --only {check.name}"
    return f'altx.testing.run({case.subject.origin}, ["{check.name}"])'


def _code(check: Check, trial: Trial, breach: Breach) -> str:
    label = breach.gap.label if breach.gap is not None else ""
    code = check.code if isinstance(check.code, str) else check.code(trial, label)
    if check.states and label.startswith("state."):
        kept = [line for line in code.splitlines() if not re.match("(found|wanted)[ ,]", line)]
        leaf = label.removeprefix("state.")
        names = zip(("found", "wanted"), check.states, strict=True)
        kept += [f'{name} = {state}.flat()["{leaf}"]' for name, state in names]
        code = "\n".join(kept)
    return code.strip("\n")


def _of_memory(check: Check, trial: Trial, breach: Breach) -> bool:
    return "memory" in re.findall(r"\w+", _code(check, trial, breach))


def python(check: Check, case: Case, trial: Trial, breach: Breach) -> str:
    """Lines that show the failure, or "" where the check has none."""
    code = _code(check, trial, breach)
    if not code:
        return ""
    words = set(re.findall(r"\w+", code))
    bare = _of_memory(check, trial, breach)
    arguments = [case.subject.origin, *([f"dim={case.subject.dim}"] if case.subject.resized else [])]
    arguments += [f"batch={trial.batch}", f"length={trial.length}", *(["bare=True"] if bare else [])]
    lines = [f"{'memory' if bare else 'layer'}, x = example({', '.join(arguments)})"]
    fields = [] if case.subject.causal else ["causal=False"]
    for name, value in (("mask", trial.mask), ("reset", trial.reset)):
        if value is not None:
            lines.append(f"{name} = torch.tensor({value.int().tolist()}).bool()")
            fields.append(f"{name}={name}")
    lines.append(f"ctx = Context({', '.join(fields)})")
    if "plain" in words:
        lines.append("plain = ctx.replace(mask=None, reset=None)")
    if "start" in words and "start =" not in code:
        stateless = breach.gap is not None and breach.gap.label == "y"
        lines.append(f"start = {'None' if stateless else _start(case)}")
    for name, filling in _values(check, case, trial).items():
        code = code.replace("{" + name + "}", str(filling))
    imports = ["import torch", "", "from altx.context import Context", "from altx.testing import example"]
    imports += [line for line in code.splitlines() if line.startswith("from ")]
    lines += [line for line in code.splitlines() if line and not line.startswith("from ")]
    return "\n".join(
        [*imports[:2], *sorted(imports[2:]), "", *lines, *(["print(found, wanted)"] if "found" in words else [])]
    )


def _start(case: Case) -> str:
    return "layer.init_state(len(x), dtype=torch.float64)" if case.streams else "None"


def _values(check: Check, case: Case, trial: Trial) -> dict[str, object]:
    """What a check's code leaves open."""
    borders = trial.borders()
    calls = borders if check.name == "packing" else Trial(trial.rows, tuple(case.calls(trial.parts))).borders()
    x = case.x(trial)
    return {
        "cut": trial.parts[0] if trial.parts else trial.length,
        "cuts": ", ".join(str(stop) for _, stop in borders[:2]),
        "ends": [stop for _, stop in borders],
        "calls": calls,
        "length": trial.length,
        "order": order_of(trial.batch),
        "edges": edges_of(case, trial.batch, trial.length).tolist() if trial.length else [],
        "fresh": _start(case),
        "other": "(x + 1 + x.abs())" if x.is_floating_point() else f"((x + 1) % {int(x.max()) + 1})",
    }
