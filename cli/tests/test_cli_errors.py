"""Exit statuses and messages: 2 for what the user can mend, 130 for Ctrl-C, one JSON object with --json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from altx.errors import AltxError
from altx_cli import output


def test_an_error_says_what_and_then_what_to_do_without_a_traceback(altx):
    result = altx("compose", "--mixer", "averag")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[:2] == ["error: no plugin offers a mixer 'averag'", "  did you mean 'average'?"]
    assert "Traceback" not in result.stderr


def test_with_json_an_error_is_one_object_on_stdout(altx):
    result = altx("compose", "--mixer", "averag", "--json")
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert (error["kind"], error["what"]) == ("UnknownComponent", "no plugin offers a mixer 'averag'")
    assert error["hint"].startswith("did you mean 'average'?")


def test_every_line_of_a_long_error_is_indented():
    assert output.message("one\ntwo", "three\nfour") == "error: one\n       two\n  three\n  four"


@pytest.mark.parametrize("args", [["compose", "--nonsense"], ["nonsense"], ["show"]])
def test_wrong_usage_exits_with_2(altx, args):
    assert altx(*args).exit_code == 2


def test_a_mistyped_command_is_recognised(altx):
    assert "Did you mean 'compose'?" in altx("compos").stderr


def test_an_uninstalled_name_in_altx_plugins_is_an_error_like_any_other(altx, monkeypatch):
    monkeypatch.setenv("ALTX_PLUGINS", "missing")
    result = altx("list")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ALTX_PLUGINS names 'missing', which is not installed")


def test_a_kernel_error_is_an_error_like_any_other(capsys):
    from altx_kernels import KernelError

    with pytest.raises(output.typer.Exit) as stop, output.reporting():
        raise KernelError("no such backend", hint="take another")
    assert stop.value.exit_code == 2
    assert capsys.readouterr().err == "error: no such backend\n  take another\n"


def test_ctrl_c_exits_with_130_and_a_word(capsys):
    with pytest.raises(output.typer.Exit) as stop, output.reporting():
        raise KeyboardInterrupt
    assert stop.value.exit_code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_other_errors_are_faults_of_altx_and_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), output.reporting():
        1 / 0  # noqa: B018


def test_what_others_print_stays_off_stdout_when_json_is_wanted(capsys):
    with output.reporting(as_json=True):
        print("a plugin talks")
        output.emit({"value": float("inf"), "set": frozenset("ba")})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"value": "inf", "set": ["a", "b"]}
    assert captured.err == "a plugin talks\n"


def test_json_errors_nest_in_the_same_way(capsys):
    with pytest.raises(output.typer.Exit), output.reporting(), output.reporting(as_json=True):
        raise AltxError("wrong")
    assert json.loads(capsys.readouterr().out) == {"error": {"kind": "AltxError", "what": "wrong", "hint": ""}}


@pytest.mark.parametrize("args", [["list"], ["show", "swiglu"], ["--help"], ["list", "--help"], ["show", "nothing"]])
def test_a_reader_that_goes_away_ends_it_without_a_word(args):
    command = [sys.executable, "-m", "altx_cli", *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        error = process.stderr.read()
    if args == ["show", "nothing"]:
        assert process.returncode == 2 and error.startswith("error: no plugin offers")
    else:
        assert (process.returncode, error) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_an_error_like_any_other():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "altx_cli", "list"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (2, "error: the output cannot be written: No space left on device\n")


def test_a_fault_has_a_status_and_a_traceback_of_its_own(monkeypatch):
    code = "from altx_cli import main\ndef fall(**k): 1 / 0\nmain.app = fall\nmain.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 3
    assert "ZeroDivisionError" in done.stderr and "altx doctor" in done.stderr


def test_the_help_tells_every_exit_status(altx):
    told = altx("--help").stdout.partition("Exit status:")[2].split()
    assert [word for word in told if word.isdigit()] == ["0", "1", "2", "3", "130", "141"]


def test_debugging_shows_where_an_error_came_from(altx, monkeypatch):
    monkeypatch.setenv("ALTX_DEBUG", "1")
    result = altx("show", "nothing")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and "error: no plugin offers" in result.stderr


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("no_color", ["", "1"])
def test_colour_is_for_terminals_without_no_color(terminal, no_color, monkeypatch):
    class Stream:
        def isatty(self):
            return terminal

    monkeypatch.setenv("NO_COLOR", no_color)
    assert ("\x1b" in output.paint("text", "red", Stream())) == (terminal and not no_color)
