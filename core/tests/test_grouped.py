"""One product per target: against a loop, with its gradients, and void rows."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from altx.dispatch import plan
from altx.feed_forward import SwiGLU, SwiGLUBank
from altx.grouped import _aligned, _composed, _swiglu, grouped_mm, grouped_swiglu
from altx.measure import count_flops

OFFSETS = torch.tensor([0, 3, 3, 8, 9])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("widths", [(6, 5), (8, 8), (1, 3), (16, 24)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_a_loop_over_targets_with_zeros_in_void_rows(widths, dtype):
    x, weight = randn(12, widths[0], dtype=dtype), randn(4, *widths, seed=1, dtype=dtype)
    x[9:] = torch.nan
    y = grouped_mm(x, weight, OFFSETS)
    for i in range(4):
        rows = slice(int(OFFSETS[i]), int(OFFSETS[i + 1]))
        torch.testing.assert_close(y[rows], x[rows] @ weight[i])
    assert y.dtype == dtype and not y[9:].any()


@pytest.mark.parametrize("rows", [1, 7, 8, 16])
@pytest.mark.parametrize("columns", [1, 7, 8, 24])
def test_what_torch_takes_of_matrices_is_known(rows, columns):
    """One by one, as parts of larger ones, transposed, with gaps: torch's own checks, which are those on a GPU."""
    whole = torch.zeros(64, 64, dtype=torch.bfloat16)
    parts = [whole[:rows, :columns], whole[: 2 * rows : 2, :columns], whole[:rows, : 2 * columns : 2]]
    parts += [torch.zeros(rows, columns, dtype=torch.bfloat16), torch.zeros(rows, columns + 1).bfloat16()[:, :columns]]
    parts += [torch.zeros(rows, 1).bfloat16().expand(rows, columns)]
    for x in (*parts, *(part.T for part in parts)):
        try:
            F.grouped_mm(x, torch.zeros(1, x.shape[1], 8, dtype=torch.bfloat16), offs=torch.tensor([len(x)]).int())
            taken = True
        except RuntimeError as error:
            assert "strides" in str(error)
            taken = False
        assert _aligned(x) == taken, (x.shape, x.stride())


def test_gradients_twice_and_none_from_void_rows():
    x, weight = randn(12, 3).requires_grad_(), randn(4, 3, 2, seed=1).requires_grad_()
    torch.autograd.gradcheck(lambda x, w: grouped_mm(x, w, OFFSETS), (x, weight))
    torch.autograd.gradgradcheck(lambda x, w: grouped_mm(x, w, OFFSETS), (x, weight))
    grouped_mm(x, weight, OFFSETS).sum().backward()
    assert not x.grad[9:].any() and not weight.grad[1].any(), "a target without rows has gradient 0"


@pytest.mark.parametrize("rows", [0, 5])
def test_no_rows_at_all(rows):
    x, weight = randn(rows, 4).requires_grad_(), randn(4, 4, 2).requires_grad_()
    y = grouped_mm(x, weight, torch.zeros(5, dtype=torch.int64))
    y.sum().backward()
    assert y.shape == (rows, 2) and not y.any() and not weight.grad.any()


def test_weights_may_be_transposed():
    x, weight = randn(12, 6), randn(4, 5, 6).transpose(1, 2)
    torch.testing.assert_close(grouped_mm(x, weight, OFFSETS), grouped_mm(x, weight.contiguous(), OFFSETS))


def test_autocast_and_meta_and_compile():
    x, weight = randn(12, 8, dtype=torch.float32), randn(4, 8, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert grouped_mm(x, weight, OFFSETS).dtype == torch.bfloat16
    assert grouped_mm(x.to("meta"), weight.to("meta"), OFFSETS.to("meta")).shape == (12, 8)
    compiled = torch.compile(lambda *args: grouped_mm(*args) + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, OFFSETS), grouped_mm(x, weight, OFFSETS) + 1)


def test_its_flops_are_counted():
    x, weight = randn(12, 8).requires_grad_(), randn(4, 8, 5).requires_grad_()
    assert count_flops(lambda: grouped_mm(x, weight, OFFSETS)) == 2 * 9 * 8 * 5


