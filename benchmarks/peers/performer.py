"""Performer beside performer-pytorch 1.1.4, causal, on the shape of its defaults: 8 heads of 64, 266 features.

Its numbers differ by the epsilons that it adds to every feature (without them both agree to 1e-8 in float64, see the
plugin's tests). Its causal form takes a maximum over later keys, too, and cannot be fed token by token.
"""

from __future__ import annotations

import contextlib
import io
import warnings

from altx.context import Context
from peers import Case, layer


def cases(dim: int, length: int) -> list[Case]:
    return [case(dim, causal=True), case(dim, causal=False)]


def case(dim: int, causal: bool) -> Case:
    ours, ctx, peers = layer("performer", dim), Context(causal=causal), {}
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore")
        from performer_pytorch import SelfAttention

        features, width = ours.fast_attention.projection_matrix.shape
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that it has no CUDA code
            theirs = SelfAttention(dim, causal=causal, heads=ours.heads, dim_head=width, nb_features=features)
        theirs.load_state_dict(ours.state_dict())
        peers["performer-pytorch"] = theirs
    name = "performer" if causal else "performer, both ways"
    return Case(name, lambda x: ours(x, ctx).y, ours, peers, exact=False)
