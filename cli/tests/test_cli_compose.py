"""`altx compose`: flags, costs, proofs, and care with the files of others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from altx_cli.description import _blocks

QUICK = ("--dim", "16", "--no-prove")


@pytest.fixture
def compose(altx):
    return lambda *args: altx("compose", "--mixer", "average", *args)


def test_a_model_is_described_proved_and_written(compose):
    result = compose("--dim", "16", "--layers", "3", "--ffn", "mlp")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    title = next(line for line in lines if line.startswith("causal language model over 256 tokens: "))
    assert title.endswith("parameters, dim 16, 3 layers")
    assert any(line.split()[:3] == ["0-2", "each", "average"] for line in lines)
    assert any(line.startswith("state    192 B per sequence, constant") for line in lines)
    assert any("parallel = one token at a time" in line and line.endswith("ok") for line in lines)
    assert lines[-2] == "wrote model.yaml"
    assert lines[-1].endswith("altx train model.yaml")


def test_the_rows_add_up_to_the_total(compose):
    report = json.loads(compose(*QUICK, "--json", "--layers", "4", "--ffn", "mlp,none").stdout)
    rows = [(row["blocks"], row["component"]) for row in report["table"]]
    assert rows == [([0, 2], "average"), ([0, 2], "mlp"), ([1, 3], "average")], "blocks that are alike share rows"
    inside = sum(row["parameters"] * len(row["blocks"]) for row in report["table"])
    embedding, norms = 256 * 16, (4 + 2 + 1) * 16
    assert report["parameters"] == inside + embedding + norms


def test_depths_need_a_router(compose):
    result = compose(*QUICK, "--depths", "3")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: depths: there is no router to choose among them\n  name one with router")


def test_blocks_are_named_briefly():
    assert [_blocks(b) for b in ([3], [0, 1, 2], [0, 2, 3], list(range(0, 48, 2)))] == [
        "3", "0-2 each", "0,2-3 each", "24 blocks each",
    ]  # fmt: skip


def test_composing_the_written_file_again_gives_the_same_file(altx, compose):
    compose(*QUICK, "-o", "first.yaml")
    result = altx("compose", "first.yaml", "--no-prove", "-o", "second.yaml")
    assert result.exit_code == 0, result.stderr
    assert Path("first.yaml").read_text() == Path("second.yaml").read_text()


def test_flags_and_settings_override_a_file(altx):
    Path("recipe.yaml").write_text("{mixer: average, dim: 16, layers: 2}")
    args = ("recipe.yaml", "--layers", "3", "--set", "average.rate=0.25", "--no-prove", "--json")
    report = json.loads(altx("compose", *args).stdout)
    assert (report["dim"], report["layers"]) == (16, 3)
    assert report["config"]["blocks"][0]["sublayers"][0]["mixer"]["rate"] == 0.25


def test_a_file_that_lists_its_blocks_takes_no_mixer(altx, compose):
    compose(*QUICK)
    result = altx("compose", "model.yaml", "--mixer", "average")
    assert result.exit_code == 2
    assert "already lists its blocks" in result.stderr


def test_params_finds_the_width(compose):
    report = json.loads(compose("--params", "100k", "--no-prove", "--json").stdout)
    assert abs(report["parameters"] - 100_000) < 20_000


@pytest.mark.parametrize("other", [("--dim", "16"), ("--set", "dim=16")])
def test_params_and_dim_contradict_each_other(compose, other):
    result = compose("--params", "100k", *other)
    assert result.exit_code == 2
    assert "dim cannot be given too" in result.stderr


@pytest.mark.parametrize("args", [("--params", "lots"), ("--set", "dim"), ("--set", "dim=["), ("--set", "dim=x")])
def test_malformed_values_exit_with_2(compose, args):
    assert compose(*args).exit_code == 2


def test_a_setting_that_does_not_fit_is_refused_by_its_path(compose):
    result = compose("--dim", "12")
    assert result.exit_code == 2
    assert "blocks[0].sublayers[0].mixer" in result.stderr
    assert "it is not a multiple of 8" in result.stderr


def test_the_default_output_is_never_overwritten(compose):
    Path("model.yaml").write_text("mine")
    result = compose(*QUICK)
    assert result.exit_code == 0
    assert result.stdout.endswith("not written: model.yaml exists and differs; use -o or --force\n")
    assert Path("model.yaml").read_text() == "mine"
    assert "wrote model.yaml" in compose(*QUICK, "--force").stdout
    assert "model.yaml is unchanged" in compose(*QUICK).stdout


def test_a_named_output_that_exists_is_refused_before_the_work(compose):
    Path("mine.yaml").write_text("mine")
    result = compose("-o", "mine.yaml", "--set", "average.rate=-1")
    assert result.exit_code == 2
    assert "mine.yaml exists already" in result.stderr
    assert Path("mine.yaml").read_text() == "mine"
    assert compose(*QUICK, "-o", "mine.yaml", "--force").exit_code == 0
    assert Path("mine.yaml").read_text() != "mine"


@pytest.mark.parametrize("output, reason", [(".", "is a directory"), ("nowhere/model.yaml", "no directory nowhere")])
def test_an_output_that_cannot_be_written_is_refused(compose, output, reason):
    result = compose("-o", output)
    assert result.exit_code == 2
    assert reason in result.stderr


def test_json_is_one_object_and_writes_only_where_it_is_told_to(compose):
    result = compose("--dim", "16", "--json")
    report = json.loads(result.stdout)
    assert {proof["status"] for proof in report["proofs"]} == {"passed"}
    assert "a plugin that prints" in result.stderr
    assert list(Path().iterdir()) == []
    report = json.loads(compose(*QUICK, "--json", "-o", "here.yaml").stdout)
    assert (report["path"], report["written"]) == ("here.yaml", True)
    assert Path("here.yaml").is_file()


def test_a_failed_proof_exits_with_1_and_writes_nothing(compose):
    result = compose("--dim", "16", "--set", "average.deaf=true")
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert "not written: a proof failed" in result.stdout
    assert not Path("model.yaml").exists()


def test_large_models_are_not_proved_unless_asked(compose, monkeypatch):
    from altx_cli.commands import compose as module

    monkeypatch.setattr(module, "LARGE", 10)
    assert "not proved: more than 10 parameters" in compose("--dim", "16").stdout
    assert "not proved" not in compose("--dim", "16", "--prove").stdout


def test_a_model_that_needs_values_is_measured_with_weights_if_it_is_small(compose, monkeypatch):
    from altx_cli import description

    curious = (*QUICK, "--set", "average.curious=true")
    assert json.loads(compose(*curious, "--json").stdout)["flops_per_token"] > 0
    monkeypatch.setattr(description, "LARGE", 10)
    report = json.loads(compose(*curious, "--json").stdout)
    assert report["flops_per_token"] is None
    assert [row["flops_per_token"] is None for row in report["table"]] == [True, False]
    total = next(line for line in compose(*curious).stdout.splitlines() if line.split()[:1] == ["total"])
    assert total.endswith(" -")
