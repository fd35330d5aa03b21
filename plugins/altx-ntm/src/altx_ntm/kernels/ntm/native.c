/* The NTM's time loop and its adjoint. Rows of the batch are independent, so threads share them.
 *
 * Inside, a row's memory lies as (W, P): slots side by side, so that vectors run over slots, and P = N rounded up to
 * PAD. Numbers beyond N are zeros, and every function leaves them so. Equations are those of reference.py.
 */
#include "altx.h"

/* A multiple of every vector's length. */
#define PAD 16
#define EPS ((real)1e-8)

/* Read heads or write heads; parameters (B, T, heads, ...). */
typedef struct {
    const real *key, *strength, *gate, *shift, *sharpness;
    int64_t heads, shifts;
} Heads;

typedef struct {
    real *key, *strength, *gate, *shift, *sharpness;
} HeadGradients;

typedef struct {
    int64_t T, N, W, P, write_first, chunk;
    Heads reads, writes;
    const real *erase, *add;
    const uint8_t *mask, *reset;
} Problem;

/* What addressing leaves behind for its adjoint: cosines, softmax, and what is shifted and sharpened. */
typedef struct {
    real *inverse, *cosine, *content, *ring, *shifted;
} Look;

static real *take(real **scratch, int64_t count) {
    real *p = *scratch;
    *scratch += count;
    return p;
}

/* Logarithm: x = 2^e m with m in [sqrt(1/2), sqrt(2)), log m = 2 artanh(s), s = (m - 1) / (m + 1), as its series. */
INLINE vec vlog(vec x) {
#ifdef ALTX_DOUBLE
    const integer root = 0x3fe6a09e667f3bcd;
    const int bits = 52, terms = 11;
    const real ln2_hi = 0.693145751953125, ln2_lo = 1.42860682030941723212e-6;
#else
    const integer root = 0x3f3504f3;
    const int bits = 23, terms = 5;
    const real ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
#endif
    ivec e = ((ivec)x - root) >> bits;
    vec m = (vec)((ivec)x - (e << bits)), s = (m - 1) / (m + 1), q = s * s, p = vset((real)1 / (2 * terms - 1));
    for (int k = terms - 2; k >= 0; k--) p = p * q + (real)1 / (2 * k + 1);
    vec n = __builtin_convertvector(e, vec), y = n * ln2_hi + (n * ln2_lo + 2 * s * p);
    const real infinity = (real)__builtin_inf();
    y = vselect(x == infinity, x, vselect(x == 0, vset(-infinity), y));
    return vselect((x < 0) | (x != x), vset((real)__builtin_nan("")), y);
}

/* x^(-1/2) for normal x > 0, from the well-known first guess by Newton's method. */
INLINE vec vrsqrt(vec x) {
#ifdef ALTX_DOUBLE
    vec y = (vec)(0x5fe6eb50c7b537a9 - ((ivec)x >> 1));
    const int steps = 4;
#else
    vec y = (vec)(0x5f3759df - ((ivec)x >> 1));
    const int steps = 3;
#endif
    for (int i = 0; i < steps; i++) y = y * ((real)1.5 - (real)0.5 * x * y * y);
    return y;
}

INLINE real inverse_root(real x) { return 1 / (sizeof(real) == 8 ? (real)__builtin_sqrt(x) : (real)__builtin_sqrtf((float)x)); }

static void fill_padding(real *p, int64_t N, int64_t P, real value) {
    for (int64_t n = N; n < P; n++) p[n] = value;
}

static void turn_in(real *M, const real *rows, const Problem *q) {
    for (int64_t w = 0; w < q->W; w++)
        for (int64_t n = 0; n < q->N; n++) M[w * q->P + n] = rows[n * q->W + w];
}

static void turn_out(real *rows, const real *M, const Problem *q) {
    for (int64_t n = 0; n < q->N; n++)
        for (int64_t w = 0; w < q->W; w++) rows[n * q->W + w] = M[w * q->P + n];
}

/* `count` padded rows from dense ones, and back. */
static void spread_out(real *to, const real *from, int64_t count, const Problem *q) {
    for (int64_t h = 0; h < count; h++) memcpy(to + h * q->P, from + h * q->N, (size_t)q->N * sizeof(real));
}

static void close_up(real *to, const real *from, int64_t count, const Problem *q) {
    for (int64_t h = 0; h < count; h++) memcpy(to + h * q->N, from + h * q->P, (size_t)q->N * sizeof(real));
}

