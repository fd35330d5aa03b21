"""Configs and checkpoints are data, whoever made them: reading one runs nothing, ends soon, fails with altx's words.

A fuzzer: seeds that are valid are mutated, by bytes, by lines and as trees, and read. The test does a few hundred; to
do more, and other ones,

    python tests/test_hostile_data.py 100000 --seed 1

which takes about half an hour on one core, stops at the first finding, keeps it, and prints what it did.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 20.0
"""CPU time that one input may take."""
OBJECTS, GROWTH = 20_000, 256 << 20
"""Python objects and bytes by which the process may have grown at the end, since its first thousand inputs. What is
left of memory after models of thousands of parts is in pieces, so that bytes tell less than objects."""
PEAK = 2 << 30
"""Bytes that it may ever have had."""
MESSAGE = 20_000

SEEDS: list[dict[str, Any]] = [
    {"mixer": "mamba", "memory": "ntm", "dim": 16, "layers": 1},
    {"mixer": "2*mamba,attention", "dim": 32, "layers": 3, "feed_forward": "mlp", "norm": "layer"},
    {"mixer": "attention", "router": "topk", "feed_forward": "4*swiglu", "dim": 32, "layers": 1},
    {"mixer": [{"name": "mamba", "state_size": 4, "repeat": 2}, "attention"], "defaults": {"mamba": {"expand": 1}}},
    {
        "causal": False, "dim": 16, "input": {"kind": "vectors", "size": 3}, "head": {"kind": "classifier",
        "classes": 5},
        "blocks": [{"sublayers": [{"mixer": "attention", "norm": "layer"}, {"feed_forward": "mlp"}], "repeat": 2}],
    },
    {
        "altx": 1, "dim": 16, "norm_eps": 1e-6,
        "blocks": [
            {"sublayers": [{"router": {"name": "topk", "k": 1, "renormalise": False}, "targets": [
                {"mixer": "mamba", "memory": {"name": "ntm"}, "attach": "gate", "repeat": 2}, {"feed_forward": "mlp"},
            ]}]},
        ],
    },
]  # fmt: skip

NESTED: Any = "deep"
for _ in range(80):
    NESTED = [NESTED]

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 64, 4096, 65536, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 63) - 1, 1 << 63,
    -(1 << 63),
    10**18, 10**40, 0.0, -0.0, 0.5, 1e-300, 1e308, float("nan"), float("inf"), "", " ", "x" * 5000, "\x1b[2J",
    "\u202e", "\0",
    "on", "1e5", "1:30", "2020-01-01", "<<", "=", "~", "none", "None", "name", "__class__", "__init__", "mlp",
    "swiglu",
    "altx:swiglu", "altx-mamba:mamba", "altx:altx", ":", "a:b:c", "ntm", "topk", "mixture-of-depths", "attention",
    "s4",
    "product-key", "recurrent-memory", "hash", "sinkhorn", "soft", "4096*mlp", "4096*mlp," * 300,
    "mlp,swiglu," * 2000 + "mlp",
    "99999*mlp", "0*mlp", "*", "altx_canary:boom", "os:system", "../../../etc/passwd", "/dev/zero",
    "file:///etc/passwd",
    "tokens", "vectors", "classifier", "language-model", "rms", "gate", "kv", "controller", "ffn", "context",
    [], {}, [[]], [{}], {"": ""}, {"name": "mlp"}, {"name": {"name": "mlp"}}, {"kind": "vectors", "size": 1 << 31},
    [1, 2],
    {"kind": "tokens", "vocab": 1 << 31}, {"name": "mamba", "state_size": 1 << 40}, ["mlp"] * 5000,
    {"repeat": 65536}, NESTED,
    {str(i): i for i in range(300)}, [{"sublayers": [{"feed_forward": "mlp"}], "repeat": 4096}],
]  # fmt: skip

PLUGINS = [
    "attention", "hopfield", "linear-attention", "linformer", "mamba", "moe", "nsm", "ntm", "performer",
    "product-key",
    "recurrent-memory", "reformer", "rwkv", "s4",
]  # fmt: skip
"""Those whose parts are built without files of a library's own, as torch-geometric writes them."""

NAMES: list[str] = []
"""Of components; filled in with what is installed."""

