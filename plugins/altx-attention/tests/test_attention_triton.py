"""The Triton kernel of the rotation: right in the interpreter, and compiled for GPUs that need not be there."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPTS = Path(__file__).parents[3] / "kernels/tests"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["interpret.py", "compile_kernels.py"])
def test_rotary(script: str) -> None:
    ran = subprocess.run([sys.executable, SCRIPTS / script, "rotary"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
