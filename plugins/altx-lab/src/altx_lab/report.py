"""What a run says about itself when it begins and when it ends."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from altx_lab.baselines import baselines
from altx_lab.trainer import Trainer


def opening(path: Path, record: dict[str, Any], trainer: Trainer) -> str:
    """What is about to be trained, on what, and where it goes."""
    text, s = trainer.text, trainer.settings
    begin = f"from step {trainer.step} to {s.steps}" if trainer.step else f"for {s.steps} steps"
    return (
        f"training {record['parameters']:,} parameters {begin} of {s.batch} x {s.length} bytes on {trainer.device}; "
        f"run: {path}\n"
        f"text: {text.name}, {len(text.data):,} bytes; held out: its last {len(text.held_out):,}, "
        f"read with {record['evaluation']}"
    )


def result(record: dict[str, Any], trainer: Trainer, curve: list[tuple[int, float]]) -> dict[str, Any]:
    """The final numbers, for result.json.

    Args:
        curve: (step, held-out bits per byte) of every evaluation, the final one last.
    """
    s = trainer.settings
    return {
        "step": trainer.step,
        "bits_per_byte": curve[-1][1],
        "baselines": baselines(trainer.text.held_out),
        "held_out_bytes": len(trainer.text.held_out),
        "evaluation": record["evaluation"],
        "curve": curve,
        "parameters": record["parameters"],
        "tokens": trainer.step * s.batch * s.length,
        "seconds": round(trainer.seconds, 1),
    }


def closing(path: Path, result: dict[str, Any]) -> str:
    """The model beside what needs no training, on the same bytes, and what to do next."""
    rows = [*result["baselines"].items(), (f"this model, step {result['step']}", result["bits_per_byte"])]
    rows += [(f"before that, step {step}", bits) for step, bits in result["curve"][-2:-1]]
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {bits:>6.3f}" for name, bits in rows]
    minutes, seconds = divmod(round(result["seconds"]), 60)
    head = f"{result['tokens']:,} tokens in {minutes}:{seconds:02d}"
    return "\n".join(
        [
            f"\n{head}; bits per byte of the {result['held_out_bytes']:,} held-out bytes:",
            *lines,
            f'next: altx generate {shlex.quote(str(path))} --prompt "The "',
        ]
    )
