"""Orthogonal random features: how they are drawn, and when again (Choromanski et al. 2020, section 2.4)."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import torch
from torch import Tensor, nn

FeatureNorm = Literal["gaussian", "constant"]


def draw(count: int, width: int, norm: FeatureNorm, generator: torch.Generator | None = None) -> Tensor:
    """Random features (F, d), in blocks of d orthogonal rows; each by itself is a Gaussian vector.

    Args:
        count: F.
        width: d.
        norm: of the rows: "gaussian", as of independent Gaussian vectors, or "constant", sqrt(d).
        generator: the source; default: torch's own. With one, the numbers are float64 and on the CPU.
    """
    options: dict[str, Any] = (
        {} if generator is None else {"generator": generator, "device": "cpu", "dtype": torch.float64}
    )
    blocks = []
    for start in range(0, count, width):
        q, r = torch.linalg.qr(torch.randn(width, width, **options))
        # The paper's Gram-Schmidt makes r's diagonal positive. Without that, directions are not uniform and the
        # estimate is biased (Mezzadri 2007, arXiv:math-ph/0609050).
        blocks.append((q * r.diagonal().sign())[:, : count - start].mT)
    directions = torch.cat(blocks)
    if norm == "constant":
        lengths = torch.full_like(directions[:, :1], width**0.5)
    else:
        lengths = torch.randn(count, width, **options).norm(dim=1, keepdim=True)
    return directions * lengths


class RandomFeatures(nn.Module):
    """The features W of all heads of a layer: a buffer, so that a checkpoint holds them.

    Args:
        count: F.
        width: d.
        norm: as for `draw`.
        seed, layer: what besides the step determines the features of a redraw.
    """

    projection_matrix: Tensor

    def __init__(self, count: int, width: int, *, norm: FeatureNorm, seed: int, layer: int) -> None:
        super().__init__()
        self.norm: FeatureNorm = norm
        self.seed, self.layer = seed, layer
        self.register_buffer("projection_matrix", draw(count, width, norm))

    @torch.no_grad()
    def redraw(self, step: int) -> None:
        """Replace the features by those of this step: the same for the same seed and layer, on any device."""
        key = f"performer {self.seed} {self.layer} {step}".encode()
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big"))
        count, width = self.projection_matrix.shape
        self.projection_matrix.copy_(draw(count, width, self.norm, generator))
