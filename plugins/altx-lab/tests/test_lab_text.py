"""Texts, their split, and batches."""

from __future__ import annotations

import math

import pytest
import torch
from altx_lab import text
from altx_lab.baselines import baselines, order0
from altx_lab.text import Text

from altx.errors import AltxError
from altx.registry import Registry

ME = "altx_lab_toys"


def test_the_standard_text_is_the_language_reference():
    standard = text.load(None)
    assert len(standard.data) > 300_000
    assert b"statement" in standard.data and standard.data.decode()
    assert standard.sha256 == text.load(None).sha256 == text.load("python-docs").sha256


def test_the_last_tenth_is_held_out_and_no_byte_is_in_both():
    source = Text("t", bytes(range(105)))
    assert bytes(source.training.tolist()) + source.held_out == source.data
    assert len(source.held_out) == 10


def test_a_batch_depends_on_seed_and_step_alone():
    source = Text("t", bytes(i % 251 for i in range(5000)))
    state = torch.random.get_rng_state()
    first = text.batch(source, size=4, length=8, seed=3, step=7)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(text.batch(source, size=4, length=8, seed=3, step=7), first)
    assert not torch.equal(text.batch(source, size=4, length=8, seed=3, step=8), first)
    assert not torch.equal(text.batch(source, size=4, length=8, seed=4, step=7), first)


def test_windows_reach_every_training_byte_and_no_held_out_one():
    source = Text("t", bytes(range(50)))
    seen = {i for step in range(60) for i in text.batch(source, size=4, length=8, seed=0, step=step).flatten().tolist()}
    assert seen == set(range(45))
    assert text.batch(Text("t", bytes(range(20))), size=2, length=17, seed=0, step=0).tolist() == [list(range(18))] * 2


@pytest.mark.parametrize(("length", "least"), [(1, 20), (17, 20), (18, 21), (256, 285)])
def test_a_text_must_hold_one_window_and_a_held_out_part(length, least):
    Text("t", bytes(least)).require(length)
    with pytest.raises(AltxError, match=f"at least {least}"):
        Text("t", bytes(least - 1)).require(length)


def test_a_text_that_cannot_be_read_says_why(tmp_path):
    with pytest.raises(AltxError, match=r"absent\.txt: the text cannot be read: No such file"):
        text.load(tmp_path / "absent.txt")
    with pytest.raises(AltxError, match="Is a directory"):
        text.load(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(AltxError, match="empty"):
        text.load(tmp_path / "empty")


def test_a_text_of_a_plugin_has_its_name(toys):
    found = text.load("fox", toys)
    assert (found.data[:9], found.path, found.component) == (b"the quick", None, f"{ME.replace('_', '-')}:fox")
    assert text.load(found.component, toys) == found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("foxy", r"there is no file 'foxy', and no plugin offers a text of that name\ninstalled: .*fox.*python-docs"),
        ("empty", r"its build returned b'', not the bytes of a text"),
        ("no-bytes", r"its build returned \[\], not the bytes of a text"),
        ("broken", r"text 'broken' of altx-lab-toys unknown: its build .* cannot be imported"),
    ],
)
def test_a_text_that_a_plugin_does_not_offer_is_refused(toys, name, message):
    with pytest.raises(AltxError, match=message):
        text.load(name, toys)


def test_a_name_that_is_a_file_too_is_neither(toys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fox").write_bytes(b"a file of the user")
    with pytest.raises(AltxError, match=r"write \./fox for the file, altx-lab-toys:fox for the other"):
        text.load("fox", toys)
    assert text.load("./fox", toys).data == text.load(tmp_path / "fox", toys).data == b"a file of the user"
    assert text.load("altx-lab-toys:fox", toys).data.startswith(b"the quick")


def test_without_this_packages_own_plugin_a_file_is_still_read(tmp_path):
    (tmp_path / "prose").write_bytes(b"x")
    assert text.load(str(tmp_path / "prose"), Registry([])).data == b"x"
    with pytest.raises(AltxError, match="no plugin offers a text of that name"):
        text.load("fox", Registry([]))


def test_order0_is_the_entropy_of_byte_frequencies():
    assert order0(b"abab") == 1
    assert order0(b"aaab") == pytest.approx(2 - 0.75 * math.log2(3))
    assert order0(bytes(range(256))) == 8


def test_baselines_measure_the_same_bytes():
    measured = baselines(b"ab" * 5000)
    assert list(measured) == ["order-0 entropy", "gzip -9", "xz -9e"]
    assert measured["order-0 entropy"] == 1 and measured["gzip -9"] < 0.1
