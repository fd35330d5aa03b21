"""Commands that other packages add: listed, run, and harmless when they are broken."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from altx_cli import external
from altx_cli.main import COMMANDS

GOOD = '''
import typer

def dance(steps: int = 3):
    """Dance a little."""
    print("step " * steps)

def stumble(as_json: bool = typer.Option(False, "--json")):
    from altx.errors import AltxError
    raise AltxError("stumbled", hint="get up")
'''


def test_help_lists_altx_own_commands_in_order(altx):
    text = altx("--help").stdout.partition("Commands:")[2]
    own = list(COMMANDS)
    found = [line.split()[0] for line in text.splitlines() if line.strip()]
    assert found[: len(own)] == own
    assert "..." not in text, "the help line of every command fits"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(altx, command):
    result = altx(command, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: altx {command}")


def test_the_version_and_those_of_the_plugins(altx, install):
    from altx import __version__

    install("Altx.Dance", "altx.commands", "dance = dance_module:dance", "dance_module", "raise SystemExit")
    lines = altx("--version").stdout.splitlines()
    assert lines[0] == f"altx {__version__}"
    assert {"altx-toy 1.0", "altx-dance 1.0"} <= set(lines[1:])


def test_a_package_adds_a_command(altx, install):
    install("altx-dance", "altx.commands", "dance = dance_module:dance", "dance_module", GOOD)
    assert "dance      Dance a little." in altx("--help").stdout
    assert altx("dance", "--steps", "2").stdout == "step step \n"


def test_its_errors_are_reported_like_altx_own(altx, install):
    install("altx-dance", "altx.commands", "stumble = dance_module:stumble", "dance_module", GOOD)
    result = altx("stumble")
    assert (result.exit_code, result.stderr) == (2, "error: stumbled\n  get up\n")
    assert '"what": "stumbled"' in altx("stumble", "--json").stdout


@pytest.mark.parametrize(
    "source, reason",
    [
        ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("raise SystemExit('stop')", "SystemExit: stop"),
        ("", "AttributeError: module 'broken_module' has no attribute 'run'"),
        ("run = 3", "TypeError"),
        ("def run(x: 'Missing'): ...", "NameError"),
    ],
)
def test_a_broken_command_says_why_and_breaks_nothing_else(altx, install, source, reason):
    install("altx-broken", "altx.commands", "fall = broken_module:run", "broken_module", source, version="0.7")
    text = " ".join(altx("--help").stdout.split())
    assert "compose Assemble" in text
    assert "fall (unavailable: of altx-broken 0.7 cannot be loaded:" in text
    for args in (["fall"], ["fall", "--any", "thing"], ["fall", "--help"]):
        result = altx(*args)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: the command 'fall' of altx-broken 0.7 cannot be loaded: ")
        assert reason in result.stderr
        assert "pip install --force-reinstall altx-broken" in result.stderr


@pytest.mark.parametrize(
    "entries, metadata, reason",
    [
        ("[altx.commands]\nfly = fly_module:run", None, "its metadata names it ''"),
        ("[altx.commands\nfly = x:y\n\udcff", "Name: altx-fly\nVersion: 1", "its entry points cannot be read"),
        ("[altx.commands]\nfly = x:y\n[other", "Name: altx-fly\nVersion: 1", "its entry points cannot be read"),
        ("[altx.commands]\nf\x1b[31mly = x:y", "Name: altx-fly\nVersion: 1", "which is none"),
        ("[altx.commands]\nfly = not a module", "Name: altx-fly\nVersion: 1", "is not 'module' or"),
        ("[altx.commands]\nfly = fly_module:run", "Name: altx-fly\nVersion: 1", "GeneratorExit"),
    ],
)
def test_a_damaged_package_breaks_no_command(altx, install, entries, metadata, reason):
    install("altx-other", "altx.commands", "dance = fly_module:dance", "fly_module", "raise GeneratorExit")
    info = Path(sys.path[0], "altx_fly-1.dist-info")
    info.mkdir()
    (info / "entry_points.txt").write_text(entries, errors="surrogateescape")
    if metadata:
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\n{metadata}\n")
    external.offers.cache_clear()
    shown = altx("--help")
    assert shown.exit_code == 0 and "compose Assemble" in " ".join(shown.stdout.split()) and "\x1b" not in shown.stdout
    assert altx("--version").exit_code == 0
    report = altx("doctor")
    assert report.exit_code == 0 and reason in report.stdout and "\x1b" not in report.stdout


def test_one_command_of_two_packages_is_an_error_that_names_both(altx, install):
    install("altx-one", "altx.commands", "dance = one_module:dance", "one_module", GOOD)
    install("altx-two", "altx.commands", "dance = two_module:dance", "two_module", GOOD, version="2.0")
    result = altx("dance")
    assert result.exit_code == 2
    assert "the command 'dance' of altx-one 1.0 and altx-two 2.0 is offered twice" in result.stderr
    assert "pip uninstall altx-one or altx-two" in result.stderr
    assert "unavailable" in altx("--help").stdout


def test_a_package_cannot_take_the_name_of_a_command_of_altx(altx, install):
    install("altx-thief", "altx.commands", "list = thief_module:dance", "thief_module", GOOD)
    assert "average" in altx("list").stdout
    for command in ("--help", "doctor"):
        text = " ".join(altx(command).stdout.split())
        assert "the command 'list' of altx-thief 1.0 has the name of one of altx's own" in text
