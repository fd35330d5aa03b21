/* The short causal convolution and its adjoint, vectors over channels.
 *
 * Tokens come in tiles: within a tile each vector of channels runs over the tile's tokens, so that weights and sums
 * stay in registers while every row is still read from its start to its end. Threads share the channels; so the
 * weights' gradients need no sum over threads, and are the same for any number of them.
 */
#include "altx.h"

#define TILE 8
/* Tokens after which the weights' sums of a block are added to the whole, which keeps float sums exact enough. */
#define BLOCK 256

typedef struct {
    const real *x, *weight, *bias, *state, *final;
    const int32_t *reach;
    int64_t x_token, tokens, K, D, silu, length;
} Sequence;

/* How many earlier inputs each token of a sequence sees: K-1, less after its start or a reset. */
static void reaches(int32_t *reach, const uint8_t *reset, int64_t tokens, int64_t K, int has_state) {
    int64_t now = has_state ? K - 1 : -1;
    for (int64_t t = 0; t < tokens; t++) {
        now = reset && reset[t] ? 0 : now + 1 < K ? now + 1 : K - 1;
        reach[t] = (int32_t)now;
    }
}

/* The input of token s; those before the first token are the state's. */
INLINE const real *input(const Sequence *q, int64_t s) {
    return s >= 0 ? q->x + s * q->x_token : q->state ? q->state + (s + q->K - 1) * q->D : NULL;
}

/* The first input that the final state holds. */
INLINE int64_t first_kept(const Sequence *q) {
    return q->length ? q->length - 1 - q->reach[q->length - 1] : q->state ? 1 - q->K : 0;
}

INLINE vec before_activation(
    const real *const *rows, const Sequence *q, int64_t K, int64_t from, int64_t d, int64_t lanes
) {
    vec sum = q->bias ? vload_n(q->bias + d, lanes) : vset(0);
    for (int64_t j = from; j < K; j++)
        sum += vload_n(q->weight + j * q->D + d, lanes) * vload_n(rows[j] + d, lanes);
    return sum;
}

/* y of tokens t .. t+n of channels d .. d+lanes; rows[i + j] is tap j of token t+i. */
INLINE void forward_vector(
    const Sequence *q, const real *const *rows, real *restrict y, int64_t t, int64_t n, int64_t K, int full, int64_t d,
    int64_t lanes
) {
    for (int64_t i = 0; i < n; i++) {
        vec sum = before_activation(rows + i, q, K, full ? 0 : K - 1 - q->reach[t + i], d, lanes);
        if (q->silu) sum = sum / (1 + vexp(-sum));
        vstore_n(y + i * q->D + d, sum, lanes);
    }
}

INLINE void forward_channels(
    const Sequence *q, const real *const *rows, real *y, int64_t t, int64_t n, int64_t K, int full, int64_t from,
    int64_t to
) {
    int64_t d = from;
    if (n == TILE)
        for (; d + LANES <= to; d += LANES) forward_vector(q, rows, y, t, TILE, K, full, d, LANES);
    for (; d < to; d += LANES) forward_vector(q, rows, y, t, n, K, full, d, to - d);
}

static void forward_sequence(const Sequence *q, real *y, real *final, int64_t from, int64_t to) {
    const int64_t K = q->K;
    const real *rows[TILE + K - 1];
    for (int64_t t = 0; t < q->tokens; t += TILE) {
        int64_t n = q->tokens - t < TILE ? q->tokens - t : TILE;
        int full = 1;
        for (int64_t i = 0; i < n + K - 1; i++) rows[i] = input(q, t + i - (K - 1));
        for (int64_t i = 0; i < n; i++) full &= q->reach[t + i] == K - 1;
        real *here = y + t * q->D;
        if (full && K == 4)
            forward_channels(q, rows, here, t, n, 4, 1, from, to);
        else if (full && K == 3)
            forward_channels(q, rows, here, t, n, 3, 1, from, to);
        else if (full && K == 2)
            forward_channels(q, rows, here, t, n, 2, 1, from, to);
        else
            forward_channels(q, rows, here, t, n, K, 0, from, to);
    }
    int64_t kept = first_kept(q);
    for (int64_t m = 0; m < K - 1; m++) {
        int64_t s = q->length - (K - 1) + m;
        if (s >= kept)
            memcpy(final + m * q->D + from, input(q, s) + from, (size_t)(to - from) * sizeof(real));
        else
            memset(final + m * q->D + from, 0, (size_t)(to - from) * sizeof(real));
    }
}

/* Channels from .. to of weight (D, K) as taps (K, D). */
static void turn(real *taps, const real *weight, int64_t D, int64_t K, int64_t from, int64_t to) {
    for (int64_t j = 0; j < K; j++)
        for (int64_t d = from; d < to; d++) taps[j * D + d] = weight[d * K + j];
}

