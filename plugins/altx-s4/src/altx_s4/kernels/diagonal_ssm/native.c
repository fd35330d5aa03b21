/* The diagonal state space, forward and backward: see reference.py for the mathematics and its letters.
 *
 * Vectors lie across channels; a block is LANES channels. Some states of a block stay in registers for a chunk of
 * tokens; with the low-rank part, which joins all states of a channel at every token, they lie in the first-level
 * cache. Chunks come outside and blocks inside, so that rows of x and y are read in order. Threads share the blocks
 * out: each channel belongs to one thread, for all rows.
 *
 * Coefficients, states and their gradients are kept as tiles: of a block, the vectors re, im of each of the N states,
 * and of each coefficient of a state side by side.
 * The backward pass starts from the states at each chunk's start, kept by the forward pass, and computes a chunk's
 * states again.
 */
#include "altx.h"

enum {
    CHUNK = 32, /* tokens */
    TILE = 4,   /* states in registers at a time */
    TERMS = 5,  /* of the coefficients rate, c, b, w, v, those of a plain system are the first two */
};

typedef struct {
    const real *x;             /* rows of tokens */
    int64_t stride, plane;     /* from token to token, and to the imaginary plane; 0 if x is real */
    const real *terms[TERMS];  /* (width, 2, states); b, w, v may be NULL */
    const real *D;             /* (width) or NULL */
    const uint8_t *reset;      /* (rows, length) or NULL */
    const int64_t *lengths;    /* (rows) or NULL */
    int64_t rows, length, width, states;
} Inputs;

typedef struct {
    vec x[2], y[2];
} Token; /* of one block; in the backward pass dy and dx */

INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t lanes_of(const Inputs *in, int64_t block) { return min_of(LANES, in->width - block * LANES); }

INLINE int64_t blocks_of(const Inputs *in) { return (in->width + LANES - 1) / LANES; }

INLINE int64_t terms_of(const Inputs *in) { return in->terms[2] ? TERMS : 2; }

/* How many tokens of a row count. */
INLINE int64_t tokens_of(const Inputs *in, int64_t row) {
    return in->lengths ? min_of(in->lengths[row] < 0 ? 0 : in->lengths[row], in->length) : in->length;
}

/* A block of (width, 2, states) into a tile, in which the states are `step` vectors apart. */
static void to_tile(const Inputs *in, const real *from, int64_t block, vec *tile, int64_t step) {
    int64_t lanes = lanes_of(in, block), states = in->states;
    real *to = (real *)tile;
    from += block * LANES * 2 * states;
    for (int64_t i = 0; i < LANES; i++)
        for (int64_t p = 0; p < 2; p++)
            for (int64_t n = 0; n < states; n++)
                to[(n * step + p) * LANES + i] = i < lanes ? from[(2 * i + p) * states + n] : 0;
}

static void from_tile(const Inputs *in, const vec *tile, int64_t step, int64_t block, real *to) {
    int64_t lanes = lanes_of(in, block), states = in->states;
    const real *from = (const real *)tile;
    to += block * LANES * 2 * states;
    for (int64_t i = 0; i < lanes; i++)
        for (int64_t p = 0; p < 2; p++)
            for (int64_t n = 0; n < states; n++) to[(2 * i + p) * states + n] = from[(n * step + p) * LANES + i];
}

/* The state after one token, from h = (r, s) and the input (u, u2), in place. The rates are small beside 1.
 * Sums are written so that each product goes with an addition. */
#define STEP(a, e, u, u2)                                                                                              \
    vec re = (a * r + (u)) + (r - e * s), im = (a * s + (u2)) + (s + e * r);                                           \
    r = re, s = im

/* The same for a real input. */
#define STEP_REAL(a, e, u)                                                                                             \
    vec re = (a * r + (u)) + (r - e * s), im = a * s + (s + e * r);                                                    \
    r = re, s = im

