"""The one schema of a model: for YAML files, the command line and Python. Never imports torch.

A `ModelConfig` lists its blocks and their sublayers. `altx.recipe` turns the short forms (patterns,
defaults) into it, and `altx.resolve` writes every setting of every component out.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, ValidationError, model_validator

from altx.errors import ConfigError, printable, shown

MAX_BLOCKS = 4096
MAX_PARTS = 1 << 16
"""Of a model: what a config can ask for in one line, such as a router of routers of experts, has a limit."""
MAX_BUILT = 1 << 13
"""Of those parts that are built one by one, which takes about a millisecond each."""
MAX_SIZE = 1 << 31
"""Of a vocabulary and the like, so that no number of weights exceeds 64 bits."""
MAX_PROBLEMS = 10


class Config(BaseModel):
    """Base of every config, a plugin's included: frozen, unknown keys refused, no silent conversions.

    A field needs a default wherever one makes sense, and a description: `altx show` prints both. The
    name `name` is taken.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if "name" in cls.model_fields:
            raise TypeError(f"{cls.__name__} has a field 'name', which is taken: it names the component")

    def fit(self, dim: int) -> None:
        """Raise ValueError if this config cannot be used at model width `dim`; say what would be accepted."""


class RouterConfig(Config):
    """Base of a router's config."""

    def fit_targets(self, n: int) -> None:
        """Raise ValueError if this router cannot choose among n targets; say what would be accepted."""


class ComponentRef(BaseModel):
    """A component by name, with its own config beside it: `mamba`, or `{name: mamba, state_size: 16}`."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    name: str = Field(max_length=200, description="short name, or 'distribution:name' where two plugins offer one")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def config(self) -> dict[str, Any]:
        """The component's own settings, as written."""
        return dict(self.model_extra or {})


class Body(Config):
    """One branch of a block: exactly one of mixer, feed_forward, router, or a memory by itself."""

    mixer: ComponentRef | None = Field(None, description="a token mixer")
    feed_forward: ComponentRef | None = Field(None, description="a feed-forward layer")
    router: ComponentRef | None = Field(None, description="a router over `targets`")
    targets: list[Target] | None = Field(None, description="what the router chooses among")
    memory: ComponentRef | None = Field(None, description="a memory: attached to the mixer, or by itself")
    attach: str | None = Field(None, description="how the memory is attached; each memory has a default")

    @model_validator(mode="after")
    def _one_body(self) -> Self:
        # A target may have sublayers, too.
        bodies = [name for name in ("mixer", "feed_forward", "router", "sublayers") if getattr(self, name, None)]
        if len(bodies) > 1:
            raise ValueError(f"a sublayer is one of mixer, feed_forward and router, not {' and '.join(bodies)}")
        if not bodies and not self.memory:
            raise ValueError("a sublayer needs a mixer, a feed_forward, a router or a memory")
        if self.memory and bodies and bodies != ["mixer"]:
            raise ValueError(f"a memory attaches to a mixer, not to {bodies[0]}; give it a sublayer of its own")
        if self.attach and not (self.memory and self.mixer):
            raise ValueError("attach says how a memory joins a mixer; this sublayer does not have both")
        if bool(self.router) != bool(self.targets):
            raise ValueError("a router needs targets, and targets a router")
        if len(self.targets or []) > 1 and any(target.depths for target in self.targets or []):
            raise ValueError("a router that chooses among depths has no other targets; give it a sublayer of its own")
        return self


class Target(Body):
    """A router's target, or `repeat` of them with weights of their own; or the depths of one stack of sublayers."""

    repeat: int = Field(1, ge=1, le=65536, description="how many such targets")
    sublayers: list[Sublayer] | None = Field(None, min_length=1, description="a stack, applied up to `depths` times")
    depths: int | None = Field(None, ge=1, le=1024, description="targets: the stack applied once, twice, ... so often")
    kv_sharing: bool = Field(
        False, description="depths: all look up the keys and values of the first, which alone is cached"
    )

    @model_validator(mode="after")
    def _one_stack(self) -> Self:
        if bool(self.sublayers) != bool(self.depths):
            raise ValueError("depths need sublayers, which are applied so often, and sublayers need depths")
        if self.depths and self.repeat > 1:
            raise ValueError("depths share their weights, so they are not repeated; give more depths")
        if self.kv_sharing and not self.depths:
            raise ValueError("kv_sharing is for the depths of a stack of sublayers, and this target has none")
        return self


class Sublayer(Body):
    """y = x + body(norm(x))."""

    norm: Literal["rms", "layer", "none"] = Field("rms", description="the norm before the body")


class Block(Config):
    """Sublayers one after another, `repeat` times with weights of their own."""

    sublayers: list[Sublayer] = Field(min_length=1, description="in order")
    repeat: int = Field(1, ge=1, le=65536, description="how many such blocks")


class TokensInput(Config):
    """Integer tokens, embedded."""

    kind: Literal["tokens"] = "tokens"
    vocab: int = Field(256, gt=0, le=MAX_SIZE, description="number of tokens; 256 reads bytes")


class VectorsInput(Config):
    """Continuous vectors (B, T, size), projected."""

    kind: Literal["vectors"]
    size: int = Field(gt=0, le=MAX_SIZE, description="size of an input vector")


class LanguageModelHead(Config):
    """A logit per token of the vocabulary at every position."""

    kind: Literal["language-model"] = "language-model"
    tie: bool = Field(True, description="share the embedding's weights")