TEXTS = [
    "!!python/object/apply:altx_canary.boom []", "!!python/name:altx_canary.boom", "!!python/module:altx_canary",
    "!!binary aGk=",
    "!!timestamp 2020-01-01", "!!set {a}", "!!int x", "!!float x", "!!omap [a: 1]", "!<tag:yaml.org,2002:int> z",
    "! 3", "!local x",
    "&a [*a]", "&a {<<: *a}", "*a", "{<<: {a: 1}}", "{<<: [{a: 1}, {a: 2}]}", "[" * 3000, "{a: " * 500, "? ? ? ?",
    "- - - - - -",
    "9" * 5000, "-" + "9" * 400, "0x" + "f" * 400, "0b" + "1" * 400, "0x_", "1" + ":59" * 4000, "1:30.5",
    "1" + ":59" * 400 + ".0",
    ".inf", ".nan", "1e999", "1.0e+999", "|", ">-", "'", '"', '"\\x1b[2J"', '"\\ud800"', '"\\U0010ffff"',
    "%YAML 9.9", "---", "...",
    "# " + "c" * 9000, "{a: 1, a: 2}", "{1: 2}", "{true: 1}", "{[1]: 2}", "{? {a: 1} : 2}", "{null: 1}", "\t", "@",
    "`", "\u2028",
    "a: b: c", "[a, b", "]", "}", ",", "x" * 20000, "\ufeff", "[" + "a," * 20000 + "]",
]  # fmt: skip

DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "C64", "F4", "Q9", "", 3, None]
NUMBERS = [0, 1, -1, 7, 1 << 31, 1 << 40, 1 << 62, (1 << 63) - 1, 1 << 64, 10**30, 0.5, "1", None, [], True]


class Canary:
    """Its pickle calls into a module that must never be imported."""

    def __reduce__(self) -> Any:
        return __import__, ("altx_canary",)


class Hang(BaseException):
    """An input took too long."""


