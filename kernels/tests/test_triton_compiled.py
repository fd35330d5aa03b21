"""The Triton kernels of the shared ops compile for GPUs that need not be there, and fit them."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Another process: whether Triton interprets or compiles is settled when it is imported.
COMPILE = Path(__file__).with_name("compile_kernels.py")


@pytest.mark.slow
@pytest.mark.parametrize("op", ["causal-conv1d", "gated-rms-norm", "linear-recurrence", "delta-rule"])
def test_kernels_compile_and_keep_within_registers_and_shared_memory(op: str) -> None:
    ran = subprocess.run([sys.executable, COMPILE, op], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
