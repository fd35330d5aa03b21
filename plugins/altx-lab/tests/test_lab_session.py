"""`altx train` from its arguments to its result, in this process."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from altx_lab import session
from altx_lab.commands import train
from altx_lab.settings import Settings

from altx.errors import AltxError

QUICK = {"steps": 6, "batch": 2, "length": 8, "eval_every": 3, "save_every": 2}


def losses(run: Path) -> list[tuple[int, float]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def test_a_run_leaves_its_record_log_checkpoints_and_result(tmp_path, write_model, prose, capsys):
    train(write_model(), text=prose, out=tmp_path / "run", **QUICK)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["settings"]["steps"] == 6 and record["versions"]["torch"]
    assert record["text"]["bytes"] == 2000 and len(record["text"]["sha256"]) == 64
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert [step for step, _ in result["curve"]] == [3, 6]
    assert result["tokens"] == 6 * 2 * 8
    shown = capsys.readouterr().out
    for part in ("order-0 entropy", "gzip -9", "xz -9e", "this model, step 6", "before that, step 3"):
        assert part in shown
    assert f'altx generate {tmp_path / "run"} --prompt "The "' in shown


def test_the_default_run_is_named_after_the_model(tmp_path, write_model, prose, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(write_model("tiny.yaml"), text=prose, **QUICK)
    assert (tmp_path / "runs/tiny/result.json").is_file()
    with pytest.raises(AltxError, match="altx train --resume runs/tiny"):
        train(Path("tiny.yaml"), text=prose, **QUICK)
    train(Path("tiny.yaml"), resume=True, steps=7)
    assert len(losses(tmp_path / "runs/tiny")) == 7


def test_raising_the_steps_goes_on_from_the_end(tmp_path, write_model, prose):
    train(write_model(), text=prose, out=tmp_path / "run", **QUICK)
    before = losses(tmp_path / "run")
    train(tmp_path / "run", resume=True, steps=9)
    after = losses(tmp_path / "run")
    assert after[:6] == before and len(after) == 9
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["settings"]["steps"] == 9 and record["changes"][0]["step"] == 6


def test_resuming_a_finished_run_changes_nothing(tmp_path, write_model, prose):
    train(write_model(), text=prose, out=tmp_path / "run", **QUICK)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    train(tmp_path / "run", resume=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_plugins_mixers_train_too(tmp_path, write_model, prose, toys):
    session.start(write_model(toy={}), tmp_path / "run", QUICK, text=prose, plugins=toys)
    session.resume(tmp_path / "run", {"steps": 8}, plugins=toys)
    assert len(losses(tmp_path / "run")) == 8


def test_a_loss_that_is_not_finite_names_step_and_last_checkpoint(tmp_path, write_model, prose, toys):
    model = write_model(toy={"nan_after": 3})
    with pytest.raises(AltxError, match=r"step 4: the loss is not a finite number\n.*step-00000002"):
        session.start(model, tmp_path / "run", QUICK, text=prose, plugins=toys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, r"length: .*greater than or equal to 1, not 0"),
        ({"steps": 0}, r"steps: .*not 0"),
        ({"batch": -1}, r"batch: .*not -1"),
        ({"lr": float("nan")}, r"lr: .*not nan"),
        ({"lr": float("inf")}, r"lr: .*not inf"),
        ({"weight_decay": -0.1}, r"weight_decay: .*not -0\.1"),
        ({"device": "tpu"}, r"device: .*'auto', 'cpu' or 'cuda', not 'tpu'"),
        ({"length": 2000}, "2,000 bytes are too few"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(tmp_path, write_model, prose, options, message):
    with pytest.raises(AltxError, match=message):
        train(write_model(), text=prose, out=tmp_path / "run", **{**QUICK, **options})
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_not_there_is_refused(tmp_path, write_model, prose, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(AltxError, match="finds no GPU"):
        train(write_model(), text=prose, out=tmp_path / "run", device="cuda")


def test_force_keeps_the_old_run_when_the_new_one_is_refused(tmp_path, write_model, prose):
    train(write_model(), text=prose, out=tmp_path / "run", **QUICK)
    for wrong in ({"target": tmp_path / "absent.yaml"}, {"target": write_model(), "text": tmp_path / "absent.txt"}):
        with pytest.raises(AltxError, match="cannot be read"):
            train(out=tmp_path / "run", force=True, **wrong)
    assert (tmp_path / "run/result.json").is_file()
    train(write_model(), text=prose, out=tmp_path / "run", force=True, **{**QUICK, "steps": 2})
    assert len(losses(tmp_path / "run")) == 2


def test_what_cannot_be_resumed_says_why(tmp_path, write_model, prose):
    with pytest.raises(AltxError, match=r"not a run: run\.json"):
        train(tmp_path, resume=True)
    with pytest.raises(AltxError, match=r"not a run: run\.json"):
        train(tmp_path / "absent", resume=True)
    run, model = tmp_path / "run", write_model()
    train(model, text=prose, out=run, **QUICK)
    with pytest.raises(AltxError, match=r"--lr: this run uses 0\.004, not 0\.1"):
        train(run, resume=True, lr=0.1)
    with pytest.raises(AltxError, match="--steps: this run goes to step 6"):
        train(run, resume=True, steps=5)
    with pytest.raises(AltxError, match="not the model of"):
        train(write_model("other.yaml", dim=24), out=run, resume=True)
    with pytest.raises(AltxError, match="use one of them"):
        train(run, resume=True, force=True)
    with pytest.raises(AltxError, match="altx train --resume"):
        train(run)
    train(model, out=run, resume=True)


def test_a_run_goes_on_only_with_its_own_text(tmp_path, write_model, prose):
    run = tmp_path / "run"
    train(write_model(), text=prose, out=run, **QUICK)
    moved = prose.rename(tmp_path / "moved.txt")
    with pytest.raises(AltxError, match=r"prose\.txt: the text cannot be read"):
        train(run, resume=True, steps=7)
    train(run, resume=True, steps=7, text=moved)
    prose.write_bytes(moved.read_bytes().replace(b"fox", b"box"))
    with pytest.raises(AltxError, match="not the text this run was started with"):
        train(run, resume=True, steps=8)


def test_a_run_on_a_plugins_text_goes_on_with_it(tmp_path, write_model, toys, monkeypatch):
    run = tmp_path / "run"
    session.start(write_model(), run, QUICK, text="fox", plugins=toys)
    assert json.loads((run / "run.json").read_text())["text"]["component"] == "altx-lab-toys:fox"
    session.resume(run, {"steps": 7}, plugins=toys)
    monkeypatch.setattr(sys.modules["altx_lab_toys"], "words", lambda: b"another text " * 100)
    with pytest.raises(AltxError, match="not the text this run was started with"):
        session.resume(run, {"steps": 8}, plugins=toys)


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.safetensors", "trainer.json"])
def test_a_truncated_checkpoint_is_refused_and_the_one_before_serves(tmp_path, write_model, prose, name):
    run = tmp_path / "run"
    train(write_model(), text=prose, out=run, **QUICK)
    whole = losses(run)
    newest = run / "checkpoints/step-00000006"
    (newest / name).write_bytes((newest / name).read_bytes()[:-20])
    with pytest.raises(AltxError, match=r"step-00000006[^\0]*rm -r"):
        train(run, resume=True)
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    train(run, resume=True)
    assert losses(run) == whole


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("run.json", ('"parameters"', '"parametres"'), r"run\.json: parameters: field required"),
        ("run.json", ('"evaluation": "', '"evaluation": ["'), "not a run: run.json is not JSON"),
        ("run.json", ('"path": "', '"path": 3, "was": "'), r"run\.json: text\.path: input should be a valid string"),
        ("run.json", ('"length": 8', '"length": 4000'), "too few for windows of 4,000"),
        ("run.json", ('"batch": 2', '"batch": 1' + 40 * "0"), r"run\.json\.batch: input should be less than or equal"),
        ("run.json", ('{', '{"a": ' + 5000 * "["), "not a run: run.json is not JSON"),
        ("metrics.jsonl", ('"held_out": ', '"held_out": [0], "was": '), r"metrics\.jsonl: line 4 is damaged.*step 6"),
        ("metrics.jsonl", ('{"step": 5', '{"steps": 5'), r"metrics\.jsonl: line 6 is damaged.*step 6"),
        ("metrics.jsonl", ('{"step": 6', '{"step": 7'), r"metrics\.jsonl: ends with step 5, and the checkpoint is of"),
        ("checkpoints/step-00000006/trainer.json", ('"seconds": ', '"seconds": 1e300, "was": '), "1e.300 seconds"),
        ("checkpoints/step-00000006/trainer.json", ('"step": 6', '"step": 1e999'), "damaged or cut short"),
        ("checkpoints/step-00000006/trainer.safetensors", ("exp_avg_sq/i", "exp_avg_sb/i"), "exp_avg_sb, step"),
    ],
)  # fmt: skip
def test_a_run_whose_files_were_changed_is_refused_as_it_is(tmp_path, write_model, prose, file, change, message):
    run = tmp_path / "run"
    train(write_model(), text=prose, out=run, **QUICK)
    content = (run / file).read_bytes()
    assert change[0].encode() in content
    (run / file).write_bytes(content.replace(change[0].encode(), change[1].encode(), 1))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(AltxError, match=message):
        train(run, resume=True, steps=8)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_text_that_never_ends_is_refused(write_model, tmp_path):
    with pytest.raises(AltxError, match="/dev/zero: not a file"):
        train(write_model(), text="/dev/zero", out=tmp_path / "run", **QUICK)


def test_the_options_show_the_settings_own_defaults():
    shown = {name: p.annotation for name, p in inspect.signature(train).parameters.items()}
    for name, field in Settings.model_fields.items():
        assert re.search(rf"show_default='{re.escape(str(field.default))}'", shown[name]), name


def test_the_command_is_imported_without_torch():
    code = "import sys, altx_lab.commands; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
