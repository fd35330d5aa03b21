"""The op mamba3: its reference computes what the authors' code does, and every backend equals the reference."""

from __future__ import annotations

import math
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch
from altx_mamba.kernels import mamba_ssm
from altx_mamba.kernels.mamba3 import OP, mamba3, reference, vendor
from altx_mamba.kernels.mamba3.angle import CHUNK, accumulate
from altx_mamba.kernels.mamba3.cases import example
from torch._subclasses.fake_tensor import FakeTensorMode

from altx_kernels import KernelError
from altx_kernels.linear_recurrence import OP as RECURRENCE
from altx_kernels.verify import verify

CPU = [name for name, backend in OP.backends.items() if name in ("native", "torch") and not backend.absent()]
STATES = ("initial_state", "initial_angle", "initial_k", "initial_v")


def detached(made):
    return {name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in made.arguments.items()}


def wave(*shape, phase):
    """sin(1.7 n + phase) over all places n."""
    return torch.sin(1.7 * torch.arange(math.prod(shape), dtype=torch.float64) + phase).reshape(shape)


# What mamba3_siso_step_ref of the authors' tests/ops/triton/test_mamba3_siso.py (state-spaces/mamba, e9594ce) gives in
# float64 for the waves below; mamba3_siso_fwd_ref there gives the same. State in their order, (P, N).
Y = """
    2.6933730183 7.7376048921 -4.253929415 -6.2308049142 2.1140994489 3.4168476749 -2.8452623322 -3.0449872533
    12.9423261622 1.618130982 -9.0967366741 1.3202314275 7.0792702623 0.4592844709 -4.9311302413 2.5648724468
    8.0479515333 -8.2770981233 -2.3370684878 3.7968022174 3.9035631021 -4.8373502663 -0.4654908897 6.7149904226"""
ANGLE = "5.4098964384 3.8341184018"
STATE = """
    0.8732786427 -0.8575461262 -1.7662042968 0.3906263428 -0.6886130519 1.3630254653 1.4621887025 -0.5604008582
    0.068254458 -0.1081431397 0.2045891053 -0.1046729718 -1.7713479675 -0.01205884 -1.4021821799 1.322113211"""
KEYS = "0.3976822547 -1.0592695792 -0.97052543 0.6256706102 -1.5567325873 -0.1875599669 -1.0989398641 1.1327793165"


@pytest.mark.parametrize("backend", [*CPU, "reference"])
def test_it_gives_the_numbers_of_the_authors_reference(backend):
    T, H, N, P, R = 6, 2, 4, 2, 1
    x = wave(1, T, H, P, phase=0.3)
    y, h, angle, k, v = mamba3(
        x=x,
        dt=wave(1, T, H, phase=0.4) + 1.2,
        A=wave(1, T, H, phase=0.5) - 1.5,
        B=wave(1, T, 1, N, phase=0.2),
        C=wave(1, T, 1, N, phase=0.1),
        trap=2 * wave(1, T, H, phase=0.6),
        angles=wave(1, T, R, phase=0.7),
        B_bias=wave(H, N, phase=0.8),
        C_bias=wave(H, N, phase=0.9),
        D=wave(H, phase=1.0),
        initial_angle=wave(1, H, R, phase=1.1),
        initial_state=wave(1, H, P, N, phase=1.2).mT,
        initial_k=wave(1, H, N, phase=1.3),
        initial_v=wave(1, H, P, phase=1.4),
        backend=backend,
    )
    for found, expected in ((y, Y), (angle, ANGLE), (h.mT, STATE), (k, KEYS)):
        numbers = torch.tensor([float(number) for number in expected.split()], dtype=torch.float64)
        torch.testing.assert_close(found.flatten(), numbers, atol=2e-10, rtol=0)
    assert torch.equal(v, x[:, -1])


