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
        message: why it failed or was skipped.
        seconds: time taken.
    """

    check: str
    law: str
    subject: str
    status: Status
    value: float | None = None
    tolerance: float | None = None
    message: str = ""
    seconds: float = 0.0
