"""The delta rule: every backend against the token-by-token reference, and that against what the papers write."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from altx_kernels.delta_rule import DELTA_RULE, cases, delta_rule, native, reference, vendor
from altx_kernels.examples import randn
from altx_kernels.op import KernelError
from altx_kernels.verify import verify

BACKENDS = ["native", "torch"]
EXAMPLES = {example.label: example for example in cases.examples()}
FLOATS = ("q", "k", "v", "a", "b", "g", "initial_state")


pytestmark = pytest.mark.usefixtures("one_thread")


def without_gradients(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.detach().clone() if isinstance(x, Tensor) else x for name, x in arguments.items()}


def run(arguments: dict[str, Any], **pin: Any) -> list[Tensor]:
    """o, the last state, and the gradients of all floating arguments through both."""
    leaves = {name: x.detach().requires_grad_() for name in FLOATS if (x := arguments.get(name)) is not None}
    o, state = delta_rule(**(arguments | leaves), **pin)
    loss = sum((x * randn(*x.shape, grad=False).to(x)).sum() for x in (o, state))
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return [o.detach(), state.detach(), *gradients]


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip((x.detach() for x in got), (x.detach() for x in expected), strict=True):
        assert one.shape == other.shape
        scale = float(other.abs().max()) if other.numel() else 1.0
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=tolerance * scale)


# The papers' recurrences, with S of V x K (but for KDA) and the transition as a matrix.


def deltanet(q, k, v, beta):
    S, out, eye = torch.zeros(v.shape[1], q.shape[1], dtype=q.dtype), [], torch.eye(q.shape[1], dtype=q.dtype)
    for t in range(len(q)):
        S = S @ (eye - beta[t] * torch.outer(k[t], k[t])) + beta[t] * torch.outer(v[t], k[t])
        out.append(S @ q[t])
    return torch.stack(out), S.T


def gated_deltanet(q, k, v, beta, alpha):
    S, out, eye = torch.zeros(v.shape[1], q.shape[1], dtype=q.dtype), [], torch.eye(q.shape[1], dtype=q.dtype)
    for t in range(len(q)):
        S = S @ (alpha[t] * (eye - beta[t] * torch.outer(k[t], k[t]))) + beta[t] * torch.outer(v[t], k[t])
        out.append(S @ q[t])
    return torch.stack(out), S.T


def kda(q, k, v, beta, alpha):
    S, out, eye = torch.zeros(q.shape[1], v.shape[1], dtype=q.dtype), [], torch.eye(q.shape[1], dtype=q.dtype)
    for t in range(len(q)):
        S = (eye - beta[t] * torch.outer(k[t], k[t])) @ torch.diag(alpha[t]) @ S + beta[t] * torch.outer(k[t], v[t])
        out.append(S.T @ q[t])
    return torch.stack(out), S


def rwkv7(r, w, k, v, kappa, iclr):
    S, out = torch.zeros(v.shape[1], r.shape[1], dtype=r.dtype), []
    for t in range(len(r)):
        S = S @ (torch.diag(w[t]) - torch.outer(kappa[t], iclr[t] * kappa[t])) + torch.outer(v[t], k[t])
        out.append(S @ r[t])
    return torch.stack(out), S.T


def numbers(*shape, seed):
    return randn(*shape, seed=seed, grad=False)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet", "kda", "rwkv7"])
def test_each_family_is_what_its_paper_writes(name, backend):
    T, K, V = 21, 6, 9
    q, v, k = numbers(T, K, seed=1), numbers(T, V, seed=2), normalize(numbers(T, K, seed=3), dim=-1)
    beta, key = torch.sigmoid(numbers(T, seed=4)), -torch.sigmoid(numbers(T, K, seed=5))
    a, g, write = -beta[:, None] * k, None, beta[:, None] * v
    if name == "deltanet":
        expected = deltanet(q, k, v, beta)
        b = k
    elif name == "gated_deltanet":
        g = torch.log(torch.sigmoid(numbers(T, seed=6)))
        expected = gated_deltanet(q, k, v, beta, g.exp())
        b = g.exp()[:, None] * k
    elif name == "kda":
        g = key
        expected = kda(q, k, v, beta, g.exp())
        b = g.exp() * k
    else:
        kappa, iclr, g = normalize(numbers(T, K, seed=7), dim=-1), torch.sigmoid(numbers(T, K, seed=8)), key
        expected = rwkv7(q, g.exp(), k, v, kappa, iclr)
        a, b, write = -iclr * kappa, kappa, v
    call = [x if x is None else x[None, :, None] for x in (q, k, write, a, b, g)]
    o, state = delta_rule(*call, backend=backend)
    assert_close([o[0, :, 0], state[0, 0]], list(expected), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_and_gradients_are_the_references(backend, dtype):
    (finding,) = verify(DELTA_RULE, [backend], dtypes=[dtype], devices=["cpu"])
    assert finding.status == "passed", finding


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("K, V", [(1, 1), (64, 64), (40, 200), (130, 33)])
def test_every_width_is_right(K, V, backend):
    arguments = cases.example("key", 1, 70, 2, K, V, state=True, reset=True).arguments
    assert_close(run(arguments, backend=backend), run(arguments, backend="reference"), 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decay", cases.DECAYS)
def test_gradcheck(decay, backend):
    arguments = cases.example(decay, 2, 11, 1, 3, 4, state=True, reset=True).arguments
    names = [name for name in FLOATS if arguments[name] is not None]

    def fn(*values):
        return delta_rule(**(dict(arguments) | dict(zip(names, values, strict=True))), backend=backend)

    assert torch.autograd.gradcheck(fn, tuple(arguments[name] for name in names), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decay", ["head", "key"])
def test_strong_decays_are_right_in_float32(decay, backend):
    arguments = cases.example(decay, 1, 200, 2, 16, 16, state=True, reset=True, strong=True).arguments
    single = {n: x.detach().float() if n in FLOATS and x is not None else x for n, x in arguments.items()}
    result = run(single, backend=backend)
    assert all(x.isfinite().all() for x in result)
    assert_close(
        result, run({n: x.double() if n in FLOATS else x for n, x in single.items()}, backend="reference"), 1e-5
    )


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_sequence_in_pieces_is_the_sequence(backend):
    arguments = cases.example("key", 2, 70, 2, 5, 7, state=True, reset=True).arguments
    whole, last = delta_rule(**arguments, backend=backend)
    state, outputs, start = arguments["initial_state"], [], 0
    for size in (1, 2, 0, 33, 1, 33):
        piece = {n: x[:, start : start + size] for n, x in arguments.items() if x is not None and n != "initial_state"}
        o, state = delta_rule(**(piece | {"initial_state": state}), backend=backend)
        outputs.append(o)
        start += size
    assert_close([torch.cat(outputs, 1), state], [whole, last], 1e-12)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_packed_sequences_are_separate_ones(backend):
    cuts = [0, 17, 17, 18, 90]
    arguments = without_gradients(cases.example("head", 1, 90, 2, 9, 11, state=True, reset=True, cuts=cuts).arguments)
    packed, states = delta_rule(**arguments, backend=backend)
    arguments.pop("cu_seqlens")
    for n, (start, stop) in enumerate(pairwise(cuts)):
        alone = {name: x[:, start:stop] for name, x in arguments.items()}
        alone["initial_state"] = arguments["initial_state"][n : n + 1]
        o, state = delta_rule(**alone, backend=backend)
        assert_close([packed[:, start:stop], states[n : n + 1]], [o, state], 1e-12)


def test_nan_stays_in_its_row_head_and_channel_and_ends_at_a_reset_in_the_reference():
    arguments = without_gradients(cases.example("key", 2, 80, 2, 5, 7, state=True).arguments)
    arguments["reset"] = torch.zeros(2, 80, dtype=torch.bool)
    arguments["reset"][0, 60] = True
    arguments["v"][0, 40, 1, 3] = torch.nan
    o, state = delta_rule(**arguments, backend="reference")
    bad = torch.zeros_like(o, dtype=torch.bool)
    bad[0, 40:60, 1, 3] = True
    assert torch.equal(o.isnan(), bad) and state.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row_head_and_channel_in_chunks(backend):
    arguments = without_gradients(cases.example("key", 2, 80, 2, 5, 7, state=True).arguments)
    arguments["v"][0, 40, 1, 3] = torch.nan
    o, _, dq, *_, dstate = run(arguments, backend=backend)
    may = torch.zeros_like(o, dtype=torch.bool)
    may[0, 32:, 1, 3] = True
    assert o[0, 40:, 1, 3].isnan().all() and not (o.isnan() & ~may).any()
    assert dq[1].isfinite().all() and dq[0, :, 0].isfinite().all() and dstate[1].isfinite().all()


@pytest.mark.parametrize("decay", cases.DECAYS)
@pytest.mark.parametrize("length", [11, 12, 13, 15, 16, 17, 31, 32, 33, 48, 49, 64])
def test_every_border_of_a_chunk_is_right(length, decay):
    arguments = cases.example(decay, 1, length, 3, 5, 7, state=True, reset=True).arguments
    expected = run(arguments, backend="reference")
    assert_close(run(arguments, backend="native"), expected, 1e-11)
    assert_close(list(delta_rule(**without_gradients(arguments), backend="native")), expected[:2], 1e-11)


@pytest.mark.parametrize("decay", cases.DECAYS)
def test_a_may_be_k_itself(decay):
    arguments = cases.example(decay, 2, 70, 2, 20, 70, state=True, reset=True).arguments
    beta = torch.sigmoid(numbers(2, 70, 2, 1, seed=9))
    for of_a in (lambda k: k, Tensor.detach):  # the same numbers, with the gradient of both or of one
        results = []
        for backend in ("reference", "native"):
            k = (arguments["k"].detach() * beta).requires_grad_()
            o, state = delta_rule(**(arguments | {"k": k, "a": of_a(k), "b": -arguments["b"]}), backend=backend)
            results.append([o, state, *torch.autograd.grad((o.sum() + state.sum()) * 2, [k, arguments["v"]])])
        assert_close(results[1], results[0], 1e-12)


@pytest.mark.parametrize("heads", [1, 3])
def test_threads_do_not_change_the_result(heads):
    arguments = cases.example("key", 1, 300, heads, 64, 160, state=True).arguments
    assert arguments["v"].numel() * 64 >= native.SERIAL
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(run(arguments, backend="native"))
        assert all(torch.equal(*pair) for pair in zip(results[-1], run(arguments, backend="native"), strict=True))
    for other in results[1:]:
        assert_close(other, results[0], 1e-13)


def test_tokens_with_a_stride_are_read_where_they_lie():
    q, k, v, a, b = randn(2, 9, 5 * 12, grad=False).view(2, 9, 5, 3, 4).unbind(2)
    g = -numbers(2, 9, 3, seed=3).abs()
    rows, strides = native._per_token(q, k, v, a, b, g)
    assert [x.data_ptr() for x in rows] == [x.data_ptr() for x in (q, k, v, a, b, g)] and strides == [60] * 5 + [3]
    expected = delta_rule(*(x.contiguous() for x in (q, k, v, a, b)), g, backend="reference")
    assert_close(list(delta_rule(q, k, v, a, b, g, backend="native")), list(expected), 1e-12)
    steps = [x[:, 4:5] for x in (q, k, v, a, b, g)]  # a stride per row that is none per token
    assert_close(list(delta_rule(*steps, backend="native")), list(delta_rule(*steps, backend="reference")), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_gradient_may_be_all_that_is_wanted(backend):
    arguments = without_gradients(cases.example("key", 1, 40, 2, 5, 7, state=True).arguments)
    arguments["initial_state"].requires_grad_()
    for pick in (0, 1):
        results = []
        for name in ("reference", backend):
            output = delta_rule(**arguments, backend=name)[pick]
            results.append(torch.autograd.grad(output.sum(), arguments["initial_state"])[0])
        assert_close(results[1:], results[:1], 1e-12)


def test_without_gradients_no_states_are_kept(monkeypatch):
    kept = []
    forward = native.FORWARD
    monkeypatch.setattr(native, "FORWARD", lambda *args: kept.append(forward(*args)) or kept[-1])
    arguments = cases.example("none", 1, 70, 2, 5, 7).arguments
    with torch.no_grad():
        delta_rule(**arguments, backend="native")
    assert [x.numel() for x in kept[0][2:]] == [0, 0]
    delta_rule(**arguments, backend="native")
    assert all(x.numel() for x in kept[1][2:])


@pytest.mark.parametrize("grad", [True, False])
def test_the_primitives_are_what_torch_expects(grad):
    arguments = cases.example("head", 1, 40, 2, 5, 7, state=True, reset=True, cuts=[0, 3, 40]).arguments
    call = [arguments[name].detach().requires_grad_(grad) for name in FLOATS]
    rest = (arguments["reset"], arguments["cu_seqlens"], grad)
    torch.library.opcheck(native.FORWARD.op, (*call, *rest))
    torch.library.opcheck(native.FORWARD.op, (*call[:5], None, None, None, None, grad))


# The compiler itself makes an object of an autograd.Function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("backend", "decay"), [("native", "none"), ("native", "key"), ("torch", "key")])
def test_compiles_into_one_graph(backend, decay):
    arguments = cases.example(decay, 2, 17, 2, 5, 7, state=True, reset=True).arguments
    torch._dynamo.reset()

    def fn(arguments):
        return delta_rule(**arguments, backend=None if backend == "native" else backend)

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    leaves = [x for x in arguments.values() if x is not None and x.requires_grad]
    results = []
    for call in (compiled, fn):
        o, state = call(arguments)
        results.append([o, state, *torch.autograd.grad(o.sum() + state.sum(), leaves)])
    assert_close(results[0], results[1], 1e-12)
    assert DELTA_RULE.choose(**arguments).backend == "native"


def test_new_lengths_do_not_compile_anew():
    torch._dynamo.reset()
    compiled = torch.compile(delta_rule, fullgraph=True, backend="aot_eager", dynamic=True)
    arguments = without_gradients(cases.example("key", 2, 40, 2, 5, 7, state=True).arguments)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for length in (40, 33, 7):
            piece = {n: x[:, :length].clone() for n, x in arguments.items() if x is not None and n != "initial_state"}
            piece["initial_state"] = arguments["initial_state"]
            assert_close(list(compiled(**piece)), list(delta_rule(**piece)), 1e-12)


def test_shapes_are_known_without_data():
    def empty(*shape):
        return torch.empty(*shape, device="meta", dtype=torch.bfloat16, requires_grad=True)

    call = [empty(2, 70, 3, 4), empty(2, 70, 3, 4), empty(2, 70, 3, 5), empty(2, 70, 3, 4), empty(2, 70, 3, 4)]
    assert "meta" in DELTA_RULE.choose(*call).refused["native"]
    for g in (None, empty(2, 70, 3), empty(2, 70, 3, 4)):
        o, state = delta_rule(*call, g)
        assert (o.shape, o.dtype) == ((2, 70, 3, 5), torch.bfloat16)
        assert (state.shape, state.dtype) == ((2, 3, 4, 5), torch.float32)
        assert [x.shape for x in torch.autograd.grad(o.sum(), call)] == [x.shape for x in call]


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_inside(backend):
    arguments = cases.example("head", 1, 33, 2, 5, 7).arguments
    single = {n: x.detach().float() if n in FLOATS and x is not None else x for n, x in arguments.items()}
    expected = run(single, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(run(single, backend=backend), expected, 1e-7)


def test_inputs_stay_as_they_were():
    arguments = without_gradients(EXAMPLES["decay=key B=1 T=70 H=2 K=6 V=10 state strong"].arguments)
    for backend in BACKENDS:
        copies = without_gradients(arguments)
        run(arguments, backend=backend)
        assert all(torch.equal(x, copies[name]) for name, x in arguments.items() if x is not None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": torch.ones(2, 5, 3, 5)}, "k has shape"),
        ({"a": torch.ones(2, 5, 3)}, "a has shape"),
        ({"g": torch.ones(2, 5, 3, 6)}, "g has shape"),
        ({"g": torch.ones(2, 5)}, "g has shape"),
        ({"initial_state": torch.ones(2, 3, 6, 4)}, "initial_state has shape"),
        ({"reset": torch.ones(2, 5)}, "reset has dtype"),
        ({"b": torch.ones(2, 5, 3, 4, dtype=torch.int64)}, "b has dtype"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "one row"),
    ],
)
def test_wrong_arguments_are_refused_in_words(wrong, message):
    right = {name: torch.ones(2, 5, 3, 4) for name in "qkab"} | {"v": torch.ones(2, 5, 3, 6)}
    with pytest.raises(KernelError, match=message):
        delta_rule(**(right | wrong))


def stub(q, k, v, a, b, gk, scale, initial_state, output_final_state, cu_seqlens):
    """What fla's chunk_dplr_delta_rule does: S = exp(gk) S + b (a^T S) + k v^T."""
    assert scale == 1.0 and output_final_state and gk.shape == q.shape and gk.dtype == torch.float32
    assert q.dtype == k.dtype == v.dtype == a.dtype == b.dtype
    assert cu_seqlens is None or cu_seqlens.dtype == torch.int64
    return reference.delta_rule(q, k, v, b, a, gk, initial_state=initial_state, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("packed", [False, True])
def test_the_vendors_function_gets_what_it_expects(packed, monkeypatch):
    module = ModuleType(vendor.MODULE)
    module.chunk_dplr_delta_rule = stub
    monkeypatch.setitem(sys.modules, vendor.MODULE, module)
    cuts = [0, 2, 2, 40] if packed else None
    arguments = without_gradients(cases.example("none", 1, 40, 2, 5, 7, state=True, cuts=cuts).arguments)
    arguments |= {name: arguments[name].bfloat16() for name in FLOATS if arguments[name] is not None}
    o, state = vendor.delta_rule(**arguments)
    expected = reference.delta_rule(**arguments)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert_close([o, state], list(expected), 1e-6)


@pytest.fixture
def probe():
    """The probe for the vendor's package, which remembers what it found, as if never asked."""
    vendor.probe.cache_clear()
    yield vendor.probe
    vendor.probe.cache_clear()


def test_the_vendors_absence_is_put_into_words(probe, monkeypatch):
    def now():
        probe.cache_clear()
        return vendor.absent()

    monkeypatch.setattr(vendor, "find_spec", lambda _: None)
    assert "not installed" in now()
    monkeypatch.setattr(vendor, "find_spec", lambda _: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA" in now()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, vendor.MODULE, None)
    monkeypatch.setitem(sys.modules, "fla.ops", ModuleType("fla.ops"))
    monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
    assert "importing fla fails" in now()
    monkeypatch.setitem(sys.modules, vendor.MODULE, ModuleType(vendor.MODULE))
    assert now() is None


def test_what_the_vendor_cannot_run_is_put_into_words():
    class OnCuda:
        """A tensor's description, as there may be no GPU to have one on."""

        def __init__(self, *shape, dtype=torch.bfloat16):
            self.tensor, self.device = torch.empty(shape, dtype=dtype), torch.device("cuda:0")

        def __getattr__(self, name):
            return getattr(self.tensor, name)

    x = OnCuda(2, 16, 3, 8)
    call = [x] * 5
    assert vendor.unavailable(*call) is None
    assert "CUDA" in vendor.unavailable(*[torch.ones(2, 16, 3, 8)] * 5)
    assert "no tokens" in vendor.unavailable(*[OnCuda(2, 0, 3, 8)] * 5)
    assert "bfloat16" in vendor.unavailable(*[OnCuda(2, 16, 3, 8, dtype=torch.float32)] * 5)
    assert "float64" in vendor.unavailable(*call, initial_state=OnCuda(2, 3, 8, 8, dtype=torch.float64))
    assert "256" in vendor.unavailable(*[OnCuda(2, 16, 3, 300)] * 5)
    assert "resets" in vendor.unavailable(*call, reset=torch.ones(2, 16) > 0)
    assert "NaN" in vendor.unavailable(*call, OnCuda(2, 16, 3))
