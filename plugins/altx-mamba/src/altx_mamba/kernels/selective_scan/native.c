/* The selective scan, forward and backward: see reference.py for the mathematics and its letters.
 *
 * Vectors lie across channels; a block is LANES channels. The state of a block, N vectors, stays in registers for a
 * chunk of tokens. Chunks come outside and blocks inside, so that rows of x, dt, z and y, which are far apart in
 * memory, are read in order. Threads share the blocks out: each channel belongs to one thread, for all sequences.
 *
 * A, the states and their gradients are kept as tiles: per block N vectors, those of channels past the last zero.
 * The backward pass starts from the states at each chunk's start, kept by the forward pass, and computes a chunk's
 * decays and states again.
 */
#include "altx.h"

enum {
    CHUNK = 16, /* tokens: the states and decays of a chunk, for TILE of N, fit into the first-level cache */
    TILE = 16,  /* of the N states in registers at a time */
};

/* What exp2 of a product with A takes in place of exp. */
#ifdef ALTX_DOUBLE
static const real A_SCALE = 1, LN2 = 1;
#else
static const real A_SCALE = 1.44269504088896341f, LN2 = 0.693147180559945309f;
#endif

typedef struct {
    const real *x, *dt, *z, *B, *C;                /* rows of tokens; z may be NULL */
    int64_t x_stride, dt_stride, z_stride, B_stride, C_stride;
    const real *A, *D, *bias;                      /* (width, states), (width) or NULL, (width) or NULL */
    const int64_t *bounds;                         /* (sequences + 1), or NULL: all have `length` tokens */
    const uint8_t *reset;                          /* (tokens) or NULL */
    int64_t length, sequences, width, states, softplus;
} Inputs;

INLINE int64_t start_of(const Inputs *in, int64_t sequence) {
    return in->bounds ? in->bounds[sequence] : sequence * in->length;
}

/* Which of the kept states is the first of a sequence: leaves room for every sequence's last, shorter chunk. */
INLINE int64_t first_chunk(const Inputs *in, int64_t sequence) { return start_of(in, sequence) / CHUNK + sequence; }

INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t lanes_of(const Inputs *in, int64_t block) { return min_of(LANES, in->width - block * LANES); }

/* A block of (width, states) into a tile. */
static void to_tile(const Inputs *in, const real *from, int64_t block, real scale, vec *tile) {
    int64_t lanes = lanes_of(in, block), states = in->states;
    real *to = (real *)tile;
    from += block * LANES * states;
    if (lanes < LANES) memset(to, 0, (size_t)(states * LANES) * sizeof(real));
    for (int64_t i = 0; i < lanes; i++)
        for (int64_t n = 0; n < states; n++) to[n * LANES + i] = from[i * states + n] * scale;
}

static void from_tile(const Inputs *in, const vec *tile, int64_t block, real *to) {
    int64_t lanes = lanes_of(in, block), states = in->states;
    const real *from = (const real *)tile;
    to += block * LANES * states;
    for (int64_t i = 0; i < lanes; i++)
        for (int64_t n = 0; n < states; n++) to[i * states + n] = from[n * LANES + i];
}

/* The largest |dt| for which the fast form of `decay` is right with these A. */
static vec limit_of(const vec *A, int64_t states) {
    vec most = vset(0);
    for (int64_t n = 0; n < states; n++) {
        /* 2^(dt A) must not overflow, and where it underflows dt A must leave room for a fraction. */
        vec size = vselect(A[n] > 0, A[n] / 120, -A[n] / 2097152);
        most = vselect(size > most, size, vselect(size != size, size, most));
    }
    return 1 / most;
}

