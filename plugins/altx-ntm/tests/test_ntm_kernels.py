"""Every backend of the NTM's time loop against the equations token by token."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from altx_ntm.kernels import SCAN
from altx_ntm.kernels.ntm import cases, native

from altx.measure import count_flops
from altx_kernels import KernelError
from altx_kernels.trees import leaves, map_floats, map_leaves
from altx_kernels.verify import outputs_and_gradients, verify

EXAMPLES = {example.label: dict(example.arguments) for example in cases.examples()}
pytestmark = pytest.mark.usefixtures("one_thread")


def run(arguments: dict[str, Any], **pin: Any) -> dict[str, torch.Tensor]:
    return outputs_and_gradients(partial(SCAN, **pin), arguments)


def assert_same(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_backends_are_the_reference_in_every_dtype_and_layout(backend):
    findings = list(verify(SCAN, backends=[backend]))
    assert len(findings) >= 4
    for finding in findings:
        assert finding.status == "passed", finding


@pytest.mark.parametrize("label", ["read-write mask reset", "write-read mask reset"])
def test_gradcheck(label):
    names = ("slots", "fresh", "reads", "writes")
    mask, reset = EXAMPLES[label]["mask"][:, :6], EXAMPLES[label]["reset"][:, :6]
    arguments = cases.call(2, 6, 5, 3, readers=2, writers=2, mask=mask, reset=reset)
    arguments["write_first"] = EXAMPLES[label]["write_first"]
    flat = {name: t for name, t in leaves({name: arguments[name] for name in names}).items()}

    def fn(*values):
        given = dict(zip(flat, values, strict=True))
        replaced = map_leaves(lambda name, tensor: given.get(name, tensor), arguments)
        return tuple(leaves(SCAN(**replaced, backend="native"), "output").values())

    assert torch.autograd.gradcheck(fn, tuple(flat.values()), fast_mode=True)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33])
@pytest.mark.parametrize("write_first", [False, True])
def test_checkpoints_fit_any_length(length, write_first):
    arguments = cases.call(2, length, 18, 3, write_first=write_first)
    assert_same(run(arguments, backend="native"), run(arguments, backend="reference"))


@pytest.mark.parametrize("order", ["read-write", "write-read"])
def test_what_a_masked_token_holds_reaches_nothing(order):
    arguments = EXAMPLES[f"{order} mask reset"]
    mask = arguments["mask"]

    def spoiled(name, tensor):
        hidden = ~mask.reshape(*mask.shape, *(1,) * (tensor.dim() - 2))
        return tensor.masked_fill(hidden, torch.nan) if name.startswith(("reads", "writes")) else tensor

    found = run(map_floats(spoiled, arguments), backend="native")
    assert_same(found, run(arguments, backend="native"), 0)
    assert not found["output[0]"][~mask].any()
    assert not found["reads.key"][~mask].any() and not found["writes.add"][~mask].any()


@pytest.mark.parametrize("backend", ["reference", "native", "torch"])
@pytest.mark.parametrize("where", ["writes.add", "reads.key", "slots.memory"])
def test_nan_stays_in_its_row(where, backend):
    # One thread works on all rows with the same scratch space, whose padding (9 slots) must not carry it on.
    arguments = cases.call(3, 5, 9, 4)

    def spoiled(name, tensor):
        tensor = tensor.clone()
        if name == where:
            tensor[1, 2] = torch.nan
        return tensor

    clean = run(arguments, backend=backend)
    found = run(map_floats(spoiled, arguments), backend=backend)
    assert found["output[0]"][1].isnan().any()
    for name, value in found.items():
        for row in (0, 2):
            assert value[row].isfinite().all(), name
            torch.testing.assert_close(value[row], clean[name][row], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [3, 16])
def test_any_number_of_threads_gives_the_same_bits(batch):
    arguments = map_floats(lambda _, t: t.float(), cases.call(batch, 40, 40, 8))
    assert batch * 40 * 40 * 8 >= native.SERIAL
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(arguments, backend="native"))
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


def test_a_sequence_in_pieces_is_the_sequence():
    arguments = EXAMPLES["read-write B=1 T=37 N=16 W=5"]
    whole, last = SCAN(**arguments, backend="native")
    slots, pieces = arguments["slots"], []
    for start, stop in ((0, 1), (1, 1), (1, 20), (20, 37)):

        def cut(_, tensor, start=start, stop=stop):
            return tensor[:, start:stop]

        piece = {name: map_leaves(cut, arguments[name]) for name in ("reads", "writes")}
        y, slots = SCAN(**(arguments | piece | {"slots": slots}), backend="native")
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=0)
    assert all(torch.equal(one, other) for one, other in zip(slots, last, strict=True))


def test_without_gradients_nothing_is_kept_for_them():
    arguments = EXAMPLES["read-write mask"]
    kept = []
    original = native.FORWARD

    class Spy:
        def __call__(self, *args):
            result = original(*args)
            kept.append(sum(t.numel() for t in result[4:]))
            return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "FORWARD", Spy())
        with torch.no_grad():
            SCAN(**arguments, backend="native")
        SCAN(**arguments, backend="native")
    assert kept[0] == 0 < kept[1]


def test_many_tokens_keep_few_memories():
    # 65 tokens: one memory for every 16.
    arguments = cases.call(1, 65, 8, 4)
    parameters = [*arguments["reads"], *arguments["writes"].heads, arguments["writes"].erase, arguments["writes"].add]
    result = native.FORWARD(*parameters, *arguments["slots"], None, None, None, None, None, False, True)
    assert result[4].shape == (1, 5, 4, native.PAD)


@pytest.mark.parametrize("grad", [True, False])
def test_the_primitive_is_what_torch_expects(grad):
    arguments = map_floats(lambda _, t: t, EXAMPLES["read-write mask reset"])
    arguments = map_leaves(lambda _, t: t.requires_grad_(grad) if t.is_floating_point() else t, arguments)
    slots, fresh, reads, writes = (arguments[name] for name in ("slots", "fresh", "reads", "writes"))
    rest = (arguments["mask"], arguments["reset"], True, grad)
    both = (*reads, *writes.heads, writes.erase, writes.add, *slots, *fresh, *rest)
    torch.library.opcheck(native.FORWARD.op, both)
    reading = (*reads, *7 * [None], *slots[:2], slots[2][:, :0].detach(), None, None, None, None, None, False, grad)
    torch.library.opcheck(native.FORWARD.op, reading)


@pytest.mark.parametrize("label", ["read-write mask reset", "write-read B=1 T=37 N=16 W=5", "read-write write only"])
def test_compiles_into_one_graph(label):
    arguments = EXAMPLES[label]
    torch._dynamo.reset()

    def fn(arguments):
        return SCAN(**arguments)

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for one, other in zip(leaves(compiled(arguments)).values(), leaves(fn(arguments)).values(), strict=True):
        torch.testing.assert_close(one, other)
    sum(t.sum() for t in leaves(compiled(arguments)).values()).backward()
    assert SCAN.choose(**arguments).backend == "native"


def test_backends_say_what_they_cannot_do():
    arguments = EXAMPLES["write-read mask"]
    meta = map_leaves(lambda _, t: t.to("meta"), arguments)
    choice = SCAN.choose(**meta)
    assert choice.backend == "reference"
    assert "meta" in choice.refused["native"] and "write-read" in choice.refused["torch"]
    assert "one loop" in SCAN.backends["torch"].unavailable(**EXAMPLES["read-write read only"])
    assert "no tokens" in SCAN.backends["torch"].unavailable(**EXAMPLES["read-write B=2 T=0 N=8 W=3"])


def test_flops_are_those_of_the_torch_backend():
    arguments = cases.call(2, 5, 8, 4, readers=2, writers=3)
    counts = [count_flops(lambda b=b: SCAN(**arguments, backend=b)) for b in ("native", "torch")]
    # Those of preparing tensors differ.
    assert counts[0] == pytest.approx(counts[1], rel=0.2) and counts[0] > 0
    reading = cases.call(2, 5, 8, 4, readers=2, writing=False)
    assert 0 < count_flops(lambda: SCAN(**reading, backend="native")) < counts[0]


def test_nothing_to_do_changes_nothing():
    arguments = EXAMPLES["read-write mask"] | {"reads": None, "writes": None, "mask": None}
    read, slots = SCAN(**arguments, backend="native")
    assert read.numel() == 0 and all(a is b for a, b in zip(slots, arguments["slots"], strict=True))


@pytest.mark.parametrize("backend", SCAN.backends)
def test_an_argument_of_another_shape_is_refused_before_any_backend_sees_it(backend):
    arguments = cases.call(2, 3, 5, 4, readers=2, mask=torch.ones(2, 3, dtype=torch.bool))
    for victim, tensor in leaves(arguments).items():
        for axis in range(tensor.dim()):

            def longer(name, value, victim=victim, axis=axis):
                return torch.cat([value, value.narrow(axis, 0, 1)], axis) if name == victim else value

            with pytest.raises(KernelError, match="op 'ntm'"):
                SCAN(**map_leaves(longer, arguments), backend=backend)
    with pytest.raises(KernelError, match="4 shifts for 5 slots"):
        even = {name: heads_with(arguments[name], torch.rand(2, 3, n, 4)) for name, n in (("reads", 2), ("writes", 1))}
        SCAN(**{**arguments, **even}, backend=backend)
    with pytest.raises(KernelError, match="mask has dtype"):
        SCAN(**{**arguments, "mask": torch.ones(2, 3)}, backend=backend)


def heads_with(heads, shift):
    return (
        heads._replace(shift=shift)
        if hasattr(heads, "shift")
        else heads._replace(heads=heads.heads._replace(shift=shift))
    )
