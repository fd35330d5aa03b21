"""What is seen of training: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 5.0


class Display:
    """Shows steps and messages.

    Args:
        start: steps taken before this session.
        steps: steps in all.
        tokens: tokens in a step.
    """

    def __init__(self, *, start: int, steps: int, tokens: int) -> None:
        self.start, self.steps, self.tokens = start, steps, tokens
        self.busy = 0.0
        self.last = time.monotonic()
        self.bar: Progress | None = None
        if sys.stdout.isatty():
            # Narrow enough for a terminal of 80 columns.
            self.bar = Progress(
                TextColumn("{task.completed}/{task.total}"), BarColumn(bar_width=8), TextColumn("{task.description}"),
                TimeRemainingColumn(compact=True), TextColumn("left"), console=Console(highlight=False),
            )  # fmt: skip
            self.task = self.bar.add_task("", total=steps, completed=start)

    def __enter__(self) -> Display:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()

    def step(self, record: dict[str, Any], seconds: float) -> None:
        """Show a step's record, as it goes to the log. seconds: how long it took."""
        self.busy += seconds
        done = record["step"] - self.start
        speed = done * self.tokens / self.busy if self.busy else 0.0
        text = f"loss {record['loss']:.3f}  {record['bits_per_byte']:.3f} bits/byte  {speed:,.0f} tokens/s"
        if (load := max_load(record.get("metrics", {}))) is not None:
            text += f"  max load {load:.2f}"
        if dropped := largest(record.get("metrics", {}), "drop_rate"):
            text += f"  dropped {dropped:.0%}"
        if (entropy := least(record.get("metrics", {}), "router.entropy")) is not None:
            text += f"  entropy {entropy + 0.0:.2f}"
        if none := largest(record.get("metrics", {}), "no_target"):
            text += f"  without a target {none:.0f}"
        if (depth := average(record.get("metrics", {}), "mean_depth")) is not None:
            text += f"  mean depth {depth:.2f}"
        if self.bar:
            self.bar.update(self.task, completed=record["step"], description=text)
        elif time.monotonic() - self.last >= SECONDS_BETWEEN_LINES or record["step"] == self.steps:
            minutes, seconds = divmod(round((self.steps - record["step"]) * self.busy / done), 60)
            self.say(f"step {record['step']}/{self.steps}  {text}  {minutes}:{seconds:02d} left")
            self.last = time.monotonic()

    def say(self, message: str) -> None:
        """Show a line that stays."""
        if self.bar:
            self.bar.console.print(message, markup=False, soft_wrap=True)
        else:
            print(message, flush=True)


def max_load(metrics: dict[str, Any]) -> float | None:
    """The busiest target's load relative to the mean, over all routers, or None without a router."""
    counts = [value for name, value in metrics.items() if name.endswith(".load") and isinstance(value, list)]
    loads = [max(load) * len(load) / (sum(load) or 1) for load in counts]
    named = largest(metrics, "max_load")
    return max(loads if named is None else [*loads, named], default=None)


def largest(metrics: dict[str, Any], name: str) -> float | None:
    """The largest value of a metric over all that return it, or None."""
    return max(_values(metrics, name), default=None)


def least(metrics: dict[str, Any], name: str) -> float | None:
    """The least value of a metric over all that return it, or None."""
    return min(_values(metrics, name), default=None)


def average(metrics: dict[str, Any], name: str) -> float | None:
    """The mean of a metric over all that return it, or None."""
    values = _values(metrics, name)
    return sum(values) / len(values) if values else None


def _values(metrics: dict[str, Any], name: str) -> list[float]:
    return [value for key, value in metrics.items() if key.endswith(name) and isinstance(value, (int, float))]