/* Channels from and to of a thread's share. */
INLINE int64_t share(int64_t D, int64_t part, int64_t parts) {
    int64_t vectors = (D + LANES - 1) / LANES, at = vectors * part / parts * LANES;
    return at < D ? at : D;
}

/* x (N or 1, T, D) with strides x_row, x_token; weight (D, K); bounds (N+1) among the B * T tokens; lengths (N) or
 * NULL; reach, taps: room for B * T numbers and (K, D). y (B, T, D), final (N, K-1, D). */
EXPORT void FN(conv)(
    const real *x, int64_t x_row, int64_t x_token, const real *weight, const real *bias, const real *state,
    const uint8_t *reset, const int64_t *bounds, const int64_t *lengths, int32_t *reach, real *taps, real *y, real *final,
    int64_t N, int64_t T, int64_t D, int64_t K, int64_t silu, int64_t threads
) {
    for (int64_t n = 0; n < N; n++)
        reaches(reach + bounds[n], reset ? reset + bounds[n] : NULL, bounds[n + 1] - bounds[n], K, state != NULL);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        unsigned denormals = flush_denormals();
        int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
        int64_t from = share(D, part, parts), to = share(D, part + 1, parts);
        turn(taps, weight, D, K, from, to);
        for (int64_t n = 0; n < N && from < to; n++) {
            int64_t start = bounds[n], tokens = bounds[n + 1] - start;
            Sequence q = {
                .x = x + (T ? start / T * x_row + start % T * x_token : 0), .weight = taps, .bias = bias,
                .state = state ? state + n * (K - 1) * D : NULL, .reach = reach + start, .x_token = x_token,
                .tokens = tokens, .K = K, .D = D, .silu = silu, .length = tokens,
            };
            if (lengths && lengths[n] < tokens) q.length = lengths[n] > 0 ? lengths[n] : 0;
            forward_sequence(&q, y + start * D, final + n * (K - 1) * D, from, to);
        }
        restore_denormals(denormals);
    }
}

/* g_t, the gradient before the activation, of a tile's tokens; adds to the weights' and the bias's sums. */
INLINE void weights_vector(
    const Sequence *q, const real *const *rows, const real *const *dy, real *restrict g, real *restrict sums, int64_t t,
    int64_t n, int64_t K, int full, int64_t d, int64_t lanes
) {
    const int64_t D = q->D;
    vec total = vload_n(sums + K * D + d, lanes);
    for (int64_t i = 0; i < n; i++) {
        vec dz = vload_n(dy[i] + d, lanes);
        if (q->silu) {
            vec z = before_activation(rows + i, q, K, full ? 0 : K - 1 - q->reach[t + i], d, lanes);
            vec s = vsigmoid(z);
            dz *= s + z * s * (1 - s);
        }
        total += dz;
        vstore_n(g + i * D + d, dz, lanes);
    }
    vstore_n(sums + K * D + d, total, lanes);
    for (int64_t j = 0; j < K; j++) {
        vec sum = vload_n(sums + j * D + d, lanes);
        for (int64_t i = 0; i < n; i++)
            if (full || q->reach[t + i] >= K - 1 - j)
                sum += vload_n(g + i * D + d, lanes) * vload_n(rows[i + j] + d, lanes);
        vstore_n(sums + j * D + d, sum, lanes);
    }
}

/* The gradient of input s: taps of token s and the K-1 after it. g[m] is that of token s+m; tokens before 0 are none. */
INLINE vec input_vector(
    const Sequence *q, const real *restrict g, int64_t s, int64_t K, int full, int64_t d, int64_t lanes
) {
    vec sum = vset(0);
    for (int64_t m = full || s >= 0 ? 0 : -s; m < K; m++) {
        if (!full && (s + m >= q->tokens || q->reach[s + m] < m)) break;
        sum += vload_n(q->weight + (K - 1 - m) * q->D + d, lanes) * vload_n(g + m * q->D + d, lanes);
    }
    int64_t kept = s - (q->length - (K - 1));
    if (!full && q->final && kept >= 0 && s < q->length && s >= first_kept(q))
        sum += vload_n(q->final + kept * q->D + d, lanes);
    return sum;
}

INLINE void backward_channels(
    const Sequence *q, const real *const *rows, const real *const *dy, real *g, real *sums, real *dx, int64_t t,
    int64_t n, int64_t K, int full, int64_t from, int64_t to
) {
    const int64_t D = q->D;
    for (int64_t d = from; d < to; d += LANES) {
        int64_t lanes = to - d < LANES ? to - d : LANES;
        if (n == TILE && lanes == LANES) {
            weights_vector(q, rows, dy, g, sums, t, TILE, K, full, d, LANES);
            for (int64_t i = 0; i < TILE; i++)
                vstore(dx + i * D + d, input_vector(q, g + i * D, t + i, K, full, d, LANES));
        } else {
            weights_vector(q, rows, dy, g, sums, t, n, K, full, d, lanes);
            for (int64_t i = 0; i < n; i++)
                vstore_n(dx + i * D + d, input_vector(q, g + i * D, t + i, K, full, d, lanes), lanes);
        }
        /* The next tile's tokens come before this one's. */
        for (int64_t m = K - 2; m >= 0; m--)
            vstore_n(g + (TILE + m) * D + d, vload_n(g + m * D + d, lanes), lanes);
    }
}

