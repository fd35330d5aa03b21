"""The documentation agrees with the code."""

from __future__ import annotations

import ast
import importlib
import itertools
import os
import re
import subprocess
import sys
import textwrap
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from altx import hookspecs
from altx.compose import compose
from altx.context import Context
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


GUIDE = (ROOT / "core/src/altx/guide.md").read_text().partition("## The laws, one by one")[0]
FILE = re.compile(r"`(altx_\w+)/([\w/]+\.(?:py|c))`(?:, `(\w+)`)?:\n\n```\w+\n(.*?)```", re.DOTALL)
SECTIONS = [section for section in GUIDE.split("\n## ")[1:] if FILE.search(section)]
REFERENCE = re.compile(r"`tests/test_reference\.py`:\n\n```python\n(.*?)```", re.DOTALL)
KERNELS = next(number for number, section in enumerate(SECTIONS) if section.startswith("Its own kernels"))
WRAPPERS = re.findall(r"```python\n(.*?)```", GUIDE.partition("## Wrapping what exists")[2], re.DOTALL)


def write(folder: Path, number: int) -> tuple[str, str]:
    """Write a section's files over those of the sections before it, and what they are compared with as `reference.py`.

    Returns:
        The name of the package that they are, and that of the component.
    """
    (package, *_), *_ = FILE.findall(SECTIONS[number])
    own = f"{package}_{number}"
    for section in SECTIONS[: number + 1]:
        for name, file, function, text in FILE.findall(section):
            if name == package:
                path, text = folder / own / file, text.replace(package, own)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(replaced(path.read_text(), function, text) if function else text)
                for reference in REFERENCE.findall(section):
                    (folder / own / "reference.py").write_text(reference.replace(package, own))
    return own, package.removeprefix("altx_")


def replaced(text: str, function: str, new: str) -> str:
    """A file with another function of that name, and the imports before it."""
    imports, definition = re.split(r"^(?=def )", new, maxsplit=1, flags=re.MULTILINE)
    (old,) = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef) and n.name == function)
    lines = text.splitlines(keepends=True)
    lines[old.lineno - 1 : old.end_lineno] = [textwrap.indent(definition, " " * old.col_offset)]
    return imports + "".join(lines)


# The kernels have a process of their own: an op stays for the life of one.
@pytest.mark.parametrize("number", {*range(len(SECTIONS))} - {KERNELS}, ids=lambda n: SECTIONS[n].partition("\n")[0])
def test_what_the_guide_writes_passes_every_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    own, name = write(tmp_path, number)
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = Registry([EntryPoint("guide", f"{own}.plugin", GROUP)])
    results = check_component(name, plugins=plugins)
    assert [f"{r.subject} {r.check}: {r.message}" for r in results if r.status == "failed"] == []
    assert sum(r.status == "passed" for r in results) > 15
    monkeypatch.setattr("altx.registry.default", lambda: plugins)
    (test,) = (f for n, f in vars(importlib.import_module(f"{own}.reference")).items() if n.startswith("test_"))
    test()


def test_the_mixer_of_the_guide_reads_packed_sequences_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, name = write(tmp_path, KERNELS - 1)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = compose({"mixer": name, "dim": 16}, plugins=Registry([EntryPoint("guide", f"{own}.plugin", GROUP)]))
    assert model.capabilities.packing and "Unpack" not in repr(model)
    tokens, cu = torch.arange(9)[None], torch.tensor([0, 4, 4, 9])
    out = model(tokens, Context(cu_seqlens=cu), model.init_state(3))
    assert out.state.tokens.tolist() == [4, 0, 5]
    for row, (start, stop) in enumerate(itertools.pairwise(cu.tolist())):
        alone = model(tokens[:, start:stop], state=model.init_state(1))
        torch.testing.assert_close(out.y[:, start:stop], alone.y)
        for name, leaf in out.state.select(torch.tensor([row])).flat().items():
            torch.testing.assert_close(leaf, alone.state.flat()[name])