class ClassifierHead(Config):
    """Logits (B, classes) for a whole sequence."""

    kind: Literal["classifier"]
    classes: int = Field(gt=0, le=MAX_SIZE, description="number of classes")
    pool: Literal["mean", "last"] = Field("mean", description="over real tokens")


class VectorsHead(Config):
    """A vector (B, T, size) at every position."""

    kind: Literal["vectors"]
    size: int = Field(gt=0, le=MAX_SIZE, description="size of an output vector")


Input = Annotated[TokensInput | VectorsInput, Field(discriminator="kind")]
Head = Annotated[LanguageModelHead | ClassifierHead | VectorsHead, Field(discriminator="kind")]


class ModelConfig(Config):
    """A whole model, block by block."""

    altx: Literal[1] = Field(1, description="version of this schema")
    dim: int = Field(128, gt=0, le=1 << 20, description="model width D")
    causal: bool = Field(True, description="no output depends on a later token")
    input: Input = Field(TokensInput(), description="what goes in")
    head: Head = Field(LanguageModelHead(), description="what comes out")
    final_norm: Literal["rms", "layer", "none"] = Field("rms", description="the norm before the head")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of every norm")
    blocks: list[Block] = Field(min_length=1, max_length=MAX_BLOCKS, description="the layers, in order")
    stack_memory: ComponentRef | None = Field(
        None, description="a memory whose tokens stand around each segment of all blocks together"
    )

    @model_validator(mode="after")
    def _head_fits_input(self) -> Self:
        if self.head.kind == "language-model" and self.input.kind != "tokens":
            raise ValueError("a language-model head needs tokens as input; for vectors use the head 'vectors'")
        return self

    @model_validator(mode="after")
    def _not_endless(self) -> Self:
        if (n := sum(block.repeat * sum(map(_parts, block.sublayers)) for block in self.blocks)) > MAX_PARTS:
            raise ValueError(f"{n} parts, with all repeats, are more than {MAX_PARTS}")
        return self


def _parts(body: Body) -> int:
    """How many components a body is made of."""
    own = sum(part is not None for part in (body.mixer, body.feed_forward, body.router, body.memory))
    stack = body.sublayers if isinstance(body, Target) else None
    return own + sum(target.repeat * _parts(target) for target in body.targets or []) + sum(map(_parts, stack or []))


AnyConfig = TypeVar("AnyConfig", bound=BaseModel)


def validate(model: type[AnyConfig], data: Any, *, path: str = "", owner: str = "") -> AnyConfig:
    """Build a config from plain data.

    Args:
        model: the config class.
        data: a mapping, as read from YAML.
        path: where the data sits in the file.
        owner: plugin and version that the class belongs to, for messages.

    Raises:
        ConfigError: naming each wrong value's path, the value, and what would be accepted.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = error.errors()
        problems = [_explain(model, data, problem, path) for problem in found[:MAX_PROBLEMS]]
        problems += [f"and {len(found) - MAX_PROBLEMS} more"] * (len(found) > MAX_PROBLEMS)
        raise ConfigError("\n".join(problems), hint=f"(settings of {owner})" if owner else "") from None


def _explain(model: type[BaseModel], data: Any, problem: Mapping[str, Any], path: str) -> str:
    """One of pydantic's findings as a line: path, value, what would be accepted."""
    steps = _steps_in(data, problem["loc"])
    where = _join(path, steps)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(model, steps[:-1])
        close = difflib.get_close_matches(str(steps[-1]), known, n=1, cutoff=0.5)
        guess = f"; did you mean {close[0]!r}?" if close else ""
        return f"{where}: unknown key{guess} (known: {', '.join(known) or 'none'})"
    if problem["type"] == "missing":
        return f"{where}: missing"
    if problem["type"] == "union_tag_not_found":
        return f"{where}: say which kind it is, e.g. {{kind: {'tokens' if where == 'input' else 'classifier'}, ...}}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    value = problem["input"]
    instead = "" if isinstance(value, (Mapping, BaseModel)) else f", not {shown(value)}"
    return f"{where or 'the model'}: {message}{instead}"


def _steps_in(data: Any, location: Sequence[str | int]) -> list[str | int]:
    """A location without the names of union members, which pydantic puts between the keys of the file."""
    steps: list[str | int] = []
    for position, step in enumerate(location):
        inside = isinstance(data, Mapping) and step in data
        element = isinstance(data, Sequence) and isinstance(step, int) and step < len(data)
        if inside or element:
            data = data[step]
            steps.append(step)
        elif position == len(location) - 1:
            steps.append(step)
    return steps


def _join(path: str, steps: Sequence[str | int]) -> str:
    for step in steps:
        name = printable(str(step), 60)
        path = f"{path}[{name}]" if isinstance(step, int) else f"{path}.{name}" if path else name
    return path


def _known_keys(model: Any, steps: Sequence[str | int]) -> list[str]:
    """Field names that are legal at a place in a model."""
    try:
        schema = model.model_json_schema()
    except PydanticUserError:
        # A plugin's field may be of a type that JSON does not know.
        return [] if steps else sorted(model.model_fields)

    def follow(node: dict[str, Any]) -> list[dict[str, Any]]:
        if "$ref" in node:
            return follow(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]])
        return [leaf for option in node.get("anyOf", node.get("oneOf", [])) for leaf in follow(option)] or [node]

    nodes = follow(schema)
    for step in steps:
        inner = [n.get("items") if isinstance(step, int) else n.get("properties", {}).get(step) for n in nodes if n]
        nodes = [leaf for node in inner if node for leaf in follow(node)]
    return sorted({key for node in nodes for key in node.get("properties", {})})
