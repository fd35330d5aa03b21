"""Every backend of the loop over chunks against the loop in PyTorch, which is held to the papers elsewhere."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from altx_titans.config import TitansConfig, TTTConfig
from altx_titans.kernels.learn import LEARN, cases, native
from altx_titans.titans import Titans
from altx_titans.ttt import TTT

from altx.measure import count_flops
from altx_kernels import KernelError
from altx_kernels.trees import leaves, map_floats, map_leaves
from altx_kernels.verify import outputs_and_gradients, verify

EXAMPLES = {example.label: dict(example.arguments) for example in cases.examples()}
pytestmark = pytest.mark.usefixtures("one_thread")
EVERYTHING = {"scaled": True, "learned": True, "anew": True, "bound": 0.2}


def run(arguments: dict[str, Any], backend: str) -> dict[str, torch.Tensor]:
    return outputs_and_gradients(partial(LEARN, backend=backend), arguments)


def test_native_is_the_loop_in_every_dtype_and_layout():
    findings = list(verify(LEARN, backends=["native"]))
    assert len(findings) >= 4
    for finding in findings:
        assert finding.status == "passed", finding


@pytest.mark.parametrize("settings", [EVERYTHING, {"biased": True, "learned": True}, {"norm": False, "bound": 0.05}])
def test_gradcheck(settings):
    arguments = cases.call(2, 1, 3, 2, 3, **settings)
    flat = {name: t for name, t in leaves(arguments).items() if t.is_floating_point()}

    def fn(*values):
        given = dict(zip(flat, values, strict=True))
        replaced = map_leaves(lambda name, tensor: given.get(name, tensor), arguments)
        return tuple(leaves(LEARN(**replaced, backend="native"), "output").values())

    assert torch.autograd.gradcheck(fn, tuple(flat.values()), fast_mode=True)


def test_nan_stays_in_its_row():
    # One thread works on all rows with the same scratch space, whose padding must not carry it on.
    arguments = cases.call(3, 2, 3, 4, 5, **EVERYTHING)

    def spoiled(name, tensor):
        tensor = tensor.clone()
        if name in ("chunks.key", "weights.w1"):
            tensor[1] = torch.nan
        return tensor

    clean, found = run(arguments, "native"), run(map_floats(spoiled, arguments), "native")
    assert found["output.value"][1].isnan().any()
    for name, value in found.items():
        for row in (0, 2):
            if not name.startswith("norm"):
                assert torch.equal(value[row], clean[name][row]), name


def test_any_number_of_threads_gives_the_same_bits():
    arguments = map_floats(lambda _, t: t.float(), cases.call(3, 2, 16, 16, 40, **EVERYTHING))
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "SERIAL", 0)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(arguments, "native"))
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


def test_without_gradients_nothing_is_kept_for_them(monkeypatch):
    kept, forward = [], native.FORWARD
    monkeypatch.setattr(native, "FORWARD", lambda *args: kept.append(forward(*args)) or kept[-1])
    arguments = EXAMPLES["B=2 H=2 N=3 C=4 d=6 biased learned"]
    with torch.no_grad():
        LEARN(**arguments, backend="native")
    LEARN(**arguments, backend="native")
    assert kept[0][4].numel() == 0 < kept[1][4].numel()


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    arguments = cases.call(2, 1, 3, 2, 5, **EVERYTHING)
    compiled = torch.compile(lambda arguments: LEARN(**arguments), fullgraph=True, backend="aot_eager")
    for one, other in zip(leaves(compiled(arguments)).values(), leaves(LEARN(**arguments)).values(), strict=True):
        torch.testing.assert_close(one, other)


def test_flops_are_those_of_the_loop():
    for settings in ({"biased": True}, {"scaled": True}, {"reads": False}, {"norm": False, "momentum": False}):
        arguments = cases.call(2, 2, 3, 8, 32, **settings)
        counts = [count_flops(lambda b=b, a=arguments: LEARN(**a, backend=b)) for b in ("native", "reference")]
        assert counts[0] == pytest.approx(counts[1], rel=0.1), settings


@pytest.mark.parametrize("backend", LEARN.backends)
def test_an_argument_of_another_shape_is_refused_before_any_backend_sees_it(backend):
    arguments = cases.call(2, 3, 4, 5, 6, scaled=True, learned=True, anew=True)
    for victim, tensor in leaves(arguments).items():
        for axis in range(tensor.dim()):

            def longer(name, value, victim=victim, axis=axis):
                return torch.cat([value, value.narrow(axis, 0, 1)], axis) if name == victim else value

            with pytest.raises(KernelError, match="op 'fast-weights'"):
                LEARN(**map_leaves(longer, arguments), backend=backend)


@pytest.mark.parametrize("field", ["drift", "last_drift", "moving_keep", "moving_share"])
def test_momentum_in_part_is_refused(field):
    arguments = cases.call(2, 3, 4, 5, 6)
    arguments["chunks"] = arguments["chunks"]._replace(**{field: None})
    with pytest.raises(KernelError, match="op 'fast-weights'"):
        LEARN(**arguments)


def test_what_native_leaves_to_the_loop_it_says():
    assert "one layer" in native.unavailable(**(cases.call(1, 1, 1, 2, 4) | {"network": cases.Network(2, False, 1, 1)}))
    assert "bias" in native.unavailable(**cases.call(1, 1, 1, 2, 4, biased=True, bound=1.0))


def test_without_a_compiler_the_loop_takes_its_place(monkeypatch):
    absent = replace(LEARN.backends["native"], absent=lambda: "no compiler")
    monkeypatch.setattr(LEARN, "backends", dict(LEARN.backends) | {"native": absent})
    choice = LEARN.choose(**EXAMPLES["B=2 H=2 N=3 C=4 d=6 biased learned"])
    assert choice.backend == "reference" and choice.refused["native"] == "no compiler"


@pytest.mark.parametrize(
    "memory",
    [
        lambda: TTT(TTTConfig(heads=2, chunk=4), 16),
        lambda: Titans(TitansConfig(heads=2, chunk=4, depth=1), 16),
        lambda: Titans(TitansConfig(heads=2, chunk=4, depth=1, residual_norm=False, momentum=False), 16),
    ],
)
def test_memories_are_the_same_with_native_and_with_the_loop(memory, monkeypatch):
    torch.manual_seed(0)
    memory = memory().double()
    x, state = torch.randn(2, 11, 16, dtype=torch.float64), memory.init_state(2, dtype=torch.float64)
    found = memory.scan(x, state)
    monkeypatch.setenv("ALTX_KERNEL", "fast-weights=reference")
    expected = memory.scan(x, state)
    torch.testing.assert_close(found.read.value, expected.read.value, rtol=1e-12, atol=1e-12)
    for name, value in expected.state.leaves.items():
        torch.testing.assert_close(found.state[name], value, rtol=1e-12, atol=1e-12)