/* One block and chunk of a plain system, for `count` of the N states: y += c h. */
INLINE void advance(const int count, const int planes, int64_t length, Token *token, const vec *tile, vec *h,
                    const uint8_t *reset) {
    vec now[TILE][2];
#pragma GCC unroll 4
    for (int n = 0; n < count; n++) now[n][0] = h[2 * n], now[n][1] = h[2 * n + 1];
    for (int64_t t = 0; t < length; t++) {
        vec u = token[t].x[0], u2 = planes > 1 ? token[t].x[1] : vset(0);
        vec y[2] = {token[t].y[0], token[t].y[1]}, more[2] = {vset(0), vset(0)};
        if (reset && reset[t])
#pragma GCC unroll 4
            for (int n = 0; n < count; n++) now[n][0] = now[n][1] = vset(0);
#pragma GCC unroll 4
        for (int n = 0; n < count; n++) {
            const vec *rate = tile + 4 * n, *c = rate + 2;
            vec a = rate[0], e = rate[1], r = now[n][0], s = now[n][1];
            if (planes > 1) {
                STEP(a, e, u, u2);
            } else {
                STEP_REAL(a, e, u);
            }
            now[n][0] = r, now[n][1] = s;
            y[0] += c[0] * r;
            more[0] -= c[1] * s;
            if (planes > 1) {
                y[1] += c[0] * s;
                more[1] += c[1] * r;
            }
        }
        token[t].y[0] = y[0] + more[0];
        if (planes > 1) token[t].y[1] = y[1] + more[1];
    }
#pragma GCC unroll 4
    for (int n = 0; n < count; n++) h[2 * n] = now[n][0], h[2 * n + 1] = now[n][1];
}

/* Re(sum_n v_n h_n), of a system with a low-rank part. */
INLINE vec inner(int64_t states, const vec *tile, const vec *h) {
    vec sum[2] = {vset(0), vset(0)};
    const vec *v = tile + 8;
    for (int64_t n = 0; n < states; n++, v += 2 * TERMS) {
        sum[0] += v[0] * h[2 * n];
        sum[1] -= v[1] * h[2 * n + 1];
    }
    return sum[0] + sum[1];
}

/* *p, read one time only: GCC would rather read it for each use. */
INLINE vec once(const vec *p) { return *(const volatile vec *)p; }

typedef struct {
    vec y[2], v[2];
} Sums; /* of Re(c h) and Re(v h), in halves, so that no addition waits for another */

/* State n after one token of a system with a low-rank part. tile: the five coefficients. old: Re(sum v h) before. */
INLINE void join_state(int64_t n, vec u, vec old, const vec *tile, const vec *before, vec *after, Sums *sums) {
    const vec *rate = tile + 2 * TERMS * n, *c = rate + 2, *b = rate + 4, *w = rate + 6, *v = rate + 8;
    vec a = once(rate), e = once(rate + 1), r = once(before + 2 * n), s = once(before + 2 * n + 1);
    STEP(a, e, b[0] * u - w[0] * old, b[1] * u - w[1] * old);
    after[2 * n] = r, after[2 * n + 1] = s;
    sums->y[0] += c[0] * r;
    sums->y[1] -= c[1] * s;
    sums->v[0] += v[0] * r;
    sums->v[1] -= v[1] * s;
}

/* All states after one token: `after` from `before`, which may be the same; returns Re(sum c h).
 * sigma: Re(sum v h) before the token, and then after it. */
INLINE vec join(int64_t states, vec u, const vec *tile, const vec *before, vec *after, vec *sigma) {
    int64_t n = 0;
    Sums even = {{vset(0), vset(0)}, {vset(0), vset(0)}}, odd = even;
    for (; n + 2 <= states; n += 2) {
        join_state(n, u, *sigma, tile, before, after, &even);
        join_state(n + 1, u, *sigma, tile, before, after, &odd);
    }
    if (n < states) join_state(n, u, *sigma, tile, before, after, &even);
    *sigma = (even.v[0] + odd.v[0]) + (even.v[1] + odd.v[1]);
    return (even.y[0] + odd.y[0]) + (even.y[1] + odd.y[1]);
}

/* The tokens of a chunk from memory: x and, if there is a skip, y = D x. */
INLINE void load_chunk(const Inputs *in, int64_t block, int64_t at, int64_t length, vec D, Token *token) {
    int64_t lanes = lanes_of(in, block);
    const real *x = in->x + at * in->stride + block * LANES;
    for (int64_t t = 0; t < length; t++, x += in->stride) {
        token[t].x[0] = vload_n(x, lanes);
        token[t].x[1] = in->plane ? vload_n(x + in->plane, lanes) : vset(0);
        token[t].y[0] = D * token[t].x[0];
        token[t].y[1] = vset(0);
    }
}

