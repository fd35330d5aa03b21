"""Keys and values on disk: kept between processes, shared by forks, and never wrong without saying so."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import pickle
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from altx_knn.config import KNNConfig
from altx_knn.memory import KNN
from altx_knn.store import StoreError, open_store, prune
from safetensors.torch import load_file, save_file
from torch import Tensor

from altx.compose import compose
from altx.context import Context
from altx.errors import AltxError, StateError
from altx.spec import Heads
from altx.state import State
from altx.testing.case import state_difference

HEADS = Heads(query=2, kv=1, key_dim=3, value_dim=2)


def memory(path: Path, heads: Heads = HEADS, **settings: Any) -> KNN:
    return KNN(KNNConfig(**{"segment": 4, "block": 8, "k": 3, "path": str(path), **settings}), heads).double()


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, HEADS.width, generator=generator, dtype=torch.float64)


def after(layer: KNN, x: Tensor, state: State | None = None) -> State:
    return layer.scan(x, state or layer.init_state(len(x), dtype=torch.float64)).state


def files(path: Path) -> list[Path]:
    return sorted((path / "blocks").rglob("*.safetensors"))


def found(layer: KNN, state: State) -> Tensor:
    read = layer.read(tokens(len(state["keys"]), 3, 9), state)[0].attended
    assert read
    return torch.cat([read.value, read.weight[..., None]], -1)


@pytest.mark.parametrize("search", ["exact", "hnsw"])
def test_another_process_goes_on_from_a_state_that_was_saved(tmp_path: Path, search: str) -> None:
    layer = memory(tmp_path / "store", search=search)
    state = after(layer, tokens(2, 29))
    save_file(state.flat(), tmp_path / "state.safetensors")
    save_file({"found": found(layer, state)}, tmp_path / "found.safetensors")
    code = f"""
        import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
        import torch
        from pathlib import Path
        from safetensors.torch import load_file
        from test_knn_store import found, memory
        path = Path({str(tmp_path)!r})
        layer = memory(path / "store", search={search!r})
        state = layer.init_state(2, dtype=torch.float64).from_flat(load_file(path / "state.safetensors"))
        assert torch.equal(found(layer, state), load_file(path / "found.safetensors")["found"])
        print("the same")
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert run.stdout == "the same\n", run.stderr


def test_forks_share_what_they_have_in_common_on_disk(tmp_path: Path) -> None:
    layer, path = memory(tmp_path / "store"), tmp_path / "store"
    trunk = after(layer, tokens(1, 24))
    assert len(files(path)) == 3
    kept = [file.read_bytes() for file in files(path)]
    after(layer, tokens(2, 9, 1), trunk.repeat(2))
    assert len(files(path)) == 5 and all(content in [f.read_bytes() for f in files(path)] for content in kept)
    # The same again writes nothing, and so does another layer with the same keys.
    after(memory(path), tokens(1, 24))
    assert len(files(path)) == 5


def test_only_the_open_block_is_in_memory(tmp_path: Path) -> None:
    layer = memory(tmp_path / "store")
    fresh = layer.init_state(1)
    assert after(layer, tokens(1, 200).float(), fresh).bytes() == fresh.bytes()


def test_a_reset_begins_anew_and_leaves_the_disk_as_it_is(tmp_path: Path) -> None:
    layer = memory(tmp_path / "store")
    state = after(layer, tokens(1, 24))
    reset = torch.arange(24)[None] == 0
    again = layer.scan(tokens(1, 24, 1), state, Context(reset=reset)).state
    assert torch.equal(found(layer, again), found(layer, after(layer, tokens(1, 24, 1))))
    assert found(layer, state).isfinite().all()
    # It goes on from none of the blocks before it, which then can go.
    assert len(files(tmp_path / "store")) == 6 and prune(str(tmp_path / "store"), again) == 3


def test_pruning_keeps_what_states_go_on_from(tmp_path: Path) -> None:
    path = tmp_path / "store"
    layer = memory(path)
    trunk = after(layer, tokens(1, 16))
    forks = [after(layer, tokens(1, 16, seed), trunk) for seed in (1, 2)]
    wanted, rest = found(layer, forks[0]), found(layer, forks[1])
    assert len(files(path)) == 6
    assert prune(str(path), State(children={"block": forks[0]})) == 2
    del layer
    assert torch.equal(found(memory(path), forks[0]), wanted)
    with pytest.raises(StoreError, match=r"(?s)has no block [0-9a-f]{40}, which a state goes on from.*prune"):
        found(memory(path), forks[1])
    # What it wrote before is written again where it is missing.
    assert torch.equal(found(memory(path), after(memory(path), tokens(1, 16, 2), trunk)), rest)
    assert prune(str(path), forks[0], last=1) == 5 and len(files(path)) == 1
    assert prune(str(path)) == 1


