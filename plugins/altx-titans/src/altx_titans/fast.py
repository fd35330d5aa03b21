"""The small network whose weights are the memory: its gradient, written out, and what it reads as it learns.

    z = x W1 + b1,   o = z or gelu(z) W2 + b2,   y = o or norm(o) gain + bias + x,   loss = factor/2 |y(k) - v|^2

All gradients of a chunk are taken at one set of weights. A layer's gradient at token i is then the outer product of
its input x_i and its error e_i, and at every token t of the chunk its weights are

    W_t = keep_t W + drift_t S - sum_i share_ti x_i e_i^T

which is never built: q W_t = keep_t (q W) + drift_t (q S) - sum_i share_ti (q x_i) e_i. This is the dual form of
Sun et al. 2024 (arXiv:2407.04620), appendix A, with the coefficients of momentum and decay.

Shapes: k, v, q (B, H, C, d); matrices (B, H, d, f); vectors (b1, b2 and the norm's scale) (B, H, 1, f).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]
"""Of the network, by name: w1, w2; b1, b2; scale, what the norm's gain is beyond 1."""

Tape = Mapping[str, tuple[Tensor | None, Tensor]]
"""Each weight's input (None for a vector) and error, token by token: its gradients, as outer products."""


class Mix(NamedTuple):
    """Of what the weights at each of C tokens are made; see above.

    Args:
        keep: (B, H, C, 1).
        drift: (B, H, C, 1), or None where there is no S.
        share: (B, H, C, C).
    """

    keep: Tensor
    drift: Tensor | None
    share: Tensor


class Norm(NamedTuple):
    """What stands around the network, learned with the model: LayerNorm's gain and bias (H, 1, d)."""

    gain: Tensor | float
    bias: Tensor | float


@dataclass(frozen=True)
class Network:
    """The network's form.

    Args:
        layers: 1 or 2.
        norm: whether its output is normalised, and its input added.
        eps: of the norm.
        factor: of the loss.
        gelu: which GELU stands between two layers.
        bound: of the norm of a token's gradient of one weight, scaled down to it; None: no bound.
    """

    layers: int
    norm: bool
    eps: float
    factor: float
    gelu: Literal["none", "tanh"] = "none"
    bound: float | None = None

    def gradients(self, w: Weights, k: Tensor, v: Tensor, norm: Norm) -> Tape:
        """Of the loss at each token, for weights w."""
        inputs, before, x = [], [], k
        for n in range(1, self.layers + 1):
            inputs.append(x)
            z = x @ w[f"w{n}"]
            z = z + w[f"b{n}"] if f"b{n}" in w else z
            before.append(z)
            x = F.gelu(z, approximate=self.gelu)
        out = before[-1]
        tape: dict[str, tuple[Tensor | None, Tensor]] = {}
        if self.norm:
            hat, deviation = self._normal(out)
            gain = norm.gain + w["scale"] if "scale" in w else norm.gain
            error = self.factor * (hat * gain + norm.bias + k - v)
            if "scale" in w:
                tape["scale"] = (None, error * hat)
            g = error * gain
            error = (g - g.mean(-1, keepdim=True) - hat * (g * hat).mean(-1, keepdim=True)) / deviation
        else:
            error = self.factor * (out - v)
        for n in range(self.layers, 0, -1):
            tape[f"w{n}"] = (inputs[n - 1], error)
            if f"b{n}" in w:
                tape[f"b{n}"] = (None, error)
            if n > 1:
                error = (error @ w[f"w{n}"].mT) * self._slope(before[n - 2])
        return {name: (x, self._bounded(x, error)) for name, (x, error) in tape.items()}

    def read(
        self, w: Weights, moving: Weights, q: Tensor, norm: Norm, tape: Tape | None = None, mix: Mix | None = None
    ) -> Tensor:
        """What query t reads from the weights at token t, W and S being w and moving; without mix, from w."""

        def at(name: str, x: Tensor | None) -> Tensor:
            """x times the matrix of that name, or the vector of that name."""
            here = w[name] if x is None else x @ w[name]
            if mix is None or tape is None:
                return here
            here = mix.keep * here
            if mix.drift is not None:
                here = here + mix.drift * (moving[name] if x is None else x @ moving[name])
            key, error = tape[name]
            share = mix.share if x is None or key is None else mix.share * (x @ key.mT)
            return here - share @ error

        x = q
        for n in range(1, self.layers + 1):
            x = F.gelu(x, approximate=self.gelu) if n > 1 else x
            x = at(f"w{n}", x)
            x = x + at(f"b{n}", None) if f"b{n}" in w else x
        if not self.norm:
            return x
        gain = norm.gain + at("scale", None) if "scale" in w else norm.gain
        return self._normal(x)[0] * gain + norm.bias + q

    def _bounded(self, x: Tensor | None, error: Tensor) -> Tensor:
        """The error whose outer product with x, |x| |error| long, keeps to the bound."""
        if self.bound is None:
            return error
        square = error.square().sum(-1, keepdim=True)
        square = square if x is None else square * x.square().sum(-1, keepdim=True)
        return error * (square / self.bound**2).clamp(min=1).rsqrt()

    def _normal(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x normalised, and its standard deviation."""
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return centred / deviation, deviation

    def _slope(self, x: Tensor) -> Tensor:
        """The derivative of GELU."""
        if self.gelu == "none":
            return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        scale = math.sqrt(2 / math.pi)
        t = torch.tanh(scale * (x + 0.044715 * x**3))
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * scale * (1 + 3 * 0.044715 * x * x)


def moved(w: Weights, moving: Weights, tape: Tape, mix: Mix) -> dict[str, Tensor]:
    """The weights at one token, the only one of mix."""
    result = {}
    for name, before in w.items():
        key, error = tape[name]
        weighted = mix.share.mT * error
        gradient = weighted.sum(-2, keepdim=True) if key is None else key.mT @ weighted
        after = mix.keep * before - gradient
        result[name] = after if mix.drift is None else after + mix.drift * moving[name]
    return result