static void forward_chunk(const Inputs *in, int64_t block, int64_t at, int64_t length, const vec *tile, vec *h,
                          real *y) {
    int64_t lanes = lanes_of(in, block), states = in->states, size = 2 * states, planes = in->plane ? 2 : 1;
    const uint8_t *reset = in->reset ? in->reset + at : NULL;
    Token token[CHUNK];
    load_chunk(in, block, at, length, in->D ? vload_n(in->D + block * LANES, lanes) : vset(0), token);
    if (in->terms[2]) {
        vec sigma = inner(states, tile, h);
        for (int64_t t = 0; t < length; t++) {
            if (reset && reset[t]) {
                for (int64_t n = 0; n < size; n++) h[n] = vset(0);
                sigma = vset(0);
            }
            token[t].y[0] += join(states, token[t].x[0], tile, h, h, &sigma);
        }
    } else {
        int64_t n = 0;
#define ADVANCE(count, planes) advance(count, planes, length, token, tile + 4 * n, h + 2 * n, reset)
        for (; n + TILE <= states; n += TILE) planes > 1 ? ADVANCE(TILE, 2) : ADVANCE(TILE, 1);
        for (; n < states; n++) planes > 1 ? ADVANCE(1, 2) : ADVANCE(1, 1);
#undef ADVANCE
    }
    y += at * planes * in->width + block * LANES;
    for (int64_t t = 0; t < length; t++)
        for (int64_t p = 0; p < planes; p++) vstore_n(y + (t * planes + p) * in->width, token[t].y[p], lanes);
}

/* The coefficients of blocks low..high-1 as tiles. */
static void load_terms(const Inputs *in, int64_t low, int64_t high, vec *tiles) {
    int64_t size = 2 * in->states, terms = terms_of(in);
    for (int64_t b = low; b < high; b++)
        for (int64_t k = 0; k < terms; k++) to_tile(in, in->terms[k], b, tiles + b * terms * size + 2 * k, 2 * terms);
}

static void forward_blocks(const Inputs *in, const real *initial, real *y, real *last, vec *kept, vec *work,
                           int64_t low, int64_t high) {
    int64_t blocks = blocks_of(in), size = 2 * in->states, terms = terms_of(in);
    vec *tiles = work, *h = work + blocks * terms * size;
    load_terms(in, low, high, tiles);
    for (int64_t row = 0; row < in->rows; row++) {
        int64_t start = row * in->length, stop = start + tokens_of(in, row), whole = in->width * size;
        for (int64_t b = low; b < high; b++) {
            if (initial)
                to_tile(in, initial + row * whole, b, h + b * size, 2);
            else
                memset(h + b * size, 0, (size_t)size * sizeof(vec));
        }
        int64_t chunk = row * ((in->length + CHUNK - 1) / CHUNK);
        for (int64_t at = start; at < stop; at += CHUNK, chunk++) {
            if (kept)
                memcpy(kept + (chunk * blocks + low) * size, h + low * size,
                       (size_t)((high - low) * size) * sizeof(vec));
            for (int64_t b = low; b < high; b++)
                forward_chunk(in, b, at, min_of(CHUNK, stop - at), tiles + b * terms * size, h + b * size, y);
        }
        for (int64_t b = low; b < high; b++) from_tile(in, h + b * size, 2, b, last + row * whole);
    }
}

