"""From a config to a blueprint: every name found, every setting checked, every part known to fit.

This is where a composition is refused, with a reason and a remedy, before anything is built. Never
imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from altx.capabilities import (
    Capabilities,
    MemoryCapabilities,
    RouterCapabilities,
    adapted,
    meet,
    placed,
    recursed,
    routed,
    segmented,
)
from altx.config import MAX_BLOCKS, MAX_BUILT, Block, Body, ComponentRef, ModelConfig, RouterConfig, Target, validate
from altx.errors import BrokenPlugin, CompositionError, ConfigError
from altx.joints import WITH_A_VALUE, misfit, unsegmented
from altx.part import Part, config_type, resolve_part
from altx.placement import around, attach_mode, sublayers
from altx.registry import Registry
from altx.spec import FeedForwardSpec, MemorySpec

__all__ = ["Blueprint", "Branch", "Part", "config_type", "resolve", "resolve_part"]


@dataclass(frozen=True)
class Branch:
    """One sublayer, or one target of a router, ready to be built.

    Args:
        part: the mixer, feed-forward, router or memory.
        memory: a memory attached to the mixer.
        attach: how.
        targets: what the router chooses among; or with `depths`, the sublayers of the stack whose depths they are.
        grouped: the targets are built as one bank with stacked weights.
        adapters: names of the adapters around the part, the innermost first.
        turned: the whole branch is run in both directions.
        norm: the norm in front of it.
        capabilities: of the whole.
        depths: how often a router may have the stack applied; 0 where it chooses among targets.
        norm_eps: of the norms in the stack.
        kv_sharing: later depths look up the keys and values of the first.
    """

    part: Part
    memory: Part | None
    attach: str
    targets: tuple[Branch, ...]
    grouped: bool
    adapters: tuple[str, ...]
    turned: bool
    norm: str
    capabilities: Capabilities
    depths: int = 0
    norm_eps: float = 0.0
    kv_sharing: bool = False


@dataclass(frozen=True)
class Blueprint:
    """A model that can be built.

    Args:
        config: the config with every setting written out and every name qualified; resolving it gives
            this blueprint again.
        blocks: branches of each block.
        memory: one whose tokens stand around each segment of all blocks together, or None.
        capabilities: of all of it.
        notes: what a user should know: defaults taken, adapters added.
    """

    config: ModelConfig
    blocks: tuple[tuple[Branch, ...], ...]
    memory: Part | None
    capabilities: Capabilities
    notes: tuple[str, ...]


def resolve(config: ModelConfig, registry: Registry) -> Blueprint:
    """Find, check and connect the parts of a model.

    Raises:
        AltxError: unknown or ambiguous names, wrong settings, parts that cannot live together.
    """
    return _Resolver(config, registry).run()


class _Resolver:
    def __init__(self, config: ModelConfig, registry: Registry) -> None:
        self.config = config
        self.registry = registry
        self.notes: dict[str, None] = {}
        self.exports: set[str] = {"token_ids"} if config.input.kind == "tokens" else set()
        names = [ref.name for block in config.blocks for ref in _references(block)]
        names += [config.stack_memory.name] if config.stack_memory else []
        if any(":" not in name for name in names):
            # Only with every plugin loaded is it certain that a short name means one thing.
            registry.load_all()

    def run(self) -> Blueprint:
        blocks: list[tuple[Branch, ...]] = []
        if (count := sum(block.repeat for block in self.config.blocks)) > MAX_BLOCKS:
            raise ConfigError(f"blocks: {count} with their repeats are more than {MAX_BLOCKS}")
        for index, block in enumerate(self.config.blocks):
            path = f"blocks[{index}].sublayers"
            known = None
            for _ in range(block.repeat):
                # What a layer shares it exports in the first repeat only.
                if known != self.exports:
                    known = set(self.exports)
                    branches = tuple(
                        self.branch(s, where, s.norm) for s, where in sublayers(block, path, self.registry, self.note)
                    )
                blocks.append(branches)
        if (built := sum(map(_built, (branch for block in blocks for branch in block)))) > MAX_BUILT:
            raise ConfigError(
                f"blocks: {built} parts would be built one by one, more than {MAX_BUILT}",
                hint="a router's experts are built together if they are all alike",
            )
        memory, capabilities = self.around(meet(branch.capabilities for block in blocks for branch in block), blocks)
        plain = self.config.model_dump() | {"stack_memory": memory and _settings(memory)}
        plain["blocks"] = [{"sublayers": [_plain(b) | {"norm": b.norm} for b in block]} for block in blocks]
        return Blueprint(
            validate(ModelConfig, plain),
            tuple(blocks),
            memory,
            capabilities,
            tuple(self.notes),
        )

    def around(self, stack: Capabilities, blocks: list[tuple[Branch, ...]]) -> tuple[Part | None, Capabilities]:
        """The memory around the whole stack, if there is one, and what the two can do together."""
        named = around(self.config, self.registry)
        if named is None:
            return None, stack
        memory = self.memory(*named)
        attach_mode(memory.component, "tokens", memory.path, self.note)
        holds = _memory_capabilities(memory)
        stuck = {str(b.part): None for block in blocks for b in block if b.capabilities.streaming != "token"}
        if problem := unsegmented(stack, self.config.causal, (str(memory), holds), ", ".join(stuck)):
            raise CompositionError(f"{memory.path}: {problem[0]}", hint=problem[1])
        self.note(f"{memory.component.name} stands around all blocks, which run in segments of {holds.chunk} tokens")
        return memory, segmented(stack, holds)

    def branch(self, body: Body, path: str, norm: str, target: bool = False) -> Branch:
        if body.mixer:
            branch = self.mixer(body, path, norm, target)
        elif body.feed_forward:
            part = self.part("feed-forward", body.feed_forward, f"{path}.feed_forward", target)
            branch = self.plain(part, norm)
        elif body.router:
            branch = self.routed(body, path, norm)
        else:
            assert body.memory
            memory = self.memory(body.memory, f"{path}.memory")
            if _memory_capabilities(memory).feedback:
                raise CompositionError(f"{path}: {memory} must hear what it read, so it only attaches as controller")
            spec = memory.component.spec
            assert isinstance(spec, MemorySpec)
            if not set(spec.attach) & set(WITH_A_VALUE):
                raise CompositionError(
                    f"{path}: {memory} reads no value for a token, so it is no sublayer by itself",
                    hint=f"attach it to a mixer: it attaches as {', '.join(spec.attach)}",
                )
            branch = self.plain(memory, norm)
        return self.directed(branch)

    def part(self, kind: str, ref: ComponentRef, path: str, target: bool = False) -> Part:
        part = resolve_part(self.registry, kind, ref, path, self.config.dim)
        part = replace(part, capabilities=placed(part.capabilities, self.exports, target=target))
        missing = part.capabilities.requires - self.exports
        if missing:
            raise CompositionError(
                f"{path}: {part} needs {', '.join(sorted(missing))} from an earlier layer, and none exports it",
                hint="put a layer that provides it before this one (`altx show NAME` lists what a layer provides)",
            )
        self.exports |= part.capabilities.provides
        return part

    def plain(self, part: Part, norm: str) -> Branch:
        adapters: list[str] = []
        capabilities = part.capabilities
        if capabilities.len_multiple > 1:
            adapters.append("pad")
            capabilities = adapted(capabilities, "pad")
        if self.config.causal and capabilities.causal and capabilities.streaming == "none":
            if capabilities.graph != "ignored":
                raise CompositionError(
                    f"{part.path}: {part} does not stream and reads a graph, which a replay of the prefix lacks",
                    hint="use it in an encoder (causal: false), or a mixer that streams",
                )
            if capabilities.requires:
                raise CompositionError(
                    f"{part.path}: {part} does not stream and needs {', '.join(sorted(capabilities.requires))} of "
                    "every token, which a replay of the prefix does not have",
                    hint="use it in an encoder (causal: false), or a mixer that streams",
                )
            adapters.append("replay")
            capabilities = adapted(capabilities, "replay")
            self.note(f"{part} does not stream: every step runs the whole prefix again (prefix replay, O(T^2))")
        return Branch(part, None, "", (), False, tuple(adapters), False, norm, capabilities)

    def mixer(self, body: Body, path: str, norm: str, target: bool) -> Branch:
        assert body.mixer
        part = self.part("mixer", body.mixer, f"{path}.mixer", target)
        branch = self.plain(part, norm)
        if not body.memory:
            return branch
        memory = self.memory(body.memory, f"{path}.memory")
        self.once(part, ("residual", "norm"), "a memory is attached to it")
        attach = attach_mode(memory.component, body.attach, f"{path}.attach", self.note)
        holds = _memory_capabilities(memory)
        if problem := misfit(attach, (str(part), part.capabilities), branch.adapters, (str(memory), holds)):
            raise CompositionError(f"{path}.attach: {attach}: {problem[0]}", hint=problem[1])
        both = meet([branch.capabilities, memory.capabilities])
        return Branch(part, memory, attach, (), False, branch.adapters, False, norm, both)

    def memory(self, ref: ComponentRef, path: str) -> Part:
        memory = self.part("memory", ref, path)
        if _memory_capabilities(memory).scope == "shared":
            raise CompositionError(f"{path}: {memory} is shared by layers, which this altx cannot do yet")
        return memory

    def once(self, part: Part, names: tuple[str, ...], why: str) -> None:
        """Refuse a layer that includes what would be there twice: its residual, or the block's norm before it."""
        wrongs = {"residual": "its residual, which is counted wrongly", "norm": "its norm, and would be normed twice"}
        for name in names:
            if name in part.capabilities.includes:
                raise CompositionError(f"{part.path}: {part} includes {wrongs[name]} where {why}")

    def routed(self, body: Body, path: str, norm: str) -> Branch:
        assert body.router and body.targets
        router = self.part("router", body.router, f"{path}.router")
        capabilities = router.capabilities
        if not isinstance(capabilities, RouterCapabilities):
            raise _wrong_promises(router, RouterCapabilities)
        if capabilities.mixes and any(not target.feed_forward for target in body.targets):
            raise CompositionError(
                f"{path}.router: {router} gives its targets mixtures of tokens, which are no sequence",
                hint="make feed-forwards its targets, or use a router that sends tokens as they are (topk)",
            )
        looks_ahead = capabilities.lookahead in ("sequence", "batch")
        if self.config.causal and looks_ahead and capabilities.decode in ("same", "forbid"):
            raise CompositionError(
                f"{path}.router: {router} looks at the whole {capabilities.lookahead} to route a token, "
                "so it cannot enter a causal model",
                hint="use a router that decides token by token (topk), or make the model an encoder: "
                "causal: false with another head, e.g. --set causal=false",
            )
        depths = body.targets[0].depths or 0
        if capabilities.stepwise and not depths:
            raise CompositionError(
                f"{path}.router: {router} decides how often a stack of sublayers is applied to a token, and these "
                "targets are no depths of one",
                hint="give depths (--depths 3), write them as targets: [{depths: 3, sublayers: [{mixer: ...}, "
                "{feed_forward: ...}]}], or use a router over any targets (topk)",
            )
        targets: list[Branch] = []
        for index, target in enumerate(body.targets[0].sublayers or []):
            targets.append(self.branch(target, f"{path}.targets[0].sublayers[{index}]", target.norm, target=True))
        for index, each in enumerate([] if depths else body.targets):
            branch = self.branch(each, f"{path}.targets[{index}]", "none", target=True)
            self.once(branch.part, ("residual", "norm"), "a router weighs it")
            targets += [branch] * each.repeat
        if isinstance(router.config, RouterConfig):
            n = depths or len(targets)
            with router.component.guard(f"{path}.router: {router}: asking whether {n} targets fit failed"):
                try:
                    router.config.fit_targets(n)
                except ValueError as error:
                    raise ConfigError(f"{path}.router: {router} cannot choose among {n} targets: {error}") from None
        first = targets[0]
        # A bank is built as it is: with no adapter around it, and one way.
        bare = not (first.adapters or first.turned)
        alike = bare and all(branch is first or _plain(branch) == _plain(first) for branch in targets)
        spec = first.part.component.spec
        grouped = alike and not depths and isinstance(spec, FeedForwardSpec) and bool(spec.grouped)
        for branch in targets:
            if branch.capabilities.provides:
                raise CompositionError(
                    f"{branch.part.path}: {branch.part} exports values for later layers, "
                    "and a router does not send it every token"
                )
            if not branch.capabilities.masked:
                raise CompositionError(
                    f"{branch.part.path}: {branch.part} takes no mask, so no tokens can be kept from it by a router"
                )
            if body.targets[0].kv_sharing and not meet([branch.capabilities]).shares_kv:
                who = branch.memory if branch.memory and branch.part.capabilities.shares_kv else branch.part
                raise CompositionError(
                    f"{who.path}: {who} shares no keys and values, so later depths cannot look up those of the first",
                    hint="stack attention and what looks at each token alone (feed-forwards), or leave out kv_sharing",
                )
            if self.config.causal and branch.capabilities.partial != "any":
                raise CompositionError(
                    f"{branch.part.path}: {branch.part} goes on at multiples of {branch.capabilities.split_multiple} "
                    "tokens, and a router gives it now more, now less",
                    hint="use a mixer that streams by token",
                )
            if branch.capabilities.growth == "linear":
                self.note(f"{router}: what it keeps tokens from does not grow with these: states are at most as shown")
        able = [branch.capabilities for branch in targets]
        whole = recursed(capabilities, meet(able)) if depths else routed(capabilities, able)
        return Branch(
            router, None, "", tuple(targets), grouped, (), False, norm, whole, depths, self.config.norm_eps,
            body.targets[0].kv_sharing,
        )  # fmt: skip

    def directed(self, branch: Branch) -> Branch:
        """The branch, made to look the way the model does, or refused."""
        part = branch.part
        if self.config.causal and not branch.capabilities.causal:
            raise CompositionError(
                f"{part.path}: {part} lets a token see later ones, so it cannot enter a causal model",
                hint="use a causal mixer, or make the model an encoder: causal: false (--set causal=false)",
            )
        if self.config.causal or branch.capabilities.bidirectional:
            return branch
        if not branch.capabilities.causal:
            raise CompositionError(
                f"{part.path}: {part} looks both ways, and what it is composed with here only backwards, so they "
                "cannot be run together in either direction",
                hint="give each a sublayer of its own" if branch.memory else "use a router that looks both ways, too",
            )
        self.once(part, ("residual",), "it is run in both directions")
        self.note(f"{part} looks only backwards: the encoder runs two of it, one in each direction")
        return replace(branch, turned=True, capabilities=adapted(branch.capabilities, "bidirectional"))

    def note(self, text: str) -> None:
        self.notes[text] = None