static void copy(real *to, const real *from, int64_t count) { memcpy(to, from, (size_t)count * sizeof(real)); }

INLINE void columns_block(real *out, const real *M, const real *c, int64_t W, int64_t P, int64_t vectors, int add) {
    vec sum[4];
    for (int64_t i = 0; i < vectors; i++) sum[i] = add ? vload(out + i * LANES) : vset(0);
    for (int64_t w = 0; w < W; w++)
        for (int64_t i = 0; i < vectors; i++) sum[i] += c[w] * vload(M + w * P + i * LANES);
    for (int64_t i = 0; i < vectors; i++) vstore(out + i * LANES, sum[i]);
}

/* out_n (+)= sum_w c_w M_wn */
INLINE void columns(real *out, const real *M, const real *c, int64_t W, int64_t P, int add) {
    int64_t n = 0;
    for (; n + 4 * LANES <= P; n += 4 * LANES) columns_block(out + n, M + n, c, W, P, 4, add);
    for (; n < P; n += LANES) columns_block(out + n, M + n, c, W, P, 1, add);
}

INLINE void rows_block(real *out, const real *M, const real *v, int64_t P, int64_t rows) {
    vec sum[4];
    for (int64_t i = 0; i < rows; i++) sum[i] = vset(0);
    for (int64_t n = 0; n < P; n += LANES)
        for (int64_t i = 0; i < rows; i++) sum[i] += vload(v + n) * vload(M + i * P + n);
    for (int64_t i = 0; i < rows; i++) out[i] = vsum(sum[i]);
}

/* out_w = sum_n M_wn v_n */
static void rows(real *out, const real *M, const real *v, int64_t W, int64_t P) {
    int64_t w = 0;
    for (; w + 4 <= W; w += 4) rows_block(out + w, M + w * P, v, P, 4);
    for (; w < W; w++) rows_block(out + w, M + w * P, v, P, 1);
}

/* 1 / |M_n|, 0 where it is padding. */
static void norms(real *inverse, const real *M, const Problem *q) {
    for (int64_t n = 0; n < q->P; n += LANES) {
        vec sum = vset(EPS * EPS);
        for (int64_t w = 0; w < q->W; w++) {
            vec m = vload(M + w * q->P + n);
            sum += m * m;
        }
        vstore(inverse + n, vrsqrt(sum));
    }
    fill_padding(inverse, q->N, q->P, 0);
}

/* p becomes the softmax of `scale` p. */
INLINE void softmax(real *p, real scale, int64_t N, int64_t P) {
    vec high = vset(-(real)__builtin_inf());
    fill_padding(p, N, P, p[0]);
    for (int64_t n = 0; n < P; n += LANES) {
        vec x = vload(p + n) * scale;
        high = vselect(x > high, x, high);
        vstore(p + n, x);
    }
    real most = high[0];
    for (int i = 1; i < LANES; i++) most = high[i] > most ? high[i] : most;
    for (int64_t n = 0; n < P; n += LANES) vstore(p + n, vexp(vload(p + n) - most));
    fill_padding(p, N, P, 0);
    vec sum = vset(0);
    for (int64_t n = 0; n < P; n += LANES) sum += vload(p + n);
    real inverse = 1 / vsum(sum);
    for (int64_t n = 0; n < P; n += LANES) vstore(p + n, vload(p + n) * inverse);
}

/* Slots on a circle: p[r .. r + N) is given, its r neighbours on both sides are set. */
static void close_ring(real *p, int64_t r, int64_t N) {
    for (int64_t i = 0; i < r; i++) {
        p[r + N + i] = p[r + i % N];
        p[i] = p[r + ((i - r) % N + N) % N];
    }
}

static real key_inverse(const real *key, int64_t W) {
    real sum = EPS * EPS;
    for (int64_t w = 0; w < W; w++) sum += key[w] * key[w];
    return inverse_root(sum);
}

