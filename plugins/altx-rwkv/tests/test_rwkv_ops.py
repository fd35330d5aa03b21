"""The ops: every backend equals the reference, whatever it is given and however it is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from altx_rwkv.kernels import token_shift as shift_package
from altx_rwkv.kernels import wkv4 as wkv4_package
from altx_rwkv.kernels.token_shift import token_shift
from altx_rwkv.kernels.wkv4 import EMPTY, wkv4
from altx_rwkv.kernels.wkv4.cases import example
from altx_rwkv.pointwise import squared_relu
from torch import Tensor

from altx_kernels import KernelError, Op
from altx_kernels.verify import TOLERANCES, verify

OPS = {"wkv4": wkv4_package.OP, "token-shift": shift_package.OP}
BACKENDS = [
    (name, backend)
    for name, op in OPS.items()
    for backend, found in op.backends.items()
    if backend != "reference" and not found.absent()
]
WKV4 = [backend for name, backend in BACKENDS if name == "wkv4"]


def arguments(*sizes: int, options: tuple[str, ...] = (), dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return {
        name: value.detach().to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in example(*sizes, *options).arguments.items()
    }


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_every_example_equals_the_float64_reference_with_all_gradients(
    op: str, backend: str, dtype: torch.dtype
) -> None:
    for finding in verify(OPS[op], [backend], dtypes=[dtype], devices=["cpu"]):
        assert finding.status == "passed", str(finding)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["reference", "native", "torch"])
def test_gradients_are_derivatives(op: str, backend: str) -> None:
    chosen: Op[Any] = OPS[op]
    if backend not in chosen.backends or chosen.backends[backend].absent():
        pytest.skip("not here")
    values = dict(next(e for e in chosen.examples() if "reset" in e.label and "state" in e.label).arguments)
    if op == "wkv4":
        values["k"] = values["k"].detach().clamp(-4, 4).requires_grad_()
        values["initial_state"] = values["initial_state"].detach().clamp(min=-5).requires_grad_()
    names = [name for name, value in values.items() if isinstance(value, Tensor) and value.requires_grad]

    def call(*tensors: Tensor) -> Any:
        return chosen(**(values | dict(zip(names, tensors, strict=True))), backend=backend)

    assert torch.autograd.gradcheck(call, tuple(values[name] for name in names), fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", *WKV4])
def test_it_is_the_equation_of_the_paper(backend: str) -> None:
    values = arguments(2, 12, 6)
    values["k"] = values["k"].clamp(-20, 20)
    w, u, k, v = (values[name] for name in ("w", "u", "k", "v"))
    y = wkv4(w, u, k, v, backend=backend)[0]
    for t in range(12):
        weights = torch.exp(torch.stack([k[:, i] + (t - 1 - i) * w for i in range(t)] + [k[:, t] + u], 1))
        expected = (weights * v[:, : t + 1]).sum(1) / weights.sum(1)
        torch.testing.assert_close(y[:, t], expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("backend", ["reference", *WKV4])
@pytest.mark.parametrize("size", [1e4, 1e8])
def test_keys_beyond_all_reason_neither_overflow_nor_vanish(backend: str, size: float) -> None:
    values = arguments(2, 20, 5, options=("state",), dtype=torch.float32)
    values["k"][:, 3:7] = -size
    values["k"][:, 11] = size
    y, state = wkv4(*(values[name] for name in ("w", "u", "k", "v")), backend=backend)
    assert y.isfinite().all() and state.isfinite().all()
    # What weighs everything else out is what is read.
    torch.testing.assert_close(y[:, 11:13], values["v"][:, [11, 11]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["reference", *WKV4])
def test_padding_holds_the_state_exactly_whatever_is_in_it(backend: str) -> None:
    values = arguments(3, 30, 21, options=("state", "reset"), dtype=torch.float32)
    lengths = torch.tensor([0, 17, 30])
    state = wkv4(**values | {"lengths": lengths}, backend=backend)[1]
    for row, length in enumerate(lengths.tolist()):
        one = {
            name: value[row : row + 1, :length] if name in ("k", "v", "reset") else value
            for name, value in values.items()
        }
        one["initial_state"] = values["initial_state"][row : row + 1]
        assert torch.equal(wkv4(**one, backend=backend)[1], state[row : row + 1])
    assert torch.equal(state[0], values["initial_state"][0])
    values["k"][1, 17:], values["v"][1, 17:] = torch.nan, torch.nan
    assert torch.equal(wkv4(**values | {"lengths": lengths}, backend=backend)[1], state)


@pytest.mark.parametrize("backend", ["reference", *WKV4])
def test_nan_stays_in_its_row_and_ends_at_a_reset(backend: str) -> None:
    values = arguments(3, 40, 20)
    values["reset"] = torch.zeros(3, 40, dtype=torch.bool)
    values["reset"][2, 20] = True
    clean = wkv4(**values, backend=backend)[0]
    values["v"][1:, 0] = torch.nan
    y = wkv4(**values, backend=backend)[0]
    assert torch.equal(y[0], clean[0]) and torch.equal(y[2, 20:], clean[2, 20:])
    assert y[1].isnan().all()


@pytest.mark.parametrize("backend", ["reference", *WKV4])
def test_gradients_of_nan_end_at_a_reset_too(backend: str) -> None:
    values = arguments(2, 20, 9)
    values["k"].requires_grad_(), values["v"].requires_grad_()
    values["reset"] = torch.zeros(2, 20, dtype=torch.bool)
    values["reset"][1, 8] = True
    y = wkv4(**values, backend=backend)[0]
    dy = torch.ones_like(y)
    dy[1, 12] = torch.nan
    for gradient in torch.autograd.grad(y, (values["k"], values["v"]), dy):
        assert gradient[0].isfinite().all() and gradient[1, :8].isfinite().all() and gradient[1, 8:13].isnan().any()


def test_an_empty_state_is_that_of_no_tokens() -> None:
    values = arguments(2, 9, 5)
    state = torch.stack([torch.zeros(2, 5), torch.full((2, 5), EMPTY)], 1).double()
    for one, other in zip(wkv4(**values), wkv4(**values | {"initial_state": state}), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", [(), ("state", "reset", "lengths")])
def test_a_compiled_function_gives_the_same(options: tuple[str, ...]) -> None:
    values = arguments(2, 12, 7, options=options, dtype=torch.float32)
    values["k"].requires_grad_()

    def run() -> Tensor:
        y, state = wkv4(**values)
        mixed = token_shift(y, torch.sigmoid(values["v"][0, :3]), initial_state=state[:, 0], reset=values["reset"])
        return mixed.square().sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for one, other in zip(*(torch.autograd.grad(f(), values["k"]) for f in (run, compiled)), strict=True):
        torch.testing.assert_close(one, other)


def test_the_squared_relu_is_one_with_all_its_derivatives() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(squared_relu(x), torch.relu(x) ** 2)
    assert torch.autograd.gradcheck(squared_relu, x) and torch.autograd.gradgradcheck(squared_relu, x)
    slopes = torch.func.vmap(torch.func.grad(lambda row: squared_relu(row).sum()))(x.detach())
    torch.testing.assert_close(slopes, 2 * torch.relu(x.detach()))


def test_what_does_not_fit_is_refused_in_words() -> None:
    k, w, mix = torch.zeros(2, 5, 4), torch.zeros(4), torch.zeros(3, 4)
    wrong: list[tuple[Any, str]] = [
        (lambda: wkv4(w, w, k, k[:, :3]), "v has shape"),
        (lambda: wkv4(w, w, k, k, initial_state=torch.zeros(2, 3, 4)), "two: mean and log weight"),
        (lambda: wkv4(w, w, k, k, reset=torch.zeros(2, 5)), "pass bool"),
        (lambda: wkv4(w, w, k, k, lengths=torch.tensor([1.0, 2.0])), "pass int64"),
        (lambda: wkv4(w, w, k[:1], k[:1], lengths=torch.tensor([1]), cu_seqlens=torch.tensor([0, 5])), "cu_seqlens"),
        (lambda: wkv4(w, w, k.long(), k), "k has dtype"),
        (lambda: token_shift(k, mix[:, :2]), "mix has shape"),
        (lambda: token_shift(k, mix, reset=torch.zeros(2, 5)), "pass bool"),
        (lambda: token_shift(k, mix, initial_state=k), "initial_state has shape"),
    ]
    for call, message in wrong:
        with pytest.raises(KernelError, match=message):
            call()