def trees(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of every value in plain data."""
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from trees(value, (*path, key))


def mutate_tree(draw: random.Random, data: Any, values: list[Any]) -> Any:
    """Plain data with one value replaced, removed, repeated, nested or renamed."""
    text = json.dumps(data)
    data, few = json.loads(text), max(1, min(300, (1 << 15) // len(text)))
    path = draw.choice(list(trees(data)))
    if not path:
        return draw.choice(values)
    parent = data
    for step in path[:-1]:
        parent = parent[step]
    last = path[-1]
    choice = draw.randrange(-4, 7)
    if choice < 0:
        # Another value of the same type, with which it may well be valid.
        kind = type(parent[last])
        parent[last] = draw.choice(
            [v for v in [*values, *NAMES] if type(v) is kind and (v != v or v != parent[last])] or values
        )
    elif choice <= 2:
        parent[last] = draw.choice(values)
    elif choice == 3:
        del parent[last]
    elif choice == 4:
        parent[last] = [parent[last]] * draw.choice([1, 2, few]) if draw.random() < 0.7 else {"name": parent[last]}
    elif isinstance(parent, dict):
        key = draw.choice(
            ["name", "repeat", "targets", "memory", "attach", "hidden", "x" * 300, "\x1b", "__init__", "k"]
        )
        parent[key] = draw.choice(values) if choice == 5 else parent.pop(last)
    else:
        parent.extend(parent * draw.choice([1, few]))
    return data


def mutate_text(draw: random.Random, text: bytes) -> bytes:
    """Bytes with some of them changed, or with something hostile put into a line."""
    data = bytearray(text)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        at = draw.randrange(len(data) + 1)
        choice = draw.randrange(8)
        if choice == 0 and data:
            data[draw.randrange(len(data))] = draw.randrange(256)
        elif choice == 1:
            data[at:at] = bytes(draw.randrange(256) for _ in range(draw.choice([1, 2, 9])))
        elif choice == 2:
            del data[at : at + draw.choice([1, 5, 50])]
        elif choice == 3:
            data += data[at : at + 200]
        elif choice == 4:
            lines = data.split(b"\n")
            lines.insert(draw.randrange(len(lines) + 1), draw.choice(lines))
            data = bytearray(b"\n".join(lines))
        else:
            # A value, where there is one.
            starts = [found.end() for found in re.finditer(rb"[:,-] ", data)]
            at = draw.choice(starts) if starts and choice > 5 else at
            end = found.start() if (found := re.compile(rb"[,\n}\]]").search(data, at)) else len(data)
            data[at : end if choice > 5 else at] = draw.choice(TEXTS).encode("utf-8", "surrogatepass")
    return bytes(data)


def hostile_yaml(draw: random.Random, seeds: list[Any]) -> bytes:
    """A config file, more or less."""
    import yaml

    data = draw.choice(seeds)
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
        data = mutate_tree(draw, data, VALUES)
    try:
        text = (
            json.dumps(data)
            if draw.random() < 0.2
            else yaml.dump(data, Dumper=yaml.CSafeDumper, default_flow_style=draw.choice([None, False]))
        )
    except (RecursionError, ValueError):
        text = "mixer: mamba"
    content = text.encode("utf-8", "surrogatepass")
    return mutate_text(draw, content) if draw.random() < 0.3 else content


def hostile_weights(draw: random.Random, weights: bytes) -> bytes:
    """A safetensors file, more or less."""
    (length,) = struct.unpack("<Q", weights[:8])
    header, tensors = json.loads(weights[8 : 8 + length]), weights[8 + length :]
    choice = draw.randrange(8)
    if choice == 0:
        return mutate_text(draw, weights)
    if choice == 1:
        return weights[: draw.randrange(len(weights))]
    if choice == 2:
        wrong = draw.choice([0, 1, length - 1, length + 1, len(weights), 1 << 20, 1 << 31, 1 << 62, (1 << 64) - 1])
        return struct.pack("<Q", wrong) + weights[8:]
    if choice == 3:
        return pickle.dumps(Canary()) + weights[draw.randrange(len(weights)) :]
    for _ in range(draw.choice([1, 1, 2, 5])):
        name = draw.choice([name for name in header if isinstance(header[name], dict)] or ["x"])
        entry = header.get(name) or {}
        match draw.randrange(8):
            case 0:
                entry["dtype"] = draw.choice(DTYPES)
            case 1:
                entry["shape"] = [draw.choice(NUMBERS) for _ in range(draw.randrange(5))]
            case 2:
                entry["data_offsets"] = [
                    draw.choice([*NUMBERS, len(tensors)]) for _ in range(draw.choice([0, 1, 2, 2, 3]))
                ]
            case 3:
                header["../" * 5 + "etc/passwd"] = header.pop(name, {})
            case 4:
                header.pop(name, None)
            case 5:
                header["__metadata__"] = draw.choice(VALUES)
            case 6:
                header[name] = draw.choice(VALUES)
            case 7:
                header[draw.choice(["__proto__", "", "\x1b[2J", name + ".weight", "x" * 9000])] = dict(entry)
    if choice == 4:
        tensors = tensors[: draw.randrange(len(tensors) + 1)]
    packed = json.dumps(header).encode()
    return struct.pack("<Q", len(packed)) + packed + tensors


class Fuzzer:
    """Valid data, and what reads it.

    Args:
        folder: where to write inputs.
        seed: of the mutations.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        import torch

        from altx import checkpoint, recipe, registry
        from altx.compose import build, compose
        from altx.errors import AltxError
        from altx.resolve import resolve

        self.folder, self.draw, self.expected = folder, random.Random(seed), AltxError
        self.plugins = registry.Registry(allow=PLUGINS)
        NAMES.extend(component.name for component in self.plugins.components())
        torch.manual_seed(0)
        self.checkpoints = []
        for index, data in enumerate(SEEDS):
            checkpoint.save(compose(data, seed=0, plugins=self.plugins), folder / f"seed-{index}")
            files = {file.name: file.read_bytes() for file in sorted((folder / f"seed-{index}").iterdir())}
            self.checkpoints.append(files)
            shutil.rmtree(folder / f"seed-{index}")
        self.written = [_plain(files["model.yaml"]) for files in self.checkpoints]
        self.outside = folder / "outside"
        self.outside.write_bytes(self.checkpoints[0]["model.yaml"])

        def read_config(path: Path) -> None:
            config = recipe.load(recipe.read(path / "model.yaml"))
            build(resolve(config, self.plugins), device="meta")

        def read_checkpoint(path: Path) -> None:
            checkpoint.load(path, plugins=self.plugins)

        self.readers: dict[str, Callable[[Path], object]] = {"config": read_config, "checkpoint": read_checkpoint}
        # What is valid is read once, so that later no import of a library is taken for something that an input did.
        for index, files in enumerate(self.checkpoints):
            path = folder / f"seed-{index}"
            path.mkdir()
            for name, content in files.items():
                (path / name).write_bytes(content)
            for read in self.readers.values():
                read(path)
            shutil.rmtree(path)

    def input(self, path: Path) -> str:
        """Write an input to a directory; what should read it."""
        draw = self.draw
        path.mkdir()
        if draw.random() < 0.5:
            (path / "model.yaml").write_bytes(hostile_yaml(draw, draw.choice([SEEDS, self.written])))
            return "config"
        files = dict(draw.choice(self.checkpoints))
        for _ in range(draw.choice([1, 1, 1, 2])):
            match draw.randrange(8):
                case 0 | 1 | 2 | 3:
                    files["model.safetensors"] = hostile_weights(draw, files["model.safetensors"])
                case 4 | 5:
                    files["model.yaml"] = hostile_yaml(draw, [_plain(files["model.yaml"])])
                case 6:
                    tree = mutate_tree(draw, json.loads(files["plugins.json"]), [*VALUES, "x; rm -rf y", "[" * 99999])
                    files["plugins.json"] = (
                        mutate_text(draw, json.dumps(tree).encode())
                        if draw.random() < 0.5
                        else json.dumps(tree).encode()
                    )
                case 7:
                    files["pytorch_model.bin"] = files["optimizer.pt"] = files["__init__.py"] = pickle.dumps(Canary())
            if len(files["model.safetensors"]) < 16:
                break
            try:
                json.loads(files["plugins.json"]), struct.unpack("<Q", files["model.safetensors"][:8])
                json.loads(files["model.safetensors"][8 : 8 + struct.unpack("<Q", files["model.safetensors"][:8])[0]])
            except (ValueError, RecursionError, OverflowError):
                break
        for name, content in files.items():
            (path / name).write_bytes(content)
        if draw.random() < 0.03:
            odd = path / draw.choice(list(files))
            odd.unlink()
            match draw.randrange(4):
                case 0:
                    odd.symlink_to(self.outside)
                case 1:
                    odd.symlink_to("/dev/zero")
                case 2:
                    odd.mkdir()
                case 3:
                    odd.symlink_to(odd)
        return "checkpoint"

    def read(self, kind: str, path: Path) -> str:
        """What became of one input: "read", or the type of altx's error.

        Raises:
            BaseException: whatever else was raised.
            AssertionError: if an error's words are no good.
        """
        try:
            with watched(), limited(SECONDS):
                self.readers[kind](path)
        except self.expected as error:
            text = str(error)
            assert text.strip(), "an error without words"
            assert len(text) < MESSAGE, f"an error of {len(text)} characters"
            assert all(c.isprintable() or c == "\n" for c in text), f"an error that a terminal would obey: {text!r}"
            return type(error).__name__
        return "read"


def _plain(content: bytes) -> Any:
    import yaml

    try:
        data = yaml.load(content, yaml.CSafeLoader)
        json.dumps(data)
    except Exception:
        data = SEEDS[0]
    return data


FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pickle.find_class",
    "socket.connect",
    "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate", "shutil.",
    "urllib.Request", "code.__new__", "webbrowser.open",
)  # fmt: skip
_watching = False
_seen: list[str] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _watching:
        return
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if event.startswith(FORBIDDEN) or writes or (event == "import" and "canary" in str(args[0])):
        _seen.append(f"{event} {args!r:.200}")


