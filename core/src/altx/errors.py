"""Errors a user can mend. The command line prints them without a traceback and exits with status 2."""

from __future__ import annotations


class AltxError(Exception):
    """Something the user can put right.

    Args:
        what: what is wrong and where, naming the value, the plugin and its version where they matter.
        hint: what to do about it.
    """

    def __init__(self, what: str, *, hint: str = "") -> None:
        super().__init__(f"{what}\n{hint}" if hint else what)
        self.what = what
        self.hint = hint


class ConfigError(AltxError):
    """A value in a configuration is wrong; the message starts with its path in the file."""


class UnknownComponent(AltxError):
    """No plugin offers a component of this name."""


class AmbiguousComponent(AltxError):
    """Several plugins offer a component of this name; a qualified name is needed."""


class BrokenPlugin(AltxError):
    """A plugin could not be loaded, or one of its import strings leads nowhere."""


class CompositionError(AltxError):
    """Parts that are valid by themselves cannot live together in this model."""


class UnsupportedContext(AltxError):
    """A call carries a context (mask, packing, resets, length) that the model cannot honour."""


class StateError(AltxError):
    """A state was asked for something that it cannot do exactly."""


class CheckpointError(AltxError):
    """A checkpoint is missing, damaged, or belongs to another model."""
