"""`altx list`, `show` and `doctor`."""

from __future__ import annotations

import json
import os
import sys


def test_list_names_every_component_with_its_plugin(altx):
    result = altx("list")
    assert result.exit_code == 0
    rows = [line.split(maxsplit=4) for line in result.stdout.splitlines()]
    assert rows[0][:3] == ["KIND", "NAME", "PLUGIN"]
    assert ["mixer", "average", "altx-toy", "1.0", "A moving average"] in rows


def test_list_of_one_kind(altx):
    report = json.loads(altx("list", "--kind", "memory", "--json").stdout)
    assert [component["qualified"] for component in report["components"]] == ["altx-toy:both"]
    assert altx("list", "--kind", "feed_forward").exit_code == 0
    assert altx("list", "--kind", "router").stdout.startswith("no router is installed")


def test_list_of_an_unknown_kind_names_the_kinds(altx):
    result = altx("list", "--kind", "engine")
    assert result.exit_code == 2
    assert "mixer, feed-forward, memory, router" in result.stderr


def test_list_puts_broken_and_disabled_plugins_last_with_the_reason(altx, install, monkeypatch):
    install("altx-bad", "altx.plugins", "bad = bad_module", "bad_module", "import nowhere_to_be_found", version="3.1")
    install("altx-idle", "altx.plugins", "idle = idle_module", "idle_module", "")
    monkeypatch.setenv("ALTX_PLUGINS", "toy,bad")
    result = altx("list")
    assert result.exit_code == 0
    usable, _, rest = result.stdout.partition("not usable")
    assert "average" in usable
    lines = [line.split() for line in rest.splitlines()]
    assert ["altx-bad", "3.1", "broken", "ModuleNotFoundError:"] in [line[:4] for line in lines]
    assert ["altx-idle", "1.0", "disabled", "not", "named", "in", "ALTX_PLUGINS"] in lines


def test_list_marks_an_ambiguous_name(altx, install, monkeypatch):
    install("altx-twin", "altx.plugins", "twin = twin_module", "twin_module", TWIN)
    monkeypatch.setenv("ALTX_PLUGINS", "toy,twin")
    text = altx("list").stdout
    assert "altx-toy:average" in text
    assert "altx-twin:average" in text
    assert "'average' alone is ambiguous" in text
    result = altx("show", "average")
    assert result.exit_code == 2
    assert "write 'altx-toy:average' or 'altx-twin:average'" in result.stderr
    assert altx("show", "altx-twin:average").exit_code == 0


TWIN = """
from altx import MixerSpec, hookimpl

@hookimpl
def altx_token_mixers():
    config = "altx.feed_forward_config:MLPConfig"
    capabilities = "altx.feed_forward_config:capabilities"
    return [MixerSpec("average", summary="Another", build="x:y", config=config, capabilities=capabilities)]
"""


def test_show_tells_everything(altx):
    text = altx("show", "average").stdout
    for fact in ("mixer of altx-toy 1.0", "h <- a h + (1 - a) W x", "folklore", "Apache-2.0", "growth     constant"):
        assert fact in text
    assert "deaf     false    bool       break the law of gradients" in text
    assert "rate     0.5      float > 0  not used" in text


def test_show_says_how_a_memory_attaches(altx):
    text = altx("show", "both", "--kind", "memory").stdout
    assert "attaches as residual (default), gate\nThere is also gate." in text


def test_show_as_json(altx):
    report = json.loads(altx("show", "mlp", "--json").stdout)
    settings = {setting["name"]: setting for setting in report["settings"]}
    assert settings["activation"]["type"] == "gelu | relu | silu | relu2"
    assert settings["hidden"]["type"] == "int > 0 or none"
    assert report["capabilities"]["bidirectional"] is True


def test_a_name_of_several_kinds_asks_which(altx):
    result = altx("show", "both")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: 'both' is the name of a mixer and of a memory\n  say which: --kind mixer or --kind memory\n"
    )


def test_show_of_an_unknown_name_suggests_one(altx):
    result = altx("show", "swigly")
    assert result.exit_code == 2
    assert "did you mean 'swiglu'?" in result.stderr


