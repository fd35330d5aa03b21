"""One model, one optimizer, one step after another. Knows nothing of files, screens or signals."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from altx.config import LanguageModelHead, ModelConfig, TokensInput
from altx.context import Context
from altx.errors import AltxError, CheckpointError, ConfigError
from altx.layer import StepInfo
from altx.model import Model
from altx.optim import optimizer_groups
from altx_lab import evaluation, optimizer_state, text
from altx_lab.settings import Settings, rate

BETAS = (0.9, 0.95)
CLIP = 1.0
MOMENTS, SCALARS = "trainer.safetensors", "trainer.json"
MOST_SECONDS = 1e12
MAX_LOGGED = 64
"""Metrics with more values than this are left out of the log."""


def require_byte_model(config: ModelConfig) -> None:
    """Raise ConfigError unless a config is a causal language model over bytes."""
    if not (isinstance(config.input, TokensInput) and config.input.vocab == 256):
        found = f"{config.input.vocab} tokens" if isinstance(config.input, TokensInput) else "vectors"
        raise ConfigError(
            f"input: training reads bytes; this model reads {found}", hint="use {kind: tokens, vocab: 256}"
        )
    if not isinstance(config.head, LanguageModelHead):
        raise ConfigError(f"head: training predicts the next byte; this model has a {config.head.kind} head",
                          hint="use {kind: language-model}")  # fmt: skip
    if not config.causal:
        raise ConfigError("causal: false; a model that sees later bytes cannot be trained to predict them",
                          hint="use causal: true")  # fmt: skip


class Diverged(AltxError):
    """The loss or its gradient is no longer a finite number."""


class Trainer:
    """Trains a model on a text.

    Args:
        model: on the device to train on.
        source: the text.
        settings: see `Settings`.
    """

    def __init__(self, model: Model, source: text.Text, settings: Settings) -> None:
        self.model = model
        self.text = source
        self.settings = settings
        groups = optimizer_groups(model, lr=settings.lr, weight_decay=settings.weight_decay)
        self.optimizer = torch.optim.AdamW([{**group, "base_lr": group["lr"]} for group in groups], betas=BETAS)
        self.weights = model.loss_weights()
        self.device = next(model.parameters()).device
        self.step = 0
        """Optimizer steps taken."""
        self.seconds = 0.0
        """Time they took, over all sessions."""

    def train_step(self) -> dict[str, Any]:
        """Take one optimizer step.

        Returns:
            What the log keeps of it: the step's number, loss, bits per byte, gradient norm, learning rate,
            auxiliary losses and metrics.

        Raises:
            Diverged: if the loss or the gradient is not finite; the weights are left as they were.
        """
        started = time.perf_counter()
        factor = rate(self.step, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss, cross_entropy, losses, metrics = self._forward()
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        values = torch.stack([loss.detach(), cross_entropy.detach(), norm]).tolist()
        if not all(map(math.isfinite, values)):
            wrong = "loss" if not math.isfinite(values[0]) else "gradient"
            raise Diverged(f"step {self.step + 1}: the {wrong} is not a finite number")
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            self.model.on_step(StepInfo(self.step, metrics))
        self.seconds += time.perf_counter() - started
        return {
            "step": self.step,
            "loss": values[0],
            "bits_per_byte": values[1] / math.log(2),
            "grad_norm": values[2],
            "lr": self.settings.lr * factor,
            **_logged("losses", losses),
            **_logged("metrics", metrics),
        }

    def _forward(self) -> tuple[Tensor, Tensor, Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Total loss, cross-entropy per byte in nats, unscaled auxiliary losses and metrics of this step's batch."""
        s = self.settings
        windows = text.batch(self.text, size=s.batch, length=s.length, seed=s.seed, step=self.step).to(self.device)
        seed = text.stream_of(s.seed, -1 - self.step).getrandbits(32)
        out = self.model(windows[:, :-1], Context(generator=torch.Generator(self.device).manual_seed(seed)))
        cross_entropy = F.cross_entropy(out.y.flatten(0, 1).float(), windows[:, 1:].flatten())
        loss = cross_entropy
        for name, value in out.losses.items():
            loss = loss + self.weights[name] * value
        return loss, cross_entropy, out.losses, out.metrics

    def evaluate(self, stop: Callable[[], bool] = lambda: False) -> float | None:
        """Bits per byte of the held-out text, or None if `stop` said yes."""
        self.model.eval()
        s = self.settings
        return evaluation.bits_per_byte(self.model, self.text.held_out, s.length, seed=s.seed, stop=stop)

    def files(self) -> dict[str, bytes]:
        """What a checkpoint holds beside the weights, so that training can go on from it exactly."""
        scalars = {"step": self.step, "seconds": self.seconds}
        return {
            MOMENTS: safetensors.torch.save(optimizer_state.pack(self.optimizer)),
            SCALARS: (json.dumps(scalars) + "\n").encode(),
        }

    def restore(self, files: Mapping[str, bytes]) -> None:
        """Go on from what `files` returned. The model must hold the same checkpoint's weights.

        Raises:
            CheckpointError: if they are damaged or belong to another model.
        """
        try:
            scalars = json.loads(files[SCALARS])
            self.step, self.seconds = int(scalars["step"]), float(scalars["seconds"])
            tensors = safetensors.torch.load(files[MOMENTS])
        except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"the trainer's state is damaged or cut short: {error}") from None
        if not 0 <= self.seconds < MOST_SECONDS:
            raise CheckpointError(f"the trainer's state is damaged: {self.seconds} seconds of training")
        optimizer_state.unpack(self.optimizer, tensors)


def _logged(kind: str, values: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Small tensors as plain numbers under one key, or nothing if there are none."""
    plain = {name: value.detach().tolist() for name, value in values.items() if value.numel() <= MAX_LOGGED}
    return {kind: plain} if plain else {}
