"""Everything works, slower, where there is no C compiler and nothing was compiled before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

REASONS = """
from altx_cli.ops import load_ops
ops, problems = load_ops()
assert not problems, problems
for op in ops.values():
    if "native" in op.backends:
        print(op.name, op.backends["native"].absent())
"""


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine without compilers."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "ALTX_"))}
    return {**kept, "PATH": str(tmp_path), "CC": "/nonexistent", "ALTX_CACHE": str(tmp_path / "cache")}


def test_every_op_says_what_is_missing(bare: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", REASONS], env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines
    assert all("no C compiler found (cc, gcc or clang); install one" in line for line in lines), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "tests",
    [
        ["plugins/altx-mamba/tests/test_mamba_conformance.py"],
        ["tests/test_hybrids.py::test_a_hybrid_trains_streams_and_is_restored", "-k", "ntm-residual"],  # every mixer
    ],
    ids=["promises", "training"],
)
def test_layers_keep_their_promises_and_models_train(tests: list[str], bare: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n0", *tests]
    done = subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert not Path(bare["ALTX_CACHE"]).exists()
