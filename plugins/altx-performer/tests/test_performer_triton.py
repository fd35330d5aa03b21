"""The Triton kernel of the positive features: right in the interpreter, and compiled for GPUs."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("features_triton.py")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["interpret", "compile"])
def test_positive_features(how: str) -> None:
    ran = subprocess.run([sys.executable, SCRIPT, how], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
