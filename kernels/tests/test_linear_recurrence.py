"""The linear recurrence: every backend agrees with the papers' loop, whatever the decay and the batch."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from altx_kernels.examples import randn
from altx_kernels.linear_recurrence import OP, cases, linear_recurrence, native, vendor
from altx_kernels.linear_recurrence import torch as chunked
from altx_kernels.op import KernelError
from altx_kernels.verify import verify

FAST = ["native", "torch"]
EXAMPLES = {example.label: example for example in cases.examples()}
decays = pytest.mark.parametrize("decay", cases.DECAYS)
backends = pytest.mark.parametrize("backend", FAST)


pytestmark = pytest.mark.usefixtures("one_thread")


def call(decay: str, *sizes: int, dtype: torch.dtype = torch.float64, **options: Any) -> dict[str, Any]:
    """Arguments of an example, for sizes B, T, H, G, K, V."""
    arguments = cases.example(decay, *sizes, **options).arguments
    return {
        name: x.detach().to(dtype).requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in arguments.items()
    }


def run(arguments: dict[str, Any], **pin: Any) -> dict[str, torch.Tensor]:
    """Outputs and the gradients of everything through both of them."""
    o, S = linear_recurrence(**arguments, **pin)
    loss = sum((x * randn(*x.shape, seed=7, grad=False).to(x)).sum() for x in (o, S))
    leaves = {name: x for name, x in arguments.items() if torch.is_tensor(x) and x.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {"o": o.detach(), "S": S.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert got[name].shape == x.shape, name
        if x.numel():
            error = (got[name].double() - x.double()).abs().max() / x.double().abs().max().clamp(min=1e-3)
            assert error <= tolerance, f"{name}: {error}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@backends
def test_every_backend_agrees_with_the_reference(backend, dtype):
    for finding in verify(OP, [backend], dtypes=[dtype], devices=["cpu"]):
        assert finding.status == "passed", finding


@decays
def test_the_reference_is_the_sum_over_pairs_of_tokens(decay):
    arguments = call(decay, 1, 12, 2, 1, 3, 4)
    q, k, v, g = (arguments[name] for name in "qkvg")
    expected = torch.zeros_like(v)
    for h in range(2):
        for t in range(12):
            for s in range(t + 1):
                between = 0.0 if g is None else g[0, s + 1 : t + 1, h].sum(0)
                score = (q[0, t, 0] * k[0, s, 0] * torch.exp(torch.as_tensor(between))).sum()
                expected[0, t, h] += score * v[0, s, h]
    torch.testing.assert_close(linear_recurrence(q, k, v, g, backend="reference")[0], expected, rtol=1e-12, atol=1e-12)


@backends
@decays
def test_gradients_are_those_of_finite_differences(decay, backend):
    arguments = call(decay, 1, 37, 2, 1, 3, 5, state=True, reset=True)
    names = [name for name, x in arguments.items() if torch.is_tensor(x) and x.requires_grad]

    def fn(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return linear_recurrence(**{**arguments, **dict(zip(names, tensors, strict=True))}, backend=backend)

    assert gradcheck(fn, [arguments[name] for name in names], fast_mode=True)


@backends
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_a_log_decay_of_minus_infinity_forgets_as_a_reset_does(decay, backend):
    arguments = call(decay, 2, 90, 2, 1, 6, 7, state=True)
    at = torch.arange(90) % 13 == 5
    with torch.no_grad():
        arguments["g"][:, at] = -torch.inf
    forgotten = run(arguments, backend=backend)
    with torch.no_grad():
        arguments["g"][:, at] = -0.5
    reset = run({**arguments, "reset": at.expand(2, 90)}, backend=backend)
    assert_same(forgotten, reset, 1e-12)
    assert not forgotten["g"][:, at].any() and not reset["g"][:, at].any()


@backends
@decays
def test_a_sequence_in_pieces_is_the_sequence(decay, backend):
    arguments = call(decay, 1, 150, 4, 2, 8, 40, state=True, reset=True)
    whole = linear_recurrence(**arguments, backend=backend)
    S, os = arguments["initial_state"], []
    for start, stop in [(0, 1), (1, 3), (3, 70), (70, 149), (149, 150)]:
        piece = {
            n: None if arguments[n] is None else arguments[n][:, start:stop] for n in ("q", "k", "v", "g", "reset")
        }
        o, S = linear_recurrence(**piece, initial_state=S, backend=backend)
        os.append(o)
    torch.testing.assert_close(torch.cat(os, 1), whole[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(S, whole[1], rtol=1e-11, atol=1e-11)


@backends
@decays
def test_packed_sequences_are_separate_ones(decay, backend):
    cuts = [0, 0, 70, 71, 200, 200]
    arguments = call(decay, 1, 200, 2, 1, 8, 24, state=True, reset=True, cuts=cuts)
    o, S = linear_recurrence(**arguments, backend=backend)
    for n, (start, stop) in enumerate(pairwise(cuts)):
        piece = {
            n: None if arguments[n] is None else arguments[n][:, start:stop] for n in ("q", "k", "v", "g", "reset")
        }
        o_, S_ = linear_recurrence(**piece, initial_state=arguments["initial_state"][n : n + 1], backend=backend)
        torch.testing.assert_close(o[:, start:stop], o_, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(S[n : n + 1], S_, rtol=1e-11, atol=1e-11)


@backends
@decays
@pytest.mark.parametrize("where", ["q", "k", "v", "g", "initial_state"])
def test_a_nan_stays_in_its_row(where, decay, backend):
    arguments = call(decay, 3, 40, 2, 1, 5, 6, state=True)
    if arguments[where] is None:
        return
    clean = run(arguments, backend=backend)
    with torch.no_grad():
        arguments[where][(1, 0)] = torch.nan
    spoiled = run(arguments, backend=backend)
    assert spoiled["o"][1].isnan().any()
    for name, x in spoiled.items():
        for row in (0, 2):
            assert torch.equal(x[row], clean[name][row]), name


@backends
def test_decays_stronger_than_any_number_can_hold_stay_exact(backend):
    # exp(600) is too large for float32, and sums of such exponents are too coarse to be subtracted in it.
    for decay in ("head", "channel"):
        arguments = call(decay, 1, 64, 1, 1, 4, 4, dtype=torch.float32)
        with torch.no_grad():
            arguments["g"].fill_(-0.01)
            arguments["g"][:, ::2] = -600.0
        exact = {n: x.detach().double().requires_grad_() if torch.is_tensor(x) else x for n, x in arguments.items()}
        assert_same(run(arguments, backend=backend), run(exact, backend="reference"), 1e-6)


@backends
@decays
def test_slices_of_one_projection_are_read_where_they_lie(decay, backend):
    B, T, H, G, K, V = 2, 70, 4, 2, 8, 16
    projection = randn(B, T, 2 * G * K + H * V + H * K, grad=False)
    q, k, v, g = projection.split([G * K, G * K, H * V, H * K], 2)
    arguments = {"q": q.unflatten(2, (G, K)), "k": k.unflatten(2, (G, K)), "v": v.unflatten(2, (H, V))}
    arguments["g"] = {"none": None, "head": -g[..., :H].abs(), "channel": -g.unflatten(2, (H, K)).abs()}[decay]
    o, S = linear_recurrence(**arguments, backend=backend)
    copies = {name: None if x is None else x.clone() for name, x in arguments.items()}
    expected = linear_recurrence(**copies, backend="reference")
    torch.testing.assert_close((o, S), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_a_state_that_fades_away_becomes_zero_and_never_denormal(decay):
    arguments = call(decay, 1, 300, 2, 1, 8, 8, dtype=torch.float32, state=True)
    with torch.no_grad():
        arguments["k"].zero_()
        arguments["g"].fill_(-1.0)
        for length in (1, 70, 95, 300):
            piece = {name: arguments[name][:, :length] for name in "qkvg"}
            piece["initial_state"] = torch.full((1, 2, 8, 8), 1e-38 if length == 1 else 1.0)
            _, S = linear_recurrence(**piece, backend="native")
            least = torch.finfo(torch.float32).tiny
            assert (S[S > 0] >= least).all()
            assert bool(S.any()) == (length == 70)


def test_slices_of_a_projection_are_not_copied():
    projection = torch.zeros(2, 9, 60)
    x = projection[..., 20:50].unflatten(2, (3, 10))
    assert native._by_token(x).data_ptr() == x.data_ptr()
    assert native._by_token(projection[:, 2:6].unflatten(2, (6, 10))).is_contiguous()


@decays
def test_one_and_two_threads_agree_exactly_where_the_work_is_split_alike(decay):
    arguments = call(decay, 4, 130, 4, 2, 32, 64, dtype=torch.float32, state=True)
    one = run(arguments, backend="native")
    torch.set_num_threads(2)
    two, again = run(arguments, backend="native"), run(arguments, backend="native")
    for name in one:
        assert torch.equal(one[name], two[name]) and torch.equal(two[name], again[name]), name


@decays
def test_the_heads_of_one_group_are_shared_by_two_threads(decay):
    arguments = call(decay, 1, 200, 3, 1, 32, 160, dtype=torch.float32, state=True)
    one = run(arguments, backend="native")
    torch.set_num_threads(2)
    two, again = run(arguments, backend="native"), run(arguments, backend="native")
    assert_same(two, one, 1e-6)
    for name in two:
        assert torch.equal(two[name], again[name]), name


@decays
def test_torch_finds_nothing_wrong_with_the_operators(decay):
    a = call(decay, 1, 40, 2, 1, 4, 8, dtype=torch.float32, state=True, reset=True)
    arguments = (a["q"], a["k"], a["v"], a["g"], a["initial_state"], a["reset"], None)
    torch.library.opcheck(native.FORWARD.op, (*arguments, False), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(
        native.FORWARD.op, (*arguments, True), test_utils=("test_schema", "test_autograd_registration")
    )


@backends
@decays
def test_a_compiled_graph_has_no_breaks(decay, backend):
    arguments = call(decay, 1, 70, 2, 1, 4, 8, state=True, reset=True)

    def fn(**arguments: Any) -> Any:
        return linear_recurrence(**arguments, backend=backend)

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    o, S = compiled(**arguments)
    grads = torch.autograd.grad(o.sum() + S.sum(), [arguments["q"], arguments["initial_state"]])
    expected = fn(**arguments)
    torch.testing.assert_close((o, S), expected)
    torch.testing.assert_close(
        grads, torch.autograd.grad(expected[0].sum() + expected[1].sum(), [arguments["q"], arguments["initial_state"]])
    )


@decays
def test_shapes_are_known_without_numbers(decay):
    arguments = {n: x.to("meta") if torch.is_tensor(x) else x for n, x in call(decay, 2, 70, 4, 2, 4, 8).items()}
    assert "CPU" in native.unavailable(**{n: arguments[n] for n in "qkvg"})
    o, S = linear_recurrence(**arguments)
    assert o.shape == (2, 70, 4, 8) and S.shape == (2, 4, 4, 8) and S.dtype == torch.float64


@backends
@decays
def test_memory_kept_for_the_backward_pass_grows_by_a_state_for_many_tokens(decay, backend):
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    K, V, T = 16, 32, 1024
    arguments = call(decay, 1, T, 1, 1, K, V, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        o, _ = linear_recurrence(**arguments, backend=backend)
    given = sum(x.untyped_storage().nbytes() for x in arguments.values() if torch.is_tensor(x))
    states = 4 * (T // 32 + 2) * 64 * 64  # a state for 32 tokens, padded to what vectors need
    assert sum(kept.values()) <= given + states < 4 * T * K * V
    assert o.requires_grad


def test_nothing_is_kept_where_no_gradient_is_wanted(monkeypatch):
    seen = []
    monkeypatch.setattr(native.LIBRARY, "call", lambda name, dtype, *args: seen.append((name, args)))
    arguments = call("head", 1, 40, 2, 1, 4, 8)
    with torch.no_grad():
        linear_recurrence(**arguments, backend="native")
        linear_recurrence(**call("head", 3, 1, 2, 1, 4, 8), backend="native")
    assert seen[0][0] == "forward" and seen[0][1][9] is None
    assert seen[1][0] == "step"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"q": torch.zeros(1, 5, 3, 4), "k": torch.zeros(1, 5, 3, 4)}, "4 heads, which 3 groups"),
        ({"k": torch.zeros(1, 5, 2, 6)}, "k has shape"),
        ({"g": torch.zeros(1, 5, 2)}, "g has shape"),
        ({"g": torch.zeros(1, 5, 4, 8)}, "g has shape"),
        ({"initial_state": torch.zeros(2, 4, 4, 8)}, "initial_state has shape"),
        ({"reset": torch.zeros(1, 5)}, "reset has dtype"),
        ({"v": torch.zeros(1, 5, 4, 8, dtype=torch.int64)}, "v has dtype"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_words(change, words):
    fitting = {"q": torch.zeros(1, 5, 2, 4), "k": torch.zeros(1, 5, 2, 4), "v": torch.zeros(1, 5, 4, 8)}
    linear_recurrence(**fitting)
    with pytest.raises(KernelError, match=words):
        linear_recurrence(**{**fitting, **change})


def fake_fla(monkeypatch) -> list[tuple[str, dict[str, Any]]]:
    """Modules as flash-linear-attention has them, which remember their calls and compute with the reference."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def stand_in(name: str) -> Any:
        def fn(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens):
            calls.append((name, {"q": q, "k": k, "v": v, "g": g, "state": initial_state}))
            assert scale == 1.0 and output_final_state and q.shape == k.shape and q.shape[2] == v.shape[2]
            assert g is None or (g.dtype == torch.float32 and g.isfinite().all())
            return OP.reference(q, k, v, g, initial_state=initial_state, cu_seqlens=cu_seqlens)

        return fn

    for module, name in [("fla.ops.gla", "chunk_gla"), ("fla.ops.simple_gla", "chunk_simple_gla")]:
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
        setattr(sys.modules[module], name, stand_in(name))
    monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", ModuleType("fla.ops"))
    return calls


