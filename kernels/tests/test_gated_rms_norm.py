"""The gated RMS norm: every backend against the reference in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from altx_kernels.examples import randn
from altx_kernels.gated_rms_norm import GATED_RMS_NORM, cases, gated_rms_norm, native
from altx_kernels.op import KernelError
from altx_kernels.verify import verify

BACKENDS = ["reference", "native"]
KINDS = {"no gate": {"gate": False}, "gate first": {}, "gate last": {"gate_first": False}}


pytestmark = pytest.mark.usefixtures("one_thread")


def run(arguments: dict[str, Any], backend: str) -> list[torch.Tensor]:
    """The result, and the gradients of all tensors."""
    out = gated_rms_norm(**arguments, backend=backend)
    leaves = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad((out * weights.to(out)).sum(), leaves)]


def single(arguments: dict[str, Any]) -> dict[str, Any]:
    return {n: v.detach().float().requires_grad_() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}


def test_it_is_what_it_says():
    y, z, weight = randn(3, 4), randn(3, 4, seed=1), randn(4, seed=2)
    for first in (True, False):
        u = y * F.silu(z) if first else y
        rms = (u.unflatten(1, (2, 2)).square().mean(2, keepdim=True) + 0.1).sqrt().expand(3, 2, 2).reshape(3, 4)
        expected = weight * u / rms * (1 if first else F.silu(z))
        for backend in BACKENDS:
            result = gated_rms_norm(y, z, weight, eps=0.1, group_size=2, gate_first=first, backend=backend)
            torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_and_gradients_are_right_in_every_dtype_and_layout(backend):
    findings = list(verify(GATED_RMS_NORM, [backend], devices=["cpu"]))
    assert len(findings) == 4
    for finding in findings:
        assert finding.status == "passed" and not finding.skipped, finding


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    arguments = cases.call(2, 3, 22, groups=2, **KINDS[kind])
    names = [name for name in ("y", "z", "weight") if arguments[name] is not None]

    def fn(*values):
        return gated_rms_norm(**(arguments | dict(zip(names, values, strict=True))), backend="native")

    assert torch.autograd.gradcheck(fn, [arguments[name] for name in names], fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_may_be_mixed(kind):
    arguments = cases.call(2, 5, 20, **KINDS[kind])
    mixed = arguments | {"y": arguments["y"].detach().bfloat16().requires_grad_()}
    mixed["weight"] = arguments["weight"].detach().float().requires_grad_()
    for result, expected in zip(run(mixed, "native"), run(mixed, "reference"), strict=True):
        assert result.dtype == expected.dtype
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("shape", [(2, 6, 48), (2, 6, 3, 16), (12, 48), (48,)])
def test_slices_of_a_projection_are_read_where_they_lie(shape):
    wide = randn(*shape[:-1], 2 * shape[-1] + 5, grad=False)
    y, z = wide[..., : shape[-1]], wide[..., shape[-1] + 2 : 2 * shape[-1] + 2]
    weight = randn(shape[-1])
    expected = gated_rms_norm(y, z, weight, eps=1e-5, group_size=8, backend="reference")
    for tensor in (y, z):
        assert native._rows(tensor, tensor.dtype).data_ptr() == tensor.data_ptr()
    torch.testing.assert_close(gated_rms_norm(y, z, weight, eps=1e-5, group_size=8, backend="native"), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["y", "z"])
@pytest.mark.parametrize("kind", ["gate first", "gate last"])
def test_nan_stays_in_its_row(backend, name, kind):
    arguments = cases.call(2, 9, 40, groups=2, **KINDS[kind])
    arguments[name] = arguments[name].detach().clone()
    arguments[name][1, 4, 7] = torch.nan
    arguments[name].requires_grad_()
    for result in run(arguments, backend)[:3]:
        assert result[1, 4, 7].isnan() and not result[1, 4, 20:].isnan().any()
        result[1, 4] = 0
        assert not result.isnan().any()


def test_large_gates_neither_overflow_nor_lose_their_gradients():
    arguments = single(cases.call(4, 32))
    with torch.no_grad():
        arguments["z"][0], arguments["z"][1] = 200, -200
    for result, expected in zip(run(arguments, "native"), run(arguments, "reference"), strict=True):
        assert expected.isfinite().all()
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_threads_gives_the_same_bits(kind):
    arguments = single(cases.call(2, 333, 200, groups=5, **KINDS[kind]))
    arguments = {n: v for n, v in arguments.items() if v is not None}
    arguments.setdefault("z", None)
    assert arguments["y"].numel() >= native.SERIAL
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(arguments, "native"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_sums_over_many_rows_stay_exact_in_float32():
    arguments = cases.call(20000, 16)
    exact, rough = run(arguments, "native")[3], run(single(arguments), "native")[3]
    torch.testing.assert_close(rough.double(), exact, rtol=0, atol=1e-6 * float(exact.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [True, False])
def test_the_primitive_is_what_torch_expects(kind, grad):
    arguments = cases.call(2, 3, 22, groups=2, **KINDS[kind])
    tensors = [None if v is None else v.detach().requires_grad_(grad) for v in list(arguments.values())[:3]]
    torch.library.opcheck(native.FORWARD.op, (*tensors, 1e-5, 11, arguments["gate_first"]))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_into_one_graph(kind):
    arguments = cases.call(2, 5, 20, **KINDS[kind])
    torch._dynamo.reset()

    def fn(arguments):
        return gated_rms_norm(**arguments)

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(arguments), fn(arguments))
    y = arguments["y"]
    gradients = [torch.autograd.grad(f(arguments).square().sum(), y)[0] for f in (compiled, fn)]
    torch.testing.assert_close(*gradients)
    assert GATED_RMS_NORM.choose(**arguments).backend == "native"


def test_shapes_are_known_without_data():
    y, weight = torch.empty(2, 5, 6, device="meta"), torch.empty(6, device="meta")
    arguments = {"eps": 1e-5, "group_size": 3, "gate_first": True}
    assert "meta" in GATED_RMS_NORM.choose(y, y, weight, **arguments).refused["native"]
    assert gated_rms_norm(y, y, weight, **arguments).shape == (2, 5, 6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight": torch.ones(5)}, "weight has shape"),
        ({"z": torch.ones(2, 5, 3)}, "z has shape"),
        ({"z": torch.ones(5, 6)}, "z has shape"),
        ({"y": torch.tensor(1.0)}, "y has shape"),
        ({"y": torch.ones(2, 5, 6, dtype=torch.int64)}, "y has dtype"),
        ({"group_size": 4}, "groups of 4"),
        ({"group_size": 0}, "groups of 0"),
    ],
)
def test_wrong_arguments_are_refused_in_words(wrong, message):
    right = {"y": torch.ones(2, 5, 6), "z": torch.ones(2, 5, 6), "weight": torch.ones(6), "eps": 1e-5, "group_size": 3}
    with pytest.raises(KernelError, match=message):
        gated_rms_norm(**(right | wrong))
