"""Platform wheels: pure ones with the compiled libraries beside their C files.

The wheels are tagged for the machine that they are made on (linux_x86_64, macosx_14_0_arm64). A package index wants
manylinux instead, which promises that a wheel runs on older systems too: make them in a manylinux container, and let
`auditwheel repair` check that and tag them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from altx_kernels.native import compiler
from altx_kernels.native.recipe import Recipe
from altx_kernels.native.variants import variants
from altx_kernels.op import KernelError

PURE = "py3-none-any"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m altx_kernels.native.prebuild",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("wheels", metavar="WHEEL", nargs="+", type=Path, help="a pure wheel (py3-none-any)")
    parser.add_argument("--out", type=Path, required=True, help="directory for the platform wheels")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        for wheel in options.wheels:
            print(prebuild(wheel, options.out))
    except KernelError as error:
        sys.exit(f"error: {error}")


def prebuild(wheel: Path, out: Path) -> Path:
    """Write the platform wheel of a pure one and return its path; one without C files stays as it is.

    Raises:
        KernelError: if the wheel is not pure, there is no compiler, or a file cannot be compiled.
    """
    if not wheel.name.endswith(f"-{PURE}.whl"):
        raise KernelError(f"{wheel} is not a pure wheel ({PURE})")
    with tempfile.TemporaryDirectory() as temporary:
        _wheel("unpack", wheel, "--dest", temporary)
        [folder] = Path(temporary).iterdir()
        tag, sources = PURE, sorted(folder.rglob("*.c"))
        if sources:
            tag = f"py3-none-{platform_tag()}"
            found = compiler.need()
            for source in sources:
                compile_all(source, found)
            [metadata] = folder.glob("*.dist-info/WHEEL")
            text = metadata.read_text().replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
            metadata.write_text(text.replace(f"Tag: {PURE}", f"Tag: {tag}"))
        _wheel("pack", folder, "--dest-dir", out)
    return out / wheel.name.replace(PURE, tag)


def compile_all(source: Path, found: compiler.Compiler) -> None:
    """Compile a C file for every variant of this kind of machine, each into a file beside it.

    Raises:
        KernelError: if it cannot be compiled.
    """
    for variant in variants():
        recipe = Recipe.read(source, variant)
        with tempfile.TemporaryDirectory() as temporary:
            path, _ = compiler.build(recipe, found, Path(temporary))
            recipe.prebuilt.write_bytes(path.read_bytes())


def platform_tag() -> str:
    """The platform as names of wheels have it."""
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


def _wheel(*arguments: str | Path) -> None:
    done = subprocess.run([sys.executable, "-m", "wheel", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelError(
            f"wheel {arguments[0]} fails: {done.stderr.strip()}", hint="pip install wheel, if it is missing"
        )


if __name__ == "__main__":
    main()
