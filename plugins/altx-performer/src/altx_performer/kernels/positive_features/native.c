/* FAVOR+'s positive features, and their gradients: see reference.py.
 *
 * a, b, q, k, decay (B, T, H, F); half (B, T, H); M (B, H, F), where the running maximum is kept. A unit of work is a
 * row's share of the heads, which it takes token by token, so that what it reads lies in one piece. */
#include "altx.h"

#define LOWEST ((real)-1e30)
#define GONE ((real)-1000)

INLINE vec vmax(vec x, vec y) { return vselect(x > y, x, y); }

/* Numbers i to i + LANES of F; those that there are not are `low`. */
INLINE vec low_beyond(vec x, int64_t left, real low) {
    if (left >= LANES) return x;
    real lanes[LANES];
    vstore(lanes, x);
    for (int64_t i = left; i < LANES; i++) lanes[i] = low;
    return vload(lanes);
}

INLINE real largest(vec x) {
    real lanes[LANES], most;
    vstore(lanes, x);
    most = lanes[0];
    for (int64_t i = 1; i < LANES; i++) most = lanes[i] > most ? lanes[i] : most;
    return most;
}

static void head(const real *a, const real *b, real half, int fresh, real *M, real *q, real *k, real *decay, int64_t F) {
    const real nothing = -(real)__builtin_inf();
    vec top = vset(nothing);
    for (int64_t i = 0; i < F; i += LANES) {
        vec e = vload_n(b + i, F - i) - half, before = fresh ? vset(LOWEST) : vload_n(M + i, F - i);
        vec m = vmax(e, before), x = vload_n(a + i, F - i) + m;
        vstore_n(M + i, m, F - i);
        vstore_n(decay + i, vmax(before - m, vset(GONE)), F - i);
        vstore_n(k + i, vexp(e - m), F - i);
        vstore_n(q + i, x, F - i);
        top = vmax(low_beyond(x, F - i, nothing), top);
    }
    const real most = largest(top);
    for (int64_t i = 0; i < F; i += LANES) vstore_n(q + i, vexp(vload_n(q + i, F - i) - most), F - i);
}

/* M holds what was before the first token. */
EXPORT void FN(forward)(const real *a, const real *b, const real *half, const uint8_t *reset, real *q, real *k,
                        real *decay, real *M, int64_t B, int64_t T, int64_t H, int64_t F, int64_t shares,
                        int64_t threads) {
    #pragma omp parallel for num_threads(threads) if(threads > 1)
    for (int64_t unit = 0; unit < B * shares; unit++) {
        const unsigned before = flush_denormals();
        const int64_t n = unit / shares, share = unit % shares;
        const int64_t first = share * H / shares, last = (share + 1) * H / shares;
        for (int64_t t = n * T; t < (n + 1) * T; t++)
            for (int64_t h = first; h < last; h++) {
                const int64_t at = t * H + h;
                head(a + at * F, b + at * F, half[at], reset && reset[t], M + (n * H + h) * F, q + at * F, k + at * F,
                     decay + at * F, F);
            }
        restore_denormals(before);
    }
}

/* da = dq q, db = dk k, dhalf = -sum of db; M and the largest exponent of a token count as constants. */
EXPORT void FN(backward)(const real *dq, const real *dk, const real *q, const real *k, real *da, real *db, real *dhalf,
                         int64_t rows, int64_t F, int64_t threads) {
    #pragma omp parallel for num_threads(threads) if(threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        const int64_t at = r * F;
        vec sum = vset(0);
        for (int64_t i = 0; i < F; i += LANES) {
            vec slope = vload_n(dk + at + i, F - i) * vload_n(k + at + i, F - i);
            vstore_n(da + at + i, vload_n(dq + at + i, F - i) * vload_n(q + at + i, F - i), F - i);
            vstore_n(db + at + i, slope, F - i);
            sum += slope;
        }
        dhalf[r] = -vsum(sum);
    }
}
