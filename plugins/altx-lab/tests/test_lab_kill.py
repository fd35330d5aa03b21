"""Stopped in every way and resumed, for real: the log ends with the same bytes as that of a run left alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from altx_lab.commands import train

OPTIONS = {"steps": 120, "batch": 4, "length": 16, "save_every": 20, "eval_every": 50}
PROGRAM = """
import sys, time, typer
from altx.errors import AltxError
from altx_lab.commands import train
from altx_lab.trainer import Trainer
step = Trainer.train_step
def slowly(self):
    time.sleep({pause})
    return step(self)
Trainer.train_step = slowly
try:
    typer.run(train)
except AltxError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(2)
"""


@pytest.fixture
def straight(write_model, prose, tmp_path) -> bytes:
    """The log of a run left alone."""
    train(write_model(), text=prose, out=tmp_path / "straight", **OPTIONS)
    return (tmp_path / "straight/metrics.jsonl").read_bytes()


@pytest.fixture
def start(write_model, prose):
    """Starts the same run in a process of its own, and waits until its log holds so many steps."""
    processes = []

    def launch(run: Path, *, steps: int, pause: float = 0.02) -> subprocess.Popen:
        options = [part for name, value in OPTIONS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        command = [sys.executable, "-c", PROGRAM.format(pause=pause), write_model(), "--text", prose, "--out", run]
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([*command, *options], env=environment, **pipes)
        processes.append(process)
        log, deadline = run / "metrics.jsonl", time.monotonic() + 60
        while not log.exists() or log.read_bytes().count(b'"loss"') < steps:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.005)
        return process

    yield launch
    for process in processes:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen) -> tuple[int, str]:
    """A process's exit status and everything it printed."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out + err


def resume(run: Path) -> bytes:
    """The log after the run was resumed and went on to its end."""
    train(run, resume=True)
    assert (run / "result.json").exists()
    return (run / "metrics.jsonl").read_bytes()


def test_killed_and_resumed_is_the_same_run(start, straight, tmp_path):
    run = tmp_path / "run"
    process = start(run, steps=33)
    process.kill()
    assert end(process)[0] == -signal.SIGKILL
    assert (run / "checkpoints/step-00000020").is_dir() and not (run / "result.json").exists()
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 99, "lo')
    assert resume(run) == straight


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_saves_and_says_how_to_resume(start, straight, tmp_path, number):
    run = tmp_path / "run"
    process = start(run, steps=33)
    process.send_signal(number)
    code, shown = end(process)
    assert code == 2
    found = re.search(r"interrupted at step (\d+); resume with: altx train --resume \S+run", shown)
    assert found, shown
    assert (run / f"checkpoints/step-{int(found[1]):08d}").is_dir()
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == int(found[1])
    assert resume(run) == straight


def test_a_second_signal_stops_at_once_and_loses_nothing_saved(start, straight, tmp_path):
    run = tmp_path / "run"
    process = start(run, steps=2, pause=1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    code, shown = end(process)
    assert code == 2
    assert re.search(r"stopped at once after step \d+; resume with: altx train --resume \S+run", shown), shown
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000000"]
    assert resume(run) == straight
