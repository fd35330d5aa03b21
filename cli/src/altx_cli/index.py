"""Which package offers what, for names that are not installed yet: altx's own plugins."""

from __future__ import annotations

import difflib
import re

from altx.discovery import canonical

INDEX = {
    "altx-attention": "attention mla",
    "altx-compressive": "compressive",
    "altx-graph": "gat gcn gin gps graph-transformer graphsage",
    "altx-hopfield": "hopfield",
    "altx-infini": "infini",
    "altx-knn": "knn",
    "altx-lab": "python-docs train",
    "altx-linear-attention": "deltanet gated-deltanet gla hgrn2 kda lightning linear-attention mlstm retnet",
    "altx-linformer": "linformer",
    "altx-mamba": "mamba mamba2 mamba3",
    "altx-moe": "base expert-choice hash mixture-of-depths mixture-of-recursions sinkhorn soft switch topk",
    "altx-nsm": "nsm token-to-state",
    "altx-ntm": "dnc ntm",
    "altx-performer": "performer",
    "altx-product-key": "memory-layer product-key",
    "altx-recurrent-memory": "associative-recurrent-memory recurrent-memory",
    "altx-reformer": "reformer reformer-local",
    "altx-rwkv": "rwkv4 rwkv4-channel rwkv5 rwkv5-channel rwkv6 rwkv6-channel rwkv7 rwkv7-channel",
    "altx-s4": "s4 s4d s5",
    "altx-titans": "titans ttt",
    "altx-token-turing": "token-turing",
}
"""Components and commands of each package, in alphabetical order."""

KNOWN = {offered: package for package, offers in INDEX.items() for offered in offers.split()}
"""The package of each."""


def package_of(name: str) -> str:
    """The package that a name means: itself, the one that offers a component or a command, or `altx-NAME`.

    Raises:
        AltxError: if the name is nearly one that is known, and so probably not that of a stranger's package.
    """
    name = canonical(name)
    if re.match("altx(-|$)", name):
        return name
    known = {package.removeprefix("altx-"): package for package in INDEX} | KNOWN
    if name in known:
        return known[name]
    if close := difflib.get_close_matches(name, known, n=3, cutoff=0.75):
        from altx.errors import AltxError

        raise AltxError(
            f"nothing that is known is called {name!r}",
            hint=f"did you mean {' or '.join(map(repr, close))}? A package of that name is written altx-{name}",
        )
    return f"altx-{name}"
