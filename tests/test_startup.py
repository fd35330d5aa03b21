"""Start-up is a feature: help and list are quick, and never import what they do not need."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

RUN = "import sys; from altx_cli.main import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"


def run(*args: str) -> tuple[float, set[str], int]:
    """CPU seconds of `altx ARGS`, the modules it imported, and its exit status."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", RUN, *args], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, set(done.stderr.splitlines()[-1].split()), done.returncode


def best(*args: str) -> float:
    """The least CPU time of five runs; other load only ever adds to it."""
    return min(run(*args)[0] for _ in range(5))


HEAVY = {"torch", "numpy", "pydantic", "rich", "yaml"}


@pytest.mark.parametrize(
    "args, banned",
    [
        (["--help"], HEAVY),
        (["list"], {"torch", "numpy"}),
        (["show", "swiglu"], {"torch", "numpy"}),
        (["compose", "--help"], {"torch", "numpy", "rich"}),
        (["kernels", "verify", "--help"], {"torch", "numpy", "rich"}),
    ],
)
def test_modules_that_are_not_needed_are_not_imported(args, banned):
    _, modules, status = run(*args)
    assert status == 0
    assert not modules & banned


def test_a_mistake_is_reported_before_torch_is_imported():
    _, modules, status = run("compose", "--mixer", "no-such-mixer")
    assert status == 2
    assert "torch" not in modules


@pytest.mark.skipif("COVERAGE_PROCESS_START" in os.environ, reason="measuring coverage costs time")
@pytest.mark.parametrize("args, limit", [(["--help"], 0.150), (["list"], 0.300)])
def test_it_starts_quickly(args, limit):
    assert best(*args) < limit
