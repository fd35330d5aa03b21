"""What kernels compile to, found out without a GPU: shared memory, registers, and what spills from them."""

# Triton has no types, nor have its functions.
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from altx_kernels.gpu import launching

# What a block may have, in bytes, by compute capability.
SHARED = {80: 163 * 1024, 90: 227 * 1024}
TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Launch:
    """A kernel and what decides how it is compiled.

    Args:
        kernel: the Triton function.
        signature: type of each argument by name.
        constants: value of each constant by name.
        aligned: positions of the arguments that are multiples of 16.
        options: num_warps and the like.
    """

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        pointers = sorted({kind for _, kind in self.signature if kind.startswith("*")})
        return f"{self.kernel.fn.__name__}({', '.join(pointers)}) {dict(self.constants)} {dict(self.options)}"


@dataclass(frozen=True)
class Compiled:
    """What came of it.

    Args:
        shared: bytes of shared memory a block.
        registers: a thread.
        spilled: bytes of a thread's registers that lie in memory.
    """

    shared: int
    registers: int
    spilled: int


def launches(call: Callable[[], object]) -> list[Launch]:
    """The different kernels that a call would launch, whose tensors are on the CPU and are not computed with."""
    found: dict[Launch, None] = {}

    def record(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        names = [p.name for p in kernel.params]
        given = {**dict(zip(names, args, strict=False)), **{n: v for n, v in options.items() if n in names}}
        signature, constants, aligned = {}, {}, []
        for position, parameter in enumerate(kernel.params):
            value = given[parameter.name]
            specialized = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and specialized):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            signature[parameter.name] = TYPES[value.dtype] if isinstance(value, Tensor) else "i32"
            if isinstance(value, Tensor) or (value % 16 == 0 and specialized):
                aligned.append(position)
        rest = {n: v for n, v in options.items() if n not in names}
        kinds, fixed = tuple(signature.items()), tuple(constants.items())
        found[Launch(kernel, kinds, fixed, tuple(aligned), tuple(rest.items()))] = None

    launching.recorder = record
    try:
        call()
    finally:
        launching.recorder = None
    return list(found)


def compiled(launch: Launch, capability: int) -> Compiled:
    """Compile a kernel for GPUs of a compute capability, such as 90."""
    source = ASTSource(
        launch.kernel, dict(launch.signature), constexprs=dict(launch.constants),
        attrs={(position,): [["tt.divisibility", 16]] for position in launch.aligned},
    )  # fmt: skip
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    return Compiled(kernel.metadata.shared, registers, stack + local)