def test_doctor_reports_what_works_and_what_to_do_about_the_rest(altx, install, monkeypatch):
    install("altx-bad", "altx.plugins", "bad = bad_module", "bad_module", "import nowhere_to_be_found")
    install("altx-slow", "altx.plugins", "slow = slow_module", "slow_module", "import torch")
    install("altx-idle", "altx.plugins", "idle = idle_module", "idle_module", "import time; time.sleep(0.06)")
    monkeypatch.setenv("ALTX_PLUGINS", "toy,bad,slow,idle")
    monkeypatch.setenv("PYTHONPATH", sys.path[0])
    report = json.loads(altx("doctor", "--json").stdout)
    plugins = {plugin["plugin"]: plugin for plugin in report["plugins"]}
    assert plugins["altx-toy"]["status"] == "ok"
    assert plugins["altx-bad"]["status"] == "broken"
    assert "pip install --force-reinstall altx-bad" in plugins["altx-bad"]["remedy"]
    assert plugins["altx-slow"]["heavy"][0] == "torch" and plugins["altx-slow"]["import_ms"] > 100
    told = altx("doctor").stdout.splitlines()
    assert any(line.startswith("altx-slow 1.0") and "imports torch" in line for line in told)
    assert any(line.startswith("altx-idle 1.0") and line.endswith("ms  slows every command down") for line in told)
    assert plugins["altx-toy"]["heavy"] == [] and plugins["altx-toy"]["import_ms"] < plugins["altx-slow"]["import_ms"]
    assert report["environment"]["ALTX_PLUGINS"] == "toy,bad,slow,idle"
    assert report["torch"]["threads"] >= 1
    assert report["python"].startswith("3.")


def test_a_doctors_report_can_be_shown_to_strangers(altx, install, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ALTX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ALTX_TOKEN", "a-secret")
    monkeypatch.setenv("ALTX_PLUGIN", "toy")
    broken = f"open({str(tmp_path / 'missing')!r})"
    install("altx-bad", "altx.plugins", "bad = bad_module", "bad_module", broken)
    monkeypatch.setenv("ALTX_PLUGINS", "toy,bad")
    for text in (altx("doctor").stdout, altx("doctor", "--json").stdout):
        assert "a-secret" not in text and str(tmp_path) not in text
        assert "~/cache" in text and "~/missing" in text
        assert "is set, and not read by altx; ALTX_PLUGINS is" in text


def test_doctor_in_words(altx):
    result = altx("doctor")
    assert result.exit_code == 0
    for word in ("altx", "python", "cpu", "pluggy", "torch", "compiler", "ALTX_PLUGINS", "altx-toy 1.0"):
        assert word in result.stdout


def test_doctor_says_what_native_kernels_run_with_or_why_they_do_not(altx, monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    monkeypatch.setenv("ALTX_CACHE", str(cache))
    monkeypatch.delenv("ALTX_NATIVE", raising=False)
    native = json.loads(altx("doctor", "--json").stdout)["native"]
    assert native["problem"] is None and native["threads"] >= 1
    assert native["library"].startswith(native["cache"]["path"]) and native["cache"]["libraries"] == 1
    assert f"{cache / 'native'}: 1 compiled" in altx("doctor").stdout
    cache.chmod(0o777)
    assert f"refused: {cache}, where compiled kernels are kept, can be written to" in altx("doctor").stdout
    monkeypatch.setenv("ALTX_CACHE", str(tmp_path / "cache" / "native" / os.listdir(cache / "native")[0]))
    assert "cannot be written to; every process compiles anew" in altx("doctor").stdout
    monkeypatch.setenv("ALTX_NATIVE", "off")
    assert "not usable, kernels run in PyTorch: switched off by ALTX_NATIVE=off" in altx("doctor").stdout


def test_doctor_still_reports_when_plugins_cannot_be_read(altx, monkeypatch):
    monkeypatch.setenv("ALTX_PLUGINS", "missing")
    result = altx("doctor")
    assert result.exit_code == 0
    assert "plugins cannot be read: ALTX_PLUGINS names 'missing'" in result.stdout
