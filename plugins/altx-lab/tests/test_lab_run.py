"""A run's directory and its log: what they keep, what they drop, and what they never touch."""

from __future__ import annotations

import json

import pytest
from altx_lab import run as runs
from altx_lab.log import Log
from altx_lab.run import Run

from altx.compose import compose
from altx.errors import AltxError, CheckpointError


@pytest.fixture
def model(write_model):
    return compose(write_model(), seed=0)


def test_a_log_is_cut_after_a_step_and_drops_a_half_written_line(tmp_path):
    with Log(tmp_path / "log") as log:
        for step in range(1, 5):
            log.append({"step": step, "loss": step / 3})
            log.append({"step": step, "held_out": 1.0 / step})
    whole = (tmp_path / "log").read_bytes()
    with (tmp_path / "log").open("ab") as file:
        file.write(b'{"step": 5, "lo')
    with Log(tmp_path / "log") as log:
        log.cut(4)
        assert (tmp_path / "log").read_bytes() == whole
        log.cut(2)
        assert log.evaluations() == [(1, 1.0), (2, 0.5)]
        log.append({"step": 3, "loss": 1.0})
    kept = [json.loads(line)["step"] for line in (tmp_path / "log").read_text().splitlines()]
    assert kept == [1, 1, 2, 2, 3]


def test_two_processes_cannot_train_one_run(tmp_path):
    with Run.create(tmp_path / "run", {}), pytest.raises(AltxError, match="another process is training"):
        Run.open(tmp_path / "run")
    with Run.open(tmp_path / "run"):
        pass


def test_the_last_two_checkpoints_are_kept(tmp_path, model):
    with Run.create(tmp_path / "run", {}) as run:
        for step in (0, 5, 10, 100_000_000):
            run.save(model, step, {})
        assert [runs.step_of(path) for path in run.checkpoints()] == [10, 100_000_000]


def test_what_a_kill_left_half_written_is_ignored_and_removed(tmp_path, model):
    with Run.create(tmp_path / "run", {}) as run:
        run.save(model, 5, {})
    partial = tmp_path / "run/checkpoints/.step-00000010.partial-123"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    with Run.open(tmp_path / "run") as run:
        assert [runs.step_of(path) for path in run.checkpoints()] == [5]
        assert not partial.exists()


def test_a_run_is_not_overwritten_unless_forced(tmp_path, model):
    with Run.create(tmp_path / "run", {"a": 1}) as run:
        run.save(model, 5, {})
        run.write_result({})
    (tmp_path / "run/notes.txt").write_text("mine")
    with pytest.raises(AltxError, match="altx train --resume"):
        Run.create(tmp_path / "run", {"a": 2})
    assert runs.read_record(tmp_path / "run") == {"a": 1}
    with pytest.raises(AltxError, match="is not a run"):
        Run.create(tmp_path / "run", {"a": 2}, force=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    (tmp_path / "run/notes.txt").unlink()
    with Run.create(tmp_path / "run", {"a": 2}, force=True):
        assert runs.read_record(tmp_path / "run") == {"a": 2}


@pytest.mark.parametrize("record", [None, "no json", "[]", '{"steps": 3}', '{"altx_run": 99}'])
def test_force_never_deletes_what_is_no_run(tmp_path, record):
    home = tmp_path / "home"
    (home / "checkpoints/step-00000001").mkdir(parents=True)
    if record is not None:
        (home / "run.json").write_text(record)
    before = sorted(home.rglob("*"))
    with pytest.raises(AltxError, match="not a run"):
        Run.create(home, {}, force=True)
    assert sorted(home.rglob("*")) == before


def test_force_does_not_follow_or_delete_files(tmp_path):
    (tmp_path / "file").write_text("x")
    for force in (False, True):
        with pytest.raises(AltxError, match="is not a run"):
            Run.create(tmp_path / "file", {}, force=force)
    assert (tmp_path / "file").read_text() == "x"


def test_a_run_without_checkpoints_says_how_to_start_again(tmp_path):
    with Run.create(tmp_path / "run", {}) as run, pytest.raises(CheckpointError, match="--force"):
        run.latest()


@pytest.mark.parametrize("name", ["model.safetensors", "model.yaml", "trainer.safetensors"])
def test_a_damaged_checkpoint_is_named_with_the_way_back(tmp_path, model, name):
    with Run.create(tmp_path / "run", {}) as run:
        files = {"trainer.safetensors": b"x", "trainer.json": b"{}"}
        run.save(model, 5, files)
        run.save(model, 10, files)
        (run.checkpoints()[-1] / name).unlink()
        with pytest.raises(CheckpointError, match=r"step-00000010[^\0]*rm -r"):
            run.latest()