@pytest.fixture
def held(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A store that another process uses, or prunes."""
    path = tmp_path / "store"
    after(memory(path), tokens(1, 8))
    code = (
        "import fcntl, sys; lock = open(sys.argv[1]); fcntl.flock(lock, int(sys.argv[2])); print(flush=True); input()"
    )
    command = [sys.executable, "-uc", code, str(path / "lock"), str(request.param)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "\n"
        yield path
        other.communicate("done\n")


@pytest.mark.parametrize("held", [fcntl.LOCK_EX], indirect=True)
def test_a_store_that_another_process_has_for_itself_is_locked(held: Path) -> None:
    with pytest.raises(StoreError, match=r"(?s)store is locked: another process prunes it.*wait"):
        memory(held).init_state(1)


@pytest.mark.parametrize("held", [fcntl.LOCK_SH], indirect=True)
def test_a_store_is_used_by_several_and_pruned_by_one(held: Path) -> None:
    layer = memory(held)
    state = after(layer, tokens(1, 16, 1))
    with pytest.raises(StoreError, match="store is locked: another process uses it"):
        prune(str(held))
    assert found(layer, state).isfinite().all()


def test_a_store_that_cannot_be_is_refused_before_the_first_token(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"(?s)nowhere/store cannot be opened: No such file or directory.*parent"):
        memory(tmp_path / "nowhere" / "store").init_state(1)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file cannot be opened: File exists"):
        memory(tmp_path / "file").init_state(1)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"is no store: it has files, and no knn\.json"):
        memory(tmp_path).init_state(1)
    assert not (tmp_path / "lock").exists()
    (tmp_path / "knn.json").write_text('{"format": 2}')
    with pytest.raises(StoreError, match="has format 2, and this version reads 1"):
        memory(tmp_path).init_state(1)
    (tmp_path / "knn.json").write_text("{")
    with pytest.raises(StoreError, match=r"knn\.json is damaged"):
        memory(tmp_path).init_state(1)
    assert issubclass(StoreError, AltxError)


def test_a_model_is_built_without_touching_the_disk(tmp_path: Path) -> None:
    knn = {"name": "knn", "path": str(tmp_path / "store"), "segment": 4, "block": 8}
    model = compose({"dim": 16, "mixer": [{"name": "attention", "heads": 2}], "memory": [knn], "layers": 1})
    assert not (tmp_path / "store").exists()
    model(torch.zeros(1, 9, dtype=torch.int64))
    assert len(files(tmp_path / "store")) == 1


def test_a_store_of_other_heads_is_refused(tmp_path: Path) -> None:
    state = after(memory(tmp_path / "store"), tokens(1, 16))
    wide = Heads(query=2, kv=1, key_dim=4, value_dim=2)
    layer = memory(tmp_path / "store", wide)
    with pytest.raises(StateError, match="3 numbers in a key, not 4"):
        layer.read(torch.zeros(1, 1, wide.width, dtype=torch.float64), state)
    mixed = layer.init_state(1, dtype=torch.float64).replace(
        document=state["document"], last=state["last"], seen=state.seen
    )
    with pytest.raises(StateError, match=r"holds keys \(8, 1, 3\) and values \(8, 1, 2\) where .* has \(8, 1, 4\)"):
        layer.read(torch.zeros(1, 1, wide.width, dtype=torch.float64), mixed)
    with pytest.raises(StateError, match=r"holds keys \(8, 1, 3\) .* has \(16, 1, 3\)"):
        other = memory(tmp_path / "store", block=16)
        grown = other.init_state(1, dtype=torch.float64).replace(last=state["last"], seen=state.seen)
        other.read(tokens(1, 1), grown)


@pytest.mark.parametrize("where", ["cut short", "keys", "values", "graph.0", "header", "empty"])
def test_a_damaged_file_is_found_out(tmp_path: Path, where: str) -> None:
    path = tmp_path / "store"
    state = after(memory(path, search="hnsw"), tokens(1, 8))
    (file,) = files(path)
    content = file.read_bytes()
    if where == "cut short":
        content = content[:-40]
    elif where == "empty":
        content = b""
    elif where == "header":
        content = content.replace(b'"before"', b'"behind"')
    else:
        tensor = load_file(file)[where]
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        at = content.index(raw) + len(raw) // 2
        content = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    file.write_bytes(content)
    with pytest.raises(StoreError, match=r"(?s)[0-9a-f]{40}\.safetensors is damaged.*restore it from a copy"):
        found(memory(path, search="hnsw"), state)


def test_a_file_in_the_place_of_another_is_found_out(tmp_path: Path) -> None:
    path = tmp_path / "store"
    state = after(memory(path), tokens(1, 16))
    first, second = sorted(files(path), key=lambda file: file.name)
    second.write_bytes(first.read_bytes())
    with pytest.raises(StoreError, match="names no block before it"):
        found(memory(path), state)


def test_a_disk_that_is_full_or_read_only_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = memory(tmp_path / "store")
    state = after(layer, tokens(1, 15))
    kept = state.clone()

    def fail(number: int, *args: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", functools.partial(fail, errno.ENOSPC))
        with pytest.raises(StoreError, match=r"(?s)cannot be written: No space left on device.*state from before"):
            after(layer, tokens(1, 3, 1), state)
        patch.setattr(
            tempfile, "mkstemp", lambda **_: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system"))
        )
        with pytest.raises(StoreError, match="cannot be written: Read-only file system"):
            after(layer, tokens(1, 3, 1), state)
    assert len(files(tmp_path / "store")) == 1 and not [*(tmp_path / "store").rglob("*.partial")]
    assert state_difference(state, kept) == 0
    assert len(files(tmp_path / "store")) == 1
    after(layer, tokens(1, 3, 1), state)
    assert len(files(tmp_path / "store")) == 2


def test_a_write_that_was_cut_off_leaves_nothing_to_be_read(tmp_path: Path) -> None:
    path = tmp_path / "store"
    state = after(memory(path), tokens(1, 8))
    (file,) = files(path)
    (file.parent / ".half.partial").write_bytes(file.read_bytes()[:50])
    assert found(memory(path), state).isfinite().all()


def test_nothing_is_pickled_and_copies_use_the_same_store(tmp_path: Path) -> None:
    path = tmp_path / "store"
    layer = memory(path)
    after(layer, tokens(1, 8))
    assert {file.suffix for file in path.rglob("*") if file.is_file()} == {".safetensors", ".json", ""}
    # A model that is copied or sent to another process takes the path along, not what is open.
    assert pickle.loads(pickle.dumps(open_store(str(path)))) is open_store(str(path))
    again = pickle.loads(pickle.dumps(layer))
    assert again.blocks.store is layer.blocks.store and not again.blocks.known