def swiglu_arguments() -> list[torch.Tensor]:
    shapes = [(12, 6), (4, 6, 5), (4, 6, 5), (4, 5, 6)]
    return [randn(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


def test_swiglu_in_one_node_is_its_products_one_after_the_other():
    arguments, dy = swiglu_arguments(), randn(12, 6, seed=9)
    with torch.no_grad():
        arguments[0][9:] = torch.nan
    results = []
    for function in (grouped_swiglu, _composed):
        y = function(*arguments, OFFSETS)
        results.append([y, *torch.autograd.grad(y, arguments, dy)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not results[0][0][9:].any() and not results[0][1][9:].any()


def test_swiglu_without_gradients_is_the_same_and_keeps_nothing():
    arguments = swiglu_arguments()
    kept, plain = (_swiglu(*arguments, OFFSETS, keep) for keep in (True, False))
    assert torch.equal(kept[0], plain[0]) and [len(each) for each in (*kept[1:], *plain[1:])] == [12, 12, 0, 0]
    with torch.no_grad():
        assert torch.equal(grouped_swiglu(*arguments, OFFSETS), kept[0])
    y = torch.compile(torch.no_grad()(grouped_swiglu), backend="aot_eager", fullgraph=True)(*arguments, OFFSETS)
    assert torch.equal(y, kept[0])
    # Who asks for gradients after all gets them.
    dy = randn(12, 6, seed=9)
    for ours, theirs in zip(*(torch.autograd.grad(each[0], arguments, dy) for each in (kept, plain)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_swiglu_has_gradients_twice_of_what_needs_them():
    arguments = swiglu_arguments()
    torch.autograd.gradcheck(lambda *inputs: grouped_swiglu(*inputs, OFFSETS), arguments)
    torch.autograd.gradgradcheck(lambda *inputs: grouped_swiglu(*inputs, OFFSETS), arguments)
    x, gate, up, down = arguments
    torch.autograd.gradgradcheck(lambda g: grouped_swiglu(x.detach(), g, up.detach(), down, OFFSETS), (gate,))


def test_swiglu_under_autocast_meta_and_compile():
    arguments = [argument.detach().float() for argument in swiglu_arguments()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert grouped_swiglu(*arguments, OFFSETS).dtype == torch.bfloat16
    assert grouped_swiglu(*(each.to("meta") for each in arguments), OFFSETS.to("meta")).shape == (12, 6)
    for each in arguments:
        each.requires_grad_()
    compiled = torch.compile(lambda *args: grouped_swiglu(*args) + 1, backend="aot_eager", fullgraph=True)
    ours, plain = compiled(*arguments, OFFSETS), grouped_swiglu(*arguments, OFFSETS) + 1
    torch.testing.assert_close(ours, plain)
    for a, b in zip(
        torch.autograd.grad(ours.sum(), arguments), torch.autograd.grad(plain.sum(), arguments), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert count_flops(lambda: grouped_swiglu(*arguments, OFFSETS)) == 2 * 9 * 3 * 6 * 5


def test_a_bank_is_its_experts():
    experts, bank = [SwiGLU(6, 5).double() for _ in range(4)], SwiGLUBank(4, 6, 5).double()
    with torch.no_grad():
        for name in ("gate", "up", "down"):
            getattr(bank, name).copy_(torch.stack([getattr(expert, name).weight.T for expert in experts]))
    x = randn(12, 6)
    y = bank(x, OFFSETS)
    for i, expert in enumerate(experts):
        rows = slice(int(OFFSETS[i]), int(OFFSETS[i + 1]))
        torch.testing.assert_close(y[rows], expert(x[None, rows]).y[0])


def test_what_a_void_pair_holds_reaches_nothing():
    token, target = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([1, -1, 0, 1, -1, -1])
    weight = torch.ones(6, dtype=torch.float64, requires_grad=True)
    x = randn(1, 3, 4)
    x[0, 2] = torch.nan
    x.requires_grad_()
    sorted_ = plan(token, target, weight, 2)
    y = sorted_.gather(x) * 2
    wild = torch.where(sorted_.valid[:, None], y, torch.nan)
    out = sorted_.combine(wild, 1, 3)
    torch.testing.assert_close(out[0, :2], 2 * torch.stack([x[0, 0], 2 * x[0, 1]]))
    out.sum().backward()
    assert not out[0, 2].any() and x.grad.isfinite().all() and weight.grad.isfinite().all()
    cut = sorted_.cut()
    assert cut.token.tolist() == [1, 0, 1] and cut.valid.all()
    torch.testing.assert_close(cut.combine(cut.gather(x) * 2, 1, 3), out)