/* One token of each row. Vectors lie across the states, so that nothing is turned around. */
static void step(const Inputs *in, const real *initial, real *y, real *last, int64_t low, int64_t high) {
    int64_t states = in->states, width = in->width, planes = in->plane ? 2 : 1;
    for (int64_t row = 0; row < in->rows; row++) {
        int64_t there = tokens_of(in, row), fresh = !initial || (in->reset && in->reset[row] && there);
        for (int64_t i = low * LANES; i < min_of(high * LANES, width); i++) {
            int64_t at = (row * width + i) * 2 * states, term = i * 2 * states;
            const real *before = fresh ? NULL : initial + at, *x = in->x + row * in->stride + i;
            real *after = last + at, *out = y + row * planes * width + i;
            if (!there) {
                if (before)
                    memcpy(after, before, (size_t)(2 * states) * sizeof(real));
                else
                    memset(after, 0, (size_t)(2 * states) * sizeof(real));
                continue;
            }
            const real *rate = in->terms[0] + term, *c = in->terms[1] + term;
            vec u = vset(x[0]), u2 = planes > 1 ? vset(x[in->plane]) : vset(0), sum = vset(0), sum2 = vset(0);
            vec sigma = vset(0);
            if (in->terms[2] && before) {
                const real *v = in->terms[4] + term;
                for (int64_t n = 0; n < states; n += LANES) {
                    int64_t some = min_of(LANES, states - n);
                    sigma += vload_n(v + n, some) * vload_n(before + n, some);
                    sigma -= vload_n(v + states + n, some) * vload_n(before + states + n, some);
                }
                sigma = vset(vsum(sigma));
            }
            for (int64_t n = 0; n < states; n += LANES) {
                int64_t some = min_of(LANES, states - n), m = n + states;
                vec a = vload_n(rate + n, some), e = vload_n(rate + m, some);
                vec r = before ? vload_n(before + n, some) : vset(0), s = before ? vload_n(before + m, some) : vset(0);
                vec in_r = u, in_s = u2;
                if (in->terms[2]) {
                    const real *b = in->terms[2] + term, *w = in->terms[3] + term;
                    in_r = vload_n(b + n, some) * u - vload_n(w + n, some) * sigma;
                    in_s = vload_n(b + m, some) * u - vload_n(w + m, some) * sigma;
                }
                STEP(a, e, in_r, in_s);
                vstore_n(after + n, r, some);
                vstore_n(after + m, s, some);
                vec c_r = vload_n(c + n, some), c_s = vload_n(c + m, some);
                sum += c_r * r - c_s * s;
                sum2 += c_r * s + c_s * r;
            }
            out[0] = vsum(sum) + (in->D ? in->D[i] * x[0] : 0);
            if (planes > 1) out[width] = vsum(sum2);
        }
    }
}

#define INPUTS                                                                                                         \
    const real *x, int64_t stride, int64_t plane, const real *rate, const real *c, const real *b, const real *w,       \
        const real *v, const real *D, const uint8_t *reset, const int64_t *lengths, int64_t rows, int64_t length,      \
        int64_t width, int64_t states
#define GATHERED {x, stride, plane, {rate, c, b, w, v}, D, reset, lengths, rows, length, width, states}

/* y (rows, length, planes, width), last (rows, width, 2, states); kept: room for the states at chunks' starts, or
 * NULL. Where lengths are given, y beyond them is not written. */
EXPORT void FN(ssm)(INPUTS, const real *initial, real *y, real *last, real *kept, real *work, int64_t threads) {
    const Inputs in = GATHERED;
    int64_t blocks = blocks_of(&in);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        unsigned before = flush_denormals();
        int64_t id = omp_get_thread_num(), all = omp_get_num_threads();
        int64_t low = blocks * id / all, high = blocks * (id + 1) / all;
        if (length == 1 && !kept)
            step(&in, initial, y, last, low, high);
        else
            forward_blocks(&in, initial, y, last, (vec *)kept, (vec *)work, low, high);
        restore_denormals(before);
    }
}

/* The gradient with respect to the state before a token, from g = (r, s) behind it, in place. */
#define STEP_BACK(a, e)                                                                                                \
    vec re = a * r + (r + e * s), im = a * s + (s - e * r);                                                            \
    r = re, s = im

