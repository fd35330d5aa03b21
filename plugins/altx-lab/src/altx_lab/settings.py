"""How to train: the numbers that decide a run's losses, and those that decide how it is watched."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from altx.config import Config

FIXED = ("batch", "length", "lr", "weight_decay", "warmup", "seed")
"""Settings that a resumed run cannot change without becoming another run."""

FINAL_RATE = 0.1


class Settings(Config):
    """Settings of a run, recorded in its run.json.

    The defaults are those of the demo: two layers of width 128 in two minutes on two cores. Short windows
    and many steps learnt the most in that time.
    """

    steps: int = Field(2000, ge=1, description="optimizer steps in all")
    batch: int = Field(8, ge=1, le=1 << 24, description="windows per step")
    length: int = Field(128, ge=1, le=1 << 24, description="bytes that each window predicts")
    lr: float = Field(4e-3, gt=0, allow_inf_nan=False, description="highest learning rate")
    weight_decay: float = Field(0.1, ge=0, allow_inf_nan=False, description="AdamW's, on matrices")
    warmup: int = Field(40, ge=0, description="steps over which the rate rises")
    seed: int = Field(0, ge=-(1 << 63), lt=1 << 63, description="of the initial weights and the batches")
    eval_every: int = Field(200, ge=1, description="steps between evaluations")
    save_every: int = Field(100, ge=1, description="steps between checkpoints")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to train")


def rate(step: int, settings: Settings) -> float:
    """Factor on every learning rate at a step counted from 0: linear warm-up, then a cosine down to a tenth."""
    if step < settings.warmup:
        return (step + 1) / (settings.warmup + 1)
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * progress)) / 2
