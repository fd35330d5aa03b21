"""The Triton kernels of the op: right in the interpreter, and compiled for GPUs that need not be there."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("triton_kernels.py")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["interpret", "compile"])
def test_diagonal_ssm(how: str) -> None:
    ran = subprocess.run([sys.executable, SCRIPT, how], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
