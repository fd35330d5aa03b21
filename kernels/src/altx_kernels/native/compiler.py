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
            command = (program, *arguments)
            # A name alone proves nothing: macOS has a cc that only asks for the real one to be installed.
            [(failed, version)] = _run([[*command, "--version"]], Path.cwd())
            if not failed and version.strip():
                return Compiler(command, version)
    return None


def build(recipe: Recipe, compiler: Compiler, folder: Path) -> tuple[Path, ctypes.CDLL]:
    """Compile a library into an empty folder, and load it.

    It is compiled with OpenMP but linked without, so that its threads are those of the library that torch has
    brought into the process, and no second one is. Where that cannot be had (clang names other functions, some
    compilers have no OpenMP), it is compiled without threads.

    Raises:
        KernelError: with the compiler's first error.
    """
    for name, text in recipe.texts.items():
        (folder / name).write_bytes(text)
    try:
        return _build(recipe, recipe.flags, compiler, folder, "threads")
    except KernelError:
        serial = [flag for flag in recipe.flags if flag != OPENMP]
        return _build(recipe, serial, compiler, folder, "serial")


def _build(
    recipe: Recipe, flags: Sequence[str], compiler: Compiler, folder: Path, name: str
) -> tuple[Path, ctypes.CDLL]:
    source, library = recipe.source.name, folder / f"{name}.so"
    command = [*compiler.command, *flags, "-c", source]
    forms = {"ALTX_FLOAT": f"{name}-float.o", "ALTX_DOUBLE": f"{name}-double.o"}
    _check(compiler, source, [[*command, f"-D{form}", "-o", out] for form, out in forms.items()], folder)
    _check(compiler, source, [[*compiler.command, "-shared", *forms.values(), "-o", library.name, "-lm"]], folder)
    try:
        return library, ctypes.CDLL(str(library))
    except OSError as error:
        raise KernelError(f"what {compiler.name} made of {recipe.source} cannot be loaded: {error}") from None


def _check(compiler: Compiler, source: str, commands: Sequence[Sequence[str]], folder: Path) -> None:
    """Raises KernelError if a command fails, with the first error that it reports."""
    for failed, text in _run(commands, folder):
        if failed:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            first = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no message")
            raise KernelError(f"{compiler.name} cannot compile {source}: {first}")


def _run(commands: Sequence[Sequence[str]], folder: Path) -> list[tuple[bool, str]]:
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
