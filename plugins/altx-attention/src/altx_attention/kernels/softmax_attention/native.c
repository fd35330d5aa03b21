/* Attention of one query per row and head: a step of decoding, which is reading the keys and the values once.
 *
 * Slots are walked through in the order in which they lie in memory, all heads at a time, with the softmax kept up as in
 * Milakov & Gimelshein 2018, arXiv:1805.02867. Stretches of slots are different programs', and merged at the end.
 */
#include "altx.h"

/* Slots whose scores are exponentiated together. */
#define BLOCK 32
/* No score is as small. */
#define LEAST ((real)-1e30)

INLINE real dot(const real *a, const real *b, int64_t n) {
    vec sum = vset(0), other = vset(0);
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        sum += vload(a + i) * vload(b + i);
        other += vload(a + i + LANES) * vload(b + i + LANES);
    }
    for (; i < n; i += LANES) sum += vload_n(a + i, n - i) * vload_n(b + i, n - i);
    return vsum(sum + other);
}

INLINE void add(real *restrict y, const real *x, real a, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) vstore_n(y + i, vload_n(y + i, n - i) + a * vload_n(x + i, n - i), n - i);
}

INLINE void scale_by(real *y, real a, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] *= a;
}

INLINE real exponential(real x) { return vexp(vset(x))[0]; }

typedef struct {
    const real *q, *k, *v;
    const int64_t *slot_document;
    int64_t document, ks, kg, vs, vg, H, G, D, E;
    real scale, softcap;
} row;

/* Slots start..stop-1 of a row: top (H), total (H) and mean (H, E) before division; scores has room for H * BLOCK. */
static void stretch(const row *r, int64_t start, int64_t stop, real *top, real *total, real *mean, real *scores) {
    const int64_t shared = r->H / r->G;
    for (int64_t h = 0; h < r->H; h++) top[h] = LEAST, total[h] = 0;
    memset(mean, 0, (size_t)(r->H * r->E) * sizeof(real));
    for (int64_t first = start; first < stop; first += BLOCK) {
        const int64_t n = stop - first < BLOCK ? stop - first : BLOCK;
        for (int64_t j = 0; j < n; j++) {
            const int64_t s = first + j;
            const int seen = !r->slot_document || r->slot_document[s] == r->document;
            for (int64_t h = 0; h < r->H; h++) {
                const real *key = r->k + s * r->ks + h / shared * r->kg;
                scores[h * BLOCK + j] = seen ? r->scale * dot(r->q + h * r->D, key, r->D) : -__builtin_inff();
            }
        }
        for (int64_t h = 0; h < r->H; h++) {
            real *a = scores + h * BLOCK, most = top[h];
            for (int64_t j = n; j < BLOCK; j++) a[j] = -__builtin_inff();
            if (r->softcap > 0)
                for (int64_t j = 0; j < n; j += LANES) {
                    /* softcap tanh(x / softcap), -infinity kept. */
                    vec x = vload(a + j), e = vexp(2 * (x / r->softcap));
                    vstore(a + j, vselect(x < LEAST, x, r->softcap * (1 - 2 / (e + 1))));
                }
            for (int64_t j = 0; j < n; j++) most = a[j] > most ? a[j] : most;
            if (most > top[h]) {
                const real less = exponential(top[h] - most);
                total[h] *= less;
                scale_by(mean + h * r->E, less, r->E);
                top[h] = most;
            }
            vec sum = vset(0);
            for (int64_t j = 0; j < BLOCK; j += LANES) {
                vec e = vexp(vload(a + j) - most);
                sum += e;
                vstore(a + j, e);
            }
            total[h] += vsum(sum);
        }
        for (int64_t j = 0; j < n; j++)
            for (int64_t h = 0; h < r->H; h++) {
                const real *value = r->v + (first + j) * r->vs + h / shared * r->vg;
                if (scores[h * BLOCK + j]) add(mean + h * r->E, value, scores[h * BLOCK + j], r->E);
            }
    }
}

/* q (B, H, D); k (B, S, G, D) and v (B, S, G, E), kb, ks, kg and vb, vs, vg apart. offset (B), document (B),
 * slot_document (B, S) and sinks (B, H) may be NULL, window and softcap 0 for none. y (B, H, E).
 * parts has room for B * splits * H * (E + 2 + BLOCK). */
EXPORT void FN(decode)(
    const real *q, const real *k, int64_t kb, int64_t ks, int64_t kg, const real *v, int64_t vb, int64_t vs, int64_t vg,
    const int64_t *offset, const int64_t *document, const int64_t *slot_document, const real *sinks, real *y,
    real *parts, int64_t B, int64_t S, int64_t H, int64_t G, int64_t D, int64_t E, int64_t causal, int64_t window,
    int64_t splits, double scale, double softcap, int64_t threads
) {
    const int64_t size = H * (E + 2 + BLOCK);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        unsigned denormals = flush_denormals();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < B * splits; i++) {
            const int64_t b = i / splits, part = i % splits, place = offset ? offset[b] : S - 1;
            int64_t low = 0, high = S;
            if (causal && place + 1 < high) high = place + 1;
            if (window && place - window + 1 > low) low = place - window + 1;
            if (window && place + window < high) high = place + window;
            const int64_t n = high > low ? high - low : 0;
            const row r = {
                q + b * H * D, k + b * kb, v + b * vb, slot_document ? slot_document + b * S : 0,
                document ? document[b] : 0, ks, kg, vs, vg, H, G, D, E, (real)scale, (real)softcap,
            };
            real *top = parts + i * size, *total = top + H, *mean = total + H, *scores = mean + H * E;
            stretch(&r, low + n * part / splits, low + n * (part + 1) / splits, top, total, mean, scores);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < B * H; i++) {
            const int64_t b = i / H, h = i % H;
            real most = sinks && sinks[i] > LEAST ? sinks[i] : LEAST, total = 0, *out = y + i * E;
            for (int64_t part = 0; part < splits; part++) {
                const real top = parts[(b * splits + part) * size + h];
                most = top > most ? top : most;
            }
            if (sinks) total = exponential(sinks[i] - most);
            memset(out, 0, (size_t)E * sizeof(real));
            for (int64_t part = 0; part < splits; part++) {
                const real *top = parts + (b * splits + part) * size + h, weight = exponential(*top - most);
                total += weight * top[H];
                add(out, top - h + 2 * H + h * E, weight, E);
            }
            if (total != 0) scale_by(out, 1 / total, E);
        }
        restore_denormals(denormals);
    }
}
