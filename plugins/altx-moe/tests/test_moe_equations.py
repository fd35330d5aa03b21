"""Sinkhorn, BASE, hash, Soft MoE and mixture of depths against their papers' equations, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from altx_moe.base import Base, assign
from altx_moe.config import BaseConfig, DepthsConfig, HashConfig, SinkhornConfig, SoftConfig, SwitchConfig, TopKConfig
from altx_moe.depths import Depths
from altx_moe.hashing import Hash
from altx_moe.sinkhorn import Sinkhorn, balanced
from altx_moe.soft import Soft
from altx_moe.switch import Switch
from altx_moe.topk import TopK

from altx.compose import compose
from altx.context import Context
from altx.errors import AltxError, CompositionError
from altx.feed_forward import SwiGLU, SwiGLUBank
from altx.feed_forward_config import SwiGLUConfig, capabilities
from altx.layer import FRESH
from altx.measure import layer_costs
from altx.routed import Routed
from altx.router import Targets

DIM, N, BATCH, LENGTH = 6, 4, 3, 7
MASK = torch.tensor([[0, 1, 1, 0, 1, 1, 0], [1, 1, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 0]]).bool()
NOBODY = torch.zeros_like(MASK)


def tokens(batch: int = BATCH, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def settled(router):
    """In float64, with scores that differ."""
    torch.manual_seed(0)
    for parameter in router.double().parameters():
        if parameter.dim():  # The scale of soft stays.
            torch.nn.init.normal_(parameter)
    return router


def experts() -> tuple[list[SwiGLU], SwiGLUBank]:
    """The same experts as modules and as a bank."""
    torch.manual_seed(3)
    modules, bank = [SwiGLU(DIM, 5).double() for _ in range(N)], SwiGLUBank(N, DIM, 5).double()
    with torch.no_grad():
        for name in ("gate", "up", "down"):
            getattr(bank, name).copy_(torch.stack([getattr(module, name).weight.T for module in modules]))
    for component in (*modules, bank):
        component.capabilities = capabilities(SwiGLUConfig())
    return modules, bank


def numbers(batch: int = BATCH, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(5))


def told(mask: torch.Tensor | None = None, **settings) -> Context:
    return Context(mask=mask, shared={"token_ids": numbers()}, **settings)


def megatron_sinkhorn(cost: torch.Tensor, rounds: int) -> torch.Tensor:
    """megatron/core/transformer/moe/moe_utils.py's equations: cost (tokens, n) is scaled by d0 and d1."""
    cost = cost.exp()
    d1 = torch.ones(cost.shape[1], dtype=cost.dtype)
    for _ in range(rounds):
        d0 = 1 / cost.shape[0] / (d1 * cost).sum(1)
        d1 = 1 / cost.shape[1] / (d0[:, None] * cost).sum(0)
    return d1 * cost * d0[:, None]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_sinkhorn_picks_from_balanced_scores_while_training(k, masked):
    router, x, real = settled(Sinkhorn(SinkhornConfig(k=k, iterations=200), DIM, N)).train(), tokens(), ~NOBODY
    ctx, real = (Context(mask=MASK), MASK) if masked else (FRESH, real)
    logits = x @ router.gate.weight.T
    scaled = megatron_sinkhorn(logits[real].detach(), 2000)
    torch.testing.assert_close(scaled.sum(0), torch.full((N,), 1 / N, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    found = balanced(logits.detach(), real, None, 200)[real].exp()
    torch.testing.assert_close(found, scaled, rtol=1e-9, atol=1e-9)
    route = router.route(x, Targets(N), ctx)
    best = scaled.topk(k, -1).indices
    assert torch.equal(route.target.view(BATCH, LENGTH, k)[real], best)
    scores = torch.sigmoid(logits) if k == 1 else torch.softmax(logits, -1)
    torch.testing.assert_close(route.weight.view(BATCH, LENGTH, k)[real], scores[real].gather(-1, best))


def test_sinkhorn_balances_in_training_and_takes_the_best_afterwards():
    router = settled(Sinkhorn(SinkhornConfig(), DIM, N))
    x = tokens(4, 64) + router.gate.weight.detach()[0]
    plain, even = router.eval().route(x, Targets(N)), router.train().route(x, Targets(N))
    assert float(even.metrics["max_load"]) < 1.3 < 1.8 < float(plain.metrics["max_load"])
    assert torch.equal(plain.target.view(4, 64), (x @ router.gate.weight.T).argmax(-1))


@pytest.mark.parametrize("shape", [(6, 2), (6, 3), (7, 3), (4, 4), (5, 1), (1, 3), (2, 4)])
def test_assignments_are_the_best_that_are_balanced(shape):
    tokens, n = shape
    places = math.ceil(tokens / n)
    for seed in range(5):
        scores = torch.randn(tokens, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        target = assign(scores, 1e-7, 100_000)
        assert int(torch.bincount(target, minlength=n).max()) <= places

        def total(picks, scores=scores):
            return float(sum(scores[t, i] for t, i in enumerate(picks)))

        best = max(
            total(picks)
            for picks in itertools.product(range(n), repeat=tokens)
            if max(picks.count(i) for i in range(n)) <= places
        )
        assert total(target.tolist()) == pytest.approx(best, abs=1e-5)


def test_an_auction_cut_short_is_balanced_all_the_same():
    scores = torch.randn(50, 4).double() + torch.tensor([3.0, 0, 0, 0])
    for rounds in (1, 2, 10):
        target = assign(scores, 1e-3, rounds)
        assert (target >= 0).all() and int(torch.bincount(target, minlength=4).max()) <= 13
    assert int(torch.bincount(assign(torch.zeros(8, 4), 1e-3, 1000)).max()) == 2, "ties"


def test_base_layers_are_balanced_in_training_and_take_the_best_afterwards():
    router, x = settled(Base(BaseConfig(precision=1e-6), DIM, N)), tokens()
    logits = x @ router.gate.weight.T
    route = router.train().route(x, Targets(N), Context(mask=MASK))
    wanted = assign(logits[MASK].detach(), 1e-6, 1000)
    assert torch.equal(route.target.view(BATCH, LENGTH)[MASK], wanted) and float(route.metrics["load"].max()) == 3
    weight = torch.sigmoid(logits[MASK].gather(-1, wanted[:, None]))[:, 0]
    torch.testing.assert_close(route.weight.view(BATCH, LENGTH)[MASK], weight)
    after = router.eval().route(x, Targets(N), Context(mask=MASK))
    assert torch.equal(after.target.view(BATCH, LENGTH)[MASK], logits[MASK].argmax(-1))


def test_a_hash_is_fixed_spread_and_of_the_number_alone():
    router = Hash(HashConfig(k=2), N)
    ids = torch.arange(40_000).view(1, -1)
    x = torch.zeros(1, 40_000, DIM)
    route = router.route(x, Targets(N), Context(shared={"token_ids": ids}))
    pairs = route.target.view(-1, 2)
    assert (pairs[:, 0] != pairs[:, 1]).all() and float(route.weight.sum()) == pytest.approx(40_000)
    assert float(route.metrics["max_load"]) < 1.03
    first = torch.bincount(pairs[:, 0] * N + pairs[:, 1], minlength=N * N).view(N, N)
    assert float(first.max()) < 1.1 * 40_000 / (N * (N - 1)), "every pair as often"
    turned = router.route(x, Targets(N), Context(shared={"token_ids": ids.flip(1)}))
    assert torch.equal(turned.target.view(-1, 2), pairs.flip(0))
    other = Hash(HashConfig(k=2, seed=1), N).route(x, Targets(N), Context(shared={"token_ids": ids}))
    assert 0.2 < float((other.target == route.target).double().mean()) < 0.3

    alive = torch.tensor([True, False, True, True])
    fewer = Hash(HashConfig(), N).route(x, Targets(N, alive=alive), Context(shared={"token_ids": ids}))
    before = Hash(HashConfig(), N).route(x, Targets(N), Context(shared={"token_ids": ids}))
    assert torch.equal(fewer.target[before.target != 1], before.target[before.target != 1]), "only the dead's move"
    assert 1 not in fewer.target


@pytest.mark.parametrize("normalise", [False, True])
def test_soft_moe_is_equations_1_to_3(normalise):
    router, (modules, bank), x = settled(Soft(SoftConfig(slots=2, normalise=normalise), DIM, N)), experts(), tokens()
    if normalise:
        torch.nn.init.constant_(router.scale, 3.0)
    wanted = torch.zeros_like(x)
    for b in range(BATCH):
        real = x[b][MASK[b]]
        phi = router.phi.detach()
        if normalise:
            phi = 3.0 * phi / phi.norm(dim=1, keepdim=True)
        logits = (real / real.norm(dim=1, keepdim=True) if normalise else real) @ phi.T
        dispatch, combine = logits.exp() / logits.exp().sum(0), logits.exp() / logits.exp().sum(1, keepdim=True)
        slots = dispatch.T @ real
        outputs = torch.stack([modules[j // 2](slots[j][None, None]).y[0, 0] for j in range(2 * N)])
        wanted[b, MASK[b]] = combine @ outputs
    spread = torch.where(MASK[..., None], x, torch.nan)
    for targets in (modules, bank):
        out = Routed(router, targets)(spread, Context(causal=False, mask=MASK))
        torch.testing.assert_close(out.y[MASK], wanted[MASK], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("score", ["linear", "sigmoid"])
@pytest.mark.parametrize("capacity", [0.125, 0.5, 1.0])
def test_mixture_of_depths_takes_the_highest_of_a_row_while_training(capacity, score):
    router, (modules, bank), x = (
        settled(Depths(DepthsConfig(capacity=capacity, score=score), DIM, N)),
        experts(),
        tokens(),
    )
    weights = torch.zeros(BATCH, LENGTH, N, dtype=torch.float64)
    logits = (x @ router.gate.weight.T + router.bias).detach()
    for b, i in itertools.product(range(BATCH), range(N)):
        real = [t for t in range(LENGTH) if MASK[b, t]]
        for t in sorted(real, key=lambda t: -float(logits[b, t, i]))[: math.ceil(capacity * len(real))]:
            weights[b, t, i] = logits[b, t, i] if score == "linear" else torch.sigmoid(logits[b, t, i])
    wanted = sum(weights[..., i, None] * module(x).y for i, module in enumerate(modules))
    for targets in (modules, bank):
        out = Routed(router.train(), targets)(x, Context(mask=MASK))
        torch.testing.assert_close(out.y[MASK], wanted[MASK], rtol=1e-10, atol=1e-10)
    encoder = Routed(router.eval(), bank)(x, Context(mask=MASK, causal=False))
    torch.testing.assert_close(encoder.y, out.y)
    chosen = (weights != 0)[MASK]
    error = torch.nn.functional.binary_cross_entropy_with_logits(logits[MASK], chosen.double())
    torch.testing.assert_close(out.losses["router.predictor"].detach(), error)


@pytest.mark.parametrize("predictor", ["gate", "mlp"])
def test_a_predictor_decides_in_a_causal_model_after_training(predictor):
    router, x = settled(Depths(DepthsConfig(capacity=0.5, predictor=predictor), DIM, 1)), tokens()
    guess = x @ router.gate.weight.T + router.bias if predictor == "gate" else router.predictor(x)
    route = router.eval().route(x, Targets(1))
    assert torch.equal(route.target >= 0, (guess > 0).flatten())
    assert torch.equal(router.route(x[:, :3], Targets(1)).target.view(BATCH, 3), route.target.view(BATCH, -1)[:, :3])


def test_the_small_networks_loss_trains_nothing_else():
    router, x = settled(Depths(DepthsConfig(predictor="mlp"), DIM, 1)).train(), tokens().requires_grad_()
    router.route(x, Targets(1)).losses["predictor"].backward()
    assert x.grad is None and router.gate.weight.grad is None
    assert all(float(p.grad.abs().max()) > 0 for p in router.predictor.parameters())


@pytest.mark.parametrize(("predictor", "share"), [("gate", 0.8), ("mlp", 0.9)])
def test_a_predictor_learns_which_tokens_are_chosen(predictor, share):
    torch.manual_seed(0)
    router = Depths(DepthsConfig(capacity=0.25, predictor=predictor), DIM, 1).double().train()
    x = tokens(8, 64)
    optimizer = torch.optim.Adam(router.parameters(), 0.05)
    for _ in range(150):
        loss = router.route(x, Targets(1)).losses["predictor"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(router.route(x, Targets(1)).metrics["predicted"]) > share
    assert 0.15 < float(router.eval().route(x, Targets(1)).metrics["load"]) / 512 < 0.35


def test_groups_limit_where_a_tokens_targets_lie():
    router = settled(TopK(TopKConfig(k=2, groups=3, groups_used=1), DIM, 6))
    x = tokens()
    scores = torch.softmax(x @ router.gate.weight.T, -1).unflatten(-1, (3, 2))
    target = router.route(x, Targets(6)).target.view(BATCH, LENGTH, 2)
    assert torch.equal(target // 2, scores.amax(-1).argmax(-1, keepdim=True).expand(-1, -1, 2))
    alive = torch.tensor([True, False, False, False, False, True])
    fewer = router.route(x, Targets(6, alive=alive)).target.view(BATCH, LENGTH, 2)
    assert set(fewer.unique().tolist()) == {-1, 0, 5} and (fewer[..., 0] >= 0).all(), "the other group stays closed"


def test_noise_is_there_in_training_only_and_from_the_contexts_generator():
    router, x = settled(TopK(TopKConfig(noise=True), DIM, N)), tokens()
    ctx = [Context(generator=torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)]
    assert torch.equal(*(router.eval().route(x, Targets(N), c).weight for c in ctx[:2]))
    still = router.route(x, Targets(N)).weight
    a, b, c = (router.train().route(x, Targets(N), each).weight for each in (
        Context(generator=torch.Generator().manual_seed(7)), Context(generator=torch.Generator().manual_seed(7)), ctx[2]
    ))  # fmt: skip
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a, still)
    size = torch.nn.functional.softplus(x @ router.noise.T)
    generator = torch.Generator().manual_seed(7)
    logits = x @ router.gate.weight.T + torch.randn(size.shape, generator=generator, dtype=size.dtype) * size
    best = torch.softmax(logits.topk(2, -1).values, -1)
    torch.testing.assert_close(a, best.flatten())


def test_jitter_is_there_in_training_only():
    router, x = settled(Switch(SwitchConfig(jitter=0.5, capacity_factor=None), DIM, N)), tokens()
    ctx = [Context(generator=torch.Generator().manual_seed(seed)) for seed in (7, 8)]
    assert not torch.equal(*(router.train().route(x, Targets(N), c).weight for c in ctx))
    assert torch.equal(*(router.eval().route(x, Targets(N), c).weight for c in ctx))


def test_a_full_target_takes_no_more_and_later_tokens_go_without():
    router = settled(Switch(SwitchConfig(capacity_factor=1.0), DIM, N)).train()
    x = router.gate.weight.detach()[0].expand(2, 8, DIM)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]]).bool()
    route = router.route(x, Targets(N), Context(mask=mask))
    assert (route.target.view(2, 8) >= 0).int().tolist() == [[0, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert int(route.metrics["no_target"]) == 11 and float(route.metrics["drop_rate"]) == pytest.approx(11 / 15)
    everyone = router.eval().route(x, Targets(N), Context(mask=mask))
    assert int(everyone.metrics["no_target"]) == 0 and float(everyone.metrics["drop_rate"]) == 0


ROUTERS = {
    "switch": lambda: Switch(SwitchConfig(), DIM, N),
    "topk with shared": lambda: TopK(TopKConfig(shared=1, groups=3, groups_used=2), DIM, N),
    "sinkhorn": lambda: Sinkhorn(SinkhornConfig(), DIM, N),
    "sinkhorn, 2": lambda: Sinkhorn(SinkhornConfig(k=2), DIM, N),
    "base": lambda: Base(BaseConfig(), DIM, N),
    "hash": lambda: Hash(HashConfig(k=2), N),
    "soft": lambda: Soft(SoftConfig(slots=2), DIM, N),
    "mixture-of-depths": lambda: Depths(DepthsConfig(capacity=0.5), DIM, N),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_padding_moves_nothing(name, training):
    layer = Routed(settled(ROUTERS[name]()), experts()[1]).train(training)
    mask = torch.tensor([0, 1, 0, 1, 1, 0, 1, 1, 0]).bool().expand(2, -1)
    x, ids = tokens(2, 5), numbers(2, 5)
    spread, spread_ids = torch.full((2, 9, DIM), torch.nan, dtype=torch.float64), torch.full((2, 9), -(2**62))
    spread[mask], spread_ids[mask] = x.reshape(-1, DIM), ids.flatten()
    causal = not isinstance(layer.router, Soft)
    plain = layer(x, Context(causal=causal, shared={"token_ids": ids}))
    padded = layer(spread, Context(causal=causal, mask=mask, shared={"token_ids": spread_ids}))
    torch.testing.assert_close(padded.y[mask], plain.y.reshape(-1, DIM), rtol=1e-10, atol=1e-10)
    for name, value in {**plain.losses, **plain.metrics}.items():
        torch.testing.assert_close({**padded.losses, **padded.metrics}[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_a_batch_of_masked_tokens_gives_zeros_and_no_loss(name, training):
    layer = Routed(settled(ROUTERS[name]()), experts()[1]).train(training)
    x = tokens().requires_grad_()
    out = layer(x, told(NOBODY, causal=not isinstance(layer.router, Soft)))
    assert not out.y.any() and all(float(loss.detach()) == 0 for loss in out.losses.values())
    assert all(value.isfinite().all() for value in out.metrics.values())
    assert int(out.metrics["router.no_target"]) == 0 and float(out.metrics["router.load"].sum()) == 0
    if out.y.requires_grad:
        (out.y.sum() + sum(out.losses.values(), torch.zeros(()))).backward()
    assert x.grad is None or x.grad.isfinite().all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("alive", [[True, False, True, True], [False, False, True, False], [False] * 4])
def test_dead_targets_are_never_chosen(name, alive, training):
    router = settled(ROUTERS[name]()).train(training)
    route = router.route(tokens(), Targets(N, alive=torch.tensor(alive)), told())
    living = {i for i in range(N) if alive[i]}
    if route.slots is not None:
        used = route.slots.dispatch.flatten(2).abs().sum((0, 2)) + route.slots.combine.flatten(2).abs().sum((0, 2))
        assert {i for i in range(N) if used[i] > 1e-12} == living
    else:
        assert set(route.target.tolist()) - {-1} <= living
        assert route.weight.isfinite().all() and not route.weight[route.target < 0].any()
    assert all(value.isfinite().all() for value in {**route.losses, **route.metrics}.values())
    if not living:
        assert int(route.metrics["no_target"]) == BATCH * LENGTH


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "hash"])
def test_the_task_trains_the_router(name):
    router = settled(ROUTERS[name]()).train()
    Routed(router, experts()[1])(tokens(), told(causal=not isinstance(router, Soft))).y.square().sum().backward()
    assert all(float(p.grad.abs().max()) > 1e-9 for p in router.parameters())


def recipe(router: dict | str, target: dict | None = None, **settings) -> dict:
    targets = [target or {"feed_forward": {"name": "swiglu", "hidden": 8}, "repeat": N}]
    return {"dim": 8, "blocks": [{"sublayers": [{"router": router, "targets": targets}]}], **settings}


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"name": "switch", "capacity_factor": 0.0}, "greater than 0"),
        ({"name": "expert-choice", "capacity_factor": 0.0}, "greater than 0"),
        ({"name": "mixture-of-depths", "capacity": 0.0}, "greater than 0"),
        ({"name": "sinkhorn", "k": 5}, "use k of at most 4"),
        ({"name": "hash", "k": 5}, "use k of at most 4"),
        ({"name": "topk", "k": 4, "shared": 1}, "use k of at most 3"),
        ({"name": "topk", "shared": 4}, "use at most 3"),
        ({"name": "topk", "groups": 3}, "use a divisor of 4"),
        ({"name": "topk", "groups": 2, "groups_used": 3}, "use at most 2"),
        ({"name": "topk", "k": 3, "groups": 2}, "use k of at most 2"),
        ("soft", "cannot enter a causal model"),
    ],
)
def test_what_cannot_be_is_refused(router, message):
    with pytest.raises(AltxError, match=message):
        compose(recipe(router))


def test_a_mixture_of_tokens_is_no_sequence():
    with pytest.raises(CompositionError, match="make feed-forwards its targets"):
        compose(recipe("soft", {"mixer": "linear-attention", "repeat": 2}, causal=False))


def test_nothing_to_choose_among_is_refused():
    with pytest.raises(AltxError, match="a router needs targets"):
        compose({"dim": 8, "blocks": [{"sublayers": [{"router": "topk", "targets": []}]}]})
    with pytest.raises(CompositionError, match="there are none"):
        Routed(TopK(TopKConfig(), DIM, 2), [])


def test_a_hash_needs_tokens():
    with pytest.raises(CompositionError, match="needs token_ids"):
        compose(recipe("hash", input={"kind": "vectors", "size": 3}, head={"kind": "vectors", "size": 3}))
    model = compose(recipe("hash"), seed=0)
    costs = layer_costs(model.body.layers[0].layers[0].body, 8)
    assert 6 * 8 * 8 <= costs.flops_per_token < 2 * 6 * 8 * 8, "one expert a token"
    assert model(torch.randint(256, (2, 5))).y.shape == (2, 5, 256)