#ifndef ALTX_DOUBLE
/* 2^(a b) for |a b| < 2^21, and below 120. */
INLINE vec power(vec a, vec b) {
    const real magic = 12582912.0f;
#ifdef __AVX512F__
    vec shifted = a * b + magic, n = shifted - magic, r = a * b - n;
#else
    vec exponent = a * b;
    exponent = vselect(exponent < -126, vset(-126), exponent);
    vec shifted = exponent + magic, n = shifted - magic, r = exponent - n;
#endif
    vec p = 0.001326472731307149f * r + 0.009671512991189957f;
    p = p * r + 0.05550733581185341f;
    p = p * r + 0.24022242426872253f;
    p = p * r + 0.6931470036506653f;
    p = p * r + 1;
#ifdef __AVX512F__
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return (vec)((ivec)p + ((ivec)shifted << 23));
#endif
}
#endif

/* exp(dt A), A times A_SCALE. Calm: |dt| is below the limit. */
INLINE vec decay(vec dt, vec A, const int calm) {
#ifndef ALTX_DOUBLE
    if (calm) return power(dt, A);
#endif
    return vexp(dt * A * LN2);
}

/* log(1 + e^x), and its derivative. */
INLINE vec softplus(vec x, vec *slope) {
#ifdef ALTX_DOUBLE
    *slope = vsigmoid(x);
    return vsoftplus(x);
#else
    vec size = vabs(x), u = power(vselect(size > 150, vset(-150), -size), vset(A_SCALE));
    *slope = vselect(x > 0, vset(1), u) / (1 + u);
    vec p = 0.005364821758121252f * u - 0.030065782368183136f;
    p = p * u + 0.07920452207326889f;
    p = p * u - 0.13753801584243774f;
    p = p * u + 0.191536545753479f;
    p = p * u - 0.24857163429260254f;
    p = p * u + 0.3332132399082184f;
    p = p * u - 0.49999648332595825f;
    p = p * u + 1;
    return vselect(x < 0, vset(0), x) + u * p;
#endif
}

/* Where the next block's numbers lie. The processor foresees no step from row to row, so it is told token by token. */
typedef struct {
    const real *row[4];
    int64_t stride[4];
} Ahead;

INLINE void fetch(const Ahead *ahead, int64_t t) {
    for (int i = 0; i < 4; i++) __builtin_prefetch(ahead->row[i] + t * ahead->stride[i]);
}

INLINE vec load(const real *p, int64_t lanes, const int full) { return full ? vload(p) : vload_n(p, lanes); }

INLINE void store(real *p, vec v, int64_t lanes, const int full) {
    if (full)
        vstore(p, v);
    else
        vstore_n(p, v, lanes);
}

INLINE vec optional(const real *p, int64_t offset, int64_t lanes) {
    return p ? vload_n(p + offset, lanes) : vset(0);
}

/* Whether every |dt| of a chunk is below the limit. */
INLINE int is_calm(const vec *dt, int64_t length, vec limit) {
    ivec wild = {0};
    for (int64_t t = 0; t < length; t++) wild |= ~(vabs(dt[t]) <= limit);
    integer any = 0;
    for (int i = 0; i < LANES; i++) any |= wild[i];
    return !any;
}

/* One block and chunk of the recurrence, for `count` of the N states: y += C h. */
INLINE void advance(const int count, const int calm, int64_t length, const vec *dt, const vec *u, const vec *A, vec *h,
                    const real *B, int64_t B_stride, const real *C, int64_t C_stride, const uint8_t *reset, vec *y,
                    const Ahead *ahead) {
    vec now[TILE];
#pragma GCC unroll 16
    for (int n = 0; n < count; n++) now[n] = h[n];
    for (int64_t t = 0; t < length; t++, B += B_stride, C += C_stride) {
        vec d = dt[t], input = u[t], sum[2] = {y[t], vset(0)};
        fetch(ahead, t);
        if (reset && reset[t])
#pragma GCC unroll 16
            for (int n = 0; n < count; n++) now[n] = vset(0);
#pragma GCC unroll 16
        for (int n = 0; n < count; n++) {
            now[n] = decay(d, A[n], calm) * now[n] + input * B[n];
            sum[n % 2] += now[n] * C[n];
        }
        y[t] = sum[0] + sum[1];
    }
#pragma GCC unroll 16
    for (int n = 0; n < count; n++) h[n] = now[n];
}