/* Equations (5) to (8) for head i of all tokens' heads, given 1 / |M_n| in look->inverse. */
static void look_at(const Look *k, const real *M, const Heads *q, int64_t i, const real *previous, const Problem *p) {
    const int64_t P = p->P, N = p->N, S = q->shifts, r = S / 2;
    const real *key = q->key + i * p->W, *shift = q->shift + i * S, gate = q->gate[i];
    columns(k->cosine, M, key, p->W, P, 0);
    real scale = key_inverse(key, p->W);
    for (int64_t n = 0; n < P; n += LANES) {
        vec cosine = vload(k->cosine + n) * vload(k->inverse + n) * scale;
        vstore(k->cosine + n, cosine);
        vstore(k->content + n, cosine);
    }
    softmax(k->content, q->strength[i], N, P);
    for (int64_t n = 0; n < P; n += LANES)
        vstore(k->ring + r + n, gate * vload(k->content + n) + (1 - gate) * vload(previous + n));
    close_ring(k->ring, r, N);
    for (int64_t n = 0; n < P; n += LANES) {
        vec sum = vset(EPS);
        for (int64_t j = 0; j < S; j++) sum += shift[j] * vload(k->ring + 2 * r - j + n);
        vstore(k->shifted + n, sum);
    }
    fill_padding(k->shifted, N, P, 1);
}

/* Equations (5) to (9): `address` before becomes that after. */
static void move(real *address, const Look *k, const real *M, const Heads *q, int64_t i, const Problem *p) {
    look_at(k, M, q, i, address, p);
    for (int64_t n = 0; n < p->P; n += LANES) vstore(address + n, vlog(vload(k->shifted + n)));
    softmax(address, q->sharpness[i], p->N, p->P);
}

/* Equation (3), one head: to = M (1 - w e^T). */
static void erase_memory(real *to, const real *M, const real *where, const real *erase, const Problem *q) {
    for (int64_t w = 0; w < q->W; w++)
        for (int64_t n = w * q->P, s = 0; s < q->P; n += LANES, s += LANES) {
            vec m = vload(M + n);
            vstore(to + n, m - m * (vload(where + s) * erase[w]));
        }
}

INLINE void write_block(
    real *to, const real *M, const real *where, const real *erase, const real *add, int64_t rows, int64_t V, int64_t W,
    int64_t P
) {
    for (int64_t n = 0; n < P; n += LANES)
        for (int64_t i = 0; i < rows; i++) {
            vec m = vload(M + i * P + n);
            for (int64_t v = 0; v < V; v++) m -= m * (vload(where + v * P + n) * erase[v * W + i]);
            for (int64_t v = 0; v < V; v++) m += vload(where + v * P + n) * add[v * W + i];
            vstore(to + i * P + n, m);
        }
}

/* Equations (3) and (4): to = what the write heads make of M in token t. */
static void write_memory(real *to, const real *M, const real *where, int64_t t, const Problem *q) {
    const int64_t V = q->writes.heads, P = q->P, W = q->W;
    const real *erase = q->erase + t * V * W, *add = q->add + t * V * W;
    int64_t w = 0;
    if (V == 1)
        for (; w + 4 <= W; w += 4) write_block(to + w * P, M + w * P, where, erase + w, add + w, 4, 1, W, P);
    for (; w < W; w++) write_block(to + w * P, M + w * P, where, erase + w, add + w, 1, V, W, P);
}

static void write_token(real *M, real *where, const Look *k, int64_t t, const Problem *q) {
    const int64_t V = q->writes.heads;
    for (int64_t v = 0; v < V; v++) move(where + v * q->P, k, M, &q->writes, t * V + v, q);
    write_memory(M, M, where, t, q);
}

static Look looking(real **scratch, int64_t P, int64_t shifts) {
    return (Look){
        take(scratch, P), take(scratch, P), take(scratch, P), take(scratch, P + shifts + PAD), take(scratch, P),
    };
}

/* Parameters from row b on. */
static Heads heads_of(const Heads *q, int64_t b, const Problem *p) {
    int64_t i = b * p->T * q->heads;
    return (Heads){
        q->key + i * p->W, q->strength + i, q->gate + i, q->shift + i * q->shifts, q->sharpness + i, q->heads, q->shifts,
    };
}

static Problem row_of(const Problem *all, int64_t b) {
    Problem q = *all;
    int64_t written = b * q.T * q.writes.heads * q.W;
    q.reads = heads_of(&all->reads, b, all);
    q.writes = heads_of(&all->writes, b, all);
    q.erase += written;
    q.add += written;
    if (q.mask) q.mask += b * q.T;
    if (q.reset) q.reset += b * q.T;
    return q;
}

static int64_t most_shifts(const Problem *q) {
    return q->reads.shifts > q->writes.shifts ? q->reads.shifts : q->writes.shifts;
}

