"""Grouped products: the op's backends against its reference, and core's products served by the op."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from altx_moe.kernels.grouped_mm import LARGEST, OP

from altx.feed_forward import SwiGLUBank
from altx.grouped import grouped_mm
from altx.measure import count_flops
from altx_kernels.op import KernelError, record
from altx_kernels.verify import verify

SCRIPT = Path(__file__).with_name("grouped_mm_triton.py")
OFFSETS = torch.tensor([0, 3, 3, 8, 9])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["interpret", "compile"])
def test_triton_kernels(how: str) -> None:
    pytest.importorskip("triton")
    ran = subprocess.run([sys.executable, SCRIPT, how], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_backends_agree_with_the_reference() -> None:
    found = list(verify(OP, ["torch", "reference"], devices=["cpu"]))
    assert all(finding.status == "passed" and not finding.skipped for finding in found), found


def test_gradients_twice_of_both_kinds() -> None:
    x, weight, y = (torch.randn(*shape).double().requires_grad_() for shape in ((12, 3), (4, 3, 2), (12, 2)))
    for other in (weight, y):
        torch.autograd.gradcheck(lambda x, other: OP(x, other, OFFSETS), (x, other))
        torch.autograd.gradgradcheck(lambda x, other: OP(x, other, OFFSETS), (x, other))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_op_serves_core(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients and floating-point operations are core's still; a pin holds there too."""
    x, weight = torch.randn(12, 6, requires_grad=True), torch.randn(4, 6, 5, requires_grad=True)
    expected = torch.autograd.grad(grouped_mm(x, weight, OFFSETS).sum(), (x, weight))
    monkeypatch.setenv("ALTX_KERNEL", f"grouped-mm={backend}")
    with record() as choices:
        y = grouped_mm(x, weight, OFFSETS)
        found = torch.autograd.grad(y.sum(), (x, weight))
    assert [choice.backend for choice in choices] == [backend]
    torch.testing.assert_close(found, expected)
    assert count_flops(lambda: grouped_mm(x, weight, OFFSETS)) == 2 * 9 * 6 * 5


def test_experts_are_compiled_with_it() -> None:
    bank, x = SwiGLUBank(4, 6, 5), torch.randn(12, 6, requires_grad=True)

    def product(x: torch.Tensor) -> torch.Tensor:
        return grouped_mm(bank(x, OFFSETS), bank.gate, OFFSETS)

    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), product(x))
    gradients = [torch.autograd.grad(each(x).sum(), x) for each in (compiled, product)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("x", "other", "offsets", "said"),
    [
        (torch.zeros(5, 3), torch.zeros(2, 4, 2), torch.tensor([0, 1, 5]), "weight has shape"),
        (torch.zeros(5, 3), torch.zeros(2, 3, 2), torch.tensor([0, 5]), "weight has shape"),
        (torch.zeros(5, 3), torch.zeros(4, 2), torch.tensor([0, 5]), "y has shape"),
        (torch.zeros(5, 3), torch.zeros(5, 2).double(), torch.tensor([0, 5]), "torch.float64"),
        (torch.zeros(5, 3), torch.zeros(5, 2), torch.tensor([0, 5]).int(), "torch.int32"),
        (torch.zeros(5, 3), torch.zeros(5, 2), torch.zeros(0).long(), "0 offsets"),
        (torch.zeros(5, 3).int(), torch.zeros(5, 2).int(), torch.tensor([0, 5]), "torch.int32"),
    ],
)
def test_what_does_not_fit_is_refused(x, other, offsets, said: str) -> None:
    with pytest.raises(KernelError, match=said):
        OP(x, other, offsets)


def test_what_a_program_cannot_count_is_said() -> None:
    x, weight = torch.empty(4, 1, device="meta"), torch.empty(2, 1, 1, device="meta")
    huge = weight.expand(2, 1, LARGEST)
    from altx_moe.kernels.grouped_mm import _small

    assert _small(x, weight, OFFSETS) is None
    assert f"spans {LARGEST} numbers" in (_small(x, huge, OFFSETS) or "")