static void add_up(real *total, real *sums, int64_t K, int64_t D, int64_t from, int64_t to) {
    for (int64_t j = 0; j <= K; j++)
        for (int64_t d = from; d < to; d++) {
            total[j * D + d] += sums[j * D + d];
            sums[j * D + d] = 0;
        }
}

static void backward_sequence(
    const Sequence *q, const real *dy, int64_t dy_token, real *g, real *sums, real *total, real *dx, real *dstate,
    int64_t from, int64_t to
) {
    const int64_t K = q->K, D = q->D;
    const real *rows[TILE + K - 1], *gradients[TILE];
    int64_t t = (q->tokens - 1) / TILE * TILE, n = q->tokens - t;
    for (; q->tokens && t >= 0; t -= TILE, n = TILE) {
        /* Not near the end, whose inputs the final state has too. */
        int full = t + n + K - 1 <= q->tokens && (!q->final || t + n <= q->length - (K - 1));
        for (int64_t i = 0; i < n + K - 1; i++) rows[i] = input(q, t + i - (K - 1));
        for (int64_t i = 0; i < n; i++) gradients[i] = dy + (t + i) * dy_token;
        for (int64_t i = 0; full && i < n + K - 1; i++) full &= q->reach[t + i] == K - 1;
        real *here = dx + t * D;
        if (full && K == 4)
            backward_channels(q, rows, gradients, g, sums, here, t, n, 4, 1, from, to);
        else if (full && K == 3)
            backward_channels(q, rows, gradients, g, sums, here, t, n, 3, 1, from, to);
        else if (full && K == 2)
            backward_channels(q, rows, gradients, g, sums, here, t, n, 2, 1, from, to);
        else
            backward_channels(q, rows, gradients, g, sums, here, t, n, K, 0, from, to);
        if (t % BLOCK == 0) add_up(total, sums, K, D, from, to);
    }
    /* g's rows TILE .. hold the first tokens: those before them are the state's. */
    for (int64_t m = 0; dstate && m < K - 1; m++)
        for (int64_t d = from; d < to; d += LANES) {
            int64_t s = m - (K - 1), lanes = to - d < LANES ? to - d : LANES;
            vstore_n(dstate + m * D + d, input_vector(q, g + (TILE + s) * D, s, K, 0, d, lanes), lanes);
        }
}

/* As above, and: dy (B, T, D) with strides; dfinal (N, K-1, D) or NULL; scratch: zeros, (TILE + 3K) rows of D.
 * dx (B, T, D); dstate (N, K-1, D) or NULL; total (K+1, D), zeros: dweight's columns and dbias. */
EXPORT void FN(conv_backward)(
    const real *dy, int64_t dy_row, int64_t dy_token, const real *dfinal, const real *x, int64_t x_row, int64_t x_token,
    const real *weight, const real *bias, const real *state, const uint8_t *reset, const int64_t *bounds,
    const int64_t *lengths, int32_t *reach, real *scratch, real *dx, real *dstate, real *total, int64_t N, int64_t T,
    int64_t D, int64_t K, int64_t silu, int64_t threads
) {
    for (int64_t n = 0; n < N; n++)
        reaches(reach + bounds[n], reset ? reset + bounds[n] : NULL, bounds[n + 1] - bounds[n], K, state != NULL);
    real *taps = scratch + (TILE + 2 * K) * D;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        unsigned denormals = flush_denormals();
        int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
        int64_t from = share(D, part, parts), to = share(D, part + 1, parts);
        turn(taps, weight, D, K, from, to);
        for (int64_t n = 0; n < N && from < to; n++) {
            int64_t start = bounds[n], tokens = bounds[n + 1] - start;
            Sequence q = {
                .x = x + (T ? start / T * x_row + start % T * x_token : 0), .weight = taps, .bias = bias,
                .state = state ? state + n * (K - 1) * D : NULL, .final = dfinal ? dfinal + n * (K - 1) * D : NULL,
                .reach = reach + start, .x_token = x_token, .tokens = tokens, .K = K, .D = D, .silu = silu,
                .length = tokens,
            };
            if (lengths && lengths[n] < tokens) q.length = lengths[n] > 0 ? lengths[n] : 0;
            backward_sequence(
                &q, dy + (T ? start / T * dy_row + start % T * dy_token : 0), dy_token, scratch,
                scratch + (TILE + K - 1) * D, total, dx + start * D, dstate ? dstate + n * (K - 1) * D : NULL, from, to
            );
        }
        restore_denormals(denormals);
    }
}
