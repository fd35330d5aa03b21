"""The op ssd: its reference is the paper's matrix form, and every backend equals the reference."""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch
from altx_mamba.kernels import mamba_ssm
from altx_mamba.kernels.ssd import OP, native, recurrence, reference, ssd, vendor
from altx_mamba.kernels.ssd.cases import example
from torch._subclasses.fake_tensor import FakeTensorMode

from altx_kernels import KernelError
from altx_kernels.linear_recurrence import OP as RECURRENCE
from altx_kernels.op import Backend
from altx_kernels.verify import verify

CPU = [name for name, backend in OP.backends.items() if name in ("native", "torch") and not backend.absent()]


def detached(made):
    return {name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in made.arguments.items()}


def test_the_reference_is_the_papers_matrix_form():
    """Section 3.2.2: y = M x with M_ts = C_t B_s exp(the sum of dt A over s+1 .. t) dt_s, here with a skip."""
    values = detached(example(2, 9, 4, 3, 2, 5, skip=True))
    x, dt, A, B, C, D = (values[name] for name in ("x", "dt", "A", "B", "C", "D"))
    y, h = reference.ssd(x, dt, A, B, C, D)
    for b in range(2):
        for head in range(4):
            B_TN, C_TN, g = B[b, :, head // 2], C[b, :, head // 2], dt[b, :, head] * A[head]
            M = torch.zeros(9, 9, dtype=torch.float64)
            for t in range(9):
                for s in range(t + 1):
                    M[t, s] = C_TN[t] @ B_TN[s] * torch.exp(g[s + 1 : t + 1].sum()) * dt[b, s, head]
            expected = M @ x[b, :, head] + D[head] * x[b, :, head]
            torch.testing.assert_close(y[b, :, head], expected, atol=1e-12, rtol=1e-12)
            state = sum(
                torch.exp(g[s + 1 :].sum()) * dt[b, s, head] * torch.outer(B_TN[s], x[b, s, head]) for s in range(9)
            )
            torch.testing.assert_close(h[b, head], state, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_backends_equal_the_reference_with_all_gradients(dtype):
    for finding in verify(OP, CPU, dtypes=[dtype]):
        assert finding.status == "passed", finding


@pytest.mark.parametrize("backend", [*CPU, "reference"])
def test_gradients_are_derivatives(backend):
    values = dict(example(1, 5, 2, 2, 1, 3, state=True, skip=True).arguments)
    names = [name for name, value in values.items() if isinstance(value, torch.Tensor)]

    def call(*tensors):
        return ssd(**{**values, **dict(zip(names, tensors, strict=True))}, backend=backend)

    assert torch.autograd.gradcheck(call, [values[name] for name in names], fast_mode=True)


@pytest.mark.parametrize("backend", [*CPU, "reference"])
@pytest.mark.parametrize("length", [1, 70])
def test_tokens_with_dt_0_hold_the_state_exactly(backend, length):
    values = detached(example(2, length, 4, 7, 2, 6, state=True))
    values["dt"] = torch.zeros_like(values["dt"])
    assert torch.equal(ssd(**values, backend=backend)[1], values["initial_state"])


@pytest.mark.parametrize("backend", [*CPU, "reference"])
def test_nan_stays_in_its_row_and_in_its_sequence(backend):
    values = detached(example(3, 40, 2, 5, 1, 4, state=True))
    values["x"][1, 7] = torch.nan
    y, h = ssd(**values, backend=backend)
    assert y[[0, 2]].isfinite().all() and h[[0, 2]].isfinite().all()
    assert y[1, 7:].isnan().all() and h[1].isnan().all()
    values = detached(example(1, 40, 2, 5, 1, 4, cuts=[0, 9, 25, 40]))
    values["x"][0, 10] = torch.nan
    y, h = ssd(**values, backend=backend)
    assert y[0, :9].isfinite().all() and y[0, 25:].isfinite().all() and h[[0, 2]].isfinite().all()
    assert h[1].isnan().all()


OPTIONS = [{}, {"state": True, "skip": True, "reset": True}]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_primitive_is_what_torch_expects(options):
    values = example(2, 70, 4, 7, 2, 5, **options).arguments
    torch.library.opcheck(native.FORWARD.op, (*values.values(), True), test_utils=("test_schema", "test_faketensor"))
    known = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in values.items()}
    torch.library.opcheck(native.FORWARD.op, (*known.values(), False))
    y, _, kept = native.FORWARD.op(*known.values(), True)
    given = [v for n, v in known.items() if n != "initial_state"]
    torch.library.opcheck(native.BACKWARD.op, (*given, kept, y, None), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("options", OPTIONS)
def test_it_compiles_into_one_graph(options):
    values = dict(example(2, 70, 4, 7, 2, 5, **options).arguments)
    torch._dynamo.reset()
    compiled = torch.compile(ssd, fullgraph=True, backend="aot_eager")
    x = values["x"]
    both = [torch.autograd.grad(sum(out.square().sum() for out in fn(**values)), x)[0] for fn in (compiled, ssd)]
    torch.testing.assert_close(*both)
    assert OP.choose(**values).backend == "native"


@pytest.mark.parametrize("skip", [True, False])
def test_any_number_of_threads_gives_the_same(skip):
    values = dict(example(2, 600, 4, 40, 2, 5, skip=skip).arguments)
    assert values["x"].numel() >= native.SERIAL
    wanted = [v for v in values.values() if isinstance(v, torch.Tensor)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, _ = ssd(**values, backend="native")
            found.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)


def test_x_is_read_where_it_lies_and_nothing_is_kept_of_it_twice():
    wide = torch.randn(2, 6, 40)
    x = wide[..., 3:23].unflatten(-1, (4, 5))
    assert native._rows(x).data_ptr() == x.data_ptr()
    values = dict(example(1, 256, 2, 64, 1, 8, skip=True).arguments)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ssd(**values, backend="native")
    large = {t.data_ptr() for t in kept if t.numel() >= values["x"].numel()}
    assert large == {values["x"].data_ptr()}


@pytest.mark.parametrize("backend", CPU)
def test_it_computes_in_float32_under_autocast(backend):
    values = {
        name: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for name, v in detached(example(2, 70, 4, 7, 2, 5, state=True, skip=True)).items()
    }
    expected = ssd(**values, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = ssd(**values, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_it_has_every_backend_of_the_linear_recurrence():
    assert [*OP.backends] == [*[*RECURRENCE.backends][:-2], "mamba-ssm", "torch", "reference"]


def test_a_backend_cannot_run_what_that_of_the_linear_recurrence_cannot(monkeypatch):
    values = detached(example(2, 3, 2, 4, 1, 4))
    seen = {}

    def unavailable(q, k, v, g=None, **states):
        seen.update(q=q.shape, k=k.shape, v=v.shape, g=g.shape)
        return "not today"

    monkeypatch.setattr(RECURRENCE, "backends", {**RECURRENCE.backends, "torch": Backend("torch", print, unavailable)})
    with pytest.raises(KernelError, match="not today"):
        ssd(**values, backend="torch")
    assert seen == {"q": (2, 3, 1, 4), "k": (2, 3, 1, 4), "v": (2, 3, 2, 4), "g": (2, 3, 2)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dt": torch.zeros(2, 4, 2)}, "dt has shape"),
        ({"A": torch.zeros(3)}, "A has shape"),
        ({"B": torch.zeros(2, 3, 3, 4), "C": torch.zeros(2, 3, 3, 4)}, "cannot share evenly"),
        ({"initial_state": torch.zeros(2, 2, 5, 4)}, "initial_state has shape"),
        ({"reset": torch.zeros(2, 3)}, "reset has dtype"),
        ({"x": torch.zeros(2, 3, 2, 5, dtype=torch.int64)}, "x has dtype"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "one row"),
    ],
)
def test_a_wrong_call_is_refused_in_words(change, words):
    values = detached(example(2, 3, 2, 5, 1, 4))
    with pytest.raises(KernelError, match=words):
        ssd(**{**values, **change})


# mamba-ssm, which needs a GPU: the adapter against a module that takes what theirs takes.


def their_scan(x, dt, A, B, C, chunk_size, D=None, initial_states=None, seq_idx=None, cu_seqlens=None,
               return_final_states=False, return_varlen_states=False):  # fmt: skip
    """Token by token, in the layout of mamba-ssm: states (B, H, P, N); a new number in seq_idx clears the state."""
    batch, length, heads, width = x.shape
    h = torch.zeros(batch, heads, width, B.shape[3], dtype=x.dtype)
    h = h if initial_states is None else initial_states.clone()
    number = torch.zeros(batch, dtype=torch.int32)
    B, C = (part.repeat_interleave(heads // part.shape[2], 2) for part in (B, C))
    assert seq_idx is None or seq_idx.dtype == torch.int32
    ys, states = [], []
    for t in range(length):
        if seq_idx is not None:
            h = torch.where((seq_idx[:, t] == number)[:, None, None, None], h, 0)
            number = seq_idx[:, t]
        h = torch.exp(dt[:, t] * A)[..., None, None] * h
        h = h + dt[:, t, :, None, None] * x[:, t, :, :, None] * B[:, t, :, None]
        ys.append((h @ C[:, t, :, :, None])[..., 0] + (0 if D is None else D[:, None] * x[:, t]))
        states.append(h)
    found = [torch.stack(ys, 1)]
    if return_final_states:
        found.append(h)
    if return_varlen_states:
        assert batch == 1
        found.append(torch.stack([states[max(int(end) - 1, 0)][0] for end in cu_seqlens[1:]]))
    return tuple(found)


def forget():
    """What was found out about mamba-ssm so far."""
    mamba_ssm._probe.cache_clear()
    mamba_ssm.load.cache_clear()


@pytest.fixture
def stub(monkeypatch):
    """A mamba_ssm on a machine with a GPU, as far as one can tell."""
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", vendor.THEIRS[0]):
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules[vendor.THEIRS[0]].mamba_chunk_scan_combined = their_scan
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    forget()
    yield sys.modules[vendor.THEIRS[0]]
    forget()


@pytest.mark.parametrize(
    "case",
    [
        {"state": True, "skip": True},
        {"reset": True, "state": True},
        {"cuts": [0, 0, 9, 9, 30, 33, 33], "skip": True},
    ],
)
def test_mamba_ssm_is_called_as_it_wants_to_be(stub, case):
    values = detached(example(1, 33, 4, 7, 2, 5, **case))
    assert vendor.absent() is None
    for found, expected in zip(vendor.ssd(**values), reference.ssd(**values), strict=True):
        torch.testing.assert_close(found, expected.to(found.dtype), atol=1e-5, rtol=1e-5)


def test_mamba_ssm_says_why_it_is_not_there(stub, monkeypatch):
    del stub.mamba_chunk_scan_combined
    assert vendor.absent() is None  # it is not imported to find out
    assert "AttributeError" in vendor.problem(*vendor.THEIRS)
    forget()
    monkeypatch.setattr(mamba_ssm, "find_spec", lambda name: None)
    assert "pip install altx-mamba[mamba-ssm]" in vendor.absent()
    forget()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert vendor.absent() == "torch sees no CUDA device"


def test_mamba_ssm_says_which_calls_it_cannot_run(stub):
    def reason(device="cuda", dtype=torch.float32, grad=False, **case):
        made = detached(example(1, case.pop("length", 33), 4, 7, 2, 5, **case))
        with FakeTensorMode():
            values = {
                name: torch.empty(v.shape, device=device, dtype=dtype if v.is_floating_point() else v.dtype)
                for name, v in made.items()
                if v is not None
            }
            values["x"].requires_grad_(grad)
            return vendor.unavailable(**values)

    assert reason(state=True, reset=True) is None
    assert reason(cuts=[0, 33]) is None
    assert "on cpu" in reason(device="cpu")
    assert "float64" in reason(dtype=torch.float64)
    assert "no tokens" in reason(length=0)
    assert "initial states" in reason(cuts=[0, 33], state=True)
    assert "resets" in reason(cuts=[0, 33], reset=True)
    assert "gradient" in reason(cuts=[0, 33], grad=True)


def test_backends_of_the_recurrence_are_called_by_name():
    assert {backend.name for backend in recurrence.BACKENDS} == set(RECURRENCE.backends) - {"reference", "native"}
