"""What a layer carries from one call to the next: an immutable tree of tensors that know their axes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from altx.errors import StateError


@dataclass(frozen=True)
class Leaf:
    """What one tensor of a state is.

    Args:
        batch_dim: axis of the rows, or None if all rows share the tensor.
        seq_dim: axis that holds one slot per real token, slot j of a row holding its j-th token, or
            None. Only such a leaf can be cropped.
        kind: recurrent, conv, kv, cross, memory, address, stat, counter or external; for display.
        fp32: keeps its dtype when the state is cast, because it accumulates over long sequences.
    """

    batch_dim: int | None = 0
    seq_dim: int | None = None
    kind: str = "recurrent"
    fp32: bool = False


COUNTER = Leaf(kind="counter")


@dataclass(frozen=True)
class State:
    """An immutable state. Every operation returns a new one; tensors are never written to.

    Args:
        leaves: tensors by name.
        spec: a Leaf for each of them.
        children: states of inner layers by name.
        seen: (B,) int64, real tokens consumed by each row, or None where only the children count.
    """

    leaves: Mapping[str, Tensor] = field(default_factory=dict)
    spec: Mapping[str, Leaf] = field(default_factory=dict)
    children: Mapping[str, State] = field(default_factory=dict)
    seen: Tensor | None = None

    def __post_init__(self) -> None:
        if self.leaves.keys() != self.spec.keys():
            raise StateError(f"leaves {sorted(self.leaves)} do not match their spec {sorted(self.spec)}")

    @staticmethod
    def zeros(
        batch: int,
        shapes: Mapping[str, Sequence[int]],
        spec: Mapping[str, Leaf],
        like: Tensor,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """A sequence's start as most layers have it: leaves (batch, *shape) of zeros, nothing seen.

        Args:
            batch: number of rows.
            shapes: by leaf, without the rows.
            spec: as for a state; a leaf that is fp32 gets float32 or more, a counter int64.
            like: a parameter, whose device and dtype are the defaults.
            device, dtype: what `init_state` was given.
        """
        device, dtype = device or like.device, dtype or like.dtype

        def kept(leaf: Leaf) -> torch.dtype:
            if leaf.kind == "counter":
                return torch.int64
            return torch.promote_types(dtype, torch.float32) if leaf.fp32 else dtype

        leaves = {
            name: torch.zeros(batch, *shape, device=device, dtype=kept(spec[name])) for name, shape in shapes.items()
        }
        return State(leaves, spec, seen=torch.zeros(batch, device=device, dtype=torch.int64))

    @property
    def tokens(self) -> Tensor | None:
        """(B,) real tokens consumed by each row, from here or from the first child that counts them."""
        if self.seen is not None:
            return self.seen
        return next((seen for child in self.children.values() if (seen := child.tokens) is not None), None)

    def __getitem__(self, name: str) -> Tensor:
        return self.leaves[name]

    def child(self, name: str) -> State | None:
        """The state of an inner layer, or None if it has none."""
        return self.children.get(name)

    def replace(self, *, seen: Tensor | None = None, **leaves: Tensor) -> State:
        """A copy with some leaves changed; `seen` stays unless given."""
        if unknown := leaves.keys() - self.leaves.keys():
            raise StateError(f"no leaf named {', '.join(sorted(unknown))}; there are {', '.join(self.leaves)}")
        return State({**self.leaves, **leaves}, self.spec, self.children, self.seen if seen is None else seen)

    def map(self, fn: Callable[[Tensor, Leaf], Tensor]) -> State:
        """Apply fn to every leaf and counter, here and below."""
        return replace(
            self,
            leaves={name: fn(tensor, self.spec[name]) for name, tensor in self.leaves.items()},
            children={name: child.map(fn) for name, child in self.children.items()},
            seen=None if self.seen is None else fn(self.seen, COUNTER),
        )

    def detach(self) -> State:
        """The same values, cut off from the graph that computed them."""
        return self.map(lambda tensor, leaf: tensor.detach())

    def clone(self) -> State:
        """A copy that shares no storage."""
        return self.map(lambda tensor, leaf: tensor.clone())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
        """Move, and cast the floating leaves; fp32 leaves keep their dtype."""

        def cast(tensor: Tensor, leaf: Leaf) -> Tensor:
            keep = leaf.fp32 or not tensor.is_floating_point()
            return tensor.to(device=device, dtype=None if keep else dtype)

        return self.map(cast)

    def select(self, index: Tensor) -> State:
        """Rows at `index` (any length, repeats allowed): beam reordering, forking, subsets."""

        def pick(tensor: Tensor, leaf: Leaf) -> Tensor:
            return tensor if leaf.batch_dim is None else tensor.index_select(leaf.batch_dim, index)

        return self.map(pick)

    def repeat(self, n: int) -> State:
        """Each row n times in a row."""

        def copies(tensor: Tensor, leaf: Leaf) -> Tensor:
            return tensor if leaf.batch_dim is None else tensor.repeat_interleave(n, leaf.batch_dim)

        return self.map(copies)

    @staticmethod
    def cat(states: Sequence[State]) -> State:
        """The rows of states of one structure, one after another. Leaves that all rows share are the first's.

        Raises:
            StateError: if their rows differ in shape, as grown caches do.
        """

        def join(tensors: Sequence[Tensor], leaf: Leaf, name: str) -> Tensor:
            if leaf.batch_dim is None:
                return tensors[0]
            shapes = [(*t.shape[: leaf.batch_dim], *t.shape[leaf.batch_dim + 1 :]) for t in tensors]
            if len(set(shapes)) > 1:
                raise StateError(f"rows of leaf {name!r} differ in shape: {' and '.join(map(str, set(shapes)))}")
            return torch.cat([*tensors], leaf.batch_dim)

        first = states[0]
        seen = [state.seen for state in states if state.seen is not None]
        return State(
            {name: join([state[name] for state in states], leaf, name) for name, leaf in first.spec.items()},
            first.spec,
            {name: State.cat([state.children[name] for state in states]) for name in first.children},
            join(seen, COUNTER, "seen") if seen else None,
        )

    def where(self, keep: Tensor, old: State) -> State:
        """This state in the rows where `keep` (B,) is true, the old one elsewhere. Shared leaves are this one's.

        Raises:
            StateError: if the two differ in shape, as grown caches do.
        """

        def choose(new: Tensor, before: Tensor, leaf: Leaf, name: str) -> Tensor:
            if leaf.batch_dim is None:
                return new
            if new.shape != before.shape:
                raise StateError(
                    f"cannot choose rows of leaf {name!r}: {tuple(new.shape)} against {tuple(before.shape)}",
                    hint="mask the tokens instead, or give both states the same capacity",
                )
            shape = [1] * new.dim()
            shape[leaf.batch_dim] = -1
            return torch.where(keep.reshape(shape), new, before)

        seen = self.seen
        if seen is not None and old.seen is not None:
            seen = torch.where(keep, seen, old.seen)
        return State(
            {name: choose(self[name], old[name], leaf, name) for name, leaf in self.spec.items()},
            self.spec,
            {name: child.where(keep, old.children[name]) for name, child in self.children.items()},
            seen,
        )

    def crop(self, n: int) -> State:
        """Forget the last n real tokens of every row, exactly. Buffers keep their size.

        Raises:
            StateError: if some leaf cannot forget; keep an earlier state instead.
        """
        if n == 0:
            return self
        if n < 0:
            raise StateError(f"cannot drop {n} tokens")
        for name, leaf in self.spec.items():
            if leaf.seq_dim is None and leaf.batch_dim is not None:
                raise StateError(
                    f"leaf {name!r} ({leaf.kind}) cannot drop its last {n} tokens",
                    hint="keep the earlier state and continue from it; states are immutable",
                )
        if self.leaves and self.seen is None:
            raise StateError("a state that counts no tokens cannot drop any")
        seen = None if self.seen is None else (self.seen - n).clamp(min=0)

        def clear(tensor: Tensor, leaf: Leaf) -> Tensor:
            if leaf.seq_dim is None or leaf.batch_dim is None or seen is None:
                return tensor
            rows, slots = [1] * tensor.dim(), [1] * tensor.dim()
            rows[leaf.batch_dim] = slots[leaf.seq_dim] = -1
            step = torch.arange(tensor.shape[leaf.seq_dim], device=tensor.device)
            return tensor.masked_fill(step.reshape(slots) >= seen.reshape(rows), 0)

        return State(
            {name: clear(tensor, self.spec[name]) for name, tensor in self.leaves.items()},
            self.spec,
            {name: child.crop(n) for name, child in self.children.items()},
            seen,
        )

    def bytes(self) -> int:
        """Size of all leaves, here and below."""
        own = sum(tensor.numel() * tensor.element_size() for tensor in self.leaves.values())
        return own + sum(child.bytes() for child in self.children.values())

    def walk(self, prefix: str = "") -> Iterator[tuple[str, State]]:
        """This state and all below it, with dotted paths."""
        yield prefix, self
        for name, child in self.children.items():
            yield from child.walk(f"{prefix}.{name}" if prefix else name)

    def flat(self) -> dict[str, Tensor]:
        """All tensors by dotted name, `seen` included: what safetensors can hold."""
        return {
            f"{path}.{name}" if path else name: tensor
            for path, state in self.walk()
            for name, tensor in [*state.leaves.items(), *([("seen", state.seen)] if state.seen is not None else [])]
        }

    def from_flat(self, tensors: Mapping[str, Tensor]) -> State:
        """A state of this structure with the tensors of `flat()`; the inverse of it.

        Raises:
            StateError: if names are missing or left over.
        """
        if tensors.keys() != self.flat().keys():
            odd = sorted(tensors.keys() ^ self.flat().keys())
            raise StateError(f"tensors do not fit this state; missing or unknown: {', '.join(odd)}")

        def fill(state: State, prefix: str) -> State:
            return State(
                {name: tensors[prefix + name] for name in state.leaves},
                state.spec,
                {name: fill(child, f"{prefix}{name}.") for name, child in state.children.items()},
                None if state.seen is None else tensors[prefix + "seen"],
            )

        return fill(self, "")
