"""The instruction sets that kernels are compiled for; the best one that the CPU has is used."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from altx_kernels.op import KernelError

VARIABLE = "ALTX_NATIVE"
OFF = "off"

CPUINFO = Path("/proc/cpuinfo")

V2 = frozenset(["cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3"])
V3 = V2 | frozenset(["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"])
V4 = V3 | frozenset(["avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"])


@dataclass(frozen=True)
class Variant:
    """One instruction set.

    Args:
        name: what ALTX_NATIVE and the names of files call it.
        flags: what the compiler needs to be told.
        needs: what the CPU must have, as Linux calls it.
    """

    name: str
    flags: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()

    def missing(self) -> list[str]:
        """What it needs and this CPU lacks; where that cannot be known, all but the least."""
        flags = cpu_flags()
        return sorted(self.needs - (V2 if flags is None else flags))


def variants() -> tuple[Variant, ...]:
    """Those of this kind of machine, best first."""
    machine = platform.machine()
    if machine not in ("x86_64", "AMD64"):
        return (Variant(machine),)
    return (
        Variant("avx512", ("-march=x86-64-v4", "-mprefer-vector-width=512"), V4),
        Variant("avx2", ("-march=x86-64-v3",), V3),
        Variant("baseline", ("-march=x86-64-v2",), V2),
    )


def cpu_flags() -> frozenset[str] | None:
    """What an x86 CPU can do, or None where the system does not say."""
    try:
        with CPUINFO.open() as lines:  # thousands on large machines, and the first CPU is like the others
            found = next((line for line in lines if re.match(r"flags\s*:", line)), None)
    except OSError:
        return None
    return frozenset(found.partition(":")[2].split()) if found else None


def choose() -> Variant:
    """The variant that ALTX_NATIVE names, else the best one that the CPU has.

    Raises:
        KernelError: if ALTX_NATIVE is "off" or names no variant, or the CPU lacks something.
    """
    known = {variant.name: variant for variant in variants()}
    wanted = os.environ.get(VARIABLE, "")
    if wanted == OFF:
        raise KernelError(f"switched off by {VARIABLE}={OFF}")
    if not wanted:
        fitting = (variant for variant in known.values() if not variant.missing())
        variant = next(fitting, next(reversed(known.values())))
    elif wanted in known:
        variant = known[wanted]
    else:
        raise KernelError(f"{VARIABLE}={wanted} names no variant", hint=f"there are {', '.join(known)} and {OFF}")
    if missing := variant.missing():
        raise KernelError(f"this CPU lacks {', '.join(missing)}, which the variant {variant.name} needs")
    return variant
