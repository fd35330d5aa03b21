"""Every backend of every op equals the reference, forward and backward, in float64."""

from __future__ import annotations

import pytest
import torch
from altx_mamba.kernels import causal_conv1d, selective_scan
from altx_mamba.kernels.chunked import CHUNK

from altx_kernels import KernelError

RAGGED = [0, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 6]
BACKENDS = {
    op.name: [name for name, backend in op.backends.items() if name != "reference" and not backend.absent()]
    for op in (selective_scan, causal_conv1d)
}


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + sum(shape)))


def scan_inputs(length, *, batch=2, dim=5, size=3, state=True, dtype=torch.float64):
    """Arguments of selective_scan with steps from 0 (a tenth of them, exactly) to far past where exp underflows."""
    dt = randn(batch, length, dim, seed=1).exp()
    dt = dt.masked_fill(randn(batch, length, 1, seed=2) < -1.3, 0)
    values = {
        "x": randn(batch, length, dim, seed=3),
        "dt": dt,
        "A": -randn(dim, size, seed=4).exp(),
        "B": randn(batch, length, size, seed=5),
        "C": randn(batch, length, size, seed=6),
        "D": randn(dim, seed=7),
    }
    if state:
        values["initial_state"] = randn(batch, dim, size, seed=8)
    return {name: value.to(dtype).requires_grad_() for name, value in values.items()}


def conv_inputs(length, *, batch=2, dim=5, width=4, state=True):
    values = {
        "x": randn(batch, length, dim, seed=1),
        "weight": randn(dim, width, seed=2),
        "bias": randn(dim, seed=3),
    }
    if state:
        values["initial_state"] = randn(batch, width - 1, dim, seed=4)
    return {name: value.requires_grad_() for name, value in values.items()}


def some(length, batch=2):
    """(B, T) bool, true for about one token in six, the first of a row among them."""
    reset = randn(batch, length, seed=9) > 1
    reset[0, :1] = True
    return reset


def outputs_and_gradients(op, values, backend, reset):
    out = op(**values, reset=reset, backend=backend)
    outputs = out if isinstance(out, tuple) else (out,)
    # Unequal weights, so that an error in one place cannot cancel one elsewhere.
    loss = sum((randn(*y.shape, seed=20) * y).sum() for y in outputs)
    gradients = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
    found = {f"output {index}": y for index, y in enumerate(outputs)}
    for (name, value), gradient in zip(values.items(), gradients, strict=True):
        found[name] = torch.zeros_like(value) if gradient is None else gradient
    return found


def assert_equal(op, values, backend, reset, tolerance=1e-10):
    found = outputs_and_gradients(op, values, backend, reset)
    expected = outputs_and_gradients(op, values, "reference", reset)
    for name in expected:
        assert found[name].shape == expected[name].shape, name
        torch.testing.assert_close(found[name], expected[name], atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.parametrize("backend", BACKENDS["selective-scan"])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("length", RAGGED)
def test_scan_equals_the_reference_with_all_gradients(length, state, resets, backend):
    assert_equal(selective_scan, scan_inputs(length, state=state), backend, some(length) if resets else None)


@pytest.mark.parametrize("backend", BACKENDS["mamba-conv1d"])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 9])
def test_conv_equals_the_reference_with_all_gradients(length, width, resets, backend):
    for state in (False, True):
        values = conv_inputs(length, width=width, state=state)
        assert_equal(causal_conv1d, values, backend, some(length) if resets else None)


@pytest.mark.parametrize("backend", BACKENDS["selective-scan"])
def test_scan_passes_gradcheck(backend):
    values = scan_inputs(CHUNK + 2, batch=1, dim=2, size=2)
    names, reset = list(values), some(CHUNK + 2, batch=1)

    def scan(*tensors):
        return selective_scan(**dict(zip(names, tensors, strict=True)), reset=reset, backend=backend)

    assert torch.autograd.gradcheck(scan, tuple(values.values()), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS["selective-scan"])
def test_tokens_with_dt_0_hold_the_state_exactly(backend):
    values = scan_inputs(40)
    values["dt"] = torch.zeros_like(values["dt"])
    _, final = selective_scan(**values, backend=backend)
    assert torch.equal(final, values["initial_state"])


@pytest.mark.parametrize("backend", BACKENDS["selective-scan"])
def test_scan_is_finite_and_right_where_the_decay_underflows(backend):
    values = scan_inputs(CHUNK + 3, dtype=torch.float32)
    values["dt"] = values["dt"] * 1e4
    found = outputs_and_gradients(selective_scan, values, backend, None)
    expected = outputs_and_gradients(selective_scan, values, "reference", None)
    for name in expected:
        assert found[name].isfinite().all(), name
        torch.testing.assert_close(found[name], expected[name], atol=1e-2, rtol=1e-4, msg=name)


@pytest.mark.parametrize("backend", [*BACKENDS["selective-scan"], "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_y_has_the_inputs_dtype_and_the_state_float32_at_least(dtype, backend):
    y, final = selective_scan(**scan_inputs(5, dtype=dtype), backend=backend)
    assert y.dtype == dtype
    assert final.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS["selective-scan"])
def test_scan_computes_in_float32_under_autocast(backend):
    values = scan_inputs(CHUNK + 1, dtype=torch.float32)
    expected = outputs_and_gradients(selective_scan, values, backend, None)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs_and_gradients(selective_scan, values, backend, None)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("op", [selective_scan, causal_conv1d])
def test_inputs_are_not_written_to(op):
    for backend in ["reference", *BACKENDS[op.name]]:
        values = scan_inputs(CHUNK + 1) if op is selective_scan else conv_inputs(9)
        before = {name: value.detach().clone() for name, value in values.items()}
        outputs_and_gradients(op, values, backend, None)
        assert all(torch.equal(values[name], before[name]) for name in before)


def test_strided_inputs_give_the_same():
    values = scan_inputs(CHUNK + 1)
    turned = {name: value.detach().mT.contiguous().mT if value.dim() > 1 else value for name, value in values.items()}
    for one, other in zip(selective_scan(**values), selective_scan(**turned), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_a_backend_that_is_not_there_is_refused():
    with pytest.raises(KernelError, match="no backend 'cuda'"):
        selective_scan(**scan_inputs(3), backend="cuda")