USED = """
import importlib
import torch
from altx.context import Context
from altx_kernels import record
from altx_kernels.verify import verify
OWN, LOOP, BACKEND, DTYPE = {own!r}, {loop!r}, {backend!r}, {dtype}

for finding in verify(importlib.import_module(OWN + ".leaky_sum").leaky_sum, devices=["cpu"]):
    print(finding.backend, finding.dtype, finding.status, finding.calls)
    assert finding.status != "failed", finding

def built(package, dtype):
    torch.manual_seed(0)
    config = importlib.import_module(package + ".config").LeakyConfig()
    return importlib.import_module(package + ".mixer").Leaky(config, 8).to(dtype)

layer, loop = built(OWN, DTYPE), built(LOOP, torch.float64)
x = torch.randn(3, 14, 8, dtype=torch.float64)
mask, reset = torch.rand(3, 14) < 0.7, torch.rand(3, 14) < 0.3
packed = Context(cu_seqlens=torch.tensor([0, 5, 5, 6, 14]), reset=reset[:1])
nothing = Context(cu_seqlens=torch.tensor([0]))
padded = Context(mask=mask, reset=reset)
for x, ctx, rows in ((x, Context(), 3), (x, padded, 3), (x[:1], packed, 4), (x[:1, :0], nothing, 0)):
    found, wanted = layer.init_state(rows), loop.init_state(rows)
    for _ in range(2):
        with torch.no_grad(), record() as choices:
            one, other = layer(x.to(DTYPE), ctx, found), loop(x, ctx, wanted)
        found, wanted = one.state, other.state
        assert [choice.backend for choice in choices] == [BACKEND], choices
        for a, b in ((one.y, other.y), (found["h"], wanted["h"]), (found.seen, wanted.seen)):
            torch.testing.assert_close(a.to(b.dtype), b, rtol=0, atol={tolerance})
"""
CHECKED = """
from importlib.metadata import EntryPoint
from altx import registry
from altx.testing import check_component
plugins = registry.Registry([EntryPoint("guide", OWN + ".plugin", registry.GROUP)])
registry.default = lambda: plugins
importlib.import_module(OWN + ".reference").test_it_is_its_equations()
results = check_component("leaky")
assert [f"{r.subject} {r.check}: {r.message}" for r in results if r.status == "failed"] == []
assert {r.check for r in results if r.status == "passed"} >= {"packing", "padding", "reset", "gradcheck", "compiled"}
"""
COMPILED = """
import torch
from altx_kernels.gpu.compiling import SHARED, compiled, launches
from {own}.leaky_sum.triton import NODE, forward
for dtype in (torch.float32, torch.bfloat16):
    (launch,) = launches(lambda: forward(torch.zeros(2, 9, 768, dtype=dtype), torch.zeros(2, 9, dtype=dtype)))
    for capability in SHARED:
        assert compiled(launch, capability).spilled == 0
"""


@pytest.mark.parametrize("backend", ["native", "triton", "triton compiled"])
def test_the_kernels_that_the_guide_writes_are_right(tmp_path: Path, backend: str) -> None:
    loop, own = (write(tmp_path, number)[0] for number in (KERNELS - 1, KERNELS))
    if backend != "native":
        pytest.importorskip("triton")
    dtype, tolerance = ("torch.float64", 1e-12) if backend == "native" else ("torch.float32", 1e-5)
    code = COMPILED if backend == "triton compiled" else USED + CHECKED * (backend == "native")
    for name, value in {"own": own, "loop": loop, "backend": backend, "dtype": dtype, "tolerance": tolerance}.items():
        code = code.replace(f"{{{name}!r}}", repr(value)).replace(f"{{{name}}}", str(value))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": str(int(backend == "triton"))}
    environment |= {"TRITON_DEFAULT_FP_FUSION": "1"}  # what Triton 3.9 does by default, and warns about
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    if backend == "native" and "native  skipped" in done.stdout:
        pytest.skip("there is no C compiler")
    assert done.returncode == 0, done.stderr
    if backend != "triton compiled":
        assert f"{backend} float32 passed 30" in done.stdout


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