/* y of one block and chunk, from its state h, which advances. */
INLINE void forward_chunk(const Inputs *in, int64_t block, int64_t token, int64_t length, const vec *A, vec limit,
                          vec *h, real *y, const int full) {
    int64_t lanes = full ? LANES : lanes_of(in, block), channel = block * LANES;
    const real *x = in->x + token * in->x_stride + channel, *dt = in->dt + token * in->dt_stride + channel;
    const real *z = in->z ? in->z + token * in->z_stride + channel : NULL;
    y += token * in->width + channel;
    vec steps[CHUNK], inputs[CHUNK], sums[CHUNK], gates[CHUNK];
    vec bias = optional(in->bias, channel, lanes), D = optional(in->D, channel, lanes);
    const Ahead ahead = {{x + LANES, dt + LANES, z ? z + LANES : x, y + LANES},
                         {in->x_stride, in->dt_stride, z ? in->z_stride : 0, in->width}};
    for (int64_t t = 0; t < length; t++) {
        vec x_t = load(x + t * in->x_stride, lanes, full), d = load(dt + t * in->dt_stride, lanes, full) + bias, slope;
        if (in->softplus) d = softplus(d, &slope);
        steps[t] = d;
        inputs[t] = d * x_t;
        sums[t] = D * x_t;
        if (z) {
            vec z_t = load(z + t * in->z_stride, lanes, full);
            gates[t] = z_t * vsigmoid(z_t);
        }
    }
    int calm = is_calm(steps, length, limit);
    const uint8_t *reset = in->reset ? in->reset + token : NULL;
    const real *B = in->B + token * in->B_stride, *C = in->C + token * in->C_stride;
    int64_t n = 0;
#define ADVANCE(count, calm)                                                                                           \
    advance(count, calm, length, steps, inputs, A + n, h + n, B + n, in->B_stride, C + n, in->C_stride, reset, sums,    \
            &ahead)
    for (; n + 16 <= in->states; n += 16) calm ? ADVANCE(16, 1) : ADVANCE(16, 0);
    for (; n + 4 <= in->states; n += 4) calm ? ADVANCE(4, 1) : ADVANCE(4, 0);
    for (; n < in->states; n++) calm ? ADVANCE(1, 1) : ADVANCE(1, 0);
#undef ADVANCE
    for (int64_t t = 0; t < length; t++)
        store(y + t * in->width, z ? sums[t] * gates[t] : sums[t], lanes, full);
}

static void forward_blocks(const Inputs *in, const real *initial, real *y, real *last, vec *kept, vec *work, int64_t low,
                           int64_t high) {
    int64_t blocks = (in->width + LANES - 1) / LANES, states = in->states;
    vec *A = work, *h = A + blocks * states, *limit = h + blocks * states;
    for (int64_t b = low; b < high; b++) {
        to_tile(in, in->A, b, A_SCALE, A + b * states);
        limit[b] = limit_of(A + b * states, states);
    }
    for (int64_t s = 0; s < in->sequences; s++) {
        int64_t stop = start_of(in, s + 1), chunk = first_chunk(in, s), size = in->width * states;
        if (initial)
            for (int64_t b = low; b < high; b++) to_tile(in, initial + s * size, b, 1, h + b * states);
        else
            memset(h + low * states, 0, (size_t)((high - low) * states) * sizeof(vec));
        for (int64_t token = start_of(in, s); token < stop; token += CHUNK, chunk++) {
            int64_t length = min_of(CHUNK, stop - token);
            if (kept)
                memcpy(kept + (chunk * blocks + low) * states, h + low * states,
                       (size_t)((high - low) * states) * sizeof(vec));
            for (int64_t b = low; b < high; b++)
                if (lanes_of(in, b) == LANES)
                    forward_chunk(in, b, token, length, A + b * states, limit[b], h + b * states, y, 1);
                else
                    forward_chunk(in, b, token, length, A + b * states, limit[b], h + b * states, y, 0);
        }
        for (int64_t b = low; b < high; b++) from_tile(in, h + b * states, b, last + s * size);
    }
}

