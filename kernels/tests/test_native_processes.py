"""What needs a process of its own: two at once, a child, torch's threads, and wheels with compiled kernels."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from altx_kernels import KernelError
from altx_kernels.native import compiler, prebuild, variants

SOURCE = """
#include "altx.h"

EXPORT void FN(count)(int64_t n, int64_t *threads) {
#pragma omp parallel num_threads(n)
    if (omp_get_thread_num() == 0) *threads = omp_get_num_threads();
}
"""
MODULE = """
from pathlib import Path
from altx_kernels.native import Library
LIBRARY = Library(Path(__file__).with_name("native.c"), {"count": "ip"})
"""
PURE = "toy-1.0-py3-none-any.whl"

pytestmark = pytest.mark.skipif(compiler.find() is None, reason="there is no C compiler")


@pytest.fixture
def package(tmp_path):
    """A package `toy` with a C file."""
    folder = tmp_path / "site" / "toy"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(MODULE)
    (folder / "native.c").write_text(SOURCE)
    return folder


def start(code: str, path: Path, **variables: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("ALTX_NATIVE", "CC")}
    environment |= {"PYTHONPATH": str(path), **variables}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code], env=environment, cwd=path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def output(process: subprocess.Popen[str]) -> str:
    try:
        out, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return out.strip()


def test_two_processes_that_compile_at_once_both_work_and_keep_one_file(package, tmp_path):
    # This compiler links only when both processes have come so far, or after a minute.
    both = f"[ $(wc -l <{tmp_path}/linking) = 2 ] || [ $((n += 1)) = 600 ]"
    wait = f"n=0; echo >>{tmp_path}/linking; until {both}; do sleep 0.1; done"
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *-shared*native.so*) {wait};; esac\nexec {compiler.find().name} "$@"\n'
    )
    wrapper.chmod(0o755)
    code = "import toy; print(toy.LIBRARY.problem(), toy.LIBRARY.path)"
    variables = {"CC": str(wrapper), "ALTX_CACHE": str(tmp_path / "cache")}
    racers = [start(code, package.parent, **variables) for _ in range(2)]
    answers = [output(racer) for racer in racers]
    [kept] = (tmp_path / "cache" / "native").iterdir()
    assert answers == [f"None {kept}"] * 2


def test_threads_are_torchs_own(package, tmp_path):
    code = """
import toy, torch
threads = torch.zeros(1, dtype=torch.int64)
toy.LIBRARY.call("count", torch.float32, torch.get_num_threads(), threads)
torch.randn(1000, 1000) @ torch.randn(1000, 1000)
maps = open("/proc/self/maps").read().split() if __import__("sys").platform == "linux" else []
print(int(threads), len({name for name in maps if "gomp" in name or "omp5" in name}))
"""
    process = start(code, package.parent, ALTX_CACHE=str(tmp_path / "cache"), OMP_NUM_THREADS="2")
    assert output(process) == ("2 1" if sys.platform == "linux" else "1 0")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_does_not_wait_for_a_thread_that_it_does_not_have(package, tmp_path):
    code = """
import os, threading, toy
from altx_kernels.native import library
holding, done = threading.Event(), threading.Event()
def hold():
    with library._lock:
        holding.set()
        done.wait()
threading.Thread(target=hold).start()
holding.wait()
child = os.fork()
if not child:
    os._exit(toy.LIBRARY.problem() is not None)
status = os.waitpid(child, 0)[1]
done.set()
print(status)
"""
    assert output(start(code, package.parent, ALTX_CACHE=str(tmp_path / "cache"))) == "0"


# Wheels with compiled kernels


def pack(path: Path, files: dict[str, bytes]) -> Path:
    """A pure wheel `toy` of the given files."""
    info = "toy-1.0.dist-info"
    files |= {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    table = io.StringIO()
    csv.writer(table).writerows([[name, f"sha256={digest(files[name])}", len(files[name])] for name in files])
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**files, f"{info}/RECORD": table.getvalue() + f"{info}/RECORD,,\n"}.items():
            archive.writestr(name, content)
    return path


def digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")


def test_a_platform_wheel_works_without_a_compiler_and_without_a_cache(package, tmp_path):
    wheel = pack(tmp_path / PURE, {f"toy/{path.name}": path.read_bytes() for path in package.iterdir()})
    built = prebuild.prebuild(wheel, tmp_path)
    assert built.name == f"toy-1.0-py3-none-{prebuild.platform_tag()}.whl"
    with zipfile.ZipFile(built) as archive:
        record = list(csv.reader(io.StringIO(archive.read("toy-1.0.dist-info/RECORD").decode())))
        assert {name for name, *_ in record} == set(archive.namelist())
        assert all(hashed == f"sha256={digest(archive.read(name))}" for name, hashed, _ in record if hashed)
        libraries = [name.split(".")[1] for name in archive.namelist() if name.endswith(".so")]
        assert sorted(libraries) == sorted(variant.name for variant in variants.variants())
        metadata = archive.read("toy-1.0.dist-info/WHEEL").decode()
        assert "Root-Is-Purelib: false" in metadata
        assert f"Tag: py3-none-{prebuild.platform_tag()}\n" in metadata

    target = tmp_path / "target"
    install = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, built]
    subprocess.run([sys.executable, "-m", *install], check=True)
    (tmp_path / "file").write_text("")
    nothing = {"PATH": str(tmp_path / "empty"), "CC": "/nonexistent", "ALTX_CACHE": str(tmp_path / "file" / "below")}
    code = """
import torch, toy
from altx_kernels.native import compiler
threads = torch.zeros(1, dtype=torch.int64)
toy.LIBRARY.call("count", torch.float64, 1, threads)
print(compiler.find(), toy.LIBRARY.path, int(threads))
"""
    [library] = (target / "toy").glob(f"native.{variants.choose().name}.*.so")
    assert output(start(code, target, **nothing)) == f"None {library} 1"

    # What no longer fits the source is not used.
    (target / "toy" / "native.c").write_text(SOURCE + "\n")
    code = "import toy; print(toy.LIBRARY.problem())"
    assert "no C compiler found" in output(start(code, target, **nothing))


def test_a_wheel_without_c_files_stays_pure(tmp_path):
    wheel = pack(tmp_path / PURE, {"toy/__init__.py": b""})
    (tmp_path / "out").mkdir()
    built = prebuild.prebuild(wheel, tmp_path / "out")
    assert built == tmp_path / "out" / PURE
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(built) as new:
        assert sorted(old.namelist()) == sorted(new.namelist())
        assert old.read("toy-1.0.dist-info/WHEEL").split() == new.read("toy-1.0.dist-info/WHEEL").split()


@pytest.mark.parametrize(
    "name, reason",
    [("toy-1.0-py3-none-win32.whl", "is not a pure wheel"), ("toy-1.0-py3-none-any.whl", "unpack fails")],
)
def test_what_cannot_be_made_into_a_platform_wheel_is_an_error(name, reason, tmp_path):
    (tmp_path / name).write_text("")
    with pytest.raises(KernelError, match=reason):
        prebuild.prebuild(tmp_path / name, tmp_path)


def test_a_c_file_that_does_not_compile_stops_the_command(tmp_path):
    wheel = pack(tmp_path / PURE, {"toy/native.c": b"not C"})
    command = [sys.executable, "-m", "altx_kernels.native.prebuild", wheel, "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "cannot compile native.c: native.c:1:1: error" in done.stderr
    assert not list((tmp_path / "out").iterdir())
