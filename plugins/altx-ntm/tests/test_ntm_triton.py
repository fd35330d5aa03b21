"""The Triton kernels of the time loops: right in the interpreter, and compiled for GPUs that need not be there."""

import subprocess
import sys
from pathlib import Path

import pytest
from altx_ntm.kernels.ntm import SCAN, cases
from altx_ntm.kernels.ntm.check import LARGEST, too_large

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("loops_triton.py")


@pytest.mark.slow
@pytest.mark.parametrize("op", ["ntm"])
@pytest.mark.parametrize("how", ["interpret", "compile"])
def test_kernels(how: str, op: str) -> None:
    ran = subprocess.run([sys.executable, SCRIPT, how, op], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_what_a_program_cannot_hold_is_said() -> None:
    unavailable = SCAN.backends["triton"].unavailable
    said = unavailable(**cases.call(1, 1, 257, 32))
    assert said and "slots.memory is on cpu" in said
    arguments = cases.call(1, 1, 257, 32)
    fits = arguments | {"slots": arguments["slots"]._replace(memory=arguments["slots"].memory[:, :256])}
    assert too_large(**fits) is None
    assert f"257 x 32 is larger than the {LARGEST}" in (too_large(**arguments) or "")
