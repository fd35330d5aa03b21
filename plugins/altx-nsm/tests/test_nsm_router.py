"""Token-to-state routing by itself: against its equations, token by token in float64, and in the memory's place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from altx_nsm.config import NSMConfig, TokenToStateConfig
from altx_nsm.memory import NSM
from altx_nsm.router import TokenToState

from altx.compose import compose
from altx.context import Context
from altx.errors import AltxError, CompositionError
from altx.layer import FRESH
from altx.router import Route, Targets

DIM, N = 6, 5


def make(**settings: Any) -> TokenToState:
    """A router with weights far from their initial values, in float64."""
    torch.manual_seed(0)
    router = TokenToState(TokenToStateConfig(**{"chunk": 3, **settings}), DIM, N).double()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.mul_(2).add_(0.3 * torch.randn_like(parameter))
        router.logit_scale.fill_(1.0)  # so that no share of a choice is next to nothing
    return router


def tokens(batch: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def unit(s: torch.Tensor) -> torch.Tensor:
    return s / (s.square().mean() + 1e-6).sqrt() / len(s) ** 0.5


def equations(router: TokenToState, x: torch.Tensor, alive: list[bool]) -> torch.Tensor:
    """One row x (T, D), target by target: weights (T, n)."""
    c, living, gate = router.config, [i for i in range(N) if alive[i]], router.write_gate
    states = list(router.initial)
    told: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in range(N)]
    rows = []
    for t, token in enumerate(x):
        query = unit(router.q_proj.weight @ token)
        score = {i: router.logit_scale.exp()[0] * (query @ unit(states[i])) for i in living}
        chosen = sorted(living, key=lambda i: -score[i].item())[: c.k]
        share = torch.stack([score[i] for i in chosen]).exp()
        weights = dict(zip(chosen, share / share.sum(), strict=True))
        rows.append(torch.stack([weights.get(i, x.new_zeros(())) for i in range(N)]))
        if gate is None or c.chunk is None:
            continue
        for i, a in weights.items():
            write = a * torch.sigmoid(gate.weight[0] @ token + gate.bias[0])
            told[i].append((write, write * query, write * write))
        if (t + 1) % c.chunk:
            continue
        for i in range(N):
            if told[i]:
                mass, query, strength = (torch.stack(each).sum(0) for each in zip(*told[i], strict=True))
                states[i] = states[i] + strength / mass * (query / mass - states[i])
        told = [[] for _ in range(N)]
    return torch.stack(rows)


def dense(route: Route, x: torch.Tensor) -> torch.Tensor:
    """Weights (B, T, n)."""
    return route.dense(*x.shape[:2]).permute(1, 2, 0)


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("settings", [{}, {"chunk": 1}, {"chunk": 5, "k": 3}, {"width": 4}, {"chunk": None}])
def test_routes_are_the_equations_with_the_same_gradients(settings: dict[str, Any], dead: bool) -> None:
    router, x = make(**settings), tokens().requires_grad_()
    alive = [not dead or i != 2 for i in range(N)]
    found = dense(router.route(x, Targets(N, alive=torch.tensor(alive))), x)
    wanted = torch.stack([equations(router, row, alive) for row in x])
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).double()
    varied = [x, *router.parameters()]
    gradients = [torch.autograd.grad((each * noise).sum(), varied) for each in (found, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        assert bool((ours != 0).any())


def test_wherever_calls_are_cut_and_padded_routes_are_the_same() -> None:
    router, x = make(), tokens()
    whole = dense(router.route(x, Targets(N)), x)
    spread, mask = torch.full((2, 16, DIM), torch.nan).double(), torch.ones(2, 16, dtype=torch.bool)
    mask[0, [0, 3, 4, 9, 15]] = mask[1, [1, 2, 6, 7, 8]] = False
    spread[mask] = x.flatten(0, 1)
    for target, context, ends in ((x, FRESH, (1, 2, 6, 7, 11)), (spread, Context(mask=mask), (5, 6, 12, 16))):
        state, start, found = router.init_state(2, dtype=torch.float64), 0, []
        for end in ends:
            route = router.route(target[:, start:end], Targets(N), context.slice(start, end), state)
            state = route.state
            found.append(dense(route, target[:, start:end]))
            start = end
        joined = torch.cat(found, 1)
        real = joined if context.mask is None else joined[mask].unflatten(0, (2, 11))
        torch.testing.assert_close(real, whole, rtol=1e-11, atol=1e-11)
        assert state is not None and state.seen is not None and state.seen.tolist() == [11, 11]


def test_with_fixed_states_it_chooses_the_memorys_states_by_what_they_hold() -> None:
    router = make(chunk=None)
    nsm = NSM(NSMConfig(slots=N, chunk=3, heads=2), DIM, router).double()
    x = tokens()
    whole, state, pieces = nsm.scan(x, nsm.init_state(2)), nsm.init_state(2), []
    for t in range(11):
        out = nsm.scan(x[:, t : t + 1], state)
        state = out.state
        assert out.read.value is not None
        pieces.append(out.read.value)
    torch.testing.assert_close(torch.cat(pieces, 1), whole.read.value, rtol=1e-11, atol=1e-11)
    assert whole.losses.keys() == {"router.balance"} and whole.metrics["load"].sum() == pytest.approx(22)


def test_given_keys_are_matched_and_its_own_states_hold() -> None:
    router, x = make(), tokens()
    keys = torch.randn(2, N, DIM, generator=torch.Generator().manual_seed(3)).double()
    state = router.init_state(2, dtype=torch.float64)
    route = router.route(x, Targets(N, keys=keys), FRESH, state)
    fixed = make(chunk=None)
    fixed.load_state_dict({name: value for name, value in router.state_dict().items() if name in fixed.state_dict()})
    fixed.initial.data = keys[1]
    torch.testing.assert_close(dense(route, x)[1], dense(fixed.route(x[1:], Targets(N)), x[1:])[0])
    assert route.state is state


def test_the_balance_loss_is_1_when_balanced_and_padding_counts_in_nothing() -> None:
    router, x = make(chunk=None), tokens()
    torch.nn.init.zeros_(router.q_proj.weight)
    assert float(router.route(x, Targets(N)).losses["balance"].detach()) == pytest.approx(1.0)
    nothing = router.route(x, Targets(N), Context(mask=torch.zeros(2, 11, dtype=torch.bool)))
    assert float(nothing.losses["balance"].detach()) == 0 and not nothing.metrics["load"].any()
    assert set(nothing.target.tolist()) == {-1}
    none = router.route(x, Targets(N, alive=torch.zeros(N, dtype=torch.bool)))
    assert set(none.target.tolist()) == {-1} and not none.weight.any() and int(none.metrics["no_target"]) == 22


def test_the_states_of_a_lopsided_stream_change_where_its_tokens_go() -> None:
    """What makes it more than a gate: the same token goes elsewhere after another past."""
    router, x = make(), tokens(1, 9)
    first = dense(router.route(x, Targets(N)), x)[0, 6:]
    other = torch.cat([-2 * x[:, :6], x[:, 6:]], 1)
    assert not torch.allclose(first, dense(router.route(other, Targets(N)), other)[0, 6:])


def recipe(targets: list[dict[str, Any]], causal: bool = True, **settings: Any) -> dict[str, Any]:
    sublayer = {"router": {"name": "token-to-state", **settings}, "targets": targets}
    head = {} if causal else {"head": {"kind": "vectors", "size": 3}}
    return {"dim": 16, "causal": causal, "blocks": [{"sublayers": [sublayer]}], **head}


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(AltxError, match="k 3 is more than there are; use k of at most 2"):
        compose(recipe([{"memory": "nsm", "repeat": 2}], k=3))
    with pytest.raises(CompositionError, match="keeps a state"):
        NSM(NSMConfig(slots=N), DIM, make())
    with pytest.raises(ValueError, match="states of width 4, and this router's keys have 6"):
        make(chunk=None).route(tokens(), Targets(N, keys=torch.zeros(N, 4).double()))


def test_an_encoder_runs_it_in_both_directions_over_what_looks_at_a_token_alone() -> None:
    model = compose(recipe([{"feed_forward": "swiglu", "repeat": 2}], causal=False), seed=0)
    assert sum(isinstance(module, TokenToState) for module in model.modules()) == 2
    with pytest.raises(CompositionError, match="use a router that looks both ways, too"):
        compose(recipe([{"memory": "nsm", "repeat": 2}], causal=False))
