"""The conformance kit: the contract as checks, generated from what a component declares.

Three doors to the same checks: `altx check NAME`, `conformance(NAME)` in a plugin's own tests, and
`prove(model)`, which `altx compose` calls.
"""

from types import MappingProxyType

from altx.testing import guard
from altx.testing.check import REGISTERED
from altx.testing.examples import example
from altx.testing.pytest_door import conformance
from altx.testing.result import Result
from altx.testing.runner import check_component, prove, run

CHECKS = MappingProxyType({check.name: check.law for check in REGISTERED.values()})
"""Every check's law by name."""

guard.remember()

__all__ = ["CHECKS", "Result", "check_component", "conformance", "example", "prove", "run"]
