"""altx.h: its functions are right over the whole range of numbers, in every variant that this CPU has."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from altx_kernels.native import Library, variants

SOURCE = """
#include "altx.h"

#define EACH(name)                                                                          \\
    EXPORT void FN(name)(const real *x, real *y, int64_t n) {                               \\
        unsigned before = flush_denormals();                                                \\
        for (int64_t i = 0; i < n; i += LANES)                                              \\
            vstore_n(y + i, v##name(vload_n(x + i, n - i)), n - i);                         \\
        restore_denormals(before);                                                          \\
    }
EACH(exp)
EACH(sigmoid)
EACH(softplus)
EACH(abs)

INLINE vec vsine(vec x) {
    vec sine, cosine;
    vsincos(x, &sine, &cosine);
    return sine;
}
EACH(sine)

INLINE vec vcosine(vec x) {
    vec sine, cosine;
    vsincos(x, &sine, &cosine);
    return cosine;
}
EACH(cosine)

INLINE vec vbounded(vec x) { return vclamp(x, -2, 3); }
EACH(bounded)

/* Sums of LANES numbers at a time; how many those are is left in y[n]. */
EXPORT void FN(sums)(const real *x, real *y, int64_t n) {
    for (int64_t i = 0; i + LANES <= n; i += LANES) y[i / LANES] = vsum(vload(x + i));
    y[n] = (real)LANES;
}
"""
FUNCTIONS = dict.fromkeys(("exp", "sigmoid", "softplus", "abs", "sine", "cosine", "bounded", "sums"), "ppi")
DTYPES = [torch.float32, torch.float64]
NAMES = [variant.name for variant in variants.variants() if not variant.missing()]

# Extended precision where the CPU has it, so that float64 is compared with something better.
Wide = np.longdouble
EXACT = {
    "exp": np.exp,
    "sigmoid": lambda x: np.where(x > 0, 1 / (1 + np.exp(-abs(x))), np.exp(-abs(x)) / (1 + np.exp(-abs(x)))),
    "softplus": lambda x: np.maximum(x, 0) + np.log1p(np.exp(-abs(x))),
}
UNITS = {"exp": 1.0, "sigmoid": 2.0, "softplus": 3.0}


@pytest.fixture(scope="module", params=NAMES)
def library(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "header.c").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALTX_CACHE", str(folder / "cache"))
        patch.setenv("ALTX_NATIVE", request.param)
        library = Library(folder / "header.c", FUNCTIONS)
        assert library.problem() is None
    return library


def apply(library, name, x):
    y = torch.full_like(x, 7.0)
    library.call(name, x.dtype, x, y, x.numel())
    return y


def points(dtype):
    """From one end of the exponential's range to the other and beyond, dense around zero and at the ends."""
    most, least = math.log(torch.finfo(dtype).max), math.log(torch.finfo(dtype).tiny)
    wide = torch.linspace(1.2 * least, 1.2 * most, 200_003, dtype=torch.float64)
    small = torch.logspace(-40, 0, 20_000, dtype=torch.float64)
    ends = [end * (1 + torch.linspace(-1e-3, 1e-3, 2_001, dtype=torch.float64)) for end in (least, -least, most)]
    return torch.cat([wide, small, -small, *ends]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXACT)
def test_each_function_is_right_to_few_units_in_the_last_place(library, name, dtype):
    x = points(dtype)
    y = apply(library, name, x).numpy().astype(Wide)
    with np.errstate(over="ignore"):
        exact = EXACT[name](x.numpy().astype(Wide))
    kind = torch.finfo(dtype)
    normal = (exact >= kind.tiny * (1 + kind.eps)) & (exact <= kind.max)
    assert (abs(y - exact)[normal] / exact[normal]).max() <= UNITS[name] * kind.eps
    assert (y[exact < kind.tiny * (1 - kind.eps)] == 0).all()
    assert np.isinf(y[exact > kind.max * (1 + kind.eps)]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sine", "cosine"])
def test_sines_and_cosines_are_right_in_every_quarter_of_many_turns(library, name, dtype):
    small = torch.logspace(-30, 0, 10_000, dtype=torch.float64)
    ends = [k * math.pi / 4 * (1 + torch.linspace(-1e-6, 1e-6, 101, dtype=torch.float64)) for k in range(-9, 10)]
    x = torch.cat([torch.linspace(-1000, 1000, 400_001, dtype=torch.float64), small, -small, *ends]).to(dtype)
    exact = (np.sin if name == "sine" else np.cos)(x.numpy().astype(Wide))
    error = abs(apply(library, name, x).numpy().astype(Wide) - exact)
    assert error.max() <= 1.5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite(library, dtype):
    inf, nan = math.inf, math.nan
    x = torch.tensor([-inf, inf, nan, 0.0, -0.0], dtype=dtype)
    half, log2 = torch.tensor([0.5, math.log(2)], dtype=dtype).tolist()
    for name, expected in {
        "exp": [0, inf, nan, 1, 1],
        "sigmoid": [0, 1, nan, half, half],
        "softplus": [0, inf, nan, log2, log2],
        "abs": [inf, inf, nan, 0, 0],
        "sine": [nan, nan, nan, 0, 0],
        "cosine": [nan, nan, nan, 1, 1],
        "bounded": [-2, 3, nan, 0, 0],
    }.items():
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(
            apply(library, name, x), torch.tensor(expected, dtype=dtype), rtol=eps, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_stays_in_its_lane(library, dtype):
    x = torch.linspace(-3, 3, 37, dtype=dtype)
    for name in ("exp", "sigmoid", "softplus", "sine", "cosine", "bounded"):
        clean = apply(library, name, x)
        for at in (0, 5, 36):
            dirty = apply(library, name, x.index_fill(0, torch.tensor(at), math.nan))
            assert dirty.isnan().nonzero().tolist() == [[at]]
            assert torch.equal(dirty.nan_to_num(9), clean.index_fill(0, torch.tensor(at), 9))


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_a_vector_are_loaded_and_stored_and_nothing_else(library, dtype):
    for n in range(20):
        x = torch.randn(n + 40, dtype=dtype)
        y = torch.full_like(x, 7.0)
        library.call("abs", dtype, x, y, n)
        assert torch.equal(y[:n], x[:n].abs())
        assert (y[n:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_vectors(library, dtype):
    x, y = torch.randn(64, dtype=dtype), torch.empty(65, dtype=dtype)
    library.call("sums", dtype, x, y, 64)
    lanes = int(y[64])
    size = {"avx512": 64, "avx2": 32}.get(library.path.name.split(".")[1], 16)
    assert lanes == size // x.element_size()
    torch.testing.assert_close(y[: 64 // lanes], x.view(-1, lanes).sum(1))


def test_denormals_count_again_after_a_kernel(library):
    x = torch.full((16,), -100.0)
    apply(library, "exp", x)
    assert torch.full((1,), 1e-38).div(100).item() > 0
