"""Completion in bash, zsh and fish: names of components, quickly, and never a word of what is wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from altx_cli import options

ALTX = [sys.executable, "-c", "from altx_cli.main import main; main()"]
MODULES = "import sys; from altx_cli.main import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"


def complete(line: str, shell: str = "bash", **environment: str) -> list[str]:
    """What `altx` offers at the end of a line, as the shell's script asks for it."""
    ask = {
        "bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
        "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    env = {**os.environ, "_ALTX_COMPLETE": f"complete_{shell}", **ask, **environment}
    done = subprocess.run([sys.executable, "-c", MODULES], env=env, capture_output=True, text=True, check=True)
    *words, modules = done.stderr.splitlines()
    assert not words, "nothing but what completes the line"
    assert not {"torch", "numpy"} & set(modules.split())
    return done.stdout.split("\n")[:-1] if done.stdout.strip() else []


@pytest.mark.parametrize(
    "line, found",
    [
        ("altx show swi", {"swiglu", "switch"}),
        ("altx compose --mixer 3*mamba,atten", {"3*mamba,attention"}),
        ("altx compose --router top", {"topk"}),
        ("altx compose --attach res", {"residual"}),
        ("altx list --kind feed", {"feed-forward"}),
        ("altx kernels ver", {"verify"}),
        ("altx uninstall altx-nt", {"altx-ntm"}),
        ("altx uninstall nt", {"ntm"}),
        ("altx tra", {"train"}),
    ],
)
def test_bash(line, found):
    assert set(complete(line)) == found


def test_zsh_and_fish_say_what_a_component_is():
    assert "swiglu\tGated feed-forward, the usual choice beside attention" in complete("altx show swi", "fish")
    assert '"swiglu":"Gated feed-forward, the usual choice beside attention"' in "".join(
        complete("altx show swi", "zsh")
    )


def test_what_is_wrong_with_the_plugins_is_no_matter_of_completion():
    assert complete("altx show swi", ALTX_PLUGINS="missing") == []


def test_a_plugin_that_prints_does_not_disturb(altx, install, monkeypatch):
    install("altx-loud", "altx.plugins", "loud = loud_module", "loud_module", "print('I am here')")
    monkeypatch.setenv("ALTX_PLUGINS", "toy,loud")
    assert options.complete("mixer")("av") == [("average", "A moving average")]


def test_a_name_of_two_plugins_is_completed_with_its_package(altx, install, monkeypatch):
    twin = (
        "from altx import MixerSpec, hookimpl\n@hookimpl\ndef altx_token_mixers():\n"
        "    return [MixerSpec('average', summary='s', build='cli_toy:build', config='cli_toy:AverageConfig',\n"
        "                      capabilities='cli_toy:capabilities')]\n"
    )
    install("altx-twin", "altx.plugins", "twin = twin_module", "twin_module", twin)
    monkeypatch.setenv("ALTX_PLUGINS", "toy,twin")
    found = {name for name, _ in options.complete("mixer")("altx-t")}
    assert found == {"altx-toy:average", "altx-twin:average"}


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_the_script_for_bash_works_in_bash(tmp_path):
    altx = tmp_path / "altx"
    altx.write_text(f'#!/bin/sh\nexec {sys.executable} -m altx_cli "$@"\n')
    altx.chmod(0o755)
    script = (
        'eval "$(_ALTX_COMPLETE=source_bash altx)"; COMP_WORDS=(altx compose --mixer mam); COMP_CWORD=3; '
        '_altx_completion altx; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "--norc", "-c", script], env=env, capture_output=True, text=True, check=True)
    assert {"mamba", "mamba2"} <= set(done.stdout.split())
