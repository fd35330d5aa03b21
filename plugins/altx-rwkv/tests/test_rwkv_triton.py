"""The Triton kernels of both ops: right in the interpreter, and compiled for GPUs that need not be there."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("rwkv_triton.py")


@pytest.mark.slow
@pytest.mark.parametrize("op", ["wkv4", "token-shift"])
@pytest.mark.parametrize("how", ["interpret", "compile"])
def test_kernels(how: str, op: str) -> None:
    ran = subprocess.run([sys.executable, SCRIPT, how, op], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