def test_without_turns_and_with_the_new_end_only_it_is_mamba_2():
    values = detached(example(2, 20, 4, 3, 2, 6, 2))
    values["angles"] = torch.zeros_like(values["angles"])
    values["trap"] = torch.full_like(values["trap"], 60)  # its sigmoid is 1
    y, h, *_ = reference.mamba3(**values)
    state, expected = torch.zeros(2, 4, 6, 3, dtype=torch.float64), []
    for t in range(20):
        k, q = (
            values[name][:, t].repeat_interleave(2, 1) + values[f"{name}_bias"] for name in ("B", "C")
        )  # fmt: skip
        decay = torch.exp(values["dt"][:, t] * values["A"][:, t])[..., None, None]
        state = decay * state + k[..., None] * (values["dt"][:, t, :, None] * values["x"][:, t])[:, :, None]
        expected.append(torch.einsum("bhn,bhnp->bhp", q, state))
    torch.testing.assert_close(y, torch.stack(expected, 1), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(h, state, atol=1e-12, rtol=1e-12)


def test_what_is_read_depends_on_the_turn_between_two_tokens_only():
    """R(a) q . R(b) k depends on a - b: starting from another angle changes nothing but the angle and k."""
    values = detached(example(2, 30, 4, 3, 2, 6, 3))
    y, h, angle, k, _ = reference.mamba3(**values)
    start = wave(2, 4, 3, phase=0.2)
    turned = reference.mamba3(**{**values, "initial_angle": start})
    torch.testing.assert_close(turned[0], y, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(reference.rotate(k, start), turned[3], atol=1e-11, rtol=1e-11)
    assert not torch.allclose(turned[1], h)
    assert torch.allclose(torch.cos(turned[2] - angle), torch.cos(start))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_backends_equal_the_reference_with_all_gradients(dtype):
    for finding in verify(OP, CPU, dtypes=[dtype]):
        assert finding.status == "passed", finding


@pytest.mark.parametrize("backend", [*CPU, "reference"])
@pytest.mark.parametrize("length", [1, 5])
def test_gradients_are_derivatives(backend, length):
    values = dict(example(1, length, 2, 2, 1, 4, 1, state=True, skip=True).arguments)
    names = [name for name, value in values.items() if isinstance(value, torch.Tensor)]

    def call(*tensors):
        return mamba3(**{**values, **dict(zip(names, tensors, strict=True))}, backend=backend)

    assert torch.autograd.gradcheck(call, [values[name] for name in names], fast_mode=True)


@pytest.mark.parametrize("backend", [*CPU, "reference"])
@pytest.mark.parametrize("length", [1, 70])
def test_padding_holds_the_states_exactly_whatever_it_holds(backend, length):
    values = detached(example(2, length, 4, 7, 2, 6, 2, state=True))
    values["initial_angle"] = values["initial_angle"].abs()
    for name in ("x", "dt", "A", "B", "trap", "angles"):
        values[name][:] = torch.nan
    after = mamba3(**{**values, "lengths": torch.tensor([0, 0])}, backend=backend)[1:]
    assert all(torch.equal(found, values[name]) for found, name in zip(after, STATES, strict=True))


@pytest.mark.parametrize("backend", [*CPU, "reference"])
@pytest.mark.parametrize("where", ["x", "dt", "B", "angles"])
def test_nan_stays_in_its_row_and_in_its_sequence(backend, where):
    values = detached(example(3, 40, 2, 5, 1, 4, 2, state=True))
    values[where][1, 7] = torch.nan
    y, *states = mamba3(**values, backend=backend)
    assert all(value[[0, 2]].isfinite().all() for value in (y, *states))
    assert y[1, 7:].isnan().any(-1).all() and states[0][1].isnan().any()
    values = detached(example(1, 40, 2, 5, 1, 4, 2, cuts=[0, 9, 25, 40], state=True))
    values[where][0, 10] = torch.nan
    y, *states = mamba3(**values, backend=backend)
    assert y[0, :9].isfinite().all() and y[0, 25:].isfinite().all() and y[0, 10:25].isnan().any(-1).all()
    assert all(state[[0, 2]].isfinite().all() for state in states) and states[0][1].isnan().any()


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("length", [1, 70])
def test_it_computes_in_float32_under_autocast(backend, length):
    values = {
        name: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for name, v in detached(example(2, length, 4, 7, 2, 6, 2, state=True, skip=True)).items()
    }
    expected = mamba3(**values, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = mamba3(**values, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_state_does_not_keep_the_whole_input_alive():
    values = detached(example(1, 40, 2, 5, 1, 4, 2))
    for state in mamba3(**values)[1:]:
        assert state.untyped_storage().nbytes() == state.numel() * 8


def test_angles_are_as_precise_after_many_tokens_as_after_few():
    turns = 0.3 * torch.rand(1, 200_000, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = turns.cumsum(1)
    found = accumulate(turns.float(), None, None).double()
    error = torch.remainder(found - exact + math.pi, 2 * math.pi) - math.pi
    # The float32 turns themselves are off by 1e-8 each; a sum of 30000 in float32 would be off by 1e-2 and more.
    assert error.abs().max() < 1e-4


@pytest.mark.parametrize("length", [1, CHUNK, 3 * CHUNK + 5])
def test_angles_start_anew_where_they_are_told_to(length):
    turns, initial = wave(2, length, 3, 2, phase=0.1), wave(2, 1, 3, 2, phase=0.5)
    fresh = wave(2, length, phase=0.9) > 0.95
    found = accumulate(turns, initial, fresh)
    for row in range(2):
        angle = torch.zeros(3, 2, dtype=torch.float64)
        for t in range(length):
            angle = turns[row, t] + (0 if fresh[row, t] else angle)
            assert torch.allclose(torch.cos(found[row, t]), torch.cos(angle + initial[row, 0]), atol=1e-12)
            assert torch.allclose(torch.sin(found[row, t]), torch.sin(angle + initial[row, 0]), atol=1e-12)


def test_it_has_every_backend_of_the_linear_recurrence():
    assert [*OP.backends] == [*[*RECURRENCE.backends][:-2], "mamba-ssm", "torch", "reference"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"A": torch.zeros(2)}, "A has shape"),
        ({"B_bias": torch.zeros(2, 5)}, "B_bias has shape"),
        ({"angles": torch.zeros(2, 3, 3)}, "rotate 6 rows of a state that has 4"),
        ({"B": torch.zeros(2, 3, 3, 4), "C": torch.zeros(2, 3, 3, 4)}, "cannot share evenly"),
        ({"initial_k": torch.zeros(2, 2, 5)}, "initial_k has shape"),
        ({"reset": torch.zeros(2, 3)}, "reset has dtype"),
        ({"trap": torch.zeros(2, 3, 2, dtype=torch.int64)}, "trap has dtype"),
    ],
)
def test_a_wrong_call_is_refused_in_words(change, words):
    values = detached(example(2, 3, 2, 5, 1, 4, 1))
    with pytest.raises(KernelError, match=words):
        mamba3(**{**values, **change})


def test_padding_and_packing_exclude_each_other():
    values = detached(example(1, 3, 2, 5, 1, 4, 1, cuts=[0, 3]))
    with pytest.raises(KernelError, match="exclude each other"):
        mamba3(**{**values, "lengths": torch.tensor([3])})


# mamba-ssm, which needs a GPU: the adapter against a module that takes what theirs takes.


def their_siso(*, Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D, Input_States, return_final_states, cu_seqlens):
    """In the layout of mamba-ssm: ADT, DT and Trap (B, H, T), angles per head, states (B, H, P, N), angle first."""
    assert return_final_states and cu_seqlens is None and Angles.shape[2] == V.shape[2]
    assert all(value.is_contiguous() for value in (ADT, DT, Trap))
    angle, h, k, v = Input_States or (None, None, None, None)
    dt = DT.mT
    y, h, angle, k, v = reference.mamba3(
        V, dt, ADT.mT / dt, K, Q, Trap.mT, Angles[:, :, 0], K_bias, Q_bias, D,
        initial_state=None if h is None else h.mT, initial_angle=angle, initial_k=k, initial_v=v,
    )  # fmt: skip
    return y, angle, h.mT, k, v


@pytest.fixture
def stub(monkeypatch):
    """A mamba_ssm on a machine with a GPU, as far as one can tell."""
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.mamba3", vendor.THEIRS[0]):
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules[vendor.THEIRS[0]].mamba3_siso_combined = their_siso
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    mamba_ssm._probe.cache_clear()
    mamba_ssm.load.cache_clear()
    yield sys.modules[vendor.THEIRS[0]]
    mamba_ssm._probe.cache_clear()
    mamba_ssm.load.cache_clear()


@pytest.mark.parametrize("given", [(), STATES, ("initial_k",)])
def test_mamba_ssm_is_called_as_it_wants_to_be(stub, given):
    values = detached(example(2, 33, 4, 8, 2, 8, 2, state=True, skip=True))
    values["dt"] += 0.1
    values |= {name: None for name in STATES if name not in given}
    assert vendor.absent() is None
    for found, expected in zip(vendor.mamba3(**values), reference.mamba3(**values), strict=True):
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_mamba_ssm_says_why_it_is_not_there(stub):
    del stub.mamba3_siso_combined
    assert vendor.absent() is None  # it is not imported to find out
    assert vendor.THEIRS[0] in vendor.problem(*vendor.THEIRS)


def test_mamba_ssm_says_which_calls_it_cannot_run(stub):
    def reason(device="cuda", dtype=torch.bfloat16, length=16, size=8, **case):
        made = detached(example(1, length, 4, 8, 2, size, 2, **case))
        with FakeTensorMode():
            values = {
                name: torch.empty(v.shape, device=device, dtype=dtype if v.is_floating_point() else v.dtype)
                for name, v in made.items()
                if v is not None
            }
            return vendor.unavailable(**values)

    assert reason(state=True) is None
    assert "on cpu" in reason(device="cpu")
    assert "bfloat16" in reason(dtype=torch.float32)
    assert "no tokens" in reason(length=0)
    assert "resets" in reason(reset=True)
    assert "padding" in reason(lengths=[3])
    assert "packed" in reason(cuts=[0, 16])
    assert "powers of two" in reason(size=10)
