"""Configs and capabilities of `reformer` and `reformer-local`. Never imports torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from altx.capabilities import Capabilities
from altx.config import Config


class HeadsConfig(Config):
    """What both mixers have."""

    heads: int = Field(8, gt=0, description="attention heads")
    head_dim: int | None = Field(None, gt=0, description="width of a head; default: model width / heads")
    rotary: bool = Field(
        True, description="rotate queries and keys by their position, after hashing; without it, no positions"
    )
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary wavelengths")

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.rotary and self.head_dim and self.head_dim % 2:
            raise ValueError(
                f"rotary needs an even head_dim, not {self.head_dim}; use head_dim {self.head_dim + 1}, or rotary false"
            )
        return self

    def width(self, dim: int) -> int:
        """Width of a head at model width `dim`."""
        return self.head_dim or dim // self.heads

    def fit(self, dim: int) -> None:
        if self.head_dim:
            return
        even = 2 if self.rotary else 1
        if dim % self.heads:
            problem = f"dim {dim} is not divisible by heads {self.heads}"
        elif dim // self.heads % even:
            problem = f"rotary needs an even head_dim, and dim {dim} / heads {self.heads} is {dim // self.heads}"
        else:
            return
        usable = [n for n in range(1, dim + 1) if dim % (n * even) == 0]
        nearest = [n for n in usable if n < self.heads][-1:] + [n for n in usable if n > self.heads][:1]
        heads = f"heads {' or '.join(map(str, nearest))}, or " if nearest else ""
        unit = self.heads * even
        raise ValueError(f"{problem}; use {heads}dim {-(-dim // unit) * unit}, or set head_dim")


class ReformerConfig(HeadsConfig):
    """Config of `reformer`. The defaults are those of reformer-pytorch for sequences of 1024 tokens."""

    bucket_size: int = Field(64, gt=0, description="tokens of a chunk; how many of a bucket a token sees")
    n_hashes: int = Field(8, gt=0, description="rounds of hashing; more miss less")
    num_buckets: int | list[int] = Field(
        16,
        description="buckets of a round: about (length of the sequences) / bucket_size; even, or a list of even "
        "factors, e.g. [64, 128], where they are many",
    )
    chunking: Literal["causal", "published"] = Field(
        "causal",
        description="how a causal model chunks: 'causal' so that no token depends on a later one, or 'published', "
        "where the order of a token's bucket, and so what it sees, depends on the whole sequence",
    )
    attend_across_buckets: bool = Field(
        True,
        description="with published chunks, a token also sees what other buckets have in them",
    )
    scale: float | None = Field(None, gt=0, description="factor of the scores; default: 1 / sqrt(head_dim)")
    norm_eps: float = Field(
        0.0, ge=0, description="added to the mean square of a key before it is brought to length 1 (transformers: 1e-6)"
    )
    rotations_per_head: bool = Field(True, description="each head hashes with rotations of its own")
    hash_seed: int = Field(0, ge=0, description="seed of the rotations, together with the block's index")
    out_bias: bool = Field(True, description="bias on the projection out")

    @model_validator(mode="after")
    def _even_buckets(self) -> Self:
        if not self.factors:
            raise ValueError("num_buckets is an empty list; use an even number, or a list of even numbers")
        for count in self.factors:
            if count < 2 or count % 2:
                raise ValueError(
                    f"num_buckets {count} is not an even number above 0 (a bucket is one of two sides of a direction); "
                    f"use {max(count - 1, 2)} or {max(count + 1, 4)}"
                )
        return self

    @property
    def factors(self) -> tuple[int, ...]:
        """`num_buckets` as a product."""
        return (self.num_buckets,) if isinstance(self.num_buckets, int) else tuple(self.num_buckets)


def capabilities(config: ReformerConfig) -> Capabilities:
    """Everything but packing, which altx unpacks. With published chunks later tokens decide what earlier ones see."""
    if config.chunking == "published":
        return Capabilities(causal=False, bidirectional=True, streaming="none")
    return Capabilities(bidirectional=True, growth="linear", rollback="crop")


class LocalConfig(HeadsConfig):
    """Config of `reformer-local`."""

    chunk_size: int = Field(64, gt=0, description="tokens of a chunk")
    before: int = Field(1, ge=0, description="chunks in front of its own that a token sees")
    after: int = Field(1, ge=0, description="chunks behind its own that a token sees where the context is not causal")
    out_bias: bool = Field(True, description="bias on the projection out")

    @model_validator(mode="after")
    def _sees_others(self) -> Self:
        if self.chunk_size == 1 and not self.before:
            raise ValueError("with chunk_size 1 and before 0 a token sees itself only; use chunk_size 2 or before 1")
        return self


def local_capabilities(config: LocalConfig) -> Capabilities:
    """Everything but packing, which altx unpacks."""
    return Capabilities(bidirectional=True, growth="window", rollback="snapshot")