def _memory_capabilities(memory: Part) -> MemoryCapabilities:
    if not isinstance(memory.capabilities, MemoryCapabilities):
        raise _wrong_promises(memory, MemoryCapabilities)
    return memory.capabilities


def _wrong_promises(part: Part, expected: type[Capabilities]) -> BrokenPlugin:
    return BrokenPlugin(f"{part}: its capabilities must be {expected.__name__}", hint=part.component.remedy)


def _references(body: Block | Body) -> list[ComponentRef]:
    """Every component that a block or a body names."""
    if isinstance(body, Block):
        return [ref for sublayer in body.sublayers for ref in _references(sublayer)]
    own = [ref for ref in (body.mixer, body.feed_forward, body.router, body.memory) if ref]
    inner: list[Body] = [*(body.targets or []), *((isinstance(body, Target) and body.sublayers) or [])]
    return own + [ref for each in inner for ref in _references(each)]


def _built(branch: Branch) -> int:
    """How many modules plugins build for a branch."""
    own = 1 + bool(branch.memory) + (1 if branch.grouped else sum(map(_built, branch.targets)))
    return 2 * own if branch.turned else own


def _plain(branch: Branch) -> dict[str, Any]:
    """A branch as the config that would give it again."""
    key = branch.part.component.spec.kind.replace("-", "_")
    data: dict[str, Any] = {key: _settings(branch.part)}
    if branch.memory:
        data |= {"memory": _settings(branch.memory), "attach": branch.attach}
    if branch.depths:
        stack = [_plain(each) | {"norm": each.norm} for each in branch.targets]
        data["targets"] = [{"depths": branch.depths, "sublayers": stack, "kv_sharing": branch.kv_sharing}]
    elif branch.targets:
        data["targets"] = []
        for target in map(_plain, branch.targets):
            if data["targets"] and {**data["targets"][-1], "repeat": 1} == target | {"repeat": 1}:
                data["targets"][-1]["repeat"] += 1
            else:
                data["targets"].append(target | {"repeat": 1})
    return data


def _settings(part: Part) -> dict[str, Any]:
    with part.component.guard(f"{part.path}: writing out the settings of {part} failed"):
        return {"name": part.component.qualified, **part.config.model_dump(mode="json")}
