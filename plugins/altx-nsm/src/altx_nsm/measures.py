"""What is measured of the tokens of a call, over real tokens only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from altx_nsm.routing import Choice


class Measures:
    """Of the choices of a call's tokens, chunk by chunk.

    Args:
        choices: of N chunks of C tokens.
        here: (B, N, C) bool, where there is a real token.
        none: (S,) zeros.
    """

    def __init__(self, choices: Sequence[Choice], here: Tensor, none: Tensor) -> None:
        self.choices, self.here, self.none = choices, here, none
        self.mask = here.flatten(1)[..., None]
        self.share = torch.cat([none.new_zeros(len(here), 0, len(none)), *(c.share.detach() for c in choices)], 1)
        self.tokens = here.sum().clamp(min=1)

    def balance(self, alive: Tensor) -> Tensor:
        """Living states x sum of part of the choices x mean probability: 1 when balanced, 0 for no tokens.

        Fedus et al. 2021 (arXiv:2101.03961), equations 4 to 6, for any number of choices.
        """
        scores = [choice.scores for choice in self.choices if choice.scores is not None]
        if not scores:
            return self.none.sum()
        chosen = ((self.share > 0) & self.mask).sum((0, 1))
        chance = (torch.softmax(torch.cat(scores, 1), -1) * self.mask).sum((0, 1)) / self.tokens
        return alive.sum() * (chosen / chosen.sum().clamp(min=1) * chance).sum()

    def mean_losses(self, names: Iterable[str]) -> dict[str, Tensor]:
        """A router's losses, averaged over tokens; 0 for no tokens."""
        counts = self.here.sum((0, 2)) / self.tokens
        return {
            name: sum((c.losses[name] * n for c, n in zip(self.choices, counts, strict=True)), self.none.sum())
            for name in names
        }

    def metrics(self, alive: Tensor) -> dict[str, Tensor]:
        """What to look at.

        load (S,) tokens' worth that each state got; alive, how many live; max_load, the largest load over the mean
        one of the living; entropy of the load. For no tokens all are 0 but `alive`.
        """
        load = (self.share * self.mask).sum((0, 1))
        part = load / load.sum().clamp(min=torch.finfo(load.dtype).tiny)
        found = {
            "load": load,
            "alive": alive.sum(),
            "max_load": part.max() * alive.sum(),
            "entropy": -torch.xlogy(part, part).sum(),
        }
        theirs = [choice.load for choice in self.choices if choice.load is not None]
        return {**found, "router.load": torch.stack(theirs).sum(0)} if theirs else found
