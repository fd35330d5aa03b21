"""The DNC's time loop in C against the equations token by token."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from altx_ntm.kernels.dnc import SCAN, cases, native

from altx.measure import count_flops
from altx_kernels import KernelError
from altx_kernels.trees import leaves, map_floats, map_leaves
from altx_kernels.verify import outputs_and_gradients, verify

EXAMPLES = {example.label: dict(example.arguments) for example in cases.examples()}
pytestmark = pytest.mark.usefixtures("one_thread")


def run(arguments: dict[str, Any], backend: str) -> dict[str, torch.Tensor]:
    return outputs_and_gradients(partial(SCAN, backend=backend), arguments)


def assert_same(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_native_is_the_reference_in_every_dtype_and_layout():
    findings = list(verify(SCAN, backends=["native"]))
    assert len(findings) >= 4
    for finding in findings:
        assert finding.status == "passed", finding


@pytest.mark.parametrize("length", [1, 15, 16, 17, 33])
def test_checkpoints_fit_any_length(length):
    arguments = cases.call(2, length, 18, 3, readers=2)
    assert_same(run(arguments, "native"), run(arguments, "reference"))


def test_gradcheck():
    mask = torch.tensor([[True, False, True, True, True], [True] * 5])
    reset = torch.tensor([[False, False, False, True, False], [True, False, False, False, False]])
    arguments = cases.call(2, 5, 5, 3, readers=2, mask=mask, reset=reset)
    flat = {name: t for name, t in leaves(arguments).items() if t.requires_grad}

    def fn(*values):
        given = dict(zip(flat, values, strict=True))
        replaced = map_leaves(lambda name, tensor: given.get(name, tensor), arguments)
        return tuple(leaves(SCAN(**replaced, backend="native"), "output").values())

    assert torch.autograd.gradcheck(fn, tuple(flat.values()), fast_mode=True)


def test_a_fresh_memory_has_the_references_gradients():
    """Nothing but zeros: all slots are alike, and no product of usages may be divided by one of them."""
    arguments = cases.call(2, 9, 6, 4, readers=2)
    fresh = map_leaves(lambda _, t: torch.zeros_like(t).requires_grad_(), arguments["slots"])
    arguments = arguments | {"slots": fresh}
    assert_same(run(arguments, "native"), run(arguments, "reference"))


def test_what_a_masked_token_holds_reaches_nothing():
    arguments = EXAMPLES["mask reset"]
    mask = arguments["mask"]

    def spoiled(name, tensor):
        hidden = ~mask.reshape(*mask.shape, *(1,) * (tensor.dim() - 2))
        return tensor.masked_fill(hidden, torch.nan) if name.startswith(("reads", "writes")) else tensor

    found = run(map_floats(spoiled, arguments), "native")
    assert_same(found, run(arguments, "native"), 0)
    assert not found["output[0]"][~mask].any() and not found["writes.add"][~mask].any()


@pytest.mark.parametrize("where", ["writes.add", "reads.key", "slots.memory", "slots.usage"])
def test_nan_stays_in_its_row(where):
    arguments = cases.call(3, 5, 9, 4)

    def spoiled(name, tensor):
        tensor = tensor.clone()
        if name == where:
            tensor[1, 2] = torch.nan
        return tensor

    clean, found = run(arguments, "native"), run(map_floats(spoiled, arguments), "native")
    assert found["output[0]"][1].isnan().any()
    for name, value in found.items():
        for row in (0, 2):
            torch.testing.assert_close(value[row], clean[name][row], rtol=1e-12, atol=1e-12)


def test_any_number_of_threads_gives_the_same_bits():
    arguments = map_floats(lambda _, t: t.float(), cases.call(5, 20, 20, 8, readers=2))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(arguments, "native"))
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


def test_flops_are_counted_and_few_states_are_kept():
    arguments = cases.call(2, 40, 8, 4, readers=2)
    assert count_flops(lambda: SCAN(**arguments, backend="native")) == 2 * 40 * cases.per_token(8, 4, 2)
    given = [*arguments["reads"], *arguments["writes"], *arguments["slots"], *6 * (None,), None, None]
    assert native.FORWARD(*given, True)[-1].shape[1] == 3 and native.FORWARD(*given, False)[-1].numel() == 0


def test_an_argument_of_another_shape_is_refused():
    arguments = cases.call(2, 3, 5, 4, readers=2, mask=torch.ones(2, 3, dtype=torch.bool))
    for victim, tensor in leaves(arguments).items():
        for axis in range(tensor.dim()):

            def longer(name, value, victim=victim, axis=axis):
                return torch.cat([value, value.narrow(axis, 0, 1)], axis) if name == victim else value

            with pytest.raises(KernelError, match="op 'dnc'"):
                SCAN(**map_leaves(longer, arguments), backend="native")
    with pytest.raises(KernelError, match="mask has dtype"):
        SCAN(**{**arguments, "mask": torch.ones(2, 3)})
