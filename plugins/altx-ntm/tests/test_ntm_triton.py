"""The Triton kernels of the time loops: right in the interpreter, and compiled for GPUs that need not be there."""

import subprocess
import sys
from pathlib import Path

import pytest
from altx_ntm.kernels import dnc, ntm

from altx_kernels.trees import map_leaves

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("loops_triton.py")


@pytest.mark.slow
@pytest.mark.parametrize("op", ["ntm", "dnc"])
@pytest.mark.parametrize("how", ["interpret", "compile"])
def test_kernels(how: str, op: str) -> None:
    ran = subprocess.run([sys.executable, SCRIPT, how, op], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize(
    "op, slots, width, said",
    [
        (ntm, 256, 32, None),
        (ntm, 257, 32, "257 x 32 is larger than the 8192 numbers"),
        (dnc, 128, 64, None),
        (dnc, 128, 65, "128 x 65 is larger than the 8192 numbers"),
        (dnc, 129, 3, "129 slots are more than the 128"),
    ],
)
def test_what_a_program_cannot_hold_is_said(op, slots: int, width: int, said: str | None) -> None:
    arguments = map_leaves(lambda _, t: t.float(), op.cases.call(1, 1, slots, width))
    found = op.too_large(**arguments)
    assert (found is None) if said is None else said in found


@pytest.mark.parametrize("op", [ntm, dnc])
def test_why_it_does_not_run_is_said(op) -> None:
    unavailable = op.SCAN.backends["triton"].unavailable
    arguments = map_leaves(lambda _, t: t.to("meta"), op.cases.call(1, 1, 5, 3))
    assert "slots.memory is on meta" in unavailable(**arguments)
    assert "Triton kernels run on CUDA" in unavailable(*arguments.values())