/* One token of sequence s, without a kept state. Vectors lie across the states, so that nothing is turned around. */
static void step(const Inputs *in, int64_t s, const real *initial, real *y, real *last, int64_t low, int64_t high) {
    int64_t states = in->states;
    const real *B = in->B + s * in->B_stride, *C = in->C + s * in->C_stride;
    if (in->reset && in->reset[s]) initial = NULL;
    for (int64_t b = low; b < high; b++) {
        int64_t lanes = lanes_of(in, b), channel = b * LANES;
        vec x = vload_n(in->x + s * in->x_stride + channel, lanes);
        vec dt = vload_n(in->dt + s * in->dt_stride + channel, lanes) + optional(in->bias, channel, lanes), slope;
        if (in->softplus) dt = softplus(dt, &slope);
        real steps[LANES], inputs[LANES], sums[LANES];
        vstore(steps, dt);
        vstore(inputs, dt * x);
        vstore(sums, vset(0));
        for (int64_t i = 0; i < lanes; i++) {
            const real *A = in->A + (channel + i) * states;
            int64_t at = (s * in->width + channel + i) * states;
            vec sum = vset(0);
            for (int64_t n = 0; n < states; n += LANES) {
                vec h = initial ? vload_n(initial + at + n, states - n) : vset(0);
                h = vexp(steps[i] * vload_n(A + n, states - n)) * h + inputs[i] * vload_n(B + n, states - n);
                vstore_n(last + at + n, h, states - n);
                sum += h * vload_n(C + n, states - n);
            }
            sums[i] = vsum(sum);
        }
        vec out = vload(sums) + optional(in->D, channel, lanes) * x;
        if (in->z) {
            vec z = vload_n(in->z + s * in->z_stride + channel, lanes);
            out *= z * vsigmoid(z);
        }
        vstore_n(y + s * in->width + channel, out, lanes);
    }
}

#define INPUTS                                                                                                         \
    const real *x, int64_t x_stride, const real *dt, int64_t dt_stride, const real *z, int64_t z_stride,               \
        const real *B, int64_t B_stride, const real *C, int64_t C_stride, const real *A, const real *D,                \
        const real *bias, const int64_t *bounds, const uint8_t *reset, int64_t length, int64_t sequences,              \
        int64_t width, int64_t states, int64_t softplus
#define GATHERED                                                                                                       \
    {                                                                                                                  \
        x, dt, z, B, C, x_stride, dt_stride, z_stride, B_stride, C_stride, A, D, bias, bounds, reset, length,          \
            sequences, width, states, softplus                                                                         \
    }

/* y (tokens, width), last (sequences, width, states); kept: room for the states at chunks' starts, or NULL. */
EXPORT void FN(scan)(INPUTS, const real *initial, real *y, real *last, real *kept, real *work, int64_t threads) {
    const Inputs in = GATHERED;
    int64_t blocks = (width + LANES - 1) / LANES;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        unsigned before = flush_denormals();
        int64_t id = omp_get_thread_num(), all = omp_get_num_threads();
        int64_t low = blocks * id / all, high = blocks * (id + 1) / all;
        if (length == 1 && !bounds && !kept)
            for (int64_t s = 0; s < sequences; s++) step(&in, s, initial, y, last, low, high);
        else
            forward_blocks(&in, initial, y, last, (vec *)kept, (vec *)work, low, high);
        restore_denormals(before);
    }
}

