"""What the loop over chunks may be called with."""

from __future__ import annotations

from torch import Tensor

from altx_kernels import KernelError
from altx_kernels.arguments import check_floats, check_shapes
from altx_titans.fast import Network, Norm, Weights
from altx_titans.kernels.learn.reference import Chunks

NAME = "fast-weights"


def check(
    network: Network, chunks: Chunks, weights: Weights, start: Weights, moving: Weights, fresh: Weights, norm: Norm
) -> None:
    """Raises KernelError if shapes, dtypes or devices do not fit together.

    B rows, H heads, N chunks of C tokens, width d.
    """
    letters = ("B H N C d",) * 3 + ("B H N C", "B H N C", "B H N C C", "B H N", "B H N", "B H N C", "B H N", "B H N C")
    fields = zip(Chunks._fields[:11], chunks[:11], letters, strict=True)
    floats: dict[str, tuple[Tensor | None, str]] = {f"chunks.{name}": (x, shape) for name, x, shape in fields}
    inner = network.layers > 1
    shapes = {"w1": "B H d f" if inner else "B H d d", "w2": "B H f d"}
    shapes |= {"b1": "B H one f" if inner else "B H one d", "b2": "B H one d", "scale": "B H one d"}
    given = {"weights": weights, "start": start, "moving": moving, "fresh": fresh}
    for state, values in given.items():
        needed = state in ("weights", "start") or (state == "fresh" and chunks.anew is not None)
        if (values or needed) and values.keys() != weights.keys():
            raise KernelError(
                f"op {NAME!r}: {state} has {', '.join(values) or 'nothing'}, where weights has {', '.join(weights)}",
                hint="pass the same weights in each",
            )
        floats |= {f"{state}.{name}": (x, shapes[name]) for name, x in values.items()}
    if unequal := {name for name in ("last_drift", "moving_keep", "moving_share") if getattr(chunks, name) is None}:
        if moving or len(unequal) < 3 or chunks.drift is not None:
            raise KernelError(
                f"op {NAME!r}: chunks has no {', '.join(sorted(unequal))}",
                hint="a memory with momentum has moving, drift, last_drift, moving_keep and moving_share, others none",
            )
    elif not moving or (chunks.drift is None and chunks.query is not None):
        raise KernelError(f"op {NAME!r}: momentum without moving or drift", hint="pass both")
    norms = {f"norm.{name}": (x, "H one d") for name, x in norm._asdict().items() if isinstance(x, Tensor)}
    flags: dict[str, tuple[Tensor | None, str]] = {"full": (chunks.full, "B N"), "anew": (chunks.anew, "B N")}
    check_shapes(NAME, {"one": 1}, **floats, **norms, **flags)
    check_floats(NAME, **{name: x for name, (x, _) in (floats | norms).items()})