/* M (W, P) and A (R+V, P) before the first token become those after the last. */
static void forward_row(
    const Problem *q, real *M, real *A, const real *fresh_memory, const real *fresh_address, real *read,
    real *checkpoints, real *addresses, real *scratch
) {
    const int64_t R = q->reads.heads, V = q->writes.heads, H = R + V, size = q->W * q->P;
    Look k = looking(&scratch, q->P, most_shifts(q));
    real *where = A + R * q->P;
    for (int64_t t = 0; t < q->T; t++) {
        if (checkpoints && t % q->chunk == 0) copy(checkpoints + t / q->chunk * size, M, size);
        real *vectors = read + t * R * q->W;
        if (q->mask && !q->mask[t]) {
            memset(vectors, 0, (size_t)(R * q->W) * sizeof(real));
        } else {
            if (q->reset && q->reset[t]) {
                copy(M, fresh_memory, size);
                copy(A, fresh_address, H * q->P);
            }
            norms(k.inverse, M, q);
            if (q->write_first && V) {
                write_token(M, where, &k, t, q);
                norms(k.inverse, M, q);
            }
            for (int64_t h = 0; h < R; h++) {
                move(A + h * q->P, &k, M, &q->reads, t * R + h, q);
                rows(vectors + h * q->W, M, A + h * q->P, q->W, q->P);
            }
            if (!q->write_first && V) write_token(M, where, &k, t, q);
        }
        if (addresses) close_up(addresses + t * H * q->N, A, H, q);
    }
}

#define PROBLEM_PARAMETERS \
    const real *read_key, const real *read_strength, const real *read_gate, const real *read_shift, \
        const real *read_sharpness, const real *write_key, const real *write_strength, const real *write_gate, \
        const real *write_shift, const real *write_sharpness, const real *erase, const real *add, \
        const uint8_t *mask, const uint8_t *reset
#define SIZE_PARAMETERS \
    int64_t B, int64_t T, int64_t N, int64_t W, int64_t R, int64_t V, int64_t read_shifts, int64_t write_shifts, \
        int64_t write_first, int64_t chunk, int64_t scratch_size, int64_t threads
#define PROBLEM \
    { \
        T, N, W, (N + PAD - 1) / PAD * PAD, write_first, chunk, \
            {read_key, read_strength, read_gate, read_shift, read_sharpness, R, read_shifts}, \
            {write_key, write_strength, write_gate, write_shift, write_sharpness, V, write_shifts}, erase, add, mask, \
            reset \
    }

/* Shapes as in reference.py. Memory (B, N, W) and addresses (B, R or V, N) before, fresh, and after; read (B, T, R, W).
 * For the adjoint, or NULL: checkpoints (B, ceil(T / chunk), W, P), the memory before every chunk-th token; addresses
 * (B, T, R+V, N) after each token. scratch: (threads, scratch_size). */
EXPORT void FN(ntm)(
    PROBLEM_PARAMETERS, const real *memory, const real *read_address, const real *write_address,
    const real *fresh_memory, const real *fresh_read_address, const real *fresh_write_address, real *read,
    real *last_memory, real *last_read_address, real *last_write_address, real *checkpoints, real *addresses,
    real *scratch, SIZE_PARAMETERS
) {
    const Problem all = PROBLEM;
    const int64_t P = all.P, H = R + V, chunks = (T + chunk - 1) / chunk;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        unsigned denormals = flush_denormals();
        real *own = scratch + omp_get_thread_num() * scratch_size;
        real *M = take(&own, W * P), *A = take(&own, H * P), *fresh = take(&own, W * P), *fresh_A = take(&own, H * P);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < B; b++) {
            const Problem q = row_of(&all, b);
            /* Another row's NaN must not stay where there is padding. */
            memset(scratch + omp_get_thread_num() * scratch_size, 0, (size_t)scratch_size * sizeof(real));
            turn_in(M, memory + b * N * W, &q);
            spread_out(A, read_address + b * R * N, R, &q);
            spread_out(A + R * P, write_address + b * V * N, V, &q);
            if (reset) {
                turn_in(fresh, fresh_memory + b * N * W, &q);
                spread_out(fresh_A, fresh_read_address + b * R * N, R, &q);
                spread_out(fresh_A + R * P, fresh_write_address + b * V * N, V, &q);
            }
            forward_row(
                &q, M, A, fresh, fresh_A, read + b * T * R * W,
                checkpoints ? checkpoints + b * chunks * W * P : NULL, addresses ? addresses + b * T * H * N : NULL, own
            );
            turn_out(last_memory + b * N * W, M, &q);
            close_up(last_read_address + b * R * N, A, R, &q);
            close_up(last_write_address + b * V * N, A + R * P, V, &q);
        }
        restore_denormals(denormals);
    }
}

#include "adjoint.h"
