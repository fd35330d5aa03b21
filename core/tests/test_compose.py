"""Composition: parts that fit are connected and left alone; parts that do not are refused with a remedy."""

from __future__ import annotations

import pytest
import torch

from altx import recipe
from altx.compose import compose
from altx.context import Context
from altx.errors import AltxError, BrokenPlugin, CompositionError, ConfigError
from altx.measure import costs, num_parameters, solve_width
from altx.optim import optimizer_groups
from altx.registry import Registry
from altx.resolve import resolve
from altx.testing import prove
from altx.testing.case import difference

MIXED = [{"mixer": "average", "repeat": 2}, {"memory": "notebook"}]
VECTORS = {"input": {"kind": "vectors", "size": 3}, "head": {"kind": "classifier", "classes": 5}}


@pytest.mark.parametrize(
    "data",
    [
        {"mixer": "average"},
        {"mixer": "average", "memory": "notebook"},
        {"mixer": "average", "memory": "notebook", "attach": "gate"},
        {"mixer": "average", "memory": "notebook", "attach": "controller"},
        {"mixer": "average", "router": "router", "feed_forward": "4*swiglu"},
        {"mixer": "average", "router": "router", "feed_forward": "mlp,swiglu"},
        {"mixer": "average", "causal": False, **VECTORS},
        {"mixer": "whole", "router": "seer", "causal": False, **VECTORS},
        {
            "blocks": [
                {
                    "sublayers": [
                        {"router": "router", "targets": [{"mixer": "average", "repeat": 2}, {"memory": "notebook"}]}
                    ]
                }
            ]
        },
        {
            "blocks": [
                {
                    "sublayers": [
                        {
                            "router": "router",
                            "targets": [{"depths": 3, "sublayers": [{"mixer": "average"}, {"feed_forward": "swiglu"}]}],
                        }
                    ]
                }
            ]
        },
        {"mixer": "average", "head": {"kind": "vectors", "size": 7}, "final_norm": "layer", "norm": "layer"},
    ],
    ids=[
        "plain",
        "residual",
        "gate",
        "controller",
        "bank",
        "experts",
        "encoder",
        "lookahead",
        "routed-mixers",
        "depths",
        "vectors",
    ],
)
def test_hybrids_are_proved(toy: Registry, data: dict) -> None:
    model = compose({**data, "dim": 16, "layers": 2} if "mixer" in data else {**data, "dim": 16}, seed=0, plugins=toy)
    results = prove(model)
    assert [r for r in results if r.status == "failed"] == []
    assert {r.check for r in results if r.status == "passed"} >= {"padding", "gradients"}


def over(*targets: dict) -> dict:
    return {"blocks": [{"sublayers": [{"router": "router", "targets": [*targets]}]}]}


