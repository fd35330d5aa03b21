"""The documentation agrees with the code."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from altx import hookspecs
from altx.registry import GROUP, Registry
from altx.testing import check_component

ROOT = Path(__file__).parent.parent
HOOKS = [name for name in vars(hookspecs) if name.startswith("altx_")]


def signatures() -> dict[str, str]:
    """Each hook's signature as it stands in the source."""
    tree = ast.parse(Path(hookspecs.__file__).read_text())
    return {
        node.name: f"def {node.name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.returns
    }


def test_every_hook_is_documented_with_its_exact_signature() -> None:
    page = (ROOT / "docs/hooks.md").read_text()
    assert sorted(signatures()) == sorted(HOOKS)
    for name, signature in signatures().items():
        assert f"```python\n{signature}\n```" in page, f"docs/hooks.md does not document {name} as {signature}"


def test_every_hook_says_when_it_is_called_and_what_it_returns() -> None:
    for name in HOOKS:
        text = getattr(hookspecs, name).__doc__
        assert "When:" in text and "Returns:" in text, name


def test_every_hook_is_tested() -> None:
    from altx.registry import KINDS

    # core/tests/test_registry.py runs test_every_hook_is_collected over KINDS, core/tests/test_kinds.py the other.
    assert sorted(["altx_kinds", *(kind.hook for kind in KINDS)]) == sorted(HOOKS)
    assert '"kind", KINDS' in (ROOT / "core/tests/test_registry.py").read_text()


def test_links_in_the_documentation_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("plugins/*/README.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_the_readmes_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_the_readmes_commands_exist() -> None:
    from altx_cli.main import COMMANDS

    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"(?:`|^    |\$ )altx ([a-z]+)", text, re.MULTILINE)) <= {*COMMANDS, "train"}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^    make ([a-z]+)", text, re.MULTILINE)) <= targets


def test_the_page_on_the_command_line_agrees_with_it() -> None:
    from altx_cli.commands.doctor import VARIABLES
    from altx_cli.main import COMMANDS, STATUSES

    page = (ROOT / "docs/cli.md").read_text()
    assert set(re.findall(r"(?:^    |`|; )altx ([a-z]+)", page, re.MULTILINE)) - {"train"} == set(COMMANDS)
    told = re.findall(r"^  (\d+) +(.*(?:\n {7}.*)*)", STATUSES, re.MULTILINE)
    assert re.findall(r"^\| (\d+) \| (.*) \|$", page, re.MULTILINE) == [(n, " ".join(w.split())) for n, w in told]
    read = (ROOT / "tests/api.txt").read_text().partition("# Environment variables\n")[2].split("\n\n")[0].split()
    assert sorted(re.findall(r"^\| `(ALTX_\w+)`", page, re.MULTILINE)) == sorted(VARIABLES) == read


def test_the_kind_that_a_package_adds_is_found_and_listed(tmp_path: Path) -> None:
    page = (ROOT / "docs/hooks.md").read_text().partition("## Kinds of your own")[2]
    files = dict(re.findall(r"`(altx_\w+/\w+\.py)`[^`]*:\n\n```python\n(.*?)```", page, re.DOTALL))
    use = re.findall(r"```python\n(from altx import registry\n.*?)```", page, re.DOTALL)
    assert len(files) == 4 and len(use) == 1
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for name in ("suites", "sums"):
        info = tmp_path / f"altx_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: altx-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[altx.plugins]\n{name} = altx_{name}.plugin\n")

    def run(*args: str) -> str:
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("-c", use[0] + "print(prompts['2+3='], suite)") == "5 suite 'sums' of altx-sums 1.0\n"
    listed = run("-m", "altx_cli", "list", "--kind", "suite").splitlines()
    assert [line.split(maxsplit=4) for line in listed[1:]] == [
        ["suite", "sums", "altx-sums", "1.0", "Sums of two digits"]
    ]
    shown = run("-m", "altx_cli", "show", "sums")
    assert shown.startswith("sums  suite of altx-sums 1.0\n") and "metric  accuracy" in shown