/* One block and chunk of a plain system, backwards, for `count` of the N states. token: y is dy. dx is added to. */
INLINE void retreat(const int count, const int planes, int64_t length, const Token *token, vec (*dx)[2],
                    const vec *tile, const vec *h, vec *g, vec *grads, const uint8_t *reset) {
    vec now[TILE][2], sums[TILE][4], seen[(CHUNK + 1) * TILE * 2];
#pragma GCC unroll 4
    for (int n = 0; n < count; n++) now[n][0] = seen[2 * n] = h[2 * n], now[n][1] = seen[2 * n + 1] = h[2 * n + 1];
    for (int64_t t = 0; t < length; t++) {
        vec u = token[t].x[0], u2 = planes > 1 ? token[t].x[1] : vset(0), *after = seen + (t + 1) * 2 * count;
        if (reset && reset[t])
#pragma GCC unroll 4
            for (int n = 0; n < count; n++) now[n][0] = now[n][1] = vset(0);
#pragma GCC unroll 4
        for (int n = 0; n < count; n++) {
            vec a = tile[4 * n], e = tile[4 * n + 1], r = now[n][0], s = now[n][1];
            if (planes > 1) {
                STEP(a, e, u, u2);
            } else {
                STEP_REAL(a, e, u);
            }
            after[2 * n] = now[n][0] = r, after[2 * n + 1] = now[n][1] = s;
        }
    }
#pragma GCC unroll 4
    for (int n = 0; n < count; n++) {
        now[n][0] = g[2 * n], now[n][1] = g[2 * n + 1];
        for (int k = 0; k < 4; k++) sums[n][k] = vset(0);
    }
    for (int64_t t = length - 1; t >= 0; t--) {
        const vec *before = seen + t * 2 * count, *after = before + 2 * count;
        vec dy = token[t].y[0], dy2 = planes > 1 ? token[t].y[1] : vset(0), du = dx[t][0], du2 = dx[t][1];
        int fresh = reset && reset[t];
#pragma GCC unroll 4
        for (int n = 0; n < count; n++) {
            const vec *c = tile + 4 * n + 2;
            vec a = tile[4 * n], e = tile[4 * n + 1], r = now[n][0], s = now[n][1];
            r += c[0] * dy;
            s -= c[1] * dy;
            sums[n][2] += dy * after[2 * n];
            sums[n][3] -= dy * after[2 * n + 1];
            if (planes > 1) {
                r += c[1] * dy2;
                s += c[0] * dy2;
                sums[n][2] += dy2 * after[2 * n + 1];
                sums[n][3] += dy2 * after[2 * n];
                du2 += s;
            }
            du += r;
            sums[n][0] += fresh ? vset(0) : r * before[2 * n];
            sums[n][0] += fresh ? vset(0) : s * before[2 * n + 1];
            sums[n][1] += fresh ? vset(0) : s * before[2 * n];
            sums[n][1] -= fresh ? vset(0) : r * before[2 * n + 1];
            STEP_BACK(a, e);
            now[n][0] = r, now[n][1] = s;
        }
        if (fresh)
#pragma GCC unroll 4
            for (int n = 0; n < count; n++) now[n][0] = now[n][1] = vset(0);
        dx[t][0] = du, dx[t][1] = du2;
    }
#pragma GCC unroll 4
    for (int n = 0; n < count; n++) {
        g[2 * n] = now[n][0], g[2 * n + 1] = now[n][1];
        for (int k = 0; k < 4; k++) grads[4 * n + k] += sums[n][k];
    }
}

/* One token of a system with a low-rank part, backwards: `grads`, the gradient with respect to the state after it,
 * from `later`, that of the next token. rho: Re(w^* grads), of the next token and then of this one. Returns
 * Re(b^* grads). */
INLINE vec part_token(int64_t states, vec dy, const vec *tile, const vec *later, vec *grads, vec *rho) {
    vec sum[4] = {vset(0), vset(0), vset(0), vset(0)}, next = *rho;
    for (int64_t n = 0; n < states; n++) {
        const vec *rate = tile + 2 * TERMS * n, *c = rate + 2, *b = rate + 4, *w = rate + 6, *v = rate + 8;
        vec a = once(rate), e = once(rate + 1), r = once(later + 2 * n), s = once(later + 2 * n + 1);
        STEP_BACK(a, e);
        r -= next * v[0];
        s += next * v[1];
        r += c[0] * dy;
        s -= c[1] * dy;
        grads[2 * n] = r, grads[2 * n + 1] = s;
        sum[0] += w[0] * r;
        sum[1] += w[1] * s;
        sum[2] += b[0] * r;
        sum[3] += b[1] * s;
    }
    *rho = sum[0] + sum[1];
    return sum[2] + sum[3];
}

/* One block and chunk of a system with a low-rank part, backwards.
 * room: PITCH(size) (2 CHUNK + 2) vectors, in rows that do not all fall into the same lines of a cache. */
