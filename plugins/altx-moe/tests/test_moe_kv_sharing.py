"""Depths that look up the keys and values of the first: recursive KV sharing, against plain loops in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from altx.compose import compose
from altx.context import Context
from altx.errors import AltxError, CompositionError
from altx.recursion import Recursion
from altx.testing.case import Subject
from altx.testing.runner import run

DIM, DEPTHS, LENGTH = 16, 3, 9
MASK = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1, 0, 1, 0]]).bool()
ATTENTION: dict[str, Any] = {"name": "attention", "heads": 2}
STACK: list[dict[str, Any]] = [
    {"mixer": ATTENTION},
    {"feed_forward": {"name": "swiglu", "hidden": 8}},
    {"mixer": {**ATTENTION, "window": 3}},
]


def recipe(stack: list[dict[str, Any]] = STACK, causal: bool = True, **router: Any) -> dict[str, Any]:
    head = {} if causal else {"head": {"kind": "vectors", "size": 3}}
    targets = [{"depths": DEPTHS, "kv_sharing": True, "sublayers": stack}]
    blocks = [{"sublayers": [{"router": {"name": "mixture-of-recursions", **router}, "targets": targets}]}]
    return {"dim": DIM, "causal": causal, "blocks": blocks, **head}


def recursion(**settings: Any) -> Recursion:
    """In float64, with scores and norms that differ."""
    model = compose(recipe(**settings), seed=0).double()
    layer = next(module for module in model.modules() if isinstance(module, Recursion))
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def tokens(batch: int = 3, length: int = LENGTH) -> torch.Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def turned(x: torch.Tensor, position: int) -> torch.Tensor:
    """x (heads, D) rotated to where it stands."""
    half = x.shape[-1] // 2
    angle = position * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def attended(layer: Any, x: torch.Tensor, position: int, rank: int, kept: list[Any], causal: bool) -> torch.Tensor:
    """One token, which stands at `rank` among those whose keys and values are kept."""
    q = turned(layer.q_proj(x).unflatten(-1, (2, -1)), position)
    first = 0 if layer.window is None else max(0, rank - layer.window + 1)
    last = rank + 1 if causal else min(len(kept), rank + (layer.window or len(kept)))
    keys, values = (torch.stack(part) for part in zip(*kept[first:last], strict=True))
    scores = torch.softmax(torch.einsum("hd,shd->hs", q, keys) / q.shape[-1] ** 0.5, -1)
    y: torch.Tensor = layer.o_proj(torch.einsum("hs,shd->hd", scores, values).flatten())
    return y


def looped(
    layer: Recursion, x: torch.Tensor, real: list[int], depths: list[list[int]], weights: Any, causal: bool
) -> torch.Tensor:
    """One row, of which the tokens of each depth are given: what is added to x."""
    caches: dict[Any, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    h, y = dict(enumerate(x)), torch.zeros_like(x)
    for depth, there in enumerate(depths):
        before = {t: h[t] for t in there}
        for sublayer in layer.body.layers:
            body, normed = sublayer.body, {t: sublayer.norm(h[t]) for t in there}
            if hasattr(body, "q_proj"):
                if depth == 0:
                    caches[body] = [
                        (
                            turned(body.k_proj(normed[t]).unflatten(-1, (2, -1)), real.index(t)),
                            body.v_proj(normed[t]).unflatten(-1, (2, -1)),
                        )
                        for t in there
                    ]
                out = {
                    t: attended(body, normed[t], real.index(t), depths[0].index(t), caches[body], causal) for t in there
                }
            else:
                out = {t: body(normed[t][None, None]).y[0, 0] for t in there}
            h = {**h, **{t: h[t] + out[t] for t in there}}
        for t in there:
            step = weights(depth, t, before[t]) * h[t]
            y[t] = y[t] + step
            if layer.router.capabilities.stepwise:
                h[t] = before[t] + step
    return y


def by_token(layer: Recursion, x: torch.Tensor, real: list[int], causal: bool) -> torch.Tensor:
    probs = torch.softmax(x @ layer.router.gate.weight.T, -1)
    best = probs.argmax(-1).tolist()
    depths = [[t for t in real if best[t] >= r] for r in range(DEPTHS)]
    return looped(layer, x, real, depths, lambda r, t, h: probs[t, r] * (best[t] == r), causal)


def by_expert(layer: Recursion, x: torch.Tensor, real: list[int], causal: bool) -> torch.Tensor:
    """The depths' tokens are those that the layer itself took; which, other tests see to."""
    depths: list[list[int]] = []
    route = layer.router.route

    def watched(*args: Any, **kwargs: Any) -> Any:
        found = route(*args, **kwargs)
        depths.append(found.token[found.target >= 0].tolist())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer.router, "route", watched)
        layer(x[None], Context(mask=torch.tensor([[t in real for t in range(len(x))]]), causal=causal))
    gate, bias = layer.router.weight, layer.router.bias
    return looped(layer, x, real, depths, lambda r, t, h: 0.1 * torch.sigmoid(h @ gate[r] + bias[r]), causal)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("choice", ["token", "expert", "expert after training", "expert in an encoder", "expert, few"])
