"""Held-out bits per byte: every byte once, through the state where there is one."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from altx_lab import evaluation

from altx.compose import compose


@pytest.fixture
def toy(toys, write_model):
    def make(**config):
        return compose(write_model(toy=config), seed=1, plugins=toys).double().eval()

    return make


@torch.no_grad()
def whole_strips(model, data: bytes, rows: int) -> float:
    """The definition: each strip in one call from a fresh start, bits over bytes predicted."""
    cuts = [row * len(data) // rows for row in range(rows + 1)]
    bits, count = 0.0, 0
    for start, stop in pairwise(cuts):
        tokens = torch.tensor([list(data[start:stop])])
        logp = model(tokens[:, :-1]).y.log_softmax(-1)
        bits -= float(logp.gather(-1, tokens[:, 1:, None]).sum()) / math.log(2)
        count += stop - start - 1
    assert count == len(data) - rows
    return bits / count


@pytest.mark.parametrize("length", [1, 7, 1000])
@pytest.mark.parametrize("size", [2, 31, 100, 333])
def test_the_stream_equals_whole_strips(toy, size, length):
    model, data = toy(), bytes((i * i) % 97 for i in range(size))
    measured = evaluation.bits_per_byte(model, data, length)
    assert measured == pytest.approx(whole_strips(model, data, min(16, size // 2)), abs=1e-5)


@pytest.mark.parametrize(
    ("config", "reason"), [({"max_len": 1000}, "it takes no longer ones"), ({"growth": "linear"}, "its state grows")]
)
def test_a_model_that_knows_no_more_than_a_window_reads_windows_and_says_why(toy, config, reason):
    model, data = toy(**config), bytes((i * i) % 97 for i in range(333))
    assert f"independent windows of 7 bytes, because {reason}" in evaluation.how(model, 7)
    short, long = (evaluation.bits_per_byte(model, data, length) for length in (7, 1000))
    assert long == pytest.approx(whole_strips(model, data, 16), abs=1e-5)
    assert abs(short - long) > 1e-3


def test_evaluation_leaves_the_global_generator_alone(toy):
    state = torch.random.get_rng_state()
    evaluation.bits_per_byte(toy(noise=0.1), bytes(100), 10)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_it_can_be_stopped(toy):
    assert evaluation.bits_per_byte(toy(), bytes(100), 10, stop=lambda: True) is None
