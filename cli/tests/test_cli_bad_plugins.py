"""A plugin that misbehaves: every command works for the others, and says which plugin of which version it was."""

from __future__ import annotations

import json

import pytest

SOURCE = """
{import_}
from altx import MixerSpec, hookimpl
from altx.config import Config
from altx.capabilities import Capabilities

class Settings(Config):
    pass

def capabilities(config):
    {capabilities}
    return Capabilities(growth="constant", rollback="snapshot")

def build(config, ctx):
    {build}
    from altx.testing.partners import MovingAverage
    class Layer(MovingAverage):
        def forward(self, *args, **kwargs):
            {forward}
            return super().forward(*args, **kwargs)
        def init_state(self, *args, **kwargs):
            {init_state}
            return super().init_state(*args, **kwargs)
    return Layer(ctx.dim)

@hookimpl
def altx_token_mixers():
    {hook}
    return [MixerSpec("bad", summary="s", build="{where}:build", config="bad_plugin:Settings",
                      capabilities="bad_plugin:capabilities")]
"""
HOLES = ["import_", "hook", "capabilities", "build", "forward", "init_state"]
RAISES = {
    "error": "raise KeyError('boom')",
    "exit": "raise SystemExit(0)",
    "generator": "raise GeneratorExit",
    "click": "import click; raise click.exceptions.Exit(0)",
}


@pytest.fixture
def bad(altx, install, monkeypatch):
    """Install a plugin with code in one of its holes, beside the good one."""

    def bad(where: str = "bad_plugin", **holes: str) -> None:
        source = SOURCE.format(where=where, **{**dict.fromkeys(HOLES, "pass"), **holes})
        install("altx-bad", "altx.plugins", "bad = bad_plugin", "bad_plugin", source, version="0.3")
        monkeypatch.setenv("ALTX_PLUGINS", "toy,bad")

    return bad


def told(result) -> None:
    assert result.exit_code == 2, (result.exit_code, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    assert "altx-bad 0.3" in result.stderr
    assert "reinstall" in result.stderr or "tell its authors" in result.stderr


@pytest.mark.parametrize("raises", RAISES)
@pytest.mark.parametrize("hole", HOLES)
def test_compose_names_the_plugin_without_a_traceback(altx, bad, hole: str, raises: str) -> None:
    bad(**{hole: RAISES[raises]})
    args = ["--dim", 16, "--layers", 1, "--no-prove"]
    told(altx("compose", "--mixer", "bad", *args))
    assert altx("compose", "--mixer", "average", *args).exit_code == 0


@pytest.mark.parametrize("hole", ["import_", "hook", "capabilities", "build"])
def test_check_show_and_list_do_too(altx, bad, hole: str) -> None:
    bad(**{hole: "raise SystemExit(0)"})
    checked = altx("check", "bad")
    if hole == "build":
        # That a component can be built is a law like others.
        assert checked.exit_code == 1
        assert "building mixer 'bad' of altx-bad 0.3 failed: SystemExit: 0" in " ".join(checked.stdout.split())
    else:
        told(checked)
    listed = altx("list", "--json")
    assert listed.exit_code == 0
    problems = {p["plugin"]: p for p in json.loads(listed.stdout)["problems"]}
    shown = altx("show", "bad")
    if hole in ("import_", "hook"):
        assert problems["altx-bad"]["version"] == "0.3" and "SystemExit" in problems["altx-bad"]["reason"]
        told(shown)
    elif hole == "capabilities":
        assert "reading its capabilities failed: SystemExit: 0" in " ".join(shown.stdout.split())
    assert altx("show", "average").exit_code == 0


@pytest.mark.parametrize("raises", RAISES)
@pytest.mark.parametrize("hole", ["build", "forward", "init_state"])
def test_a_component_that_ends_the_program_fails_its_check_by_name(altx, bad, hole: str, raises: str) -> None:
    bad(**{hole: RAISES[raises]})
    checked = altx("check", "bad", "--json")
    assert checked.exit_code == 1, checked.stderr
    failed = [result for result in json.loads(checked.stdout)["results"] if result["status"] == "failed"]
    assert [result["check"] for result in failed] == ["shapes"]
    assert "mixer 'bad' of altx-bad 0.3" in failed[0]["message"]


def test_an_import_string_to_nowhere_is_listed_as_broken(altx, bad) -> None:
    bad(where="bad_elsewhere")
    reason = "its build 'bad_elsewhere:build' leads nowhere: there is no module bad_elsewhere"
    listed = {c["name"]: c["problem"] for c in json.loads(altx("list", "--json").stdout)["components"]}
    assert (listed["bad"], listed["average"]) == (reason, "")
    assert f"broken: {reason}" in " ".join(altx("list").stdout.split())
    plugins = {p["plugin"]: p for p in json.loads(altx("doctor", "--json").stdout)["plugins"]}
    assert plugins["altx-bad"]["errors"] == [f"mixer 'bad' of altx-bad 0.3: {reason}"]
    told(altx("compose", "--mixer", "bad", "--dim", 16, "--no-prove"))


def test_doctor_asks_every_component_for_what_it_promises(altx, bad) -> None:
    bad(capabilities="return {'causal': True}")
    report = json.loads(altx("doctor", "--json").stdout)
    plugins = {p["plugin"]: p for p in report["plugins"]}
    assert plugins["altx-toy"]["errors"] == []
    assert "its capabilities are a dict, not altx Capabilities" in plugins["altx-bad"]["errors"][0]
    assert "tell its authors" in plugins["altx-bad"]["remedy"]


def test_the_traceback_is_there_for_who_asks(altx, bad, monkeypatch) -> None:
    bad(forward="raise KeyError('boom')")
    monkeypatch.setenv("ALTX_DEBUG", "1")
    result = altx("compose", "--mixer", "bad", "--dim", 16, "--layers", 1, "--no-prove")
    assert "bad_plugin.py" in result.stderr and "Traceback" in result.stderr
    assert "error: mixer 'bad' of altx-bad 0.3 failed: KeyError: 'boom'" in result.stderr


def test_an_error_that_a_user_can_mend_is_told_with_the_component_that_raised_it(altx, bad) -> None:
    bad(forward="from altx.errors import AltxError; raise AltxError('the store is full', hint='empty it')")
    result = altx("compose", "--mixer", "bad", "--dim", 16, "--layers", 1, "--no-prove")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-3:] == [
        "error: the store is full", "  empty it", "  (raised in mixer 'bad' of altx-bad 0.3)"
    ]  # fmt: skip


@pytest.mark.parametrize("value", ["!!python/object/apply:os.system [x]", "&a [*a]", "9" * 5000, "0x_", "["])
def test_a_setting_on_the_command_line_is_plain_data_too(altx, value: str) -> None:
    result = altx("compose", "--mixer", "average", "--set", f"average.rate={value}")
    assert result.exit_code == 2 and "not valid YAML" in " ".join(result.stderr.split())
