"""Triton's backends of the shared ops against their references, in Triton's interpreter, which needs no GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# The interpreter must be chosen before Triton is imported, hence another process.
INTERPRET = Path(__file__).with_name("interpret.py")


@pytest.mark.slow
@pytest.mark.parametrize("op", ["causal-conv1d", "gated-rms-norm", "linear-recurrence", "delta-rule"])
def test_backend_is_right_in_the_interpreter(op: str) -> None:
    ran = subprocess.run([sys.executable, INTERPRET, op], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