#define PITCH(size) ((size) + 2)
static void part(int64_t states, int64_t length, const Token *token, vec (*dx)[2], const vec *tile, const vec *h,
                 vec *g, vec *sums, const uint8_t *reset, vec *room) {
    int64_t size = 2 * states, pitch = PITCH(size);
    vec *none = room, *seen = room + pitch, *grads = seen + (CHUNK + 1) * pitch;
    vec sigma[CHUNK + 1], rho[CHUNK], zero = vset(0);
    memset(none, 0, (size_t)size * sizeof(vec));
    memcpy(seen, h, (size_t)size * sizeof(vec));
    sigma[0] = inner(states, tile, h);
    for (int64_t t = 0; t < length; t++) {
        int fresh = reset && reset[t];
        if (fresh) sigma[t] = zero;
        sigma[t + 1] = sigma[t];
        join(states, token[t].x[0], tile, fresh ? none : seen + t * pitch, seen + (t + 1) * pitch, sigma + t + 1);
    }
    /* The last token takes g as it is: it comes as the gradient with respect to the state after it. */
    for (int64_t t = length - 1; t >= 0; t--) {
        vec dy = token[t].y[0], *here = grads + t * pitch;
        if (t == length - 1) {
            vec sum = zero, into = zero;
            const vec *c = tile + 2, *b = tile + 4, *w = tile + 6;
            for (int64_t n = 0, k = 0; n < size; n += 2, k += 2 * TERMS) {
                here[n] = g[n] + c[k] * dy;
                here[n + 1] = g[n + 1] - c[k + 1] * dy;
                sum += w[k] * here[n] + w[k + 1] * here[n + 1];
                into += b[k] * here[n] + b[k + 1] * here[n + 1];
            }
            rho[t] = sum;
            dx[t][0] += into;
            continue;
        }
        int cut = reset && reset[t + 1];
        rho[t] = cut ? zero : rho[t + 1];
        dx[t][0] += part_token(states, dy, tile, cut ? none : here + pitch, here, rho + t);
    }
    vec next = rho[0];
    if (reset && reset[0])
        memset(g, 0, (size_t)size * sizeof(vec));
    else
        part_token(states, zero, tile, grads, g, &next);
    for (int64_t n = 0; n < size; n += 2) {
        vec sum[TERMS][2], p = seen[n], q = seen[n + 1];
        for (int k = 0; k < TERMS; k++) sum[k][0] = sum[k][1] = zero;
        for (int64_t t = 0; t < length; t++) {
            const vec *after = seen + (t + 1) * pitch + n, *here = grads + t * pitch + n;
            vec r = here[0], s = here[1], u = token[t].x[0], dy = token[t].y[0];
            if (reset && reset[t]) p = q = zero;
            sum[0][0] += r * p;
            sum[0][1] += s * p;
            sum[0][0] += s * q;
            sum[0][1] -= r * q;
            sum[2][0] += r * u;
            sum[2][1] += s * u;
            sum[3][0] -= r * sigma[t];
            sum[3][1] -= s * sigma[t];
            sum[4][0] -= rho[t] * p;
            sum[4][1] += rho[t] * q;
            p = after[0], q = after[1];
            sum[1][0] += dy * p;
            sum[1][1] -= dy * q;
        }
        for (int k = 0; k < TERMS; k++, sums += 2) sums[0] += sum[k][0], sums[1] += sum[k][1];
    }
}

typedef struct {
    const real *dy, *dlast; /* either may be NULL */
    real *dx, *terms[TERMS], *dD, *dinitial;
} Gradients;

