"""altx: assemble, prove and run sequence models from plugins.

Importing this package is cheap: it brings the markers and records that a plugin's entry module needs
and never torch. The contract lives in `altx.layer`, `altx.context`, `altx.state`, `altx.memory` and
`altx.router`.
"""

from altx.hookspecs import hookimpl, hookspec
from altx.spec import (
    API_VERSION,
    BuildContext,
    ComponentSpec,
    FeedForwardSpec,
    Kind,
    MemorySpec,
    MixerSpec,
    RouterSpec,
)

__version__ = "0.1.0"

__all__ = [
    "API_VERSION",
    "BuildContext",
    "ComponentSpec",
    "FeedForwardSpec",
    "Kind",
    "MemorySpec",
    "MixerSpec",
    "RouterSpec",
    "__version__",
    "hookimpl",
    "hookspec",
]