VERIFY = """
from altx_kernels.verify import verify
from my_plugin.leaky_sum import leaky_sum
for finding in verify(leaky_sum, devices=["cpu"]):
    print(finding.backend, finding.dtype, finding.status, finding.calls)
    assert finding.status != "failed", finding
"""


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_the_op_that_a_plugin_ships_is_right(tmp_path: Path, backend: str) -> None:
    page = (ROOT / "docs/kernels.md").read_text()
    files = dict(re.findall(r"`(leaky_sum/[\w.]+)`:\n\n```\w+\n(.*?)```", page, re.DOTALL))
    assert len(files) == 6
    (tmp_path / "my_plugin/leaky_sum").mkdir(parents=True)
    (tmp_path / "my_plugin/__init__.py").touch()
    for name, text in files.items():
        (tmp_path / "my_plugin" / name).write_text(text)
    if backend == "triton":
        pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": str(int(backend == "triton"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", VERIFY], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if backend == "native" and "native  skipped" in done.stdout:
        pytest.skip("there is no C compiler")
    assert f"{backend} float32 passed 30" in done.stdout


GUIDE = (ROOT / "core/src/altx/guide.md").read_text().partition("## The laws, one by one")[0]
FILE = re.compile(r"`(altx_\w+)/(\w+\.py)`:\n\n```python\n(.*?)```", re.DOTALL)
SECTIONS = [section for section in GUIDE.split("\n## ")[1:] if FILE.search(section)]
WRAPPERS = re.findall(r"```python\n(.*?)```", GUIDE.partition("## Wrapping what exists")[2], re.DOTALL)


@pytest.mark.parametrize("number", range(len(SECTIONS)), ids=[text.partition("\n")[0] for text in SECTIONS])
def test_what_the_guide_writes_passes_every_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A section's files, over those of the sections before it, are a plugin."""
    (package, *_), *_ = FILE.findall(SECTIONS[number])
    own = f"{package}_{number}"
    (tmp_path / own).mkdir()
    for section in SECTIONS[: number + 1]:
        for name, file, text in FILE.findall(section):
            if name == package:
                (tmp_path / own / file).write_text(text.replace(package, own))
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = Registry([EntryPoint("guide", f"{own}.plugin", GROUP)])
    results = check_component(package.removeprefix("altx_"), plugins=plugins)
    assert [f"{r.subject} {r.check}: {r.message}" for r in results if r.status == "failed"] == []
    assert sum(r.status == "passed" for r in results) > 15


@pytest.mark.parametrize("code", WRAPPERS, ids=["state", "no state", "in-place cache", "chunks"])
def test_what_the_guide_wraps_passes_every_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    own = f"altx_wraps_{WRAPPERS.index(code)}"
    name = re.findall(r"class (\w+)\(Wrapped\)", code)[0]
    (tmp_path / own).mkdir()
    (tmp_path / own / "mixer.py").write_text(code + f"\n\ndef build(config, ctx):\n    return {name}(ctx.dim)\n")
    promises = re.search(r"Capabilities\(.*\)", code)
    assert promises
    (tmp_path / own / "config.py").write_text(
        f"from altx.capabilities import Capabilities\n\n\ndef capabilities(config):\n    return {promises[0]}\n"
    )
    spec = f"MixerSpec('wraps', 'x', '{own}.mixer:build', 'altx.config:Config', '{own}.config:capabilities')"
    (tmp_path / own / "plugin.py").write_text(
        f"from altx import MixerSpec, hookimpl\n\n\n@hookimpl\ndef altx_token_mixers():\n    return [{spec}]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    results = check_component("wraps", plugins=Registry([EntryPoint("wraps", f"{own}.plugin", GROUP)]))
    assert [f"{r.subject} {r.check}: {r.message}" for r in results if r.status == "failed"] == []
    passed = {r.check for r in results if r.status == "passed"}
    assert passed >= {"padding", "reset", "packing", "steps", "select", "gradcheck", "initialisation", "meta-build"}
