"""`altx kernels`: ops of plugins appear by themselves, are verified and timed; names that do not exist are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from altx_cli import kernel_text
from altx_kernels import op


@pytest.fixture
def kernels(altx, install, monkeypatch):
    """Run `altx kernels ARGS` with the toy kernels installed."""
    from altx_cli.ops import load_ops

    monkeypatch.delenv("ALTX_KERNEL", raising=False)
    load_ops()
    monkeypatch.setattr(op, "_ops", dict(op._ops))
    toy = Path(__file__).with_name("kernel_toy.py")
    install("altx-kernel-toy", "altx.plugins", "kernel-toy = kernel_toy", "kernel_toy", toy, version="3.1")
    monkeypatch.setenv("ALTX_PLUGINS", "toy,kernel-toy")
    return lambda *args: altx("kernels", *args)


def section(text: str, name: str) -> list[str]:
    """The lines about one op."""
    blocks = [block.splitlines() for block in text.split("\n\n")]
    return next(block for block in blocks if block[0].split()[:1] == [name])


def test_a_plugins_ops_are_listed_with_their_backends_and_the_choice(kernels):
    result = kernels("list")
    assert result.exit_code == 0, result.stderr
    lines = section(result.stdout, "toy-double")
    assert lines[:5] == [
        "toy-double  (altx-kernel-toy 3.1)  twice as much",
        "  mars       there is no such machine",
        "  native     available",
        "  torch      available",
        "  reference  available",
    ]
    reason = "(native: gradients are wanted, and it has none)"
    assert lines[5] == f"  chosen on cpu: native for inference, torch for training {reason}"
    assert section(result.stdout, "toy-bare")[-1] == "  chosen on cpu: none: the op has no examples to try"
    assert result.stdout.endswith("next: altx kernels verify, altx kernels bench\n")


def test_altx_own_ops_are_listed(kernels):
    report = json.loads(kernels("list", "--json").stdout)
    packages = {op["op"]: op["package"] for op in report["ops"]}
    assert packages["causal-conv1d"] == "altx"


def test_a_component_that_cannot_be_imported_is_reported_and_hurts_nothing(kernels):
    result = kernels("list")
    assert "could not be imported, so that its ops are missing" in result.stdout
    assert "mixer 'brittle' of altx-kernel-toy 3.1" in result.stdout
    assert "No module named 'nowhere_to_be_found'" in result.stdout
    assert kernels("verify", "toy-double").exit_code == 0


def test_the_list_is_one_json_object(kernels):
    report = json.loads(kernels("list", "--json").stdout)
    toy = next(op for op in report["ops"] if op["op"] == "toy-double")
    assert (toy["package"], toy["version"], toy["summary"]) == ("altx-kernel-toy", "3.1", "twice as much")
    assert toy["backends"][0] == {"backend": "mars", "absent": "there is no such machine"}
    on_cpu = {choice["mode"]: choice for choice in toy["choices"] if choice["device"] == "cpu"}
    assert {mode: choice["backend"] for mode, choice in on_cpu.items()} == {"inference": "native", "training": "torch"}
    assert on_cpu["training"]["refused"]["native"] == "gradients are wanted, and it has none"
    assert [problem["from"] for problem in report["problems"]] == ["mixer 'brittle' of altx-kernel-toy 3.1"]


def test_a_pin_is_shown_and_obeyed(kernels, monkeypatch):
    monkeypatch.setenv("ALTX_KERNEL", "toy-double=torch")
    text = kernels("list").stdout
    assert text.startswith("pinned by ALTX_KERNEL=toy-double=torch\n")
    assert section(text, "toy-double")[-1] == "  chosen on cpu: torch (pinned)"
    monkeypatch.setenv("ALTX_KERNEL", "toy-double=mars")
    assert "none: ALTX_KERNEL=toy-double=mars: backend 'mars' cannot run" in kernels("list").stdout


@pytest.mark.parametrize(
    "pin, message",
    [
        ("toy-duble=torch", "there is no op 'toy-duble'\n  did you mean 'toy-double'"),
        ("toy-double=trch", "op 'toy-double' has no backend 'trch'\n  did you mean 'torch'?"),
        ("ntive", "no op has a backend 'ntive'\n  did you mean 'native'?"),
        ("a=b=c", "cannot read 'a=b=c'"),
    ],
)
@pytest.mark.parametrize("command", [["list"], ["verify"], ["bench"]])
def test_a_pin_that_names_nothing_is_an_error(kernels, monkeypatch, pin, message, command):
    monkeypatch.setenv("ALTX_KERNEL", pin)
    result = kernels(*command)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: ALTX_KERNEL={pin}: {message}")


def test_compose_and_doctor_notice_a_pin_that_names_nothing(kernels, altx, monkeypatch):
    monkeypatch.setenv("ALTX_KERNEL", "toy-duble=torch")
    result = altx("compose", "--mixer", "average", "--dim", "16")
    assert result.exit_code == 2
    assert "there is no op 'toy-duble'\n  did you mean 'toy-double'" in result.stderr
    assert "ALTX_KERNEL=toy-duble=torch: there is no op 'toy-duble'" in altx("doctor").stdout
    # One for an op that the model does not use is no mistake.
    monkeypatch.setenv("ALTX_KERNEL", "toy-double=torch")
    assert altx("compose", "--mixer", "average", "--dim", "16").exit_code == 0
    assert "there is no op" not in altx("doctor").stdout


def test_what_is_right_passes(kernels):
    result = kernels("verify", "toy-double")
    assert result.exit_code == 0
    lines = section(result.stdout, "toy-double")
    assert lines[-1] == "  mars  skipped: there is no such machine"
    native = next(line for line in lines if line.split()[:3] == ["native", "cpu", "float32"])
    assert native.split()[3:5] == ["6", "calls"]
    assert native.endswith("ok, 6 calls skipped")
    assert lines.count("      skipped: gradients are wanted, and it has none") == 1
    assert result.stdout.splitlines()[-1].startswith("12 passed, 1 skipped: ")


def test_what_is_wrong_fails_with_the_example_and_the_argument(kernels):
    result = kernels("verify", "toy-wrong", "toy-double", "--dtype", "float64")
    assert result.exit_code == 1
    wrong, where, *_ = section(result.stdout, "toy-wrong")[1:]
    assert wrong.endswith("FAILED")
    assert where == "      n=3: gradient of x: 0.005 > 1e-10 (contiguous, sliced, transposed)"
    assert section(result.stdout, "toy-double"), "the others are verified all the same"


def test_findings_are_one_json_object(kernels):
    result = kernels("verify", "toy-wrong", "toy-double", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["passed"] is False
    failed = [r for r in report["results"] if r["status"] == "failed"]
    assert {(r["op"], r["backend"]) for r in failed} == {("toy-wrong", "torch")}
    # A relative error of 0.005 is within the tolerance of 16 bits.
    assert [r["dtype"] for r in failed] == ["float64", "float32"]
    assert {failure["layout"] for failure in failed[0]["failures"]} == {"contiguous", "sliced", "transposed"}
    absent = next(r for r in report["results"] if r["backend"] == "mars")
    assert absent["skipped"] == {"there is no such machine": 2}


def test_only_what_is_asked_for_is_verified(kernels):
    args = ("toy-double", "--backend", "native", "--dtype", "float32", "--dtype", "bfloat16", "--device", "cpu")
    report = json.loads(kernels("verify", *args, "--json").stdout)
    assert [(r["op"], r["backend"], r["dtype"]) for r in report["results"]] == [
        ("toy-double", "native", "float32"), ("toy-double", "native", "bfloat16"),
    ]  # fmt: skip


@pytest.mark.parametrize("args", [("toy-double", "--backend", "mars"), ("toy-bare",)])
def test_nothing_verified_is_not_success(kernels, args):
    result = kernels("verify", *args)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == "nothing was verified: altx kernels list says what is available here"


@pytest.mark.parametrize("command", ["verify", "bench"])
@pytest.mark.parametrize(
    "args, message",
    [
        (["toy-duble"], "there is no op 'toy-duble'\n  did you mean 'toy-double'"),
        (["toy-double", "--backend", "ntive"], "toy-double has no backend 'ntive'\n  did you mean 'native'?"),
        (["--backend", "zzzz"], "no op has a backend 'zzzz'\n  there are "),
        (["--dtype", "int8"], "there is no dtype 'int8' here; write one of float64, float32"),
        (["--device", "tpu"], "there is no device 'tpu' here; write cpu or cuda"),
    ],
)
def test_names_that_do_not_exist_exit_with_2(kernels, command, args, message):
    result = kernels(command, *args)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_device_that_is_not_here_exits_with_2(kernels, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = kernels("verify", "toy-double", "--device", "cuda")
    assert (result.exit_code, result.stderr.splitlines()[0]) == (2, "error: this machine has no cuda device")


@pytest.fixture
def bench(kernels, monkeypatch):
    from altx_kernels import bench

    monkeypatch.setattr(bench, "measure_rates", lambda device, dtype: bench.Rates(1e9, 1e9))
    monkeypatch.setattr(bench, "MOST_ROUNDS", 3)
    return lambda *args: kernels("bench", "toy-double", "--device", "cpu", "--seconds", "5", *args)


def test_backends_are_timed_side_by_side(bench):
    result = bench()
    assert result.exit_code == 0, result.stderr
    lines = section(result.stdout, "toy-double")
    assert lines[0] == "toy-double  n=4  float32 on cpu"
    assert lines[1].split() == ["MEDIAN", "QUARTILES", "X", "FLOOR", "X", "FASTEST"]
    assert [line.split()[:2] for line in lines[2:7]] == [
        ["native", "forward"], ["torch", "forward"], ["torch", "forward+backward"],
        ["floor", "forward"], ["floor", "forward+backward"],
    ]  # fmt: skip
    assert lines[5].split()[2:] == ["0.032", "us", "by", "bytes"]
    assert lines[7:] == [
        "  mars: there is no such machine",
        "  native, forward+backward: gradients are wanted, and it has none",
    ]


def test_timings_are_one_json_object_and_a_file(bench):
    result = bench("--json", "-o", "timings.json", "--include-reference", "--threads", "1")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert json.loads(Path("timings.json").read_text()) == report
    assert report["machine"]["threads"] == 1
    assert {timing["backend"] for timing in report["timings"]} == {"mars", "native", "torch", "reference"}
    assert all((timing["median"] is None) == bool(timing["note"]) for timing in report["timings"])


def test_an_output_that_cannot_be_written_is_refused_before_the_work(bench):
    result = bench("-o", "nowhere/timings.json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "nowhere/timings.json cannot be written" in result.stderr


def test_too_little_time_is_said(bench):
    result = bench("--seconds", "0")
    assert result.exit_code == 0
    assert "cut off after one call" in result.stdout
    assert "not all had the time they need: raise --seconds, or name fewer ops" in result.stdout


def test_an_op_without_workloads_is_said(kernels):
    assert "nothing was timed" in kernels("bench", "toy-bare").stdout


@pytest.mark.parametrize("args", [["verfy"], ["verify", "--nonsense"], ["bench", "--seconds", "-1"]])
def test_wrong_usage_exits_with_2(kernels, args):
    assert kernels(*args).exit_code == 2


@pytest.mark.parametrize("command", [["--help"], ["list", "--help"], ["verify", "--help"], ["bench", "--help"]])
def test_every_command_has_help(kernels, command):
    result = kernels(*command)
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: altx kernels")
    assert "..." not in result.stdout.partition("Commands:")[2], "the help line of every command fits"


@pytest.mark.parametrize("seconds, text", [(None, "-"), (2.5, "2.5 s"), (0.01234, "12.3 ms"), (4.2e-6, "4.2 us")])
def test_times_are_told_in_the_unit_that_suits_them(seconds, text):
    assert kernel_text.time_text(seconds) == text
