"""Inputs that a law is tried with, and smaller ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Parts = Literal["keep", "drop", "join"]
"""What may happen to the parts of a smaller trial: none is lost, empty ones are, or they may join their neighbours."""

LONG = 20
"""Tokens of a kind in a row that are counted rather than drawn."""

PLAINER = {".": "x", "R": "x", "r": "."}


@dataclass(frozen=True)
class Trial:
    """The shape of an input, as a person reads it.

    Args:
        rows: one character for each token of each row: `x` real, `.` masked, `R` real and the first of a fresh
            sequence, `r` masked with a reset that must mean nothing.
        parts: lengths of what the tokens are cut into: calls, packed sequences, or what comes before and after a
            change, as the law says. Empty: they are not cut.
    """

    rows: tuple[str, ...]
    parts: tuple[int, ...] = ()

    @property
    def batch(self) -> int:
        return len(self.rows)

    @property
    def length(self) -> int:
        return len(self.rows[0])

    @property
    def mask(self) -> Tensor | None:
        """(B, T) bool, or None if every token is real."""
        return self._where("xR") if any(set(row) & set(".r") for row in self.rows) else None

    @property
    def reset(self) -> Tensor | None:
        """(B, T) bool, or None if there is none."""
        return self._where("Rr") if any(set(row) & set("Rr") for row in self.rows) else None

    def _where(self, symbols: str) -> Tensor:
        return torch.tensor([[token in symbols for token in row] for row in self.rows]).reshape(self.batch, -1)

    def translated(self, old: str, new: str) -> Trial:
        """With some symbols changed."""
        return Trial(tuple(row.translate(str.maketrans(old, new)) for row in self.rows), self.parts)

    def borders(self) -> list[tuple[int, int]]:
        """Start and end of every part."""
        ends = torch.tensor(self.parts or (self.length,)).cumsum(0).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def picture(self) -> list[str]:
        """Each row with its tokens apart, and a bar where a part begins; a long one by numbers."""

        def part(tokens: str) -> str:
            runs = ["".join(run) for _, run in itertools.groupby(tokens)]
            return " ".join(f"{len(run)} {run[0]}" if len(run) > LONG else " ".join(run) for run in runs)

        return [" | ".join(part(row[start:stop]) for start, stop in self.borders()).strip() for row in self.rows]

    def smaller(self, unit: int, parts: Parts) -> Iterator[Trial]:
        """Trials with less in them, the boldest first; tokens go in groups of `unit`."""
        for row in range(self.batch if self.batch > 1 else 0):
            yield Trial(self.rows[:row] + self.rows[row + 1 :], self.parts)
        groups = self.length // 2 // unit
        while groups:
            size = groups * unit
            for start in range(self.length - size, -1, -size):
                without = self._without(start, start + size)
                if parts == "keep" and without.parts.count(0) > self.parts.count(0):
                    continue
                yield Trial(without.rows, tuple(n for n in without.parts if n or parts == "keep"))
            groups = groups - 1 if groups <= 8 else groups // 2
        for index in range(len(self.parts) - 1 if parts == "join" else 0):
            joined = self.parts[index] + self.parts[index + 1]
            yield Trial(self.rows, (*self.parts[:index], joined, *self.parts[index + 2 :]))
        for number, symbols in enumerate(self.rows):
            for place, symbol in enumerate(symbols):
                if symbol in PLAINER:
                    changed = symbols[:place] + PLAINER[symbol] + symbols[place + 1 :]
                    yield Trial((*self.rows[:number], changed, *self.rows[number + 1 :]), self.parts)

    def _without(self, start: int, stop: int) -> Trial:
        rows = tuple(row[:start] + row[stop:] for row in self.rows)
        left = [b - a - max(0, min(b, stop) - max(a, start)) for a, b in self.borders()] if self.parts else []
        return Trial(rows, tuple(left))


def plain(batch: int, *parts: int) -> Trial:
    """Rows of real tokens, cut where there is more than one part."""
    return Trial(("x" * sum(parts),) * batch, parts if len(parts) > 1 else ())