def test_later_depths_look_up_the_keys_and_values_of_the_first(choice: str, masked: bool) -> None:
    causal, few = choice != "expert in an encoder", {"capacity": [0.75, 0.75, 0.25]} if choice == "expert, few" else {}
    layer, x = recursion(choice=choice.split()[0].strip(","), causal=causal, **few), tokens()
    layer.train(choice in ("expert", "token", "expert, few"))
    out = layer(x, Context(mask=MASK if masked else None, causal=causal))
    for row in range(3):
        real = (MASK if masked else MASK | True)[row].nonzero().flatten().tolist()
        loop = (by_token if choice == "token" else by_expert)(layer, x[row], real, causal)
        torch.testing.assert_close(out.y[row][real], loop[real], rtol=1e-11, atol=1e-11)
    assert bool(few) or 1 < float(out.metrics["mean_depth"]) < DEPTHS


@pytest.mark.parametrize("choice", ["token", "expert"])
def test_gradients_are_those_of_the_loop(choice: str) -> None:
    layer, x = recursion(choice=choice).train(), tokens(1, 6)
    weights = torch.randn(6, DIM, generator=torch.Generator().manual_seed(2)).double()
    parameters = list(layer.parameters())
    found = torch.autograd.grad((layer(x).y[0] * weights).sum(), parameters, allow_unused=True)
    loop = (by_token if choice == "token" else by_expert)(layer, x[0], list(range(6)), True)
    wanted = torch.autograd.grad((loop * weights).sum(), parameters, allow_unused=True)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("choice", ["token", "expert"])
@pytest.mark.parametrize("mixer", [ATTENTION, {"name": "mla", "heads": 2}, {**ATTENTION, "window": 3, "sinks": True}])
def test_models_with_shared_keys_and_values_keep_the_laws(mixer: dict[str, Any], choice: str) -> None:
    model = compose(recipe([{"mixer": mixer}, STACK[1]], choice=choice), seed=0)
    laws = (
        "steps", "empty", "select", "save-restore", "donation", "causality", "padding-across-calls", "padding",
        "all-masked", "reset", "packing", "gradients", "growth",
    )  # fmt: skip
    results = run(Subject("shared", lambda: model, DIM), laws)
    assert [result for result in results if result.status == "failed"] == []
    assert set(laws) <= {result.check for result in results if result.status == "passed"}


def test_only_the_first_depth_has_a_cache() -> None:
    shared, own = recursion(choice="token").eval(), recursion(choice="token").eval()
    own.kv_sharing = False
    few, many = (layer.init_state(2, capacity=64) for layer in (shared, own))
    assert few and many and many.bytes() - many["pending"].nbytes == DEPTHS * (few.bytes() - few["pending"].nbytes)
    state = shared.init_state(2, dtype=torch.float64)
    for t in range(4):
        out = shared(tokens(2)[:, t : t + 1], Context(), state)
        assert out.state is not None
        state = out.state
    assert list(state.children["depths"].children) == ["0"]
    assert state.children["depths"].tokens.tolist() == [4, 4]


REFUSED = [
    (
        [{"mixer": "attention"}, {"mixer": "mamba"}],
        CompositionError,
        r"sublayers\[1\].mixer: .*'mamba'.* shares no keys",
    ),
    ([{"mixer": "attention", "memory": "ntm"}], CompositionError, "memory: memory 'ntm'.* shares no keys and values"),
    (
        [{"router": "topk", "targets": [{"mixer": "attention", "repeat": 4}]}],
        CompositionError,
        "'topk'.* shares no keys",
    ),
]


@pytest.mark.parametrize(("stack", "error", "message"), REFUSED)
def test_a_stack_that_carries_something_else_is_refused(stack: Any, error: type[AltxError], message: str) -> None:
    with pytest.raises(error, match=message):
        compose(recipe(stack))


def test_sharing_is_of_depths_and_is_written_out() -> None:
    data = recipe()
    data["blocks"][0]["sublayers"][0]["targets"] = [{"mixer": "attention", "kv_sharing": True, "repeat": 2}]
    with pytest.raises(AltxError, match="kv_sharing is for the depths"):
        compose(data)
    model = compose(recipe(), seed=0)
    again = compose(model.config.model_dump(exclude_none=True), seed=0)
    inputs = torch.randint(256, (1, 6))
    torch.testing.assert_close(again(inputs).y, model(inputs).y, rtol=0, atol=0)
    own = recipe()
    own["blocks"][0]["sublayers"][0]["targets"][0]["kv_sharing"] = False
    assert not torch.equal(compose(own, seed=0)(inputs).y, model(inputs).y)
