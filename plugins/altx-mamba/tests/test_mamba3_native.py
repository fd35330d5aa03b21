"""What is Mamba-3's own in C: angles, turned keys and queries, and the inputs of the token before."""

from __future__ import annotations

import math

import pytest
import torch
from altx_mamba.kernels.mamba3 import mamba3, native
from altx_mamba.kernels.mamba3.cases import example
from altx_mamba.kernels.mamba3.reference import TURN, rotate

from altx_kernels.examples import randn

pytestmark = pytest.mark.skipif(bool(native.LIBRARY.problem()), reason="no compiled code on this machine")


def inputs(B=2, T=40, H=4, P=5, G=2, N=10, R=3, *, reset=False, lengths=None, cuts=None, dtype=torch.float64):
    rows = B if cuts is None else len(cuts) - 1
    shapes = [
        (B, T, H, P), (B, T, H), (B, T, R), (B, T, G, N), (B, T, G, N), (H, N), (H, N), (B, T, H), (B, T, H),
        (rows, H, R), (rows, H, N), (rows, H, P),
    ]  # fmt: skip
    tensors = [randn(*shape, seed=seed).detach().to(dtype).requires_grad_() for seed, shape in enumerate(shapes)]
    return (
        *tensors,
        randn(B, T, seed=20, grad=False) > 1 if reset else None,
        None if lengths is None else torch.tensor(lengths),
        None if cuts is None else torch.tensor(cuts),
    )


def plain(x, dt, turns, B, C, B_bias, C_bias, a, w, angle, k, v, reset, lengths, cu_seqlens):
    """The equations as they stand, for one row or sequence after the other."""
    heads = x.shape[2] // B.shape[2]
    bounds = (
        [(row, 0, x.shape[1]) for row in range(len(x))]
        if cu_seqlens is None
        else [(0, *cut) for cut in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)]
    )
    found = [[], [], [], []]
    states = []
    for n, (row, start, stop) in enumerate(bounds):
        phi, key, value, last = angle[n], k[n], v[n], k[n]
        per_token = [[], [], [], []]
        for t in range(start, stop):
            if reset is not None and reset[row, t]:
                phi, key, value = 0 * phi, 0 * key, 0 * value
            phi = torch.remainder(phi + dt[row, t][:, None] * turns[row, t], TURN)
            own, query = (
                part[row, t].repeat_interleave(heads, 0) + bias for part, bias in ((B, B_bias), (C, C_bias))
            )  # fmt: skip
            values = (
                a[row, t][:, None] * rotate(query, phi), w[row, t][:, None] * key, value,
                (rotate(query, phi) * rotate(own, phi)).sum(-1),
            )  # fmt: skip
            for tokens, tensor in zip(per_token, values, strict=True):
                tokens.append(tensor)
            key, value = rotate(own, phi), x[row, t]
            if lengths is None or t < lengths[row]:
                last = key
        for all_tokens, tokens in zip(found, per_token, strict=True):
            all_tokens += tokens
        states.append((last, phi))
    shaped = [torch.stack(tokens).view(*x.shape[:2], *tokens[0].shape) for tokens in found]
    return (*shaped, *(torch.stack(state) for state in zip(*states, strict=True)))


def derived(values, floats, weights):
    return torch.autograd.grad(
        list(values), floats, weights, retain_graph=True, allow_unused=True, materialize_grads=True
    )  # fmt: skip


CASES = [
    {},
    {"reset": True},
    {"lengths": [40, 7]},
    {"lengths": [0, 39], "reset": True},
    {"B": 1, "cuts": [0, 0, 3, 31, 31, 32, 40, 40], "reset": True},
    {"T": 1},
    {"T": 33, "N": 8, "R": 4, "G": 4},
    {"T": 64, "N": 37, "R": 18, "G": 1, "P": 1},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_equals_the_equations_as_they_stand(case, dtype):
    given = inputs(**case, dtype=dtype)
    if given[13] is not None:
        padding = torch.arange(given[1].shape[1]) >= given[13][:, None]
        given = (given[0], given[1].masked_fill(padding[..., None], 0), *given[2:])
    floats = [value for value in given if value is not None and value.requires_grad]
    found, expected = native.turn(*given), plain(*given)
    bound = 1e-12 if dtype == torch.float64 else 2e-5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=bound, rtol=bound)
    weights = [randn(*value.shape, seed=30 + i, grad=False).to(dtype) for i, value in enumerate(found)]
    gradients = [derived(values, floats, weights) for values in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=10 * bound * float(other.abs().max()), rtol=0)


def test_each_output_has_gradients_by_itself():
    given = inputs(T=9, reset=True)
    floats = [value for value in given[:12] if value.requires_grad]
    for i, (found, expected) in enumerate(zip(native.turn(*given), plain(*given), strict=True)):
        weight = randn(*found.shape, seed=i, grad=False)
        gradients = [derived([value], floats, [weight]) for value in (found, expected)]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)


def test_angles_are_as_precise_after_many_tokens_as_after_few():
    given = [*inputs(1, 200_000, 1, 1, 1, 2, 1, dtype=torch.float32)]
    given[1], given[2] = given[1].detach().abs(), given[2].detach().abs()
    exact = (given[1].double() * given[2][:, :, 0].double()[..., None]).sum(1) + given[9].double()[..., 0]
    found = native.turn(*given)[5].double()[..., 0]
    error = torch.remainder(found - exact + math.pi, TURN) - math.pi
    assert exact.min() > 10_000
    assert error.abs().max() < 5e-7


def test_results_do_not_depend_on_the_number_of_threads():
    given = inputs(2, 300, 4, 8, 2, 64, 16, reset=True, dtype=torch.float32)
    assert native._threads(given[0], given[3]) == torch.get_num_threads()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs = native.turn(*given)
            gradients = torch.autograd.grad([value.sum() for value in outputs], given[:12])
            found.append([*outputs, *gradients])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_nothing_is_kept_where_no_gradient_is_wanted():
    given = inputs()
    keep = torch.ops.altx.mamba3_turn(*given, True)[6]
    with torch.no_grad():
        assert torch.ops.altx.mamba3_turn(*given, False)[6].numel() == 0
    assert keep.shape == (2, 40, 4, 3)


def test_torch_knows_what_it_is_told_of_it():
    given = inputs(T=7, reset=True)
    torch.library.opcheck(torch.ops.altx.mamba3_turn.default, (*given, True))
    packed = tuple(None if v is None else v.detach() for v in inputs(B=1, T=7, cuts=[0, 3, 7]))
    torch.library.opcheck(torch.ops.altx.mamba3_turn.default, (*packed, False))


def test_it_compiles_to_one_graph():
    values = example(2, 40, 4, 7, 2, 6, 2, state=True, reset=True, skip=True).arguments
    compiled = torch.compile(
        lambda **given: mamba3(**given, backend="native"), fullgraph=True, backend="aot_eager", dynamic=False
    )
    floats = [v for v in values.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    found, expected = compiled(**values), mamba3(**values, backend="native")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    gradients = (torch.autograd.grad([v.sum() for v in y], floats) for y in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
