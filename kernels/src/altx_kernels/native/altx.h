/* What every native kernel starts with: one number type, its vectors, and the functions that a C library lacks for
 * vectors. A source file is compiled twice, with `real` as float and as double; FN(scan) names scan_f32 and scan_f64.
 *
 * Only GCC's vector extensions are used, which clang has too, so the same source serves any CPU. Threads are OpenMP's
 * where the library could be linked to those that torch uses, else there is one.
 */
#ifndef ALTX_H
#define ALTX_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_thread_num(void) { return 0; }
static inline int omp_get_num_threads(void) { return 1; }
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifdef ALTX_DOUBLE
typedef double real;
typedef int64_t integer;
#define FN(name) name##_f64
#else
typedef float real;
typedef int32_t integer;
#define FN(name) name##_f32
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

typedef real vec __attribute__((vector_size(VECTOR_BYTES)));
typedef integer ivec __attribute__((vector_size(VECTOR_BYTES)));
#define LANES ((int64_t)(VECTOR_BYTES / sizeof(real)))

#define INLINE static inline __attribute__((always_inline, unused))
#define EXPORT __attribute__((visibility("default")))

INLINE vec vset(real x) { return x - (vec){0}; }

INLINE vec vload(const real *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void vstore(real *p, vec v) { memcpy(p, &v, sizeof v); }

/* The first n numbers, n < LANES allowed; the rest are zeros. */
INLINE vec vload_n(const real *p, int64_t n) {
    vec v = {0};
    if (n >= LANES) return vload(p);
    memcpy(&v, p, (size_t)n * sizeof(real));
    return v;
}

INLINE void vstore_n(real *p, vec v, int64_t n) {
    if (n >= LANES)
        vstore(p, v);
    else
        memcpy(p, &v, (size_t)n * sizeof(real));
}

INLINE real vsum(vec v) {
#if defined(__AVX512F__) && defined(ALTX_DOUBLE)
    return _mm512_reduce_add_pd((__m512d)v);
#elif defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    real a[LANES];
    vstore(a, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) a[i] += a[i + half];
    return a[0];
#endif
}

/* a where the mask's bits are set, else b. */
INLINE vec vselect(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }

/* Not smaller than `low`, nor larger than `high`; a NaN stays one. */
INLINE vec vclamp(vec x, real low, real high) {
#if defined(__AVX512F__) && defined(ALTX_DOUBLE)
    return (vec)_mm512_min_pd((__m512d)vset(high), _mm512_max_pd((__m512d)vset(low), (__m512d)x));
#elif defined(__AVX512F__)
    return (vec)_mm512_min_ps((__m512)vset(high), _mm512_max_ps((__m512)vset(low), (__m512)x));
#else
    x = vselect(x < low, vset(low), x);
    return vselect(x > high, vset(high), x);
#endif
}

/* e^x to one unit in the last place. Where denormals are flushed, as in every kernel, a result below the least
 * normal number is 0. Reduction by Cody and Waite. */
INLINE vec vexp(vec x) {
    /* low and high: the logarithms of the least normal and of the greatest number. */
#ifdef ALTX_DOUBLE
    const real low = -708.3964185322641, high = 709.782712893384, magic = 6755399441055744.0;
    const real log2e = 1.4426950408889634, ln2_hi = 0.693145751953125, ln2_lo = 1.42860682030941723212e-6;
#else
    const real low = -87.33654f, high = 88.72283f, magic = 12582912.0f;
    const real log2e = 1.44269504088896341f, ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
#endif
#if defined(__AVX512F__)
    /* scalef makes 0 and infinity by itself, so the bounds only keep the reduction in range. */
    vec y = vclamp(x, 2 * low, 2 * high);
#else
    vec y = vclamp(x, low, high);
#endif
    vec shifted = y * log2e + magic, n = shifted - magic;
    vec r = y - n * ln2_hi - n * ln2_lo;
#ifdef ALTX_DOUBLE
    vec p = vset(1 / 6227020800.0);
    p = p * r + 1 / 479001600.0;
    p = p * r + 1 / 39916800.0;
    p = p * r + 1 / 3628800.0;
    p = p * r + 1 / 362880.0;
    p = p * r + 1 / 40320.0;
    p = p * r + 1 / 5040.0;
    p = p * r + 1 / 720.0;
    p = p * r + 1 / 120.0;
    p = p * r + 1 / 24.0;
    p = p * r + 1 / 6.0;
    p = p * r + 0.5;
    p = p * r * r + r + 1;
#else
    vec p = vset(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
#endif
#if defined(__AVX512F__) && defined(ALTX_DOUBLE)
    return (vec)_mm512_scalef_pd((__m512d)p, (__m512d)n);
#elif defined(__AVX512F__)
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    /* 2^n as two factors, since 2^n itself may overflow where e^x does not. */
    ivec whole = (ivec)shifted - (ivec)vset(magic), half = whole >> 1;
#ifdef ALTX_DOUBLE
    p = p * (vec)((half + 1023) << 52) * (vec)((whole - half + 1023) << 52);
#else
    p = p * (vec)((half + 127) << 23) * (vec)((whole - half + 127) << 23);
#endif
    p = vselect(x != x, x, p);
    return vselect(x < low, vset(0), vselect(x > high, vset((real)__builtin_inf()), p));
#endif
}

/* 1 / (1 + e^-x) to two units in the last place. */
INLINE vec vsigmoid(vec x) { return 1 / (1 + vexp(-x)); }

INLINE vec vabs(vec x) { return vselect(x < 0, -x, x); }

/* log(1 + e^x) to three units in the last place, for large and small x alike: max(x, 0) + log(1 + u) with
 * u = e^-|x| <= 1, and log(1 + u) = 2 artanh(w / 2), w = 2u / (2 + u) <= 2/3, as its series. */
INLINE vec vsoftplus(vec x) {
    vec u = vexp(-vabs(x)), w = 2 * u / (2 + u), q = w * w * (real)0.25;
#ifdef ALTX_DOUBLE
    const int terms = 17;
#else
    const int terms = 8;
#endif
    vec p = vset((real)1 / (2 * terms + 1));
    for (int k = terms - 1; k >= 0; k--) p = p * q + (real)1 / (2 * k + 1);
    return vselect(x > 0, x, vselect(x != x, x, vset(0))) + w * p;
}

/* Sine and cosine of |x| <= 1000, to 1.5 times the machine's epsilon, absolutely. Reduction by Cody and Waite. */
INLINE void vsincos(vec x, vec *sine, vec *cosine) {
#ifdef ALTX_DOUBLE
    const real magic = 6755399441055744.0, pi2_1 = 1.57079625129699707031, pi2_2 = 7.54978941586159635336e-8;
    const real pi2_3 = 5.39030285815811905290e-15;
#else
    const real magic = 12582912.0f, pi2_1 = 1.5703125f, pi2_2 = 4.837512969970703125e-4f;
    const real pi2_3 = 7.54978995489188216e-8f;
#endif
    vec shifted = x * (real)0.63661977236758134 + magic, n = shifted - magic;
    ivec quarter = (ivec)shifted - (ivec)vset(magic);
    vec r = x - n * pi2_1 - n * pi2_2 - n * pi2_3, z = r * r;
#ifdef ALTX_DOUBLE
    vec s = vset(1.58962301576546568060e-10), c = vset(-1.13585365213876817300e-11);
    s = s * z - 2.50507477628578072866e-8;
    s = s * z + 2.75573136213857245213e-6;
    s = s * z - 1.98412698295895385996e-4;
    s = s * z + 8.33333333332211858878e-3;
    s = s * z - 1.66666666666666307295e-1;
    c = c * z + 2.08757008419747316778e-9;
    c = c * z - 2.75573141792967388112e-7;
    c = c * z + 2.48015872888517045348e-5;
    c = c * z - 1.38888888888730564116e-3;
    c = c * z + 4.16666666666665929218e-2;
#else
    vec s = vset(-1.9515295891e-4f), c = vset(2.443315711809948e-5f);
    s = s * z + 8.3321608736e-3f;
    s = s * z - 1.6666654611e-1f;
    c = c * z - 1.388731625493765e-3f;
    c = c * z + 4.166664568298827e-2f;
#endif
    s = s * z * r + r;
    c = c * z * z - (real)0.5 * z + 1;
    ivec odd = (quarter & 1) != 0;
    vec a = vselect(odd, c, s), b = vselect(odd, s, c);
    *sine = vselect((quarter & 2) != 0, -a, a);
    *cosine = vselect(((quarter + 1) & 2) != 0, -b, b);
}

/* Denormal numbers count as zero between these two, in the thread that runs them. */
#if defined(__x86_64__)
INLINE unsigned flush_denormals(void) {
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
}
INLINE void restore_denormals(unsigned before) { _mm_setcsr(before); }
#else
INLINE unsigned flush_denormals(void) { return 0; }
INLINE void restore_denormals(unsigned before) { (void)before; }
#endif

#endif
