"""What no caller should pass, and sizes of nothing: an error or an empty result, never memory that is not ours."""

from __future__ import annotations

import pytest
import torch

from altx_kernels import KernelError
from altx_kernels.causal_conv1d import causal_conv1d
from altx_kernels.delta_rule import delta_rule
from altx_kernels.linear_recurrence import linear_recurrence

BACKENDS = ["native", "torch", "reference"]


def conv(tokens, cu_seqlens=None, **pin):
    return causal_conv1d(torch.ones(1, tokens, 3), torch.ones(3, 4), cu_seqlens=cu_seqlens, **pin)


def recurrence(tokens, cu_seqlens=None, values=4, **pin):
    q, v = torch.ones(1, tokens, 2, 3), torch.ones(1, tokens, 2, values)
    return linear_recurrence(q, q, v, cu_seqlens=cu_seqlens, **pin)


def delta(tokens, cu_seqlens=None, values=4, **pin):
    q, v = torch.ones(1, tokens, 2, 3), torch.ones(1, tokens, 2, values)
    return delta_rule(q, q, v, -q / 9, q / 9, cu_seqlens=cu_seqlens, **pin)


def skip_without(fn, backend):
    try:
        fn(2, backend=backend)
    except KernelError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("lie", [[0, 10**7], [0, 50, 40], [-5, 40], [0, -3, 40], [0, 30], [5, 40]], ids=str)
@pytest.mark.parametrize("fn", [conv, recurrence, delta])
def test_a_compiled_graph_does_not_read_where_wrong_bounds_say(fn, lie):
    skip_without(fn, "native")
    compiled = torch.compile(lambda cuts: fn(40, cuts, backend="native"), backend="eager", fullgraph=True)
    with torch.no_grad(), pytest.raises(KernelError, match="does not rise from 0 to the 40 tokens"):
        compiled(torch.tensor(lie))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fn", [conv, recurrence, delta])
def test_a_packed_batch_may_have_no_sequences(fn, backend):
    skip_without(fn, backend)
    y, state = fn(0, torch.tensor([0]), backend=backend)
    assert y.shape[:2] == (1, 0)
    assert len(state) == 0


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("fn", [recurrence, delta])
def test_a_state_may_have_no_value_channels(fn, backend):
    if backend == "native" and fn is recurrence:
        pytest.skip("it says that there are no channels")
    skip_without(fn, backend)
    y, state = fn(5, values=0, backend=backend)
    assert y.shape == (1, 5, 2, 0)
    assert state.shape == (1, 2, 3, 0)
