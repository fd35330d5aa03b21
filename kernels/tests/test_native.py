"""A C file becomes a library: compiled once, for this CPU, into a cache that nobody else can write to."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from altx_kernels import KernelError
from altx_kernels.native import Library, cache, compiler, variants
from altx_kernels.native.recipe import Recipe

SOURCE = """
#include "altx.h"

EXPORT void FN(scale)(const real *x, real *y, int64_t n, double by, int64_t *threads) {
#pragma omp parallel num_threads(2)
    if (omp_get_thread_num() == 0) *threads = omp_get_num_threads();
    for (int64_t i = 0; i < n; i++) y[i] = (real)by * x[i];
}
"""
FUNCTIONS = {"scale": "ppidp"}

root_only = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    for name in ("ALTX_NATIVE", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALTX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "toy" / "native.c"
    path.parent.mkdir()
    path.write_text(SOURCE)
    return path


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A cache with the library in it, compiled once for all tests."""
    folder = tmp_path_factory.mktemp("example")
    (folder / "toy").mkdir()
    (folder / "toy" / "native.c").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALTX_CACHE", str(folder / "cache"))
        assert Library(folder / "toy" / "native.c", FUNCTIONS).problem() is None
    return folder / "cache"


@pytest.fixture
def stored(example, tmp_path):
    """The library's file in this test's cache."""
    shutil.copytree(example, tmp_path / "cache")
    [path] = (tmp_path / "cache" / "native").iterdir()
    return path


@pytest.fixture
def builds(monkeypatch):
    """The recipes that were compiled."""
    recipes, build = [], compiler.build

    def counted(recipe, *rest):
        recipes.append(recipe)
        return build(recipe, *rest)

    monkeypatch.setattr(compiler, "build", counted)
    return recipes


def works(library: Library) -> int:
    """Check that its functions compute, in float and double; returns how many threads they get."""
    assert library.problem() is None
    threads = torch.zeros(1, dtype=torch.int64)
    for dtype in (torch.float32, torch.float64):
        x = torch.arange(5, dtype=dtype)
        y = torch.empty_like(x)
        library.call("scale", dtype, x, y, 5, 0.1, threads)
        assert torch.equal(y, x * torch.tensor(0.1, dtype=dtype))
    return int(threads)


def kept(tmp_path):
    return sorted((tmp_path / "cache" / "native").iterdir())


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


# What is compiled, and when


def test_it_is_compiled_once_and_then_found(source, builds, tmp_path):
    first = Library(source, FUNCTIONS)
    works(first)
    works(Library(source, FUNCTIONS))
    assert len(builds) == 1
    assert kept(tmp_path) == [first.path]
    assert [stat.S_IMODE(p.stat().st_mode) for p in (first.path, *first.path.parents[:2])] == [0o600, 0o700, 0o700]


def test_the_key_holds_everything_that_matters(source, monkeypatch, tmp_path):
    source.write_text('#include "one.h"\n' + SOURCE)
    source.with_name("one.h").write_text('#include "two.h"')
    source.with_name("two.h").write_text("")
    chosen = variants.choose()

    def key():
        return Recipe.read(source, chosen).key

    keys = [key(), key()]
    assert keys.pop() == keys[0]
    source.with_name("two.h").write_text("/* a header of a header */")
    keys.append(key())
    source.write_text(SOURCE + "\n")
    keys.append(key())
    monkeypatch.setattr("altx_kernels.native.recipe.HEADERS", tmp_path)
    (tmp_path / "altx.h").write_text("/* another altx.h */")
    keys.append(key())
    monkeypatch.setattr("altx_kernels.native.recipe.FLAGS", ("-O2",))
    keys.append(key())
    monkeypatch.setattr("altx_kernels.native.recipe.ABI", 0)
    keys.append(key())
    keys += [Recipe.read(source, variant).key for variant in variants.variants() if variant != chosen]
    assert len(set(keys)) == len(keys)


def test_another_compiler_gives_another_file(source, stored, builds, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "cc -fno-strict-aliasing")
    works(Library(source, FUNCTIONS))
    assert len(builds) == 1 and len(kept(tmp_path)) == 2


@pytest.mark.parametrize("variant", [v.name for v in variants.variants() if not v.missing()])
def test_every_variant_of_this_cpu_works(source, variant, monkeypatch):
    monkeypatch.setenv("ALTX_NATIVE", variant)
    library = Library(source, FUNCTIONS)
    works(library)
    assert f".{variant}." in library.path.name


