"""What a model's bits per byte are measured against: the same bytes under an order-0 code and two compressors."""

from __future__ import annotations

import gzip
import lzma
import math
from collections import Counter


def order0(data: bytes) -> float:
    """Entropy of the byte frequencies, in bits per byte: the best a code can do that sees no context."""
    return sum(-n / len(data) * math.log2(n / len(data)) for n in Counter(data).values())


def baselines(data: bytes) -> dict[str, float]:
    """Bits per byte by name."""
    return {
        "order-0 entropy": order0(data),
        "gzip -9": 8 * len(gzip.compress(data, 9, mtime=0)) / len(data),
        "xz -9e": 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data),
    }
