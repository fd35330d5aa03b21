"""The short causal convolution: every backend against the token-by-token reference."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from altx_kernels.causal_conv1d import CAUSAL_CONV1D, cases, causal_conv1d, native, vendor
from altx_kernels.op import KernelError

BACKENDS = ["native", "torch"]
EXAMPLES = {example.label: example for example in cases.examples()}


pytestmark = pytest.mark.usefixtures("one_thread")


def cast(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def one(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return value.detach().to(dtype).requires_grad_()

    return {name: one(value) for name, value in arguments.items()}


def run(arguments: dict[str, Any], **pin: Any) -> list[torch.Tensor]:
    """y, final state, and the gradients of all floating arguments through both."""
    y, final = causal_conv1d(**arguments, **pin)
    generator = torch.Generator().manual_seed(0)
    loss = sum((t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)).sum() for t in (y, final))
    leaves = [value for value in arguments.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    return [y.detach(), final.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


def assert_close(got, expected, tolerance):
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label", EXAMPLES)
def test_results_and_gradients_are_the_references(label, backend):
    arguments = dict(EXAMPLES[label].arguments)
    expected = run(arguments, backend="reference")
    assert_close(run(arguments, backend=backend), expected, 1e-12)
    single = run(cast(arguments, torch.float32), backend=backend)
    assert_close(single, expected, 1e-5)
    assert [t.dtype for t in single] == [torch.float32] * len(single)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_computed_in_float32(backend):
    arguments = cast(EXAMPLES["reset lengths state"].arguments, torch.bfloat16)
    expected = run(cast(arguments, torch.float64), backend="reference")
    result = run(arguments, backend=backend)
    assert {t.dtype for t in result} == {torch.bfloat16}
    assert_close(result, expected, 1e-2)
    mixed = arguments | {"initial_state": arguments["initial_state"].detach().float()}
    y, final = causal_conv1d(**mixed, backend=backend)
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    arguments = dict(EXAMPLES["reset lengths state"].arguments)
    names = ("x", "weight", "bias", "initial_state")

    def fn(*values):
        return causal_conv1d(**(arguments | dict(zip(names, values, strict=True))), backend=backend)

    assert torch.autograd.gradcheck(fn, tuple(arguments[name] for name in names), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_are_right_and_left_as_they_were(backend):
    plain = dict(EXAMPLES["lengths state"].arguments)
    expected = run(plain, backend="reference")
    halves = torch.cat([plain["x"].detach(), torch.full_like(plain["x"], torch.nan)], -1)
    for x in (
        halves.chunk(2, -1)[0],
        plain["x"].detach().mT.contiguous().mT,
        plain["x"].detach()[:1].expand(2, -1, -1),
    ):
        copy = x.clone()
        arguments = plain | {
            "x": x.detach().requires_grad_(), "weight": plain["weight"].detach().T.contiguous().T.requires_grad_(),
        }  # fmt: skip
        if x.stride(0):
            assert_close(run(arguments, backend=backend), expected, 1e-12)
        else:
            assert_close(run(arguments, backend=backend), run(arguments, backend="reference"), 1e-12)
        assert torch.equal(x, copy)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_sequence_in_pieces_is_the_sequence(backend):
    arguments = dict(EXAMPLES["B=2 T=33 D=21 K=4 state silu"].arguments)
    whole, last = causal_conv1d(**arguments, backend=backend)
    state, pieces = arguments["initial_state"], []
    for piece in arguments["x"].split([1, 2, 0, 17, 1, 12], 1):
        y, state = causal_conv1d(**(arguments | {"x": piece, "initial_state": state}), backend=backend)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    assert torch.equal(state, last)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_right_padding_leaves_the_state_of_the_last_real_token(backend):
    arguments = dict(EXAMPLES["reset state"].arguments)
    lengths = torch.tensor([14, 0])
    _, padded = causal_conv1d(**arguments, lengths=lengths, backend=backend)
    for row, length in enumerate(lengths.tolist()):
        alone = {name: arguments[name][row : row + 1] for name in ("x", "reset", "initial_state")}
        alone |= {"x": alone["x"][:, :length], "reset": alone["reset"][:, :length]}
        _, final = causal_conv1d(**(arguments | alone), backend=backend)
        assert torch.equal(padded[row], final[0])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nan_stays_in_its_row_its_channel_and_its_sequence(backend):
    arguments = {
        name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in EXAMPLES["reset"].arguments.items()
    }
    reset = torch.zeros(2, 29, dtype=torch.bool)
    reset[0, 12] = True
    x = arguments["x"].clone()
    x[0, 10, 4] = torch.nan
    result = run(arguments | {"x": x.requires_grad_(), "reset": reset}, backend=backend)
    y, dx = result[0], result[2]
    bad = torch.zeros_like(y, dtype=torch.bool)
    bad[0, 10:12, 4] = True
    assert torch.equal(y.isnan(), bad)
    assert not dx[0, 12:].isnan().any() and not dx[1].isnan().any()
    assert not dx[0, :, :4].isnan().any() and not dx[0, :, 5:].isnan().any()


@pytest.mark.parametrize("dim", [64, 200])
def test_any_number_of_threads_gives_the_same_bits(dim):
    arguments = cast(cases.call(2, 600, dim, 4, state=True, activation=True), torch.float32)
    assert arguments["x"].numel() >= native.SERIAL
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(arguments, backend="native"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_sums_over_many_tokens_stay_exact_in_float32():
    arguments = cases.call(1, 20000, 16, 4)
    exact, single = run(arguments, backend="native"), run(cast(arguments, torch.float32), backend="native")
    assert_close(single[3:], exact[3:], 1e-6)


@pytest.mark.parametrize("grad", [True, False])
def test_the_primitive_is_what_torch_expects(grad):
    arguments = EXAMPLES["reset lengths state"].arguments
    tensors = [arguments[name].detach().requires_grad_(grad) for name in ("x", "weight", "bias", "initial_state")]
    torch.library.opcheck(native.FORWARD.op, (*tensors, arguments["reset"], None, arguments["lengths"], True))
    torch.library.opcheck(native.FORWARD.op, (*tensors[:2], None, None, None, None, None, False))


@pytest.mark.parametrize("label", ["lengths state", "packed reset state"])
def test_compiles_into_one_graph(label):
    arguments = dict(EXAMPLES[label].arguments)
    torch._dynamo.reset()

    def fn(arguments):
        return causal_conv1d(**arguments)

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(arguments), fn(arguments), strict=True):
        torch.testing.assert_close(one, other)
    sum(t.sum() for t in compiled(arguments)).backward()
    assert CAUSAL_CONV1D.choose(**arguments).backend == "native"


def test_bounds_out_of_bounds_are_refused_in_a_compiled_graph_too():
    arguments = {"x": torch.ones(1, 20, 3), "weight": torch.ones(3, 4)}
    torch._dynamo.reset()
    compiled = torch.compile(causal_conv1d, fullgraph=True, backend="eager")
    compiled(**arguments, cu_seqlens=torch.tensor([0, 4, 20]))
    with pytest.raises(KernelError, match="does not rise from 0 to the 20 tokens"):
        compiled(**arguments, cu_seqlens=torch.tensor([0, 4, 2000]))


def test_shapes_are_known_without_data():
    x, weight = torch.empty(2, 5, 3, device="meta"), torch.empty(3, 4, device="meta")
    assert "meta" in CAUSAL_CONV1D.choose(x, weight).refused["native"]
    y, final = causal_conv1d(x, weight)
    assert y.shape == (2, 5, 3) and final.shape == (2, 3, 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight": torch.ones(4, 4)}, "weight has shape"),
        ({"weight": torch.ones(3, 0)}, "no taps"),
        ({"bias": torch.ones(4)}, "bias has shape"),
        ({"initial_state": torch.ones(2, 4, 3)}, "initial_state has shape"),
        ({"reset": torch.ones(2, 5)}, "reset has dtype"),
        ({"lengths": torch.tensor([1, 6])}, "0 to 5"),
        ({"lengths": torch.tensor([1.0, 2.0])}, "lengths has dtype"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "one row"),
        ({"x": torch.ones(2, 5, 3, dtype=torch.int64)}, "x has dtype"),
    ],
)
def test_wrong_arguments_are_refused_in_words(wrong, message):
    right = {"x": torch.ones(2, 5, 3), "weight": torch.ones(3, 4)}
    with pytest.raises(KernelError, match=message):
        causal_conv1d(**(right | wrong))


def test_padding_and_packing_exclude_each_other():
    with pytest.raises(KernelError, match="exclude"):
        causal_conv1d(torch.ones(1, 5, 3), torch.ones(3, 4), cu_seqlens=torch.tensor([0, 5]), lengths=torch.tensor([5]))


def stub(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
    """What causal_conv1d_fn does, x (B, D, T), slowly."""
    assert x.stride(1) == 1 and (seq_idx is None or initial_states is None) and activation in (None, "silu")
    assert initial_states is None or initial_states.stride(1) == 1
    reset = None
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32
        reset = seq_idx.diff(dim=1, prepend=torch.zeros(len(x), 1, dtype=torch.int32)) > 0
    state = None if initial_states is None else initial_states.mT
    y, _ = causal_conv1d(
        x.mT, weight, bias, initial_state=state, reset=reset, activation=activation == "silu", backend="reference"
    )
    return y.mT


VENDOR = ["plain", "state", "reset", "lengths", "packed", "packed reset"]


@pytest.mark.parametrize("kind", VENDOR)
def test_the_vendors_function_gets_what_it_expects(kind, monkeypatch):
    module = ModuleType("causal_conv1d")
    module.causal_conv1d_fn = stub
    monkeypatch.setitem(sys.modules, "causal_conv1d", module)
    arguments = cases.call(1 if "packed" in kind else 2, 29, 16, 4, activation=True, state=kind in ("state", "lengths"))
    if kind == "lengths":
        arguments["lengths"] = EXAMPLES["lengths"].arguments["lengths"]
    if "packed" in kind:
        arguments["cu_seqlens"] = torch.tensor([0, 2, 2, 13, 29, 29])
    if "reset" in kind:
        arguments["reset"] = EXAMPLES["reset"].arguments["reset"][: len(arguments["x"])]
    arguments = cast(arguments, torch.float32)
    expected = run(arguments, backend="reference")
    y, final = vendor.causal_conv1d(**arguments)
    assert_close([y.detach(), final.detach()], expected[:2], 1e-6)


@pytest.fixture
def probe():
    """The probe for the vendor's package, which remembers what it found, as if never asked."""
    vendor.probe.cache_clear()
    yield vendor.probe
    vendor.probe.cache_clear()


