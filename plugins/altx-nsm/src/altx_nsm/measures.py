"""What is measured of the tokens of a call, over real tokens only."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from altx_nsm.routing import Choice


class Measures:
    """Sums over the chunks of a call.

    Args:
        load: (S,) what each state got of the tokens, detached.
        chosen: (S,) by how many tokens each was chosen.
        chance: (S,) probabilities of the choice, summed; carries the gradient.
        tokens: number of real tokens.
    """

    def __init__(self, load: Tensor, chosen: Tensor, chance: Tensor, tokens: Tensor) -> None:
        self.load, self.chosen, self.chance, self.tokens = load, chosen, chance, tokens
        self.losses: dict[str, Tensor] = {}
        self.router_load: Tensor | None = None

    @classmethod
    def none(cls, slots: Tensor) -> Measures:
        """Of no tokens. slots: (B, S, W)."""
        zero = slots.new_zeros(slots.shape[1])
        return cls(zero, zero, zero, slots.new_zeros((), dtype=torch.int64))

    def add(self, choice: Choice, mask: Tensor) -> None:
        """The tokens of a chunk; mask: (B, T) bool."""
        count = mask.sum()
        self.load = self.load + choice.share.detach().sum((0, 1))
        self.chosen = self.chosen + (choice.share > 0).sum((0, 1))
        self.chance = self.chance + choice.chance
        self.tokens = self.tokens + count
        for name, loss in choice.losses.items():
            self.losses[name] = self.losses.get(name, torch.zeros_like(loss)) + loss * count
        if choice.load is not None:
            self.router_load = choice.load if self.router_load is None else self.router_load + choice.load

    def balance(self, alive: Tensor) -> Tensor:
        """Living states x sum of part of the choices x mean probability: 1 when balanced, 0 for no tokens.

        Fedus et al. 2021 (arXiv:2101.03961), equations 4 to 6, for any number of choices.
        """
        part = self.chosen / self.chosen.sum().clamp(min=1)
        return alive.sum() * (part * self.chance).sum() / self.tokens.clamp(min=1)

    def mean_losses(self, names: Iterable[str]) -> dict[str, Tensor]:
        """A router's losses, averaged over tokens; 0 for no tokens."""
        count = self.tokens.clamp(min=1)
        return {name: self.losses.get(name, self.load.new_zeros(())) / count for name in names}

    def metrics(self, alive: Tensor) -> dict[str, Tensor]:
        """What to look at.

        load (S,) tokens' worth that each state got; alive, how many live; max_load, the largest load over the mean
        one of the living; entropy of the load. For no tokens all are 0 but `alive`.
        """
        total = self.load.sum()
        part = self.load / total.clamp(min=torch.finfo(self.load.dtype).tiny)
        found = {
            "load": self.load,
            "alive": alive.sum(),
            "max_load": part.max() * alive.sum(),
            "entropy": -torch.xlogy(part, part).sum(),
        }
        return found if self.router_load is None else {**found, "router.load": self.router_load}
