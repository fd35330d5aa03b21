"""Recipes: every short form expands to the same canonical config, and every mistake names its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from altx import recipe
from altx.errors import ConfigError


def names(data: dict, settings: dict | None = None) -> list[list[str]]:
    """What each block holds."""
    shown = []
    for block in recipe.load(data, settings).blocks:
        parts = []
        for s in block.sublayers:
            refs = [r.name for r in (s.mixer, s.memory, s.feed_forward, s.router) if r]
            refs += [f"{t.repeat}*{t.feed_forward.name}" for t in s.targets or [] if t.feed_forward]
            parts.append("+".join(refs))
        shown.append(parts)
    return shown


def test_a_pattern_cycles_over_the_layers() -> None:
    assert names({"mixer": "2*mamba, attention", "layers": 6}) == [
        ["mamba", "swiglu"], ["mamba", "swiglu"], ["attention", "swiglu"],
    ] * 2  # fmt: skip
    assert len(names({"mixer": "3*mamba,attention"})) == 4


def test_memory_and_router_patterns_and_none() -> None:
    assert names({"mixer": "mamba", "memory": "none,ntm", "layers": 2, "feed_forward": "none"}) == [
        ["mamba"],
        ["mamba+ntm"],
    ]
    assert names({"mixer": "mamba", "router": "none,topk", "layers": 2, "feed_forward": "mlp"}) == [
        ["mamba", "mlp"], ["mamba", "topk+8*mlp"],
    ]  # fmt: skip
    assert names({"mixer": "mamba", "router": "topk", "layers": 1, "feed_forward": "2*mlp,swiglu"}) == [
        ["mamba", "topk+2*mlp+1*swiglu"]
    ]


def test_with_depths_neighbouring_blocks_under_the_same_router_are_one_stack() -> None:
    data = {"mixer": "a,b", "memory": "m,none", "feed_forward": "f,g", "depths": 3, "layers": 4}

    def stacks(router: str, **more: object) -> list[list[str]]:
        found = []
        for block in recipe.load({**data, "router": router, **more}).blocks:
            (targets,) = block.sublayers[0].targets or [None]
            inner = targets.sublayers if targets else block.sublayers
            assert targets is None or (targets.depths == 3 and len(block.sublayers) == 1)
            parts = [ref.name for s in inner for ref in (s.mixer, s.memory, s.feed_forward) if ref]
            found.append([*([block.sublayers[0].router.name] if block.sublayers[0].router else []), *parts])
        return found

    assert stacks("r") == [["r", "a", "m", "f", "b", "g", "a", "m", "f", "b", "g"]]
    assert stacks("none,2*r,none") == [["a", "m", "f"], ["r", "b", "g", "a", "m", "f"], ["b", "g"]]
    assert stacks("r,s") == [["r", "a", "m", "f"], ["s", "b", "g"]] * 2
    model = recipe.load({**data, "router": "r", "kv_sharing": True, "norm": "layer"})
    (targets,) = model.blocks[0].sublayers[0].targets or []
    assert targets.kv_sharing and {s.norm for s in targets.sublayers or []} == {"layer"}
    assert recipe.load(recipe.dump(model)) == model
    assert recipe.load(data | {"router": "r"}, {"a.k": 3}).blocks[0].sublayers[0].targets[0].sublayers[0].mixer.config


def test_entries_may_be_mappings() -> None:
    config = recipe.load({"mixer": [{"name": "mamba", "state_size": 8, "repeat": 2}, "attention"]})
    assert [b.sublayers[0].mixer.config for b in config.blocks if b.sublayers[0].mixer] == [{"state_size": 8}] * 2 + [
        {}
    ]


def test_one_entry_may_stand_without_a_list() -> None:
    (block,) = recipe.load({"mixer": {"name": "mamba", "state_size": 8}, "layers": 1}).blocks
    assert block.sublayers[0].mixer and block.sublayers[0].mixer.config == {"state_size": 8}


def test_a_component_may_be_called_much_like_a_key() -> None:
    (block,) = recipe.load({"mixer": "blocksparse", "layers": 1}, {"blocksparse.k": 3}).blocks
    assert block.sublayers[0].mixer and block.sublayers[0].mixer.config == {"k": 3}


def test_defaults_fill_in_and_settings_override() -> None:
    data = {
        "mixer": [{"name": "mamba", "state_size": 4}, "mamba"],
        "defaults": {"mamba": {"state_size": 8, "expand": 1}},
    }
    blocks = recipe.load(data).blocks
    assert [b.sublayers[0].mixer.config["state_size"] for b in blocks if b.sublayers[0].mixer] == [4, 8]
    blocks = recipe.load(data, {"mamba.state_size": 2, "blocks[1].sublayers[0].mixer.expand": 3, "dim": 64}).blocks
    assert [b.sublayers[0].mixer.config for b in blocks if b.sublayers[0].mixer] == [
        {"state_size": 2, "expand": 1},
        {"state_size": 2, "expand": 3},
    ]


def test_a_canonical_config_is_its_own_expansion() -> None:
    config = recipe.load({"mixer": "mamba", "memory": "ntm", "router": "topk", "layers": 2})
    assert recipe.load(recipe.dump(config)) == config


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        ({}, {}, "mixer: missing"),
        ({"mixer": "mamba,,"}, {}, "mixer: cannot read ''"),
        ({"mixer": "0*mamba"}, {}, "cannot read '0*mamba'"),
        ({"mixer": "9" * 5000 + "*mamba"}, {}, "cannot read '99"),
        ({"mixer": "Mamba"}, {}, "cannot read 'Mamba'"),
        ({"mixer": "mamba", "layrs": 3}, {}, "layrs: unknown key; did you mean 'layers'?"),
        ({"mixer": "mamba", "dim": "big"}, {}, "dim: input should be a valid integer, not 'big'"),
        ({"mixer": "mamba", "dim": 0}, {}, "dim: input should be greater than 0, not 0"),
        ({"mixer": "mamba", "dim": True}, {}, "dim: input should be a valid integer, not True"),
        (
            {"mixer": "3*mamba,attention", "layers": 6},
            {},
            "layers: 6 is not a multiple of the mixer pattern's 4 entries",
        ),
        ({"mixer": "mamba", "attach": "gate"}, {}, "attach: there is no memory to attach"),
        ({"mixer": "mamba", "router": "topk", "feed_forward": "none"}, {}, "a router needs experts"),
        ({"mixer": "mamba", "depths": 3}, {}, "depths: there is no router to choose among them"),
        ({"mixer": "mamba", "router": "topk", "depths": 0}, {}, "depths: input should be greater than or equal to 1"),
        ({"mixer": "mamba", "router": "topk", "kv_sharing": True}, {}, "kv_sharing: there are no depths to share"),
        ({"blocks": [{"sublayers": [{"mixer": "a"}]}], "depths": 3}, {}, "depths: the model already lists its blocks"),
        ({"mixer": "mamba", "defaults": {"mmaba": {}}}, {}, "defaults.mmaba: no part of this model"),
        ({"mixer": "mamba"}, {"mmaba.x": 1}, "mmaba.x: no part of this model is called 'mmaba'"),
        ({"mixer": "mamba"}, {"mamba.": 3}, "mamba.: not a path"),
        (
            {"mixer": "mamba,a", "layers": 4, "memory": "a,b,c"},
            {},
            "memory: a pattern of 3 entries does not fit 4 layers\nuse 6 layers",
        ),
        (
            {"mixer": "mamba", "layers": 4, "feed_forward": "a,b,c"},
            {},
            "feed_forward: a pattern of 3 entries does not fit 4 layers\nuse 6 layers",
        ),
        ({"mixer": "mamba"}, {"nonsense": 1}, "nonsense: unknown key"),
        ({"mixer": "mamba"}, {"blocks[9].sublayers[0].norm": "rms"}, "blocks[9].sublayers[0].norm: there is no 9 here"),
        ({"blocks": [], "mixer": "mamba"}, {}, "mixer: the model already lists its blocks"),
        ({"blocks": []}, {}, "blocks: list should have at least 1 item"),
        ({"blocks": [{"sublayers": [{}]}]}, {}, "blocks[0].sublayers[0]: a sublayer needs a mixer"),
        (
            {"blocks": [{"sublayers": [{"mixer": "a"}]}, {"sublayers": [{"mixer": "a", "nrom": "rms"}]}]},
            {},
            "blocks[1].sublayers[0].nrom: unknown key; did you mean 'norm'?",
        ),
        (
            {"blocks": [{"sublayers": [{"mixer": "a", "norm": "batch"}]}]},
            {},
            "blocks[0].sublayers[0].norm: input should be 'rms', 'layer' or 'none', not 'batch'",
        ),
        ({"mixer": "mamba", "head": {"kind": "clasifier"}}, {}, "head"),
        ({"mixer": "mamba"}, {"input.vocab": 7}, "input: say which kind it is, e.g. {kind: tokens, ...}"),
        ({"mixer": "mamba"}, {"head.classes": 7}, "head: say which kind it is, e.g. {kind: classifier, ...}"),
        ({"mixer": "mamba", "input": {"kind": "vectors", "size": 3}}, {}, "head: missing"),
        (
            {"mixer": "m", "input": {"kind": "vectors", "size": 3}, "head": {"kind": "language-model"}},
            {},
            "a language-model head needs tokens",
        ),
    ],
)
def test_mistakes_name_their_place(data: dict, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        recipe.load(data, settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"mixer: [", "not valid YAML at line 1"),
        (b"- a\n", "expected a mapping"),
        (b"", "expected a mapping"),
        (b"\xff\xfe\x00", "not"),
        (b"!!python/object/apply:os.system ['true']", "not valid YAML"),
        (b"? [1, 2]\n: 3", "not valid YAML"),
        (b"a: " + b"[" * 5000, "not valid YAML"),
        (b"mixer: mamba\nmixer: attention", "line 2, column 1: 'mixer' stands here twice"),
        (b"a: &a [x, x]\nmixer: *a", "line 2, column 8: aliases are not allowed"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "model.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        recipe.read(file)


def test_missing_files_and_directories(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        recipe.read(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="directory"):
        recipe.read(tmp_path)


def test_the_schema_for_editors_describes_every_key() -> None:
    schema = recipe.Recipe.model_json_schema()
    undescribed = [key for key, value in schema["properties"].items() if "description" not in value]
    assert undescribed == []
