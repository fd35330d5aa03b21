"""A C file as a library of functions."""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from altx_kernels.native import cache, compiler
from altx_kernels.native.recipe import Recipe
from altx_kernels.native.variants import choose
from altx_kernels.op import KernelError

TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}
SUFFIXES = {torch.float32: "_f32", torch.float64: "_f64"}

_lock = threading.Lock()


def _renew_lock() -> None:
    """In a child process nobody is left to release a lock that another thread of its parent held."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class Library:
    """The functions of one C file, found or compiled when first needed.

    The variables ALTX_NATIVE, ALTX_CACHE and CC count as they are at that time.

    Args:
        source: the C file.
        functions: parameters of each function as letters: p pointer, i int64_t, d double.
    """

    def __init__(self, source: Path, functions: Mapping[str, str]) -> None:
        self.source = source
        self.functions = functions
        self.path: Path | None = None  # where the library lies, once it is loaded; None if it could not be kept
        self._loaded: dict[tuple[str, torch.dtype], Any] | None = None
        self._problem: str | None = None

        def problem() -> str | None:
            if self._loaded is None:
                self._load()
            return self._problem

        # A compiled graph knows it as a constant. This is all that torch.compiler.assume_constant_result does, but
        # for the second that it takes to import the compiler.
        problem._dynamo_marked_constant = True  # type: ignore[attr-defined]
        self.problem: Callable[[], str | None] = problem

    def call(self, function: str, dtype: torch.dtype, *args: Tensor | int | float | None) -> None:
        """Call a function's float or double form with contiguous tensors (None is a null pointer) and numbers.

        Raises:
            KernelError: if there is a problem.
        """
        loaded = self._loaded or self._load()
        if self._problem:
            raise KernelError(f"{self.source} cannot be used: {self._problem}")
        loaded[function, dtype](*[a.data_ptr() if isinstance(a, Tensor) else a for a in args])

    def _load(self) -> dict[tuple[str, torch.dtype], Any]:
        with _lock:
            if self._loaded is not None:
                return self._loaded
            loaded: dict[tuple[str, torch.dtype], Any] = {}
            try:
                library = self._open()
            except KernelError as error:
                self._problem = "; ".join(filter(None, (error.what, error.hint)))
            except OSError as error:
                self._problem = f"{self.source} cannot be read or compiled: {error}"
            else:
                for name, letters in self.functions.items():
                    for dtype, suffix in SUFFIXES.items():
                        function = getattr(library, name + suffix)
                        function.argtypes, function.restype = [TYPES[letter] for letter in letters], None
                        loaded[name, dtype] = function
            self._loaded = loaded
            return loaded

    def _open(self) -> ctypes.CDLL:
        """The library that came with the source, else the one in the cache, else one compiled now."""
        recipe = Recipe.read(self.source, choose())
        if recipe.prebuilt.is_file() and (library := self._try(recipe.prebuilt)):
            return library
        folder, found = cache.folder(), compiler.find()
        if folder is not None:
            # A cache filled where there is a compiler serves where there is none, such as a cluster's nodes.
            for path in sorted(folder.glob(_name(recipe, found))):
                if cache.intact(path) and (library := self._try(path)):
                    return library
        # The file is loaded before it is stored: what cannot be loaded is not kept, and what cannot be kept serves.
        with cache.workplace(folder) as temporary:
            path, library = compiler.build(recipe, compiler.need(), Path(temporary))
            if folder is not None and cache.store(folder / _name(recipe, found), path.read_bytes()):
                self.path = folder / _name(recipe, found)
        return library

    def _try(self, path: Path) -> ctypes.CDLL | None:
        """A library that was found, unless it was made for another system."""
        try:
            library = ctypes.CDLL(str(path))
        except OSError:
            return None
        self.path = path
        return library


def _name(recipe: Recipe, made_by: compiler.Compiler | None) -> str:
    """What a library is called in the cache; without a compiler, a pattern for those of any."""
    digest = hashlib.sha256(repr(made_by).encode()).hexdigest()[:8] if made_by else "*"
    return f"{recipe.source.parent.name}-{recipe.source.stem}.{recipe.variant.name}.{recipe.key}.{digest}.so"
