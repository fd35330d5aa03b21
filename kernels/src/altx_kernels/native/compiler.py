"""The machine's C compiler: which one it is, and a library built with it."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from altx_kernels.native.recipe import Recipe
from altx_kernels.op import KernelError

NAMES = ("cc", "gcc", "clang")
OPENMP = "-fopenmp"

THREADS = """
#include <omp.h>
void where(int *x) {
#pragma omp parallel num_threads(2)
    x[omp_get_thread_num()] = omp_get_num_threads();
}
"""


@dataclass(frozen=True)
class Compiler:
    """A C compiler.

    Args:
        command: its path, and arguments that $CC gives.
        version: all that it says about its version.
    """

    command: tuple[str, ...]
    version: str

    @property
    def name(self) -> str:
        """How it is called."""
        return " ".join(self.command)


def find() -> Compiler | None:
    """The C compiler: $CC if it can be run, else the first of cc, gcc and clang."""
    return _find(os.environ.get("CC", ""), os.environ.get("PATH", ""))


def need() -> Compiler:
    """The C compiler.

    Raises:
        KernelError: if there is none.
    """
    if (compiler := find()) is None:
        raise KernelError(
            "no C compiler found (cc, gcc or clang)",
            hint="install one (apt install gcc, xcode-select --install) or use a wheel with prebuilt kernels",
        )
    return compiler


@cache
def _find(cc: str, path: str) -> Compiler | None:
    try:
        wanted = shlex.split(cc)
    except ValueError:  # a quote that does not end
        wanted = []
    for name, *arguments in filter(None, (wanted, *([name] for name in NAMES))):
        if program := shutil.which(name, path=path):
            command = (os.path.abspath(program), *arguments)
            # A name alone proves nothing: macOS has a cc that only asks for the real one to be installed.
            [(failed, version)] = _run([[*command, "--version"]])
            if not failed and version.strip():
                return Compiler(command, version)
    return None


def build(recipe: Recipe, compiler: Compiler, folder: Path) -> tuple[Path, ctypes.CDLL]:
    """Compile a library into an empty folder, and load it.

    It is compiled with OpenMP but linked without, so that its threads are those of the library that torch has
    brought into the process, and no second one is. With a compiler for which that does not work (clang names other
    functions, some have no OpenMP), it is compiled without threads.

    Raises:
        KernelError: with the compiler's first error.
    """
    flags = recipe.flags if _has_threads(compiler, folder) else [flag for flag in recipe.flags if flag != OPENMP]
    for name, text in recipe.texts.items():
        (folder / name).write_bytes(text)
    return _build(recipe.source.name, flags, ("ALTX_FLOAT", "ALTX_DOUBLE"), compiler, folder)


def _has_threads(compiler: Compiler, folder: Path) -> bool:
    (folder / "threads.c").write_text(THREADS)
    try:
        _build("threads.c", (OPENMP, "-fPIC"), ("ALTX_PROBE",), compiler, folder)
    except KernelError:
        return False
    return True


def _build(
    source: str, flags: Sequence[str], forms: Sequence[str], compiler: Compiler, folder: Path
) -> tuple[Path, ctypes.CDLL]:
    """Compile a file in the forms that macros name, side by side, into one library, and load it."""
    command, library = [*compiler.command, *flags, "-c", source], Path(source).with_suffix(".so").name
    objects = [f"{form}.o" for form in forms]
    _check(source, compiler, [[*command, f"-D{f}", "-o", o] for f, o in zip(forms, objects, strict=True)], folder)
    _check(source, compiler, [[*compiler.command, "-shared", *objects, "-o", library, "-lm"]], folder)
    try:
        return folder / library, ctypes.CDLL(str(folder / library))
    except OSError as error:
        raise KernelError(f"what {compiler.name} made of {source} cannot be loaded: {error}") from None


def _check(source: str, compiler: Compiler, commands: Sequence[Sequence[str]], folder: Path) -> None:
    """Raises KernelError if a command fails, with the first error that it reports."""
    for failed, text in _run(commands, folder):
        if failed:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            first = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no message")
            raise KernelError(f"{compiler.name} cannot compile {source}: {first}")


def _run(commands: Sequence[Sequence[str]], folder: Path | None = None) -> list[tuple[bool, str]]:
    """Run commands side by side; for each, whether it failed, and all that it said."""
    results, running = [], []
    environment = {**os.environ, "LC_ALL": "C"}  # untranslated messages, in which errors can be found
    for command in commands:
        try:
            running.append(
                subprocess.Popen(
                    command, cwd=folder, env=environment, text=True, errors="replace",
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
        except OSError as error:
            results.append((True, str(error)))
    for process in running:
        text, _ = process.communicate()
        results.append((process.returncode != 0, text))
    return results
