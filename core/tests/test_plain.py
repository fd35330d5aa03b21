"""YAML from anybody is plain data of a limited size, or a ConfigError that says where it is not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from altx import checkpoint, plain, recipe
from altx.compose import build, compose
from altx.config import MAX_BUILT, MAX_PARTS
from altx.errors import AltxError, CheckpointError, ConfigError
from altx.registry import Registry
from altx.resolve import resolve


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system ['true']", "line 1, column 4: tags are not allowed"),
        ("a: !!binary aGk=", "tags are not allowed"),
        ("a: !!int x", "tags are not allowed"),
        ("a: ! 3", "tags are not allowed"),
        ("a: &a [*a]", "aliases are not allowed"),
        ("a: " + "[" * 65 + "]" * 65, "more than 64 levels inside each other"),
        ("a: [" + "0," * 1000 + "]", "more than 1000 values"),
        ("a: " + "9" * 5000, "is no number of at most 64 bits"),
        ("a: 9223372036854775808", "is no number of at most 64 bits"),
        ("a: 0x" + "f" * 400, "is no number of at most 64 bits"),
        ("a: 0x_", "is no number"),
        ("a: 1:30", "is no number"),
        ("a: 1" + ":59" * 10**5, "is no number"),
        ("a: 1" + ":59" * 10**5 + ".5", "is no number"),
        ("1: a", "the key '1' is no text; write it in quotes"),
        ("on: a", "the key 'on' is no text"),
        ("? [a]\n: b", "a key is no text"),
        ('"\\e[2J": 1\n"\\e[2J": 2', r"'\\x1b[2J' stands here twice"),
        ("a: 'b", "not valid YAML at line 1"),
    ],
)
def test_what_is_not_plain_data_is_refused_with_its_place(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "MAX_VALUES", 1000)
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        plain.parse(text, "file")
    assert message in str(caught.value) and str(caught.value).startswith("file: ")
    assert len(str(caught.value)) < 300
    assert time.process_time() - start < 20


def test_words_are_numbers_where_people_mean_them_and_else_texts() -> None:
    text = "{a: 1e-3, b: 2020-01-01, c: 1_000, d: 0x10, e: yes, f: ~, g: =, h: {<<: {i: 1}}, j: -2.5, k: 1E5, l: 1e}"
    assert plain.parse(text, "file") == {
        "a": 0.001, "b": "2020-01-01", "c": 1000, "d": 16, "e": True, "f": None, "g": "=", "h": {"<<": {"i": 1}},
        "j": -2.5, "k": 100000.0, "l": "1e",
    }  # fmt: skip


def test_what_is_written_is_read_again() -> None:
    words = [
        "1e-3",
        "1E5",
        "2020-01-01",
        "0x10",
        "1_0",
        "on",
        "~",
        "=",
        "<<",
        "a: b",
        "*a",
        "&a",
        "!a",
        "1:30",
        "\x1b",
        "é",
    ]
    data = {"words": words, "numbers": [0, -1, 2**62, 1e-5, 1e300, 0.1], "twice": [words, words], "none": None}
    assert plain.parse(plain.dump(data), "file") == data


def test_no_more_of_a_file_is_read_than_a_config_has(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="larger than 4 MiB"):
        recipe.read(Path("/dev/zero"))
    (tmp_path / "model.yaml").write_text("a: 1\n" + "#" * (4 << 20))
    with pytest.raises(ConfigError, match="larger than 4 MiB"):
        recipe.read(tmp_path / "model.yaml")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mixer": "4096*average,4096*average"}, "mixer: a pattern of more than 4096 entries"),
        ({"mixer": [{"name": "average", "repeat": 4096}] * 2}, "mixer: a pattern of more than 4096 entries"),
        ({"mixer": []}, "mixer: the pattern is empty"),
        (
            {"mixer": "average", "router": "router", "feed_forward": "mlp,swiglu," * 2000 + "mlp", "layers": 4096},
            "router: 4096 layers of 4001 experts are more than 65536 parts",
        ),
        (
            {"blocks": [{"sublayers": [{"router": "router", "targets": [
                {"router": "router", "targets": [{"feed_forward": "mlp", "repeat": 65536}], "repeat": 65536}]}]}]},
            f"parts, with all repeats, are more than {MAX_PARTS}",
        ),
        (
            {"blocks": [{"sublayers": [{"router": "router", "targets": [
                {"mixer": "average", "repeat": 9000}, {"feed_forward": "mlp"}]}]}]},
            f"9002 parts would be built one by one, more than {MAX_BUILT}",
        ),
        ({"mixer": "average", "input": {"kind": "tokens", "vocab": 1 << 40}}, "input.vocab: "),
        ({"mixer": "average", "norm_eps": float("inf")}, "norm_eps: input should be a finite number"),
        ({"mixer": [{"name": "average", "speed": float("nan")}]}, "speed: input should be a finite number"),
        ({"mixer": "average", "\x1b[2J": 1}, r"\x1b[2J: unknown key"),
        ({"mixer": "average", "defaults": {"\x1b[2J": {}}}, r"defaults.\x1b[2J: no part"),
        ({"mixer": "average", "dim": "9" * 10**6}, "dim: input should be a valid integer"),
        ({"mixer": "average", **{f"k{i}": i for i in range(10**4)}}, "and 9990 more"),
        ({"mixer": [{"name": "a" * 10**6}]}, "at most 200 characters"),
    ],
    ids=range(14),
)  # fmt: skip
def test_what_a_few_words_can_ask_for_has_a_limit(toy: Registry, data: dict, message: str) -> None:
    start = time.process_time()
    with pytest.raises(AltxError) as caught:
        build(resolve(recipe.load({"dim": 16, **data}), toy), device="meta")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 5000
    assert time.process_time() - start < 20


def test_a_model_that_memory_cannot_hold_is_an_error_with_words(toy: Registry, monkeypatch) -> None:
    def full(*args: object) -> None:
        raise RuntimeError("can't allocate memory: you tried to allocate 4398046511104 bytes")

    monkeypatch.setattr("altx.compose.Model", full)
    with pytest.raises(AltxError, match="input and head cannot be built: RuntimeError: can't allocate"):
        compose({"mixer": "average", "dim": 16}, plugins=toy)


@pytest.fixture
def run(toy: Registry, tmp_path: Path) -> Path:
    checkpoint.save(compose({"mixer": "average", "dim": 16, "layers": 1}, seed=0, plugins=toy), tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
def test_weights_of_another_type_are_refused(run: Path, toy: Registry, dtype: torch.dtype) -> None:
    weights = load_file(run / "model.safetensors")
    save_file({**weights, "norm.weight": weights["norm.weight"].to(dtype)}, run / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"norm\.weight is .*, the config says F32"):
        checkpoint.load(run, plugins=toy)


def test_weights_may_be_in_half_precision(run: Path, toy: Registry) -> None:
    weights = load_file(run / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, run / "model.safetensors")
    assert {p.dtype for p in checkpoint.load(run, plugins=toy).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["model.yaml", "model.safetensors"])
def test_a_link_out_of_a_checkpoint_is_not_followed(run: Path, toy: Registry, name: str) -> None:
    (run / name).rename(run.parent / name)
    (run / name).symlink_to(run.parent / name)
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        checkpoint.load(run, plugins=toy)
    (run / name).unlink()
    (run.parent / name).rename(run / f"blob-{name}")
    (run / name).symlink_to(f"blob-{name}")
    checkpoint.load(run, plugins=toy)


def test_a_link_to_a_whole_checkpoint_is(run: Path, toy: Registry) -> None:
    (run.parent / "latest").symlink_to(run)
    checkpoint.load(run.parent / "latest", plugins=toy)


def test_a_huge_header_is_not_read(run: Path, toy: Registry) -> None:
    weights = run / "model.safetensors"
    weights.write_bytes((90 << 20).to_bytes(8, "little") + b"{" + b" " * 1000)
    with pytest.raises(CheckpointError, match=r"damaged or cut short: .*its header would have 94371840 bytes"):
        checkpoint.load(run, plugins=toy)


def test_versions_that_cannot_be_read_are_left_out(run: Path, toy: Registry) -> None:
    for content in (b"[" * 100_000, b"\xff", b'{"plugins": {"a": ' + b"9" * 9999 + b"}}", b" " * (2 << 20)):
        (run / "plugins.json").write_bytes(content)
        checkpoint.load(run, plugins=toy)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(run, plugins=Registry(entry_points=[]))
        assert "pip install" not in caught.value.hint