/* The chunk once more, keeping of each token the decay and the state before it; dC += h dy across channels. */
INLINE void replay(const int count, const int calm, int64_t length, const vec *dt, const vec *u, const vec *dy,
                   const vec *A, const vec *h, const real *B, int64_t B_stride, const real *C, int64_t C_stride,
                   const uint8_t *reset, vec *y, vec *decays, vec *befores, vec *dC, int64_t dC_stride,
                   const Ahead *ahead) {
    vec now[TILE];
#pragma GCC unroll 16
    for (int n = 0; n < count; n++) now[n] = h[n];
    for (int64_t t = 0; t < length; t++, B += B_stride, C += C_stride, dC += dC_stride) {
        vec d = dt[t], input = u[t], dy_t = dy[t], sum[2] = {y[t], vset(0)};
        fetch(ahead, t);
        if (reset && reset[t])
#pragma GCC unroll 16
            for (int n = 0; n < count; n++) now[n] = vset(0);
#pragma GCC unroll 16
        for (int n = 0; n < count; n++) {
            vec kept = decay(d, A[n], calm);
            decays[t * count + n] = kept;
            befores[t * count + n] = now[n];
            now[n] = kept * now[n] + input * B[n];
            sum[n % 2] += now[n] * C[n];
            dC[n] += now[n] * dy_t;
        }
        y[t] = sum[0] + sum[1];
    }
}

/* The recurrence of the gradient g with respect to h, from the end: g_t = C_t dy_t + decay_{t+1} g_{t+1}. */
INLINE void reverse(const int count, int64_t length, const vec *dt, const vec *u, const vec *dy, const vec *A,
                    const real *B, int64_t B_stride, const real *C, int64_t C_stride, const uint8_t *reset,
                    const vec *decays, const vec *befores, vec *g, vec *du, vec *ddt, vec *dA, vec *dB,
                    int64_t dB_stride) {
    vec now[TILE];
#pragma GCC unroll 16
    for (int n = 0; n < count; n++) now[n] = g[n];
    for (int64_t t = length - 1; t >= 0; t--) {
        const real *B_t = B + t * B_stride, *C_t = C + t * C_stride;
        vec d = dt[t], input = u[t], dy_t = dy[t], du_t = du[t], ddt_t = ddt[t];
        vec *dB_t = dB + t * dB_stride;
#pragma GCC unroll 16
        for (int n = 0; n < count; n++) {
            vec dh = now[n] + dy_t * C_t[n];
            dB_t[n] += dh * input;
            du_t += dh * B_t[n];
            now[n] = dh * decays[t * count + n];
            /* The gradient of the exponent dt A. */
            vec exponent = now[n] * befores[t * count + n];
            ddt_t += exponent * A[n];
            dA[n] += exponent * d;
        }
        if (reset && reset[t])
#pragma GCC unroll 16
            for (int n = 0; n < count; n++) now[n] = vset(0);
        du[t] = du_t;
        ddt[t] = ddt_t;
    }
#pragma GCC unroll 16
    for (int n = 0; n < count; n++) g[n] = now[n];
}

typedef struct {
    const real *dy, *dlast;                       /* either may be NULL */
    real *dx, *ddt, *dz, *dB, *dC;                /* dz may be NULL; dB, dC (threads, tokens, states) */
    real *dA, *dD, *dbias, *dinitial;
} Gradients;

/* All that one thread adds up across channels or time. */
typedef struct {
    vec *dB, *dC; /* of a chunk, across blocks */
} Sums;

