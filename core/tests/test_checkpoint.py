"""Checkpoints and generation: saved, loaded, streamed on; damage and mismatch are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from altx import checkpoint
from altx.compose import compose
from altx.errors import CheckpointError, UnsupportedContext
from altx.generation import prefill, sample, stream
from altx.model import Model
from altx.registry import Registry
from altx.testing.case import difference


@pytest.fixture
def model(toy: Registry) -> Model:
    return compose({"mixer": "average", "memory": "notebook", "dim": 16, "layers": 2}, seed=0, plugins=toy)


def test_a_checkpoint_is_three_files_and_gives_the_model_back(model: Model, toy: Registry, tmp_path: Path) -> None:
    checkpoint.save(model, tmp_path / "run")
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == ["model.safetensors", "model.yaml", "plugins.json"]
    loaded = checkpoint.load(tmp_path / "run", plugins=toy)
    tokens = torch.randint(256, (2, 9))
    assert torch.equal(loaded(tokens).y, model(tokens).y)
    assert all(p.requires_grad for p in loaded.parameters())
    with pytest.raises(CheckpointError, match="exists already"):
        checkpoint.save(model, tmp_path / "run")


def test_damage_is_named(model: Model, toy: Registry, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match=r"not a checkpoint: it has no model\.safetensors"):
        checkpoint.load(run)
    checkpoint.save(model, run)
    weights = run / "model.safetensors"
    whole = weights.read_bytes()
    for cut in (0, 4, 100, len(whole) - 10):
        weights.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="damaged or cut short"):
            checkpoint.load(run, plugins=toy)
    weights.write_bytes(whole)
    config = (run / "model.yaml").read_text()
    (run / "model.yaml").write_text(config.replace("dim: 16", "dim: 32"))
    with pytest.raises(CheckpointError, match=r"belongs to another config: .* the config says \(.*32"):
        checkpoint.load(run, plugins=toy)
    (run / "model.yaml").write_text(config.replace("norm: rms", "norm: rsm", 1))
    with pytest.raises(CheckpointError, match="norm"):
        checkpoint.load(run, plugins=toy)


def test_a_missing_plugin_is_named_with_the_version_to_install(model: Model, tmp_path: Path) -> None:
    checkpoint.save(model, tmp_path / "run")
    (tmp_path / "run" / "plugins.json").write_text(json.dumps({"plugins": {"toy-plugin": "1.2"}}))
    with pytest.raises(CheckpointError, match=r"pip install toy-plugin==1\.2"):
        checkpoint.load(tmp_path / "run", plugins=Registry(entry_points=[]))


def test_nothing_odd_from_a_checkpoint_enters_a_command(model: Model, tmp_path: Path) -> None:
    checkpoint.save(model, tmp_path / "run")
    for plugins in ({"toy-plugin; rm -rf x": "1"}, {"toy-plugin": "1 --index-url x"}, {"toy-plugin": 3}, ["x"], None):
        (tmp_path / "run" / "plugins.json").write_text(json.dumps({"plugins": plugins}))
        with pytest.raises(CheckpointError) as error:
            checkpoint.load(tmp_path / "run", plugins=Registry(entry_points=[]))
        assert "pip install" not in str(error.value)


def test_streaming_equals_running_the_whole_text_again(model: Model) -> None:
    model = model.double()
    prompt = torch.randint(256, (2, 5))
    drawn = torch.stack(list(stream(model, prompt, max_new_tokens=6, temperature=0)), 1)
    text = prompt
    for _ in range(6):
        text = torch.cat([text, model(text).y[:, -1:].argmax(-1)], 1)
    assert torch.equal(drawn, text[:, 5:])


def test_left_padded_prompts_continue_as_if_alone(model: Model) -> None:
    model = model.double()
    prompt = torch.randint(256, (1, 5))
    padded = torch.cat([torch.randint(256, (1, 3)), prompt], 1)
    mask = torch.tensor([[False] * 3 + [True] * 5])
    alone = list(stream(model, prompt, max_new_tokens=4, temperature=0))
    assert list(stream(model, padded, mask=mask, max_new_tokens=4, temperature=0)) == alone


def test_a_model_without_memory_of_the_past_streams_too(toy: Registry) -> None:
    model = compose({"blocks": [{"sublayers": [{"feed_forward": "mlp"}]}], "dim": 16}, plugins=toy)
    assert len(list(stream(model, torch.zeros(2, 3, dtype=torch.int64), max_new_tokens=3))) == 3


def test_a_prefill_leaves_padding_out(model: Model) -> None:
    model = model.double()
    prompt = torch.randint(256, (1, 5))
    padded = torch.cat([torch.randint(256, (1, 3)), prompt], 1)
    mask = torch.tensor([[False] * 3 + [True] * 5])
    alone, _ = prefill(model, prompt, model.init_state(1))
    assert difference(prefill(model, padded, model.init_state(1), mask)[0], alone) < 1e-12
    assert difference(prefill(model, padded, model.init_state(1))[0], alone) > 1e-6


def test_weights_that_are_missing_or_left_over_are_named(model: Model, toy: Registry, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint.save(model, tmp_path / "run")
    weights = load_file(tmp_path / "run" / "model.safetensors")
    lost = {name: tensor for name, tensor in weights.items() if name != "norm.weight"}
    odd = {**weights, "odd": torch.ones(1)}
    for tensors, message in ((lost, r"norm\.weight is missing"), (odd, "odd is left over")):
        save_file(tensors, tmp_path / "run" / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(tmp_path / "run", plugins=toy)


def test_a_prompt_padded_at_its_end_is_refused(model: Model) -> None:
    prompt, mask = torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[True, True, False]])
    with pytest.raises(UnsupportedContext, match="ends with a real token"):
        next(stream(model, prompt, mask=mask, max_new_tokens=1))


def test_what_a_plugin_froze_stays_frozen(toy: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import toy_plugin

    class Frozen(toy_plugin.MovingAverage):
        def __init__(self, dim: int) -> None:
            super().__init__(dim)
            self.decay.requires_grad_(False)

    monkeypatch.setattr(toy_plugin, "MovingAverage", Frozen)
    checkpoint.save(compose({"mixer": "average", "dim": 16}, plugins=toy), tmp_path / "run")
    loaded = dict(checkpoint.load(tmp_path / "run", plugins=toy).named_parameters())
    assert {name for name, p in loaded.items() if not p.requires_grad} == {n for n in loaded if n.endswith("decay")}


def test_a_state_survives_a_file_and_streams_on(model: Model, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    text = torch.randint(256, (1, 8))
    _, state = prefill(model, text, model.init_state(1))
    save_file({name: tensor.contiguous() for name, tensor in state.flat().items()}, tmp_path / "state.safetensors")
    restored = model.init_state(1).from_flat(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(model(text, state=restored).y, model(text, state=state).y)


def test_sampling_keeps_to_its_limits() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(2000, -1)
    generator = torch.Generator().manual_seed(0)
    assert set(sample(logits, top_k=2, generator=generator).tolist()) == {0, 1}
    assert set(sample(logits, top_p=0.7, generator=generator).tolist()) == {0, 1}
    assert set(sample(logits, top_p=0.0, generator=generator).tolist()) == {0}
    share = (sample(logits, generator=generator) == 0).float().mean()
    assert 0.45 < float(share) < 0.55
    assert sample(logits, temperature=0).unique().tolist() == [0]


def test_only_causal_language_models_generate(toy: Registry) -> None:
    model = compose({"mixer": "average", "dim": 16, "head": {"kind": "vectors", "size": 2}}, plugins=toy)
    with pytest.raises(UnsupportedContext, match="language-model head"):
        next(stream(model, torch.zeros(1, 1, dtype=torch.int64), max_new_tokens=1))
