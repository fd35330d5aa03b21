"""Every mixer, feed-forward and memory in bfloat16 at widths that are no multiple of anything."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from altx import registry
from altx.block import Residual
from altx.compose import compose
from altx.context import Context
from altx.errors import AltxError
from altx.registry import Component
from altx.segment_loop import SegmentLoop

DIMS = (34, 33)
HEADS: tuple[dict[str, int], ...] = ({"heads": 2}, {"heads": 3}, {"heads": 1}, {"head_dim": 17}, {})
"""Heads of 11, 17, 33 and 34 numbers; what does not fit is left out."""
LENGTH = 40
"""Enough for the products of torch that work in tiles."""
SHORT = {"segment": 8, "chunk": 8, "frame": 8, "memory": 8, "compressed": 8, "keys": 8, "topk": 8, "k": 4}
CHOOSES = ("memory-layer", "product-key", "reformer")
"""What takes the nearest of several: in bfloat16 others than in float32, once in a while."""
KINDS = ("mixer", "feed-forward", "memory")
ALL = [component for kind in KINDS for component in registry.default().components(kind)]


def recipe(component: Component, settings: dict[str, Any]) -> dict[str, Any]:
    part = {"name": component.qualified, **settings}
    if component.spec.kind != "memory":
        return {component.spec.kind.replace("-", "_"): part}
    if component.spec.attach[0] == "ffn":
        return {"memory": part}
    return {"mixer": {"name": "attention", "heads": 1}, "memory": part}


def models(component: Component) -> Any:
    """One model for each of the widths that the component accepts."""
    known = component.load("config").model_fields
    short = {name: value for name, value in SHORT.items() if name in known and component.spec.kind == "memory"}
    for dim in DIMS:
        for heads in (heads for heads in HEADS if heads.keys() <= known.keys()):
            data = {"dim": dim, "blocks": [{"sublayers": [recipe(component, {**short, **heads})]}]}
            for encoder in ({}, {"causal": False, "head": {"kind": "classifier", "classes": 3}}):
                try:
                    yield compose({**data, **encoder}, seed=0)
                    break
                except AltxError:
                    continue


@pytest.mark.parametrize("component", ALL, ids=lambda component: component.name)
def test_in_bfloat16_it_is_what_it_is_in_float32(component: Component) -> None:
    found, bound = 0, 0.5 if component.name in CHOOSES else 0.03
    for model in models(component):
        found += 1
        segmented = isinstance(model.body, SegmentLoop)
        body = model.body if segmented else next(m for m in model.modules() if isinstance(m, Residual)).body
        body = body.eval().to(torch.bfloat16)
        for parameter in body.parameters():
            if not parameter.any():  # such as a last projection that starts with zeros
                torch.nn.init.normal_(parameter, std=0.1)
        precise = copy.deepcopy(body).float()
        x = torch.randn(2, LENGTH, model.config.dim, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        contexts = [Context(causal=model.config.causal)]
        if body.capabilities.masked:
            real = torch.ones(2, LENGTH, dtype=torch.bool)
            real[0, 5:9], real[1, :3], real[1, 30:] = False, False, False
            contexts.append(contexts[0].replace(mask=real))
        for ctx in contexts:
            real = torch.ones(2, LENGTH, dtype=torch.bool) if ctx.mask is None else ctx.mask
            wild = torch.where(real[..., None], x, 1e4)
            with torch.no_grad():
                y, wanted = body(wild, ctx).y[real].float(), precise(x.float(), ctx).y[real]
            assert (y - wanted).abs().max() < bound * wanted.abs().max()
    assert found
