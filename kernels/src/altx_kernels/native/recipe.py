"""What a library is made from, and the key that changes with any of it."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from altx_kernels.native.variants import Variant

ABI = 1
"""Changes when the way in which Library calls functions does."""

FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fvisibility=hidden", "-fopenmp")
HEADERS = Path(__file__).parent
INCLUDE = re.compile(rb'^\s*#\s*include\s*"([^"/\\]+)"', re.MULTILINE)


@dataclass(frozen=True)
class Recipe:
    """A C file and its headers, as they were read, to be compiled for one variant.

    Args:
        source: where the C file lies.
        variant: what to compile it for.
        texts: the C file and every header that it includes, beside it or altx.h, by name.
    """

    source: Path
    variant: Variant
    texts: Mapping[str, bytes]

    @classmethod
    def read(cls, source: Path, variant: Variant) -> Recipe:
        """Read a C file and the headers that it includes."""
        texts = {source.name: source.read_bytes()}
        unseen = [source.name]
        while unseen:
            for found in INCLUDE.findall(texts[unseen.pop()]):
                name = found.decode()
                path = next((p for p in (source.with_name(name), HEADERS / name) if p.is_file()), None)
                if path and name not in texts:
                    texts[name] = path.read_bytes()
                    unseen.append(name)
        return cls(source, variant, texts)

    @property
    def flags(self) -> tuple[str, ...]:
        """What the compiler is told."""
        return (*FLAGS, *self.variant.flags)

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits of all that the library depends on, but for the compiler."""
        parts = [str(ABI), sys.platform, self.variant.name, *self.flags]
        data = [part.encode() for part in parts]
        for name, text in sorted(self.texts.items()):
            data += [name.encode(), text]
        digest = hashlib.sha256()
        for item in data:
            digest.update(len(item).to_bytes(8, "big") + item)
        return digest.hexdigest()[:16]

    @property
    def prebuilt(self) -> Path:
        """Where a platform wheel has the library: beside its source."""
        return self.source.with_name(f"{self.source.stem}.{self.variant.name}.{self.key}.so")
