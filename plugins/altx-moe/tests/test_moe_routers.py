"""The routers against dense loops in float64, and their laws."""

from __future__ import annotations

import math

import pytest
import torch
from altx_moe.config import ExpertChoiceConfig, TopKConfig
from altx_moe.expert_choice import ExpertChoice
from altx_moe.topk import TopK

from altx.capabilities import Capabilities
from altx.compose import compose
from altx.context import Context
from altx.errors import AltxError, CompositionError
from altx.feed_forward import SwiGLU, SwiGLUBank
from altx.feed_forward_config import SwiGLUConfig, capabilities
from altx.layer import FRESH, Layer, Output, StepInfo, advanced
from altx.routed import Routed
from altx.router import Targets
from altx.state import Leaf, State

DIM, N = 6, 4
MASK = torch.tensor([[0, 1, 1, 0, 1, 1, 0], [1, 1, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 0]]).bool()


def tokens(batch: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def topk(**settings) -> TopK:
    torch.manual_seed(0)
    router = TopK(TopKConfig(**settings), DIM, N).double()
    torch.nn.init.normal_(router.gate.weight)
    return router


def expert_choice(capacity_factor: float = 2.0) -> ExpertChoice:
    torch.manual_seed(0)
    router = ExpertChoice(ExpertChoiceConfig(capacity_factor=capacity_factor), DIM, N).double()
    torch.nn.init.normal_(router.gate.weight)
    return router


def experts() -> tuple[list[SwiGLU], SwiGLUBank]:
    """The same experts as modules and as a bank."""
    torch.manual_seed(3)
    modules, bank = [SwiGLU(DIM, 5).double() for _ in range(N)], SwiGLUBank(N, DIM, 5).double()
    with torch.no_grad():
        for name in ("gate", "up", "down"):
            getattr(bank, name).copy_(torch.stack([getattr(module, name).weight.T for module in modules]))
    for component in (*modules, bank):
        component.capabilities = capabilities(SwiGLUConfig())  # As composition sets them.
    return modules, bank


def dense_topk(router: TopK, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Weights (B, T, n), one token after the other."""
    c, weights = router.config, torch.zeros(*x.shape[:2], N, dtype=x.dtype)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            if not mask[b, t]:
                continue
            logits = [float(row @ x[b, t]) for row in router.gate.weight.detach()]
            if c.score == "softmax":
                total = sum(math.exp(logit) for logit in logits)
                scores = [math.exp(logit) / total for logit in logits]
            else:
                scores = [1 / (1 + math.exp(-logit)) for logit in logits]
            bias = [0.0] * N if router.bias is None else router.bias.tolist()
            best = sorted(range(N), key=lambda i: -(scores[i] + bias[i]))[: c.k]
            total = sum(scores[i] for i in best) if c.renormalise else 1.0
            for i in best:
                weights[b, t, i] = scores[i] / total
    return weights


def dense_expert_choice(router: ExpertChoice, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Weights (B, T, n), one row and one expert after the other."""
    weights = torch.zeros(*x.shape[:2], N, dtype=x.dtype)
    for b in range(x.shape[0]):
        real = [t for t in range(x.shape[1]) if mask[b, t]]
        scores = torch.softmax(x[b] @ router.gate.weight.detach().T, -1)
        capacity = min(len(real), math.ceil(router.config.capacity_factor * len(real) / N))
        for i in range(N):
            for t in sorted(real, key=lambda t: -float(scores[t, i]))[:capacity]:
                weights[b, t, i] = scores[t, i]
    return weights


ROUTERS = {
    "topk": (topk, dense_topk),
    "top-1 unnormalised": (lambda: topk(k=1, renormalise=False), dense_topk),
    "top-3 sigmoid with bias": (lambda: biased(k=3, score="sigmoid"), dense_topk),
    "expert-choice": (expert_choice, dense_expert_choice),
    "expert-choice, factor 1": (lambda: expert_choice(1.0), dense_expert_choice),
    "expert-choice, everything": (lambda: expert_choice(9.0), dense_expert_choice),
}


def biased(**settings) -> TopK:
    router = topk(bias_rate=0.1, **settings)
    router.bias += torch.tensor([0.5, -0.5, 0.25, 0.0])
    return router


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_modules_and_bank_agree_with_a_dense_loop(name, masked):
    make, dense = ROUTERS[name]
    router, x, (modules, bank) = make(), tokens(), experts()
    mask = MASK if masked else torch.ones_like(MASK)
    ctx = Context(mask=MASK) if masked else FRESH
    weights = dense(router, x, mask)
    wanted = sum(weights[..., i, None] * module(x).y for i, module in enumerate(modules))
    for targets in (modules, bank):
        out = Routed(router, targets)(x, ctx)
        torch.testing.assert_close(out.y[mask], wanted[mask], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(out.metrics["router.load"].double(), (weights > 0).sum((0, 1)).double())
        assert int(out.metrics["router.no_target"]) == int((mask & (weights == 0).all(-1)).sum())


@pytest.mark.parametrize("name", ROUTERS)
def test_padding_moves_no_output_no_loss_and_no_metric(name):
    make, _ = ROUTERS[name]
    layer, x = Routed(make(), experts()[1]), tokens(2, 5)
    mask = torch.tensor([0, 1, 0, 1, 1, 0, 1, 1, 0]).bool().expand(2, -1)
    spread = torch.full((2, 9, DIM), torch.nan, dtype=torch.float64)
    spread[mask] = x.reshape(-1, DIM)
    plain, padded = layer(x), layer(spread, Context(mask=mask))
    torch.testing.assert_close(padded.y[mask], plain.y.reshape(-1, DIM), rtol=1e-12, atol=1e-12)
    for name, value in {**plain.losses, **plain.metrics}.items():
        torch.testing.assert_close({**padded.losses, **padded.metrics}[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_batch_of_masked_tokens_has_no_loss_and_nothing_is_nan(name):
    make, _ = ROUTERS[name]
    router = make()
    layer, x = Routed(router, experts()[1]), tokens().requires_grad_()
    out = layer(x, Context(mask=torch.zeros_like(MASK)))
    assert not out.y.any() and all(float(loss.detach()) == 0 for loss in out.losses.values())
    assert all(value.isfinite().all() for value in out.metrics.values())
    (out.y.sum() + sum(out.losses.values(), torch.zeros(()))).backward()
    assert x.grad.isfinite().all()


def test_losses_are_those_of_the_papers():
    router, x = topk(), tokens()
    route = router.route(x, Targets(N), Context(mask=MASK))
    logits = (x @ router.gate.weight.T)[MASK].detach()
    fraction = (dense_topk(router, x, MASK)[MASK] > 0).double().mean(0) / 2
    balance = N * sum(fraction[i] * logits.softmax(-1)[:, i].mean() for i in range(N))
    torch.testing.assert_close(route.losses["balance"].detach(), balance)
    torch.testing.assert_close(route.losses["z"].detach(), (logits.exp().sum(-1).log() ** 2).mean())


def test_the_balance_loss_is_1_when_balanced():
    router = topk()
    torch.nn.init.zeros_(router.gate.weight)
    assert float(router.route(tokens(), Targets(N)).losses["balance"].detach()) == pytest.approx(1.0)


def test_only_losses_with_a_weight_are_returned_and_recommended():
    router = topk(balance_weight=0.0, z_weight=0.5)
    assert router.capabilities.losses == {"z": 0.5}
    assert list(router.route(tokens(), Targets(N)).losses) == ["z"]


@pytest.mark.parametrize("make", [topk, lambda: topk(k=1, renormalise=False), expert_choice])
def test_the_task_alone_trains_the_router(make):
    # A balance loss would hide a router cut off from the task.
    router = make()
    Routed(router, experts()[1])(tokens()).y.square().sum().backward()
    assert float(router.gate.weight.grad.abs().max()) > 1e-6


@pytest.mark.parametrize("make", [topk, lambda: topk(k=3), expert_choice])
def test_dead_targets_are_never_chosen_even_when_fewer_than_k_live(make):
    router, x = make(), tokens()
    for alive in ([True, False, True, True], [False, False, True, False], [False] * 4):
        route = router.route(x, Targets(N, alive=torch.tensor(alive)))
        assert set(route.target.tolist()) - {-1} <= {i for i in range(N) if alive[i]}
        assert route.weight.isfinite().all() and not route.weight[route.target < 0].any()
        assert all(loss.isfinite() for loss in route.losses.values())
        if not any(alive):
            assert int(route.metrics["no_target"]) == 21


def test_the_bias_rises_where_the_load_is_low_and_only_picks():
    router, x = topk(bias_rate=0.25), tokens()
    router.on_step(StepInfo(1, {"load": torch.tensor([10.0, 0.0, 4.0, 2.0])}))
    assert router.bias.tolist() == [-0.25, 0.25, 0.0, 0.25]
    router.on_step(StepInfo(2, {}))
    assert router.bias.tolist() == [-0.25, 0.25, 0.0, 0.25]

    router.bias += torch.tensor([100.0, 100.0, 0.0, 0.0])
    route = router.route(x, Targets(N))
    assert set(route.target.tolist()) == {0, 1}
    scores = torch.softmax(x @ router.gate.weight.T, -1)[..., :2]
    weights = route.dense(3, 7)[:2].movedim(0, -1)
    torch.testing.assert_close(weights, scores / scores.sum(-1, keepdim=True))


def test_the_bias_balances_a_lopsided_gate():
    router, x = topk(k=1, renormalise=False, bias_rate=0.02), tokens(8, 32)
    x = x + 0.5 * router.gate.weight.detach()[0]
    router.bias += torch.tensor([0.5, 0.0, 0.0, 0.0])
    before = float(router.route(x, Targets(N)).metrics["max_load"])
    for step in range(100):
        router.on_step(StepInfo(step, router.route(x, Targets(N)).metrics))
    assert float(router.route(x, Targets(N)).metrics["max_load"]) < 1.2 < 1.5 < before


def test_the_bias_stays_in_float32_and_is_saved():
    router = topk(bias_rate=0.1).bfloat16()
    assert router.bias.dtype == torch.float32 and "bias" in router.state_dict()
    assert topk().state_dict().keys() == {"gate.weight"}


def test_the_gate_stays_in_float32_under_autocast():
    router = topk().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert router.gate(tokens().float(), Targets(N), FRESH).dtype == torch.float32


def test_the_plan_is_in_order_of_time_for_each_target():
    for router in (topk(), expert_choice()):
        plan = router.route(tokens(), Targets(N), Context(mask=MASK)).plan()
        for i in range(N):
            mine = plan.token[plan.offsets[i] : plan.offsets[i + 1]]
            assert (mine.diff() > 0).all() and MASK.flatten()[mine].all()


class Counter(Layer):
    """y_t = x_t + sum of the real tokens so far: a tiny mixer with a state."""

    def __init__(self) -> None:
        super().__init__()
        self.capabilities = Capabilities(growth="constant", rollback="snapshot")

    def init_state(self, batch, *, capacity=None, device=None, dtype=None):
        total = torch.zeros(batch, DIM, device=device, dtype=dtype)
        return State({"total": total}, {"total": Leaf()}, seen=torch.zeros(batch, dtype=torch.int64))

    def forward(self, x, ctx=FRESH, state=None):
        start = state or self.init_state(x.shape[0], dtype=x.dtype)
        real = x if ctx.mask is None else torch.where(ctx.mask[..., None], x, 0)
        totals = start["total"][:, None] + real.cumsum(1)
        last = totals[:, -1] if x.shape[1] else start["total"]
        return Output(x + totals, start.replace(total=last, seen=advanced(start.seen, x, ctx)) if state else None)


def test_a_mixture_of_mixers_streams_and_skipped_targets_hold():
    router, x = topk(), tokens()
    layer = Routed(router, [Counter() for _ in range(N)], "mixers")
    weights = dense_topk(router, x, torch.ones_like(MASK))
    whole = layer(x).y
    wanted = torch.zeros_like(x)
    for i in range(N):
        chosen = (weights[..., i] > 0)[..., None]
        wanted += weights[..., i, None] * (x + torch.where(chosen, x, 0).cumsum(1))
    torch.testing.assert_close(whole, wanted, rtol=1e-10, atol=1e-10)

    state, pieces = layer.init_state(3, dtype=torch.float64), []
    for t in range(7):
        out = layer(x[:, t : t + 1], FRESH, state)
        for i in range(N):
            before, after = (s.children["targets"].children[str(i)] for s in (state, out.state))
            skipped = weights[:, t, i] == 0
            assert torch.equal(before["total"][skipped], after["total"][skipped])
            assert torch.equal(after.seen - before.seen, (~skipped).long())
        state = out.state
        pieces.append(out.y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-10)


def recipe(router: dict | str, **settings) -> dict:
    experts = [{"feed_forward": {"name": "swiglu", "hidden": 8}, "repeat": N}]
    return {"dim": 8, "blocks": [{"sublayers": [{"router": router, "targets": experts}]}], **settings}


def test_k_beyond_the_number_of_targets_is_refused():
    with pytest.raises(AltxError, match="use k of at most 4"):
        compose(recipe({"name": "topk", "k": 5}))


def test_k_1_with_weights_that_are_always_1_is_refused():
    with pytest.raises(AltxError, match="set renormalise to false"):
        compose(recipe({"name": "topk", "k": 1}))


def test_expert_choice_is_refused_in_a_causal_model_with_a_reason_and_a_remedy():
    with pytest.raises(CompositionError, match=r"(?s)'expert-choice' of altx-moe .*whole sequence.*causal: false"):
        compose(recipe("expert-choice"))


def test_expert_choice_classifies_and_padding_changes_no_logit():
    model = compose(recipe("expert-choice", causal=False, head={"kind": "classifier", "classes": 3}), seed=0).double()
    inputs, mask = torch.randint(256, (2, 6)), torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0]).bool().expand(2, -1)
    spread = torch.zeros(2, 9, dtype=torch.int64)
    spread[mask] = inputs.flatten()
    torch.testing.assert_close(model(spread, Context(mask=mask)).y, model(inputs).y, rtol=1e-12, atol=1e-12)


def test_recommended_weights_reach_the_model():
    model = compose(recipe("topk"), seed=0)
    weights = model.loss_weights()
    assert sorted(weights.values()) == [0.001, 0.01]
    assert weights.keys() == model(torch.randint(256, (2, 5))).losses.keys()