def test_the_vendors_absence_is_put_into_words(probe, monkeypatch):
    monkeypatch.setattr(vendor, "find_spec", lambda _: None)
    assert "not installed" in probe()
    monkeypatch.setattr(vendor, "find_spec", lambda _: object())
    probe.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA" in probe()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    probe.cache_clear()
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    assert "importing causal_conv1d fails" in probe()
    monkeypatch.setitem(sys.modules, "causal_conv1d", ModuleType("causal_conv1d"))
    probe.cache_clear()
    assert probe() is None and vendor.absent() is None


def test_what_the_vendor_cannot_run_is_put_into_words():
    class OnCuda:
        """A tensor's description, as there may be no GPU to have one on."""

        def __init__(self, *shape, dtype=torch.float32):
            self.tensor, self.device = torch.empty(shape, dtype=dtype), torch.device("cuda:0")

        def __getattr__(self, name):
            return getattr(self.tensor, name)

    x, weight, state = OnCuda(2, 16, 8), OnCuda(8, 4), OnCuda(2, 3, 8)
    assert vendor.unavailable(x, weight) is None
    assert vendor.unavailable(x, weight, initial_state=state) is None
    assert "CUDA" in vendor.unavailable(torch.ones(2, 16, 8), weight)
    assert "taps" in vendor.unavailable(x, OnCuda(8, 5))
    assert "float64" in vendor.unavailable(x, weight, OnCuda(8, dtype=torch.float64))
    assert "not both" in vendor.unavailable(x, weight, initial_state=state, reset=torch.ones(2, 16) > 0)
    assert "multiples of 8" in vendor.unavailable(OnCuda(2, 16, 12), OnCuda(12, 4))
    assert "no tokens" in vendor.unavailable(OnCuda(2, 0, 8), weight)