STACK = [{"mixer": "average"}]
REFUSED: list[tuple[dict, type[AltxError], str]] = [
    (over({"depths": 3, "mixer": "average"}), ConfigError, "targets[0]: depths need sublayers"),
    (over({"depths": 3}), ConfigError, "a sublayer needs a mixer, a feed_forward, a router or a memory"),
    (over({"sublayers": STACK}), ConfigError, "sublayers need depths"),
    (over({"depths": 3, "sublayers": STACK, "repeat": 2}), ConfigError, "give more depths"),
    (over({"depths": 3, "sublayers": STACK, "mixer": "average"}), ConfigError, "not mixer and sublayers"),
    (over({"depths": 3, "sublayers": STACK}, {"mixer": "average"}), ConfigError, "among depths has no other targets"),
    (
        over({"depths": 3, "sublayers": STACK}) | {"defaults": {"router": {"k": 4}}},
        ConfigError,
        "cannot choose among 3 targets: k 4 is more than 3",
    ),
    (
        over({"depths": 3, "sublayers": [{"mixer": "source"}]}),
        CompositionError,
        "targets[0].sublayers[0].mixer: mixer 'source' of toy-plugin unknown exports values for later layers",
    ),
    (
        over({"depths": 3, "sublayers": [{"mixer": "paced"}]}),
        CompositionError,
        "sublayers[0].mixer: mixer 'paced' of toy-plugin unknown goes on at multiples of 4 tokens, and a router",
    ),
    (over({"mixer": "paced", "repeat": 2}), CompositionError, "a router gives it now more, now less"),
    (
        {"mixer": "whole"},
        CompositionError,
        "blocks[0].sublayers[0].mixer: mixer 'whole' of toy-plugin unknown lets a token see later",
    ),
    (
        {"mixer": "whole", "memory": "notebook", "causal": False, **VECTORS},
        CompositionError,
        "mixer: mixer 'whole' of toy-plugin unknown looks both ways, and what it is composed with here only backwards",
    ),
    ({"mixer": "average", "router": "seer"}, CompositionError, "looks at the whole sequence to route a token"),
    (
        {"mixer": "block", "memory": "notebook", "attach": "controller"},
        CompositionError,
        "cannot be fed one token at a time",
    ),
    ({"mixer": "needy"}, CompositionError, "needs first_value from an earlier layer"),
    ({"mixer": "needy,source"}, CompositionError, "blocks[0].sublayers[0].mixer: mixer 'needy'"),
    ({"mixer": "source,late"}, CompositionError, "does not stream and needs first_value of every token"),
    ({"mixer": "average", "memory": "echo"}, CompositionError, "so it only attaches as controller"),
    ({"blocks": [{"sublayers": [{"memory": "echo"}]}]}, CompositionError, "so it only attaches as controller"),
    (
        {"blocks": [{"sublayers": [{"router": "router", "targets": [{"mixer": "source"}]}]}]},
        CompositionError,
        "a router does not send it every token",
    ),
    ({"mixer": "average", "router": "oracle"}, CompositionError, "looks at the whole batch to route a token"),
    (
        {
            "causal": False,
            "blocks": [{"sublayers": [{"router": "router", "targets": [{"mixer": "block"}]}]}],
            **VECTORS,
        },
        CompositionError,
        "takes no mask, so no tokens can be kept from it",
    ),
    ({"mixer": "average", "memory": "notebook", "attach": "tokens"}, CompositionError, "does not attach as 'tokens'"),
    (
        {"mixer": "average", "memory": "notebook", "attach": "kv"},
        CompositionError,
        "takes no keys and values, such as memory 'notebook'",
    ),
    ({"mixer": "average", "dim": 18}, ConfigError, "dim 18 is not divisible by heads 4"),
    (
        {"mixer": [{"name": "average", "sped": 1.0}]},
        ConfigError,
        "blocks[0].sublayers[0].mixer.sped: unknown key; did you mean 'speed'?",
    ),
    (
        {"mixer": [{"name": "average", "speed": 2.0}]},
        ConfigError,
        "mixer.speed: input should be less than or equal to 1, not 2.0",
    ),
    (
        {"mixer": "average", "router": "router", "defaults": {"router": {"k": 9}}},
        ConfigError,
        "cannot choose among 8 targets: k 9 is more than 8",
    ),
    ({"mixer": "wrong"}, BrokenPlugin, "its build returned a Linear, not a Layer"),
    (
        {"mixer": "raises"},
        CompositionError,
        "building mixer 'raises' of toy-plugin unknown failed: RuntimeError: no luck",
    ),
    ({"mixer": "nowhere"}, BrokenPlugin, "cannot be imported"),
    (
        {"blocks": [{"sublayers": [{"mixer": "average"}], "repeat": 5000}]},
        ConfigError,
        "5000 with their repeats are more than 4096",
    ),
]