INLINE void backward_chunk(const Inputs *in, const Gradients *out, int64_t block, int64_t token, int64_t length,
                           const vec *A, vec limit, const vec *h, vec *g, vec *dA, vec *dD, vec *dbias, Sums sums,
                           const int full) {
    int64_t lanes = full ? LANES : lanes_of(in, block), channel = block * LANES, states = in->states;
    const real *x = in->x + token * in->x_stride + channel, *dt = in->dt + token * in->dt_stride + channel;
    const real *z = in->z ? in->z + token * in->z_stride + channel : NULL;
    int64_t here = token * in->width + channel;
    const real *dy = out->dy ? out->dy + here : NULL;
    vec steps[CHUNK], slopes[CHUNK], inputs[CHUNK], gated[CHUNK], sigmoids[CHUNK], y[CHUNK], du[CHUNK], ddt[CHUNK];
    vec decays[CHUNK * TILE], befores[CHUNK * TILE];
    vec bias = optional(in->bias, channel, lanes), D = optional(in->D, channel, lanes);
    const Ahead ahead = {{x + LANES, dt + LANES, z ? z + LANES : x, dy ? dy + LANES : x},
                         {in->x_stride, in->dt_stride, z ? in->z_stride : 0, dy ? in->width : 0}};
    for (int64_t t = 0; t < length; t++) {
        vec x_t = load(x + t * in->x_stride, lanes, full), d = load(dt + t * in->dt_stride, lanes, full) + bias;
        vec dy_t = dy ? load(dy + t * in->width, lanes, full) : vset(0);
        slopes[t] = vset(1);
        if (in->softplus) d = softplus(d, slopes + t);
        if (z) {
            vec z_t = load(z + t * in->z_stride, lanes, full);
            sigmoids[t] = vsigmoid(z_t);
            dy_t *= z_t * sigmoids[t];
        }
        steps[t] = d;
        inputs[t] = d * x_t;
        gated[t] = dy_t;
        y[t] = D * x_t;
        du[t] = ddt[t] = vset(0);
    }
    int calm = is_calm(steps, length, limit);
    const uint8_t *reset = in->reset ? in->reset + token : NULL;
    const real *B = in->B + token * in->B_stride, *C = in->C + token * in->C_stride;
    int64_t n = 0;
#define REPLAY(count, calm)                                                                                            \
    replay(count, calm, length, steps, inputs, gated, A + n, h + n, B + n, in->B_stride, C + n, in->C_stride, reset,   \
           y, decays, befores, sums.dC + n, states, &ahead)
#define REVERSE(count)                                                                                                 \
    reverse(count, length, steps, inputs, gated, A + n, B + n, in->B_stride, C + n, in->C_stride, reset, decays,       \
            befores, g + n, du, ddt, dA + n, sums.dB + n, states)
    for (; n + 16 <= states; n += 16) {
        calm ? REPLAY(16, 1) : REPLAY(16, 0);
        REVERSE(16);
    }
    for (; n + 4 <= states; n += 4) {
        calm ? REPLAY(4, 1) : REPLAY(4, 0);
        REVERSE(4);
    }
    for (; n < states; n++) {
        calm ? REPLAY(1, 1) : REPLAY(1, 0);
        REVERSE(1);
    }
#undef REPLAY
#undef REVERSE
    vec bias_sum = vset(0), D_sum = vset(0);
    for (int64_t t = 0; t < length; t++) {
        int64_t at = here + t * in->width;
        vec x_t = load(x + t * in->x_stride, lanes, full);
        store(out->dx + at, du[t] * steps[t] + D * gated[t], lanes, full);
        /* ddt was summed with the scaled A. */
        vec ddt_t = (ddt[t] * LN2 + du[t] * x_t) * slopes[t];
        store(out->ddt + at, ddt_t, lanes, full);
        bias_sum += ddt_t;
        D_sum += gated[t] * x_t;
        if (z) {
            vec z_t = load(z + t * in->z_stride, lanes, full), s = sigmoids[t];
            vec dy_t = dy ? load(dy + t * in->width, lanes, full) : vset(0);
            store(out->dz + at, dy_t * y[t] * s * (1 + z_t * (1 - s)), lanes, full);
        }
    }
    *dD += D_sum;
    *dbias += bias_sum;
}

