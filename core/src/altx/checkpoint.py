"""Checkpoints: a directory with the weights, the config, and who made the parts. Data only, never pickled.

model.safetensors   the weights
model.yaml          the config, every setting written out
plugins.json        distributions and versions of the parts, and of altx and torch
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_model
from torch import Tensor

from altx import __version__, plain, recipe, registry
from altx.compose import build
from altx.config import ModelConfig, validate
from altx.errors import AltxError, CheckpointError, ConfigError, UnknownComponent, describe, printable
from altx.model import Model
from altx.resolve import resolve

DISTRIBUTION, VERSION = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*"), re.compile(r"[0-9][0-9a-z.+]*")
MAX_HEADER_BYTES, MAX_PLUGINS_BYTES = 32 << 20, 1 << 20
FLOATS = {"F64", "F32", "F16", "BF16"}
"""Any of them may stand for another: a model may be saved in half precision."""
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.complex64: "C64",
}  # fmt: skip
WEIGHTS, CONFIG, PLUGINS = "model.safetensors", "model.yaml", "plugins.json"


def to_yaml(config: ModelConfig) -> str:
    """A config as the text of a model.yaml."""
    return plain.dump(recipe.dump(config))


def save(model: Model, path: str | Path, *, extra: dict[str, bytes] | None = None) -> None:
    """Write a checkpoint; the directory appears complete or not at all.

    Args:
        path: directory to make; it must not exist.
        extra: more files to put beside the weights, by name.

    Raises:
        CheckpointError: if the path exists or cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise CheckpointError(f"{path} exists already", hint="choose another path, or remove it first")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        save_model(model, str(partial / WEIGHTS))
        (partial / CONFIG).write_text(to_yaml(model.config), "utf-8")
        (partial / PLUGINS).write_text(json.dumps(_versions(model.config), indent=2) + "\n", "utf-8")
        for name, content in (extra or {}).items():
            (partial / name).write_bytes(content)
        for file in partial.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        partial.rename(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path}: cannot be written: {reason}") from error


def load(path: str | Path, *, plugins: registry.Registry | None = None) -> Model:
    """Read a checkpoint, from anybody: it is data, and files beside those three are not looked at.

    Raises:
        CheckpointError: if files are missing or damaged, a plugin is not installed, or the weights
            belong to another config.
    """
    path = Path(path)
    for name in (WEIGHTS, CONFIG):
        if not (path / name).is_file():
            raise CheckpointError(f"{path} is not a checkpoint: it has no {name}")
        if not (target := (path / name).resolve()).is_relative_to(path.resolve()):
            raise CheckpointError(
                f"{path / name} is a link to {target}, outside of the checkpoint",
                hint="put the file itself there: cp -rL makes a copy of the directory without links",
            )
    recorded = _recorded(path)
    try:
        config = validate(ModelConfig, recipe.read(path / CONFIG))
        model = build(resolve(config, plugins or registry.default()), device="meta")
    except UnknownComponent as error:
        raise _missing_plugin(path, error, recorded) from None
    except ConfigError as error:
        raise CheckpointError(f"{path / CONFIG}: {error.what}", hint=error.hint) from None
    return _fill(model, path / WEIGHTS)


def _fill(model: Model, path: Path) -> Model:
    """A model on the meta device, given the weights of a file."""
    expected = model.state_dict()
    try:
        with path.open("rb") as raw:
            if (length := int.from_bytes(raw.read(8), "little")) > MAX_HEADER_BYTES:
                raise SafetensorError(f"its header would have {length} bytes")
        with safe_open(str(path), framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            found = {name: (tuple(each.get_shape()), str(each.get_dtype())) for name, each in slices.items()}
            if wrong := sorted(_differences(found, expected)):
                more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
                raise CheckpointError(f"{path} belongs to another config: {'; '.join(wrong[:3])}{more}")
            # Copies, because a mapped file is not aligned as new tensors are, and matrix products may round otherwise.
            tensors = {name: file.get_tensor(name).clone() for name in found}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged or cut short: {describe(error)}", hint="use an earlier checkpoint, or copy it again"
        ) from None
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.load_state_dict(tensors, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def _differences(found: dict[str, tuple[tuple[int, ...], str]], expected: dict[str, Tensor]) -> Iterator[str]:
    """Where the tensors of a file, by shape and type, are not those of a model, in words."""
    for name in found.keys() & expected.keys():
        (shape, dtype), tensor = found[name], expected[name]
        if shape != tuple(tensor.shape):
            yield f"{name} is {shape}, the config says {tuple(tensor.shape)}"
        elif (wanted := DTYPES.get(tensor.dtype)) and dtype not in (FLOATS if wanted in FLOATS else {wanted}):
            yield f"{name} is {dtype}, the config says {wanted}"
    yield from (f"{name} is missing" for name in expected.keys() - found.keys())
    yield from (f"{printable(name, 100)} is left over" for name in found.keys() - expected.keys())


def _versions(config: ModelConfig) -> dict[str, Any]:
    """Versions of everything a config's parts came from."""
    plain = recipe.dump(config)
    names = {name.partition(":")[0] for name in _names([plain["blocks"], plain.get("stack_memory")])}
    plugins = {plugin.distribution: plugin.version for plugin in registry.default().plugins}
    return {
        "altx": __version__,
        "torch": torch.__version__,
        "plugins": {n: plugins[n] for n in sorted(names) if n in plugins},
    }


def _names(node: Any) -> list[str]:
    if isinstance(node, list):
        return [name for item in node for name in _names(item)]
    if isinstance(node, dict):
        return [node["name"]] if "name" in node else [name for value in node.values() for name in _names(value)]
    return []


def _recorded(path: Path) -> dict[str, str]:
    """Plugin versions that a checkpoint was made with, as far as they can be read."""
    try:
        with (path / PLUGINS).open("rb") as file:
            recorded = json.loads(file.read(MAX_PLUGINS_BYTES))["plugins"]
        # They end up in a command that the user is told to run.
        return {n: v for n, v in recorded.items() if DISTRIBUTION.fullmatch(n) and VERSION.fullmatch(v)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _missing_plugin(path: Path, error: AltxError, recorded: dict[str, str]) -> CheckpointError:
    installed = {plugin.distribution for plugin in registry.default().plugins}
    lacking = [f"{name}=={version}" for name, version in recorded.items() if name not in installed]
    if lacking:
        return CheckpointError(
            f"{path}: {error.what}", hint=f"the checkpoint was made with it: pip install {' '.join(lacking)}"
        )
    return CheckpointError(f"{path}: {error.what}", hint=error.hint)
