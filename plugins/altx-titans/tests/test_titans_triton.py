"""The Triton kernels of the loop over chunks: right in the interpreter, and compiled for GPUs not there."""

import subprocess
import sys
from pathlib import Path

import pytest
from altx_titans.kernels.learn import LEARN, cases, flat

from altx_kernels.trees import map_leaves

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("titans_triton.py")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["interpret", "compile"])
def test_kernels(how: str) -> None:
    ran = subprocess.run([sys.executable, SCRIPT, how], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize(
    "tokens, width, form, said",
    [
        (32, 128, {}, None),
        (33, 16, {}, "a chunk of 33 tokens is larger than the 32"),
        (2, 129, {}, "a head of width 129 is larger than the 128"),
        (2, 4, {"biased": True, "bound": 1.0}, "not of a bias"),
    ],
)
def test_what_a_program_cannot_hold_is_said(tokens, width, form, said) -> None:
    arguments = map_leaves(
        lambda _, x: x.float() if x.is_floating_point() else x, cases.call(1, 1, 1, tokens, width, **form)
    )
    found = flat.too_large(**arguments)
    assert (found is None) if said is None else said in found


def test_why_it_does_not_run_is_said() -> None:
    unavailable = LEARN.backends["triton"].unavailable
    arguments = cases.call(1, 1, 1, 2, 4)
    assert "chunks.key is on cpu, and Triton kernels run on CUDA" in unavailable(**arguments)
    assert "float64" in flat.too_large(*arguments.values())
