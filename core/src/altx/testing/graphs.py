"""Laws of `ctx.graph`, and the graph that layers which need one are checked with."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from altx.context import Context, Graph
from altx.errors import AltxError, describe
from altx.layer import FRESH, Layer, Output, scoped
from altx.layout import compaction, take
from altx.state import State
from altx.testing.case import Case, Failure, difference
from altx.testing.check import EXACT, Finding, law, tokens
from altx.testing.trial import Trial


def chain(x: Tensor, ctx: Context) -> Graph:
    """Edges between neighbouring real tokens of a document in x (B, T, ...): forward, and back if not causal."""
    batch, length = x.shape[:2]
    token = torch.arange(batch * length, device=x.device).view(batch, length)
    if ctx.mask is not None:
        token = take(token, compaction(ctx.mask)[0])
    edges = torch.stack([token[:, :-1].flatten(), token[:, 1:].flatten()])
    if ctx.mask is not None:
        edges = edges[:, ctx.mask.flatten()[edges[1]]]
    if ctx.reset is not None:
        edges = edges[:, ~ctx.reset.flatten()[edges[1]]]
    return Graph(edges if ctx.causal else torch.cat([edges, edges.flip(0)], 1))


class Chained(Layer):
    """A layer that needs a graph, and is given a chain where there is none."""

    def __init__(self, inner: Layer) -> None:
        super().__init__()
        self.inner = inner
        self.capabilities = replace(inner.capabilities, graph="optional", losses={})

    def forward(self, x: Tensor, ctx: Context = FRESH, state: State | None = None) -> Output:
        out: Output = self.inner(x, ctx if ctx.graph else ctx.replace(graph=chain(x, ctx)), state)
        return replace(out, losses=scoped("inner", out.losses), metrics=scoped("inner", out.metrics))


def _if_graph(case: Case) -> str | None:
    if not isinstance(case.layer, Layer):
        return "is a whole model"
    return "declares that it reads no graph" if case.capabilities.graph == "ignored" else None


def _listed(edges: Tensor, most: int = 8) -> str:
    shown = [f"{source}->{target}" for source, target in edges.T.tolist()]
    return ", ".join(shown[:most]) + (", ..." if len(shown) > most else "")


def edges_of(case: Case, batch: int, length: int) -> Tensor:
    """(2, E) some edges within the rows, none from the future if the case is causal."""
    generator = torch.Generator().manual_seed(11)
    row, a, b = (torch.randint(n, (3 * length,), generator=generator) for n in (batch, length, length))
    if case.subject.causal:
        a, b = torch.minimum(a, b), torch.maximum(a, b)
    return torch.stack([row * length + a, row * length + b])


ORDER, ROWS, LATER, MASKED = (
    "y with the edges in another order",
    "y[:1] without the edges of row 1",
    "y before other tokens",
    "y beside other masked tokens",
)
"""Of what should be equal."""


def _graph_code(trial: Trial, label: str) -> str:
    half = trial.length // 2
    equal = {
        ORDER: ("y(x, edges.flip(1))", "y(x, edges)"),
        ROWS: (f"y(x, edges[:, edges[1] < {trial.length}])[:1]", "y(x, edges)[:1]"),
        LATER: (
            f"y(torch.cat([x[:, :{half}], {{other}}[:, {half}:]], 1), edges)[:, :{half}]",
            f"y(x, edges)[:, :{half}]",
        ),
        MASKED: (
            "y(torch.where(real[..., None], x, {other}), edges, real)[real]",
            "y(x, edges[:, real.flatten()[edges].all(0)], real)[real]",
        ),
    }
    lines = ["print(y(x, edges))", "print(y(x, edges[:, ::2]))"]  # that other edges change nothing
    if label in equal:
        lines = [f"{name} = {value}" for name, value in zip(("found", "wanted"), equal[label], strict=True)]
    if label == MASKED:
        lines.insert(0, "real = torch.arange(x.shape[1]).expand(x.shape[:2]) % 3 != 1")
    return """
from altx.context import Graph
edges = torch.tensor({edges})
def y(x, edges, mask=None):
    return layer(x, ctx.replace(graph=Graph(edges), mask=mask)).y
""" + "\n".join(lines)


@law(
    "what is computed follows the edges of ctx.graph and nothing but them",
    needs=("padding",),
    applies=_if_graph,
    trials=tokens(2, 12),
    code=_graph_code,
)
def graph(case: Case, trial: Trial) -> Finding | None:
    batch, length = trial.batch, trial.length
    if not length:
        return None
    x, edges = case.x(trial), edges_of(case, batch, length)

    def run(x: Tensor, edges: Tensor, mask: Tensor | None = None) -> Tensor:
        return case.run(x, case.ctx.replace(graph=Graph(edges), mask=mask)).y

    y = run(x, edges)
    if not difference(run(x, edges[:, ::2]), y):
        raise Failure(
            "the output is the same for other edges", f"edges {_listed(edges)}; without {_listed(edges[:, 1::2])}"
        )
    found = [(difference(run(x, edges.flip(1)), y, ORDER), "the outputs change with the order of the edges")]
    kept = edges[:, edges[1] < length]
    found.append((difference(run(x, kept)[:1], y[:1], ROWS), "the outputs of row 0 change with the edges of row 1"))
    if case.subject.causal:
        cut = length // 2
        changed = torch.cat([x[:, :cut], case.other(x)[:, cut:]], 1)
        gap = difference(run(changed, edges)[:, :cut], y[:, :cut], LATER)
        found.append((gap, "outputs changed with later tokens"))
    if case.capabilities.masked:
        mask = torch.ones(batch, length, dtype=torch.bool)
        mask[:, 1::3] = False
        both = mask.flatten()[edges].all(0)
        spoilt = torch.where(mask[..., None], x, case.other(x))
        gap = difference(run(spoilt, edges, mask)[mask], run(x, edges[:, both], mask)[mask], MASKED)
        found.append((gap, "masked tokens are seen along their edges"))
    worst, message = max(found, key=lambda pair: pair[0])
    return worst, EXACT, message


@law(
    "an edge that leaves the tokens or its row, or comes from the future, is refused",
    needs=("graph",),
    applies=_if_graph,
    trials=tokens(2, 6),
    code="""
from altx.context import Graph
from altx.errors import AltxError
for edge in [(0, x.shape[0] * x.shape[1]), (-1, 0), (0, x.shape[1])] + [(1, 0)] * ctx.causal:
    try:
        print(edge, "is taken:", layer(x, ctx.replace(graph=Graph(torch.tensor([edge]).T))).y)
    except AltxError as error:
        print(edge, "is refused:", error)
""",
)
def graph_refused(case: Case, trial: Trial) -> Finding | None:
    batch, length = trial.batch, trial.length
    if batch < 2 or length < 2:
        return None  # not all the bad edges could be
    x, good = case.x(trial), edges_of(case, batch, length)
    bad = {
        "out of range": (0, batch * length),
        "of a negative token": (-1, 0),
        "from one row to another": (0, length),
    }
    if case.subject.causal:
        bad["from the future in a causal context"] = (1, 0)
    for what, edge in bad.items():
        bad_edge = torch.tensor([edge]).T
        edges = torch.cat([good, bad_edge], 1)
        try:
            case.run(x, case.ctx.replace(graph=Graph(edges)))
        except AltxError:
            continue
        except Exception as error:
            raise Failure(
                f"an edge {what} raised {type(error).__name__}, which says nothing to the user",
                f"edge {_listed(bad_edge)}: {describe(error)}",
            ) from error
        raise Failure(f"an edge {what} is taken", f"edge {_listed(bad_edge)}")
    return None
