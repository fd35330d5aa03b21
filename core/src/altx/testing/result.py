"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["passed", "failed", "skipped", "waived"]


@dataclass(frozen=True)
class Result:
    """One check of one subject.

    Args:
        check: the check's name, which is API: waivers and `--only` use it.
        law: the law in a few words.
        subject: what was checked, e.g. "ntm[controller]".
        status: skipped where the law does not apply, or a law it builds on failed.
        value: the measured number, if the check measures one; passed means value <= tolerance.
        tolerance: what is allowed.
        message: why it failed or was skipped, in a sentence.
        example: the smallest input found that breaks the law, where the difference begins, and lines of Python that
            show it.
        seconds: time taken.
    """

    check: str
    law: str
    subject: str
    status: Status
    value: float | None = None
    tolerance: float | None = None
    message: str = ""
    example: str = ""
    seconds: float = 0.0

    def report(self) -> str:
        """What is wrong, the example of it, and where the author's guide explains it."""
        return "\n".join([self.message, *([self.example] if self.example else []), f"altx guide {self.check}"])
