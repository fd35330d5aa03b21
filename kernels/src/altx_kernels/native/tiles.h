/* Matrix products a tile at a time: ROWS rows and WIDE columns of the result stay in registers while the terms are
 * added. */
#ifndef TILES_H
#define TILES_H

#include "altx.h"

#define WIDE (2 * LANES)
#if defined(__AVX512F__)
#define ROWS 8
#else
#define ROWS 4
#endif

/* For functions with products: inside larger ones, compilers do not leave all of a tile in registers. */
#define APART __attribute__((noinline))

INLINE int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* c += a b for ROWS rows and WIDE columns over n terms: a_ri at a[r ra + i ca], b_i at b[i ldb]. */
INLINE void product(const real *a, int64_t ra, int64_t ca, const real *b, int64_t ldb, int64_t n, vec c[ROWS][2]) {
    for (int64_t i = 0; i < n; i++) {
        vec b0 = vload(b + i * ldb), b1 = vload(b + i * ldb + LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            vec x = vset(a[r * ra + i * ca]);
            c[r][0] += x * b0;
            c[r][1] += x * b1;
        }
    }
}

INLINE void load_tile(vec c[ROWS][2], const real *p, int64_t ld) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) c[r][0] = vload(p + r * ld), c[r][1] = vload(p + r * ld + LANES);
}

INLINE void store_tile(vec c[ROWS][2], real *p, int64_t ld) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) vstore(p + r * ld, c[r][0]), vstore(p + r * ld + LANES, c[r][1]);
}

/* Rows of a tile, of which `rows` and `columns` exist, to memory of any alignment. */
INLINE void store_part(vec c[ROWS][2], real *p, int64_t ld, int64_t rows, int64_t columns) {
    for (int r = 0; r < ROWS && r < rows; r++) {
        vstore_n(p + r * ld, c[r][0], columns);
        if (columns > LANES) vstore_n(p + r * ld + LANES, c[r][1], columns - LANES);
    }
}

/* to (columns, rows) = from^T; both sizes are multiples of LANES. */
static void transpose(const real *from, int64_t ldf, real *to, int64_t ldt, int64_t rows, int64_t columns) {
#if defined(__AVX512F__)
    ivec low[4], high[4];
    for (int i = 0; (1 << i) < LANES; i++)
        for (int j = 0; j < LANES; j++) {
            int step = 1 << i, odd = j & step;
            low[i][j] = odd ? LANES + j - step : j;
            high[i][j] = odd ? LANES + j : j + step;
        }
    for (int64_t r = 0; r < rows; r += LANES)
        for (int64_t c = 0; c < columns; c += LANES) {
            vec x[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) x[i] = vload(from + (r + i) * ldf + c);
#pragma GCC unroll 4
            for (int s = 0; (1 << s) < LANES; s++)
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++)
                    if (!(i >> s & 1)) {
                        vec a = x[i], b = x[i + (1 << s)];
#ifdef ALTX_DOUBLE
                        x[i] = (vec)_mm512_permutex2var_pd((__m512d)a, (__m512i)low[s], (__m512d)b);
                        x[i + (1 << s)] = (vec)_mm512_permutex2var_pd((__m512d)a, (__m512i)high[s], (__m512d)b);
#else
                        x[i] = (vec)_mm512_permutex2var_ps((__m512)a, (__m512i)low[s], (__m512)b);
                        x[i + (1 << s)] = (vec)_mm512_permutex2var_ps((__m512)a, (__m512i)high[s], (__m512)b);
#endif
                    }
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) vstore(to + (c + i) * ldt + r, x[i]);
        }
#else
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) to[c * ldt + r] = from[r * ldf + c];
#endif
}

/* to (padded, ld) = `rows` rows of n numbers, zeros elsewhere. */
static void pack(real *to, int64_t ld, int64_t padded, const real *from, int64_t stride, int64_t rows, int64_t n) {
    for (int64_t r = 0; r < rows; r++) {
        memcpy(to + r * ld, from + r * stride, (size_t)n * sizeof(real));
        memset(to + r * ld + n, 0, (size_t)(ld - n) * sizeof(real));
    }
    memset(to + rows * ld, 0, (size_t)((padded - rows) * ld) * sizeof(real));
}

INLINE real *take(real **memory, int64_t n) {
    real *at = *memory;
    *memory += up(n, 64 / (int64_t)sizeof(real));
    return at;
}

INLINE void clear(real *x, int64_t n) { memset(x, 0, (size_t)n * sizeof(real)); }

#endif