static void backward_chunk(const Inputs *in, const Gradients *out, int64_t block, int64_t at, int64_t length,
                           const vec *tile, const vec *h, vec *g, vec *sums, vec *dD, vec *room) {
    int64_t lanes = lanes_of(in, block), states = in->states, planes = in->plane ? 2 : 1;
    const uint8_t *reset = in->reset ? in->reset + at : NULL;
    vec D = in->D ? vload_n(in->D + block * LANES, lanes) : vset(0), dx[CHUNK][2];
    int64_t here = at * planes * in->width + block * LANES;
    Token token[CHUNK];
    load_chunk(in, block, at, length, D, token);
    for (int64_t t = 0; t < length; t++) {
        for (int64_t p = 0; p < planes; p++)
            token[t].y[p] = out->dy ? vload_n(out->dy + here + (t * planes + p) * in->width, lanes) : vset(0);
        dx[t][0] = D * token[t].y[0], dx[t][1] = vset(0);
        *dD += token[t].x[0] * token[t].y[0];
    }
    if (in->terms[2]) {
        part(states, length, token, dx, tile, h, g, sums, reset, room);
    } else {
        int64_t n = 0;
#define RETREAT(count, planes)                                                                                         \
    retreat(count, planes, length, token, dx, tile + 4 * n, h + 2 * n, g + 2 * n, sums + 4 * n, reset)
        for (; n + TILE <= states; n += TILE) planes > 1 ? RETREAT(TILE, 2) : RETREAT(TILE, 1);
        for (; n < states; n++) planes > 1 ? RETREAT(1, 2) : RETREAT(1, 1);
#undef RETREAT
    }
    for (int64_t t = 0; t < length; t++)
        for (int64_t p = 0; p < planes; p++) vstore_n(out->dx + here + (t * planes + p) * in->width, dx[t][p], lanes);
}

static void backward_blocks(const Inputs *in, const Gradients *out, const vec *kept, vec *work, vec *room, int64_t low,
                            int64_t high) {
    int64_t blocks = blocks_of(in), size = 2 * in->states, terms = terms_of(in);
    int64_t chunks = (in->length + CHUNK - 1) / CHUNK;
    vec *tiles = work, *sums = tiles + blocks * terms * size, *g = sums + blocks * terms * size;
    vec *dD = g + blocks * size;
    load_terms(in, low, high, tiles);
    memset(sums + low * terms * size, 0, (size_t)((high - low) * terms * size) * sizeof(vec));
    memset(dD + low, 0, (size_t)(high - low) * sizeof(vec));
    for (int64_t row = 0; row < in->rows; row++) {
        int64_t start = row * in->length, tokens = tokens_of(in, row), whole = in->width * size;
        if (out->dlast)
            for (int64_t b = low; b < high; b++) to_tile(in, out->dlast + row * whole, b, g + b * size, 2);
        else
            memset(g + low * size, 0, (size_t)((high - low) * size) * sizeof(vec));
        for (int64_t c = (tokens + CHUNK - 1) / CHUNK - 1; c >= 0; c--) {
            int64_t at = start + c * CHUNK, length = min_of(CHUNK, tokens - c * CHUNK);
            for (int64_t b = low; b < high; b++)
                backward_chunk(in, out, b, at, length, tiles + b * terms * size,
                               kept + ((row * chunks + c) * blocks + b) * size, g + b * size, sums + b * terms * size,
                               dD + b, room);
        }
        for (int64_t b = low; b < high; b++) from_tile(in, g + b * size, 2, b, out->dinitial + row * whole);
    }
    for (int64_t b = low; b < high; b++) {
        for (int64_t k = 0; k < terms; k++) from_tile(in, sums + b * terms * size + 2 * k, 2 * terms, b, out->terms[k]);
        vstore_n(out->dD + b * LANES, dD[b], lanes_of(in, b));
    }
}

/* Gradients of everything from dy and dlast. Where lengths are given, dx beyond them is not written. */
EXPORT void FN(ssm_backward)(INPUTS, const real *kept, const real *dy, const real *dlast, real *dx, real *drate,
                             real *dc, real *db, real *dw, real *dv, real *dD, real *dinitial, real *work,
                             int64_t threads) {
    const Inputs in = GATHERED;
    const Gradients out = {dy, dlast, dx, {drate, dc, db, dw, dv}, dD, dinitial};
    int64_t blocks = blocks_of(&in), size = 2 * states;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        unsigned before = flush_denormals();
        int64_t id = omp_get_thread_num(), all = omp_get_num_threads();
        vec *room = (vec *)work + blocks * ((2 * terms_of(&in) + 1) * size + 1) + id * (2 * CHUNK + 2) * PITCH(size);
        backward_blocks(&in, &out, (const vec *)kept, (vec *)work, room, blocks * id / all, blocks * (id + 1) / all);
        restore_denormals(before);
    }
}