static void backward_blocks(const Inputs *in, const Gradients *out, const vec *kept, vec *work, Sums sums, int64_t low,
                            int64_t high) {
    int64_t blocks = (in->width + LANES - 1) / LANES, states = in->states;
    vec *A = work, *g = A + blocks * states, *dA = g + blocks * states;
    vec *limit = dA + blocks * states, *dD = limit + blocks, *dbias = dD + blocks;
    for (int64_t b = low; b < high; b++) {
        to_tile(in, in->A, b, A_SCALE, A + b * states);
        limit[b] = limit_of(A + b * states, states);
        dD[b] = dbias[b] = vset(0);
        for (int64_t n = 0; n < states; n++) dA[b * states + n] = vset(0);
    }
    for (int64_t s = 0; s < in->sequences; s++) {
        int64_t start = start_of(in, s), stop = start_of(in, s + 1), size = in->width * states;
        if (out->dlast)
            for (int64_t b = low; b < high; b++) to_tile(in, out->dlast + s * size, b, 1, g + b * states);
        else
            memset(g + low * states, 0, (size_t)((high - low) * states) * sizeof(vec));
        for (int64_t c = (stop - start + CHUNK - 1) / CHUNK - 1; c >= 0; c--) {
            int64_t token = start + c * CHUNK, length = min_of(CHUNK, stop - token);
            const vec *h = kept + (first_chunk(in, s) + c) * blocks * states;
            memset(sums.dB, 0, (size_t)(length * states) * sizeof(vec));
            memset(sums.dC, 0, (size_t)(length * states) * sizeof(vec));
            for (int64_t b = low; b < high; b++) {
                int64_t tile = b * states;
                if (lanes_of(in, b) == LANES)
                    backward_chunk(in, out, b, token, length, A + tile, limit[b], h + tile, g + tile, dA + tile, dD + b,
                                   dbias + b, sums, 1);
                else
                    backward_chunk(in, out, b, token, length, A + tile, limit[b], h + tile, g + tile, dA + tile, dD + b,
                                   dbias + b, sums, 0);
            }
            for (int64_t i = 0; i < length * states; i++) {
                out->dB[token * states + i] = vsum(sums.dB[i]);
                out->dC[token * states + i] = vsum(sums.dC[i]);
            }
        }
        for (int64_t b = low; b < high; b++) from_tile(in, g + b * states, b, out->dinitial + s * size);
    }
    for (int64_t b = low; b < high; b++) {
        from_tile(in, dA + b * states, b, out->dA);
        vstore_n(out->dD + b * LANES, dD[b], lanes_of(in, b));
        vstore_n(out->dbias + b * LANES, dbias[b], lanes_of(in, b));
    }
}

/* Gradients of everything from dy (tokens, width) and dlast (sequences, width, states); dB and dC (threads, tokens,
 * states) are sums over the channels of one thread each. */
EXPORT void FN(scan_backward)(INPUTS, const real *kept, const real *dy, const real *dlast, real *dx, real *ddt,
                              real *dz, real *dB, real *dC, real *dA, real *dD, real *dbias, real *dinitial, real *work,
                              int64_t tokens, int64_t threads) {
    const Inputs in = GATHERED;
    int64_t blocks = (width + LANES - 1) / LANES;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        unsigned before = flush_denormals();
        int64_t id = omp_get_thread_num(), all = omp_get_num_threads(), own = id * tokens * states;
        Gradients out = {dy, dlast, dx, ddt, dz, dB + own, dC + own, dA, dD, dbias, dinitial};
        vec *sums = (vec *)work + blocks * (3 * states + 3) + id * 2 * CHUNK * states;
        backward_blocks(&in, &out, (const vec *)kept, (vec *)work, (Sums){sums, sums + CHUNK * states},
                        blocks * id / all, blocks * (id + 1) / all);
        restore_denormals(before);
    }
}