@contextmanager
def watched() -> Iterator[None]:
    """Fail if what runs inside starts a process, writes a file, unpickles, connects, or imports what it is told to."""
    global _watching
    _watching = True
    try:
        yield
    finally:
        _watching = False
        # Not raised where it happens: code there might catch it.
        assert not _seen, f"reading caused {_seen}"


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Fail if what runs inside takes longer."""

    def stop(number: int, frame: Any) -> None:
        raise Hang(f"more than {seconds} s")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def memory() -> int:
    """Resident bytes of this process, without what is free and kept for later."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Fuzz, and print what came of it as JSON; exit status 1 and the input, if one was mishandled."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.dont_write_bytecode = True
    folder = Path(tempfile.mkdtemp(prefix="altx-fuzz-"))
    fuzzer = Fuzzer(folder, options.seed)
    sys.addaudithook(_audit)
    outcomes: Counter[str] = Counter()
    slowest, largest, before, start = (0.0, 0), (0, 0), (0, 0), time.process_time()
    for index in range(options.inputs):
        path = folder / str(index)
        kind = fuzzer.input(path)
        began = time.process_time()
        try:
            outcomes[f"{kind}: {fuzzer.read(kind, path)}"] += 1
        except BaseException:
            print(f"input {index} of seed {options.seed}, a {kind}, is kept in {path}", file=sys.stderr)
            raise
        slowest = max(slowest, (round(time.process_time() - began, 1), index))
        if (peak := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) > largest[0]:
            largest = peak, index
        shutil.rmtree(path)
        if index == min(1000, options.inputs // 2):
            before = len(gc.get_objects()), memory()
    growth = memory() - before[1]
    objects = len(gc.get_objects()) - before[0]
    shutil.rmtree(folder)
    print(
        json.dumps(
            {
                "inputs": options.inputs, "seconds": round(time.process_time() - start), "slowest": slowest,
                "largest": largest,
                "objects": objects, "growth_mb": round(growth / 1e6, 1), "outcomes": dict(sorted(outcomes.items())),
            }, indent=2,
        )
    )  # fmt: skip
    assert objects < OBJECTS, f"{objects} objects were left"
    assert growth < GROWTH, f"the process grew by {growth} bytes"
    assert largest[0] < PEAK, f"the process had {largest[0]} bytes with input {largest[1]}"


def test_a_few_hundred_mutations_are_read_or_refused() -> None:
    done = subprocess.run([sys.executable, __file__, "300"], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)["outcomes"]
    assert {"checkpoint: CheckpointError", "checkpoint: read", "config: ConfigError", "config: read"} <= outcomes.keys()


if __name__ == "__main__":
    main()
