"""Mixture of recursions, and other routers over depths, against plain loops in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from altx_moe.config import RecursionsConfig
from typer.testing import CliRunner

from altx import registry
from altx.compose import compose
from altx.context import Context
from altx.errors import AltxError, CompositionError
from altx.recursion import Recursion
from altx.resolve import resolve
from altx.router import Targets
from altx_cli.description import label
from altx_cli.main import app

DIM, DEPTHS = 16, 3
MASK = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1, 0, 1, 0]]).bool()
STACK: list[dict[str, Any]] = [{"mixer": "attention"}, {"feed_forward": {"name": "swiglu", "hidden": 8}}]


def tokens(batch: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def recipe(depths: int = DEPTHS, causal: bool = True, stack: list[dict[str, Any]] = STACK, **router: Any) -> dict:
    head = {} if causal else {"head": {"kind": "vectors", "size": 3}}
    targets = [{"depths": depths, "sublayers": stack}]
    blocks = [{"sublayers": [{"router": {"name": "mixture-of-recursions", **router}, "targets": targets}]}]
    return {"dim": DIM, "causal": causal, "blocks": blocks, **head}


def recursion(**settings: Any) -> Recursion:
    """In float64, with scores that differ."""
    model = compose(recipe(**settings), seed=0).double()
    layer = next(module for module in model.modules() if isinstance(module, Recursion))
    torch.manual_seed(0)
    for parameter in layer.router.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def applied(layer: Recursion, h: torch.Tensor, there: list[int], real: list[int], causal: bool) -> torch.Tensor:
    """The stack on some of the real tokens of one row, which know where they stand among these and see nobody else."""
    ctx = Context(positions=torch.tensor([[real.index(t) for t in there]]), causal=causal)
    return layer.body(h[there][None], ctx).y[0]


def by_token(layer: Recursion, x: torch.Tensor, real: list[int]) -> torch.Tensor:
    """One row: each token has its depth from the start, and is weighted once, at the end."""
    probs = torch.softmax(x @ layer.router.gate.weight.T, -1)
    depth, h, y = probs.argmax(-1).tolist(), x, torch.zeros_like(x)
    for r in range(DEPTHS):
        there = [t for t in real if depth[t] >= r]
        if there:
            h = h.index_copy(0, torch.tensor(there), applied(layer, h, there, real, causal=True))
        done = torch.tensor([t in there and depth[t] == r for t in range(len(x))])
        y = torch.where(done[:, None], probs[:, r : r + 1] * h, y)
    return y


def by_expert(layer: Recursion, x: torch.Tensor, real: list[int], trained: bool, causal: bool = True) -> torch.Tensor:
    """One row: at each depth those that score highest go on; after training those that the predictor says would."""
    h, there, router = x, real, layer.router
    for r, share in enumerate((1, 2 / 3, 1 / 2)):
        logits = h @ router.weight[r] + (0 if router.bias is None else router.bias[r])
        guess = router.predictors[r](h)[:, 0] if len(router.predictors) else logits
        if trained and r:
            there = [t for t in there if guess[t].item() > 0]
        elif not trained:
            best = sorted(there, key=lambda t: -logits[t].item())[: math.ceil(share * len(there) - 1e-9)]
            there = sorted(best)
        if there:
            step = 0.1 * torch.sigmoid(logits[there, None]) * applied(layer, h, there, real, causal)
            h = h.index_add(0, torch.tensor(there), step)
    return h - x


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "choice", ["token", "expert", "expert after training", "expert in an encoder", "expert after training, mlp"]
)
def test_tokens_go_as_deep_as_the_papers_equations_say(choice: str, masked: bool) -> None:
    causal, trained = choice != "expert in an encoder", choice.startswith("expert after training")
    router = {"predictor": "mlp"} if choice.endswith("mlp") else {}
    layer, x = recursion(choice=choice.split()[0], causal=causal, **router), tokens()
    mask = MASK if masked else MASK | True
    layer.train(choice in ("expert", "token"))
    out = layer(x, Context(mask=MASK if masked else None, causal=causal))
    for row in range(3):
        real = mask[row].nonzero().flatten().tolist()
        loop = by_token(layer, x[row], real) if choice == "token" else by_expert(layer, x[row], real, trained, causal)
        torch.testing.assert_close(out.y[row][real], loop[real], rtol=1e-11, atol=1e-11)
    assert 1 < float(out.metrics["mean_depth"]) < DEPTHS
    assert out.metrics["active"].sum() == (out.metrics["mean_depth"] * mask.sum()).round()


def test_gradients_are_those_of_the_loop() -> None:
    for choice in ("token", "expert"):
        layer, x = recursion(choice=choice).train(), tokens(1)[:, :7]
        real, weights = list(range(7)), torch.randn(7, DIM, generator=torch.Generator().manual_seed(2)).double()
        parameters = [p for p in layer.parameters()]
        found = torch.autograd.grad((layer(x).y[0] * weights).sum(), parameters, allow_unused=True)
        loop = by_token(layer, x[0], real) if choice == "token" else by_expert(layer, x[0], real, trained=False)
        wanted = torch.autograd.grad((loop * weights).sum(), parameters, allow_unused=True)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_the_predictors_loss_is_the_papers_auxiliary_loss_at_every_depth() -> None:
    layer, x = recursion().train(), tokens()
    h, there, wanted, right = x, MASK, 0.0, 0.0
    for r, share in enumerate((1, 2 / 3, 1 / 2)):
        logits = h @ layer.router.weight[r] + layer.router.bias[r]
        chosen = torch.zeros_like(there)
        for row in range(3):
            count = math.ceil(share * int(there[row].sum()) - 1e-9)
            chosen[row, logits[row].masked_fill(~there[row], -math.inf).topk(count).indices] = True
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, chosen.double(), reduction="none")
        wanted = wanted + loss[there].mean()
        right += ((logits > 0) == chosen)[there].double().mean() / DEPTHS
        ctx = Context(mask=chosen, positions=Context(mask=MASK).ranks(x))
        step = layer.body(h, ctx).y * 0.1 * torch.sigmoid(logits)[..., None]
        h, there = h + torch.where(chosen[..., None], step, 0), chosen
    out = layer(x, Context(mask=MASK))
    torch.testing.assert_close(out.losses["router.predictor"], wanted, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(out.metrics["router.predicted"].double(), right)
    assert out.losses.keys() == {f"router.{name}" for name in layer.router.capabilities.losses}


def test_a_network_that_predicts_learns_from_its_own_loss_and_trains_nothing_else() -> None:
    layer = recursion(predictor="mlp").train()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    out = layer(tokens(), Context(mask=MASK))
    gradients = torch.autograd.grad(out.losses["router.predictor"], parameters, allow_unused=True)
    reached = {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None and gradient.any()}
    assert reached and all(name.startswith("router.predictors.") for name in reached)
    torch.autograd.grad(layer(tokens(), Context(mask=MASK)).y.sum(), layer.router.weight)


def test_a_share_is_of_the_rows_tokens_and_rounded_up() -> None:
    layer, x = recursion().train(), tokens()
    assert layer(x).metrics["active"].tolist() == [27, 18, 9]
    # 7, 8 and 2 real tokens: 7 + 8 + 2, then ceil(14 / 3) + ceil(16 / 3) + ceil(4 / 3), then half of these.
    assert layer(x, Context(mask=MASK)).metrics["active"].tolist() == [17, 5 + 6 + 2, 3 + 3 + 1]
    assert recursion(capacity=[0.5, 0.5, 0.25]).train()(tokens(1)[:, :8]).metrics["active"].tolist() == [4, 4, 2]


def test_the_states_of_a_depth_hold_what_went_so_deep() -> None:
    for choice in ("token", "expert"):
        layer, x = recursion(choice=choice).eval(), tokens()
        state, lengths, ys = layer.init_state(3, dtype=torch.float64), [], []
        for t in range(9):
            out = layer(x[:, t : t + 1], Context(mask=MASK[:, t : t + 1]), state)
            assert out.state is not None
            state = out.state
            ys.append(out.y)
        whole = layer(x, Context(mask=MASK))
        torch.testing.assert_close(torch.cat(ys, 1)[MASK], whole.y[MASK], rtol=1e-11, atol=1e-11)
        for depth in state.children["depths"].children.values():
            assert depth.tokens is not None
            lengths.append(int(depth.tokens.sum()))
        assert lengths == whole.metrics["active"].tolist() and lengths[-1] < lengths[0] == MASK.sum()


def test_in_decoding_a_depth_that_nobody_needs_is_not_computed() -> None:
    layer, x = recursion(choice="token").eval(), tokens(1, 1)
    with torch.no_grad():
        layer.router.gate.weight.zero_()
        layer.router.gate.weight[0] = x[0, 0]
    calls: list[int] = []
    layer.body.register_forward_hook(lambda *_: calls.append(1))
    layer(x, Context(), layer.init_state(1, dtype=torch.float64))
    assert len(calls) == 1


def test_one_depth_is_a_mixture_of_depths_over_a_whole_block() -> None:
    data = recipe(1, causal=False)
    data["blocks"][0]["sublayers"][0]["router"] = {"name": "mixture-of-depths", "capacity": 0.4}
    layer = next(m for m in compose(data, seed=0).double().modules() if isinstance(m, Recursion))
    torch.nn.init.normal_(layer.router.gate.weight)
    x = tokens(1)
    logits = x[0] @ layer.router.gate.weight[0]
    there = logits.topk(4).indices.sort().values.tolist()
    wanted = torch.zeros_like(x[0])
    wanted[there] = logits[there, None] * applied(layer, x[0], there, list(range(9)), causal=False)
    torch.testing.assert_close(layer(x, Context(causal=False)).y[0], wanted, rtol=1e-11, atol=1e-11)


def test_a_token_may_use_several_depths() -> None:
    data = recipe()
    data["blocks"][0]["sublayers"][0]["router"] = {"name": "topk", "k": 2}
    layer = next(m for m in compose(data, seed=0).double().modules() if isinstance(m, Recursion))
    torch.nn.init.normal_(layer.router.gate.weight)
    x = tokens(1)
    top = torch.softmax(x[0] @ layer.router.gate.weight.T, -1).topk(2, -1)
    weights = top.values / top.values.sum(-1, keepdim=True)
    h, wanted = x[0].clone(), torch.zeros_like(x[0])
    for r in range(DEPTHS):
        there = (top.indices.max(-1).values >= r).nonzero().flatten().tolist()
        h[there] = applied(layer, h, there, list(range(9)), causal=True)
        wanted += torch.where(top.indices == r, weights, 0).sum(-1, keepdim=True) * h
    torch.testing.assert_close(layer(x).y[0], wanted, rtol=1e-11, atol=1e-11)


def test_losses_and_metrics_of_routers_inside_are_of_all_depths() -> None:
    experts = {"router": {"name": "topk", "bias_rate": 0.1}, "targets": [{"feed_forward": "swiglu", "repeat": 4}]}
    model = compose(recipe(choice="token", stack=[{"mixer": "attention"}, experts]), seed=0)
    out = model(torch.randint(256, (2, 8)))
    assert out.losses.keys() == model.loss_weights().keys()
    (load,) = [value for name, value in out.metrics.items() if name.endswith("body.router.load") and "layers.1" in name]
    (active,) = [value for name, value in out.metrics.items() if name.endswith("active")]
    torch.testing.assert_close(load.sum() * DEPTHS, 2.0 * active.sum())


@pytest.mark.parametrize("choice", ["token", "expert"])
def test_a_batch_of_masked_tokens_has_no_loss_and_nothing_is_nan(choice: str) -> None:
    layer, x = recursion(choice=choice).train(), tokens().requires_grad_()
    out = layer(x, Context(mask=MASK & False))
    assert not out.y.any() and all(float(loss.detach()) == 0 for loss in out.losses.values())
    assert all(value.isfinite().all() for value in out.metrics.values())
    (out.y.sum() + sum(out.losses.values(), torch.zeros(()))).backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_dead_depths_are_never_used() -> None:
    router = recursion().router.eval()
    for depth, alive in enumerate([True, False, True]):
        targets = Targets(3, "depths", alive=torch.tensor([True, False, True]), depth=depth)
        route = router.route(tokens(), targets, Context(causal=False))
        assert bool((route.target == depth).any()) == alive
        assert set(route.target.tolist()) <= {-1, depth}


REFUSED = [
    ({"capacity": [1.0, 0.5]}, "capacity lists 2 shares; give one for each of the 3 depths"),
    ({"capacity": [0.5, 1.0, 0.5]}, "capacity may not rise"),
    ({"capacity": [1.0, 0.5, 0.0]}, "each above 0 and at most 1"),
    ({"score": "softmax"}, "with choice expert score is one of sigmoid, tanh, not softmax"),
    ({"choice": "token", "score": "tanh"}, "with choice token score is one of softmax, sigmoid, not tanh"),
    ({"choice": "token", "predictor": "mlp"}, "predictor means nothing with choice token"),
    ({"bias_rate": 0.1}, "bias_rate means nothing with choice expert"),
    ({"balance_warmup_steps": 5}, "balance_warmup_steps means nothing with choice expert"),
    ({"choice": "token", "capacity_warmup_steps": 5}, "capacity_warmup_steps means nothing with choice token"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AltxError, match=message):
        compose(recipe(**settings))


def test_other_targets_are_refused_and_the_written_out_form_gives_the_same_model() -> None:
    data = recipe()
    data["blocks"][0]["sublayers"][0]["targets"] = [{"feed_forward": "swiglu", "repeat": 3}]
    with pytest.raises(CompositionError, match=r"targets are no depths of one\n.*depths: 3"):
        compose(data)
    model = compose(recipe(), seed=0)
    assert label(resolve(model.config, registry.default()).blocks[0][0]) == (
        "mixture-of-recursions over 3 depths of attention, swiglu"
    )
    again = compose(model.config.model_dump(exclude_none=True), seed=0)
    assert again.config == model.config
    inputs = torch.randint(256, (1, 6))
    torch.testing.assert_close(again(inputs).y, model(inputs).y, rtol=0, atol=0)


def test_the_command_line_takes_depths_and_says_so_where_they_are_missing(tmp_path: Path) -> None:
    args = ["compose", "--mixer", "attention", "--router", "mixture-of-recursions", "--dim", "16", "--no-prove"]
    wrong = CliRunner().invoke(app, [*args, "-o", str(tmp_path / "wrong.yaml")])
    assert wrong.exit_code == 2 and "give depths (--depths 3)" in wrong.stderr
    path = tmp_path / "model.yaml"
    sharing = ["--depths", "3", "--set", "kv_sharing=true", "-o", str(path)]
    right = CliRunner().invoke(app, [*args, *sharing])
    assert right.exit_code == 0, right.stderr
    title = "mixture-of-recursions over 3 depths of attention, swiglu, attention, swiglu with shared keys and values"
    assert title in right.stdout and "states are at most as shown" in right.stdout
    layer = next(module for module in compose(path).modules() if isinstance(module, Recursion))
    assert (layer.n, layer.kv_sharing, len(layer.body.layers)) == (3, True, 4)


def test_choice_token_is_top_1_of_topk() -> None:
    config = RecursionsConfig(choice="token", score="sigmoid", bias_rate=0.1)
    settings = config.by_token
    assert (settings.k, settings.scale, settings.score, settings.bias_rate) == (1, 0.1, "sigmoid", 0.1)
    assert not settings.renormalise and RecursionsConfig(choice="token").by_token.scale == 1