def test_threads_that_ask_at_once_have_it_compiled_once(source, builds):
    library = Library(source, FUNCTIONS)
    askers = [threading.Thread(target=library.problem) for _ in range(8)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    works(library)
    assert len(builds) == 1


def test_a_compiled_graph_knows_the_answer_as_a_constant(source, stored):
    library = Library(source, FUNCTIONS)

    @torch.compile(fullgraph=True, backend="eager")
    def twice(x):
        return 2 * x if library.problem() is None else x

    assert twice(torch.ones(1)) == 2


def test_importing_it_does_not_bring_the_compiler_of_torch():
    code = "import sys, altx_kernels.native as n; n.Library('x', {}); sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_function_that_the_source_lacks_is_an_error_not_a_reason(source, stored):
    with pytest.raises(AttributeError, match="other_f32"):
        Library(source, {"other": "p"}).problem()


# Which variant


@pytest.mark.parametrize(
    "has, name",
    [(variants.V4, "avx512"), (variants.V3, "avx2"), (variants.V4 - {"avx512bw"}, "avx2"), (variants.V2, "baseline")],
)
def test_the_best_variant_that_the_cpu_has_is_chosen(has, name, tmp_path, monkeypatch):
    cpu(monkeypatch, tmp_path, has)
    assert variants.choose().name == name


def cpu(monkeypatch, tmp_path, flags, machine="x86_64"):
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nflags\t\t: " + " ".join(sorted(flags)) + "\nbogomips\t: 1\n")
    monkeypatch.setattr(variants, "CPUINFO", path)
    monkeypatch.setattr("platform.machine", lambda: machine)


def test_a_cpu_that_lacks_the_least_has_a_reason(source, tmp_path, monkeypatch):
    cpu(monkeypatch, tmp_path, variants.V2 - {"ssse3"})
    assert "this CPU lacks ssse3, which the variant baseline needs" in Library(source, FUNCTIONS).problem()


def test_where_the_system_does_not_say_the_least_is_chosen(tmp_path, monkeypatch):
    cpu(monkeypatch, tmp_path, ())
    monkeypatch.setattr(variants, "CPUINFO", tmp_path / "missing")
    assert variants.choose().name == "baseline"


def test_other_machines_have_one_variant_and_no_flags(tmp_path, monkeypatch):
    cpu(monkeypatch, tmp_path, (), machine="aarch64")
    assert variants.choose() == variants.Variant("aarch64")


def test_the_variable_names_a_variant_or_switches_off(source, tmp_path, monkeypatch):
    cpu(monkeypatch, tmp_path, variants.V3)
    for value, reason in {
        "off": "switched off by ALTX_NATIVE=off",
        "avx512": "this CPU lacks avx512bw, avx512cd, avx512dq, avx512f, avx512vl, which the variant avx512 needs",
        "sse": "ALTX_NATIVE=sse names no variant; there are avx512, avx2, baseline and off",
    }.items():
        monkeypatch.setenv("ALTX_NATIVE", value)
        library = Library(source, FUNCTIONS)
        assert library.problem() == reason
        with pytest.raises(KernelError, match="cannot be used: "):
            library.call("scale", torch.float32)
    monkeypatch.setenv("ALTX_NATIVE", "baseline")
    assert variants.choose().name == "baseline"


# The compiler


def without_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("CC", "/nonexistent")


def test_without_a_compiler_the_reason_says_what_to_install(source, monkeypatch, tmp_path):
    without_compiler(monkeypatch, tmp_path)
    assert Library(source, FUNCTIONS).problem() == (
        "no C compiler found (cc, gcc or clang); install one (apt install gcc, xcode-select --install) or use a wheel "
        "with prebuilt kernels"
    )


def test_what_was_compiled_before_serves_where_there_is_no_compiler(source, stored, monkeypatch, tmp_path):
    without_compiler(monkeypatch, tmp_path)
    works(Library(source, FUNCTIONS))


def test_a_compiler_that_only_pretends_is_passed_over(monkeypatch, tmp_path):
    script(tmp_path / "cc", "echo 'install the developer tools first' >&2; exit 1")
    script(tmp_path / "clang", "echo 'clang version 1'")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiler.find() == compiler.Compiler((str(tmp_path / "clang"),), "clang version 1\n")


def test_an_error_of_the_compiler_is_the_reason(source):
    source.write_text(SOURCE.replace("int64_t i = 0", "i = 0"))
    assert "cannot compile native.c: native.c:7:10: error: " in Library(source, FUNCTIONS).problem()


def test_a_compiler_without_openmp_makes_it_without_threads(source, monkeypatch, tmp_path):
    wrapper = 'case "$*" in *-fopenmp*) echo "error: unsupported option -fopenmp" >&2; exit 1;; esac; exec gcc "$@"'
    monkeypatch.setenv("CC", script(tmp_path / "wrapper", wrapper))
    assert works(Library(source, FUNCTIONS)) == 1


def test_a_compiler_with_another_openmp_makes_it_without_threads(source, monkeypatch, tmp_path):
    (tmp_path / "kmpc.h").write_text(
        "void __kmpc_unheard_of(void);\nstatic __attribute__((constructor)) void n(void) { __kmpc_unheard_of(); }\n"
    )
    wrapper = f'case "$*" in *-fopenmp*) exec gcc -include {tmp_path}/kmpc.h "$@";; esac; exec gcc "$@"'
    monkeypatch.setenv("CC", script(tmp_path / "wrapper", wrapper))
    assert works(Library(source, FUNCTIONS)) == 1


# The cache


@pytest.mark.parametrize("damage", [lambda b: b[:-40], lambda b: b"", lambda b: b[:999] + b"?" + b[1000:]])
def test_a_damaged_file_is_made_anew(source, stored, builds, damage):
    content = stored.read_bytes()
    stored.write_bytes(damage(content))
    works(Library(source, FUNCTIONS))
    assert len(builds) == 1
    assert stored.read_bytes() == content


def test_a_link_in_the_place_of_a_file_is_replaced(source, stored, builds, tmp_path):
    stored.rename(tmp_path / "elsewhere")
    stored.symlink_to(tmp_path / "elsewhere")
    works(Library(source, FUNCTIONS))
    assert len(builds) == 1 and not stored.is_symlink()


def test_a_cache_that_cannot_be_made_is_done_without(source, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALTX_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    library = Library(source, FUNCTIONS)
    works(library)
    assert library.path is None
    assert not list(tmp_path.glob("altx-*"))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_cache_that_takes_no_files_is_done_without(source, monkeypatch, number):
    def mkstemp(**options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tempfile.mkstemp", mkstemp)
    library = Library(source, FUNCTIONS)
    works(library)
    assert library.path is None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no file that is always full")
def test_a_disk_that_fills_up_leaves_nothing_behind(source, monkeypatch, tmp_path):
    def mkstemp(dir, prefix):
        path = dir / prefix
        path.touch()
        return os.open("/dev/full", os.O_WRONLY), str(path)

    monkeypatch.setattr("tempfile.mkstemp", mkstemp)
    works(Library(source, FUNCTIONS))
    assert kept(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "ST_NOEXEC"), reason="this system does not say so")
def test_where_temporary_files_cannot_be_loaded_it_is_compiled_in_the_cache(source, monkeypatch, tmp_path):
    folders, build = [], compiler.build

    def watched(recipe, found, folder):
        folders.append(folder)
        return build(recipe, found, folder)

    monkeypatch.setattr(compiler, "build", watched)
    monkeypatch.setattr("os.statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC))
    library = Library(source, FUNCTIONS)
    works(library)
    assert [folder.parent for folder in folders] == [tmp_path / "cache" / "native"]
    assert kept(tmp_path) == [library.path]


def test_no_room_at_all_is_a_reason(source, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert "cannot be read or compiled: [Errno 2]" in Library(source, FUNCTIONS).problem()


PLACES = {"root": lambda path: path.parents[1], "folder": lambda path: path.parent, "file": lambda path: path}


@root_only
@pytest.mark.parametrize("place", PLACES)
def test_what_belongs_to_another_user_is_refused(source, stored, builds, place):
    path = PLACES[place](stored)
    os.chown(path, 12345, -1)
    library = Library(source, FUNCTIONS)
    assert library.problem() == (
        f"{path}, where compiled kernels are kept, belongs to another user (number 12345); set ALTX_CACHE to a "
        f"directory of your own, or, if you trust what is there, chown 0 {path}"
    )
    with pytest.raises(KernelError, match="belongs to another user"):
        library.call("scale", torch.float32)
    assert not builds


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bits", [0o020, 0o002])
def test_what_others_can_write_to_is_refused(source, stored, builds, place, bits):
    path = PLACES[place](stored)
    path.chmod(path.stat().st_mode | bits)
    problem = Library(source, FUNCTIONS).problem()
    assert f"{path}, where compiled kernels are kept, can be written to by other users" in problem
    assert problem.endswith(f"chmod go-w {path}")
    path.chmod(path.stat().st_mode & ~0o022)
    works(Library(source, FUNCTIONS))
    assert not builds


def test_the_cache_lies_where_the_user_keeps_others(monkeypatch, tmp_path):
    assert cache.folder() == tmp_path / "cache" / "native"
    monkeypatch.setenv("ALTX_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "altx" / "native"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "altx" / "native"