@pytest.mark.parametrize(("data", "error", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_what_does_not_fit_is_refused_with_its_place(
    toy: Registry, data: dict, error: type[AltxError], message: str
) -> None:
    with pytest.raises(error) as caught:
        compose({"dim": 16, **data}, plugins=toy)
    assert message in str(caught.value)


def test_the_written_config_gives_the_same_model(toy: Registry) -> None:
    data = {"mixer": "average,block", "memory": "none,notebook", "router": "router,none", "dim": 16}
    blueprint = resolve(recipe.load(data), toy)
    again = resolve(recipe.load(recipe.dump(blueprint.config)), toy)
    assert again.config == blueprint.config
    assert "toy-plugin:average" in str(recipe.dump(blueprint.config))
    one, two = compose(data, seed=3, plugins=toy), compose(recipe.dump(blueprint.config), seed=3, plugins=toy)
    tokens = torch.randint(256, (2, 9))
    assert torch.equal(one(tokens).y, two(tokens).y)


def test_an_exported_value_reaches_the_layer_that_requires_it(toy: Registry) -> None:
    assert resolve(recipe.load({"mixer": "source,needy", "dim": 16}), toy).capabilities.requires == set()


def test_experts_share_a_bank_only_if_they_are_alike(toy: Registry) -> None:
    def experts(pattern: str) -> list[str]:
        data = {"mixer": "average", "router": "router", "feed_forward": pattern, "dim": 16, "layers": 1}
        return [
            type(m).__name__ for m in compose(data, plugins=toy).modules() if type(m).__module__ == "altx.feed_forward"
        ]

    assert experts("4*swiglu") == ["SwiGLUBank"]
    assert experts("swiglu,mlp") == ["SwiGLU", "MLP"]


def test_an_encoder_sees_both_ways(toy: Registry) -> None:
    data = {"mixer": "average", "dim": 16, "layers": 1, "causal": False, "head": {"kind": "vectors", "size": 2}}
    model, tokens = compose(data, seed=0, plugins=toy), torch.zeros(1, 6, dtype=torch.int64)
    changed = tokens.clone()
    changed[0, -1] = 1
    assert difference(model(changed).y[:, 0], model(tokens).y[:, 0]) > 1e-6


def test_defaults_and_adapters_are_announced(toy: Registry) -> None:
    notes = resolve(recipe.load({"mixer": "block", "memory": "notebook", "dim": 16}), toy).notes
    assert any("notebook is attached as residual. There is also controller." in note for note in notes)
    assert any("prefix replay" in note for note in notes)


def test_a_router_chooses_among_mixers_with_memories(toy: Registry) -> None:
    target = {"mixer": "average", "memory": "notebook", "attach": "gate", "repeat": 2}
    model = compose({"blocks": [{"sublayers": [{"router": "router", "targets": [target]}]}], "dim": 16}, plugins=toy)
    assert [r for r in prove(model) if r.status == "failed"] == []


def test_a_causal_classifier_is_proved_as_far_as_it_goes(toy: Registry) -> None:
    model = compose({"mixer": "average", "dim": 16, "head": {"kind": "classifier", "classes": 4}}, plugins=toy)
    status = {r.check: r.status for r in prove(model)}
    assert (status["padding"], status["gradients"], status["steps"]) == ("passed", "passed", "skipped")


def test_a_seed_fixes_the_weights_and_leaves_the_global_generator(toy: Registry) -> None:
    before = torch.get_rng_state()
    one, two = (compose({"mixer": "average", "dim": 16}, seed=1, plugins=toy) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_a_classifier_pools_real_tokens_only(toy: Registry, pool: str) -> None:
    head = {"kind": "classifier", "classes": 5, "pool": pool}
    model = compose({"mixer": "average", "dim": 16, "head": head}, seed=0, plugins=toy).double()
    tokens = torch.randint(256, (2, 6))
    padded = torch.cat([torch.randint(256, (2, 3)), tokens, torch.randint(256, (2, 2))], 1)
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[:, 3:9] = True
    assert difference(model(padded, Context(mask=mask)).y, model(tokens).y) < 1e-12


def test_costs_on_the_meta_device_equal_those_of_the_model(toy: Registry) -> None:
    from altx.compose import build

    blueprint = resolve(recipe.load({"mixer": "average", "dim": 16, "layers": 2}), toy)
    assert costs(build(blueprint, device="meta")) == costs(build(blueprint))
    # Embedding 256 x 16; per block an average (16 x 16 + 16 + 16), swiglu (3 x 16 x 48) and two norms; a norm.
    assert costs(build(blueprint)).parameters == 256 * 16 + 2 * (16 * 16 + 32 + 3 * 16 * 48 + 32) + 16
    assert costs(build(blueprint)).state_bytes == 2 * 16 * 4


def test_a_parameter_budget_is_met_within_a_width_step(toy: Registry) -> None:
    from altx.compose import build

    def meta(config):
        return build(resolve(config, toy), device="meta")

    config = solve_width(recipe.load({"mixer": "average", "layers": 2}), 1_000_000, meta)
    found = num_parameters(meta(config))
    assert abs(found - 1_000_000) <= abs(
        num_parameters(meta(config.model_copy(update={"dim": config.dim + 16}))) - 1_000_000
    )
    assert abs(found - 1_000_000) < 100_000


def test_matrices_decay_vectors_do_not(toy: Registry) -> None:
    model = compose({"mixer": "average", "dim": 16}, plugins=toy)
    groups = {g["weight_decay"]: g["names"] for g in optimizer_groups(model, lr=1.0, weight_decay=0.1)}
    assert all(name.endswith(("weight", "decay")) for name in groups[0.1])
    assert any(name.endswith("norm.weight") for name in groups[0.0])
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


def test_a_component_scales_the_learning_rate_whatever_it_is(toy: Registry) -> None:
    model = compose({"mixer": "average", "dim": 16}, plugins=toy)
    model.param_groups = lambda: {"norm.weight": {"lr_scale": 2.0}}  # type: ignore[method-assign]
    for lr in (0.5, 1e-3):
        groups = optimizer_groups(model, lr=lr, weight_decay=0.1)
        assert {g["lr"] for g in groups if "norm.weight" in g["names"]} == {2 * lr}
        assert {g["lr"] for g in groups if "norm.weight" not in g["names"]} == {lr}
        assert not any("lr_scale" in group for group in groups)