@pytest.mark.parametrize("cuts", [None, [0, 9, 9, 40]])
@decays
def test_fla_gets_what_it_expects(decay, cuts, monkeypatch):
    calls = fake_fla(monkeypatch)
    arguments = call(decay, 1, 40, 4, 2, 6, 8, dtype=torch.float32, state=True, cuts=cuts, strong=decay != "none")
    monkeypatch.setattr(OP, "backends", {"fla": OP.backends["fla"], "reference": OP.backends["reference"]})
    monkeypatch.setattr(vendor, "probe", lambda: None)
    expected = run(arguments, backend="reference")
    arguments = {name: x for name, x in arguments.items() if name != "reset"}
    o, S = vendor.linear_recurrence(**arguments)
    torch.testing.assert_close((o.detach(), S.detach()), (expected["o"], expected["S"]), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad((S * randn(*S.shape, grad=False).float()).sum(), arguments["initial_state"])
    assert gradient.any() or decay != "none"
    assert [name for name, _ in calls] == ["chunk_gla" if decay == "channel" else "chunk_simple_gla"]


def test_what_fla_cannot_run_is_put_into_words():
    def on_cuda(*shape: int, dtype: torch.dtype = torch.float32) -> Any:
        size = torch.Size(shape).numel()
        return SimpleNamespace(device=torch.device("cuda:0"), dtype=dtype, shape=shape, numel=lambda: size)

    q, v = on_cuda(1, 5, 2, 4), on_cuda(1, 5, 2, 8)
    assert vendor.unavailable(q, q, v) is None
    assert "no resets" in vendor.unavailable(q, q, v, reset=on_cuda(1, 5))
    assert "float64" in vendor.unavailable(q, q, v, on_cuda(1, 5, 2, dtype=torch.float64))
    assert "no tokens" in vendor.unavailable(q, q, on_cuda(1, 0, 2, 8))
    assert "on cpu" in vendor.unavailable(q, q, torch.zeros(1, 5, 2, 8))


def test_the_absence_of_fla_is_put_into_words(monkeypatch):
    def probed() -> str | None:
        vendor.probe.cache_clear()
        return vendor.absent()

    monkeypatch.setattr(vendor, "find_spec", lambda name: None)
    assert "not installed" in probed()
    monkeypatch.setattr(vendor, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA" in probed()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "fla", None)
    assert "importing fla fails" in probed()
    fake_fla(monkeypatch)
    assert probed() is None
    vendor.probe.cache_clear()


def test_importing_the_op_imports_no_vendor_and_no_triton():
    code = "import sys, altx_kernels.linear_recurrence; print(*{'fla', 'triton'} & set(sys.modules))"
    assert not subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_the_chunked_backend_never_holds_more_than_a_blocks_decays():
    # With a decay per channel the pairs of a block make (L, L, K); for a whole chunk that would be 16 times as much.
    seen = []
    original = chunked._past
    try:
        chunked._past = lambda x: seen.append(x.shape) or original(x)
        linear_recurrence(**call("channel", 1, 130, 1, 1, 4, 4), backend="torch")
    finally:
        chunked._past = original
    assert max(shape[-1] for shape in seen) == chunked.BLOCK


def test_the_workloads_run():
    for workload in OP.workloads():
        assert workload.flops > 0 and workload.bytes(torch.bfloat16) < workload.bytes(torch.float32)
    arguments = cases.workload("cpu", "channel", 1, 8, 2, 1, 4, 4).arguments(torch.device("cpu"), torch.float32)
    assert (arguments["g"] <= 0).all()
    assert F.relu(linear_recurrence(**arguments)[0]).isfinite().all()
