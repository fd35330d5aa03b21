"""A C file as a library of functions."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}
SUFFIXES = {torch.float32: "_f32", torch.float64: "_f64"}


class Library:
    """The functions of one C file, built or found when first needed.

    Args:
        source: the C file.
        functions: parameters of each function as letters: p pointer, i int64_t, d double.
    """

    def __init__(self, source: Path, functions: Mapping[str, str]) -> None:
        self.source = source
        self.functions = functions
        self._loaded: dict[str, Any] | None = None
        self._problem: str | None = None

        @torch.compiler.assume_constant_result  # a compiled graph knows it as a constant
        def problem() -> str | None:
            self._load()
            return self._problem

        self.problem: Callable[[], str | None] = problem

    def call(self, function: str, dtype: torch.dtype, *args: Tensor | int | float | None) -> None:
        """Call a function's float or double form with contiguous tensors (None is a null pointer) and numbers."""
        loaded = self._load()
        loaded[function + SUFFIXES[dtype]](*[a.data_ptr() if isinstance(a, Tensor) else a for a in args])

    def _load(self) -> dict[str, Any]:
        if self._loaded is None:
            folder = Path(tempfile.mkdtemp())
            objects = []
            for flag in ("ALTX_FLOAT", "ALTX_DOUBLE"):
                objects.append(folder / f"{flag}.o")
                subprocess.run(
                    ["cc", "-std=gnu11", "-O3", "-march=x86-64-v4", "-fPIC", "-fopenmp", "-fvisibility=hidden",
                     f"-I{Path(__file__).parent}", f"-D{flag}", "-c", self.source, "-o", objects[-1]],
                    check=True,
                )  # fmt: skip
            subprocess.run(["cc", "-shared", *objects, "-o", folder / "library.so", "-lm"], check=True)
            library = ctypes.CDLL(str(folder / "library.so"))
            self._loaded = {}
            for name, letters in self.functions.items():
                for suffix in SUFFIXES.values():
                    function = getattr(library, name + suffix)
                    function.argtypes, function.restype = [TYPES[letter] for letter in letters], None
                    self._loaded[name + suffix] = function
        return self._loaded
