/* The DNC's time loop and its adjoint. Rows of the batch are independent, so threads share them.
 *
 * Rows lie padded with zeros, so that loops run over whole vectors: the memory as (N, Q), Q = W rounded up to PAD, all
 * that has a number per slot with P = N rounded up to PAD. Equations are those of reference.py.
 */
#include "altx.h"

/* A multiple of every vector's length. */
#define PAD 16
#define EPS ((real)1e-6)
#ifdef ALTX_DOUBLE
#define ALIKE (128 * 2.220446049250313e-16)
#define ROUND __builtin_rint
#define ROOT __builtin_sqrt
#else
#define ALIKE (128 * 1.1920928955078125e-7f)
#define ROUND __builtin_rintf
#define ROOT __builtin_sqrtf
#endif

/* Parameters of one token, or of all from one on; no keys where there are no reads or writes. */
typedef struct {
    const real *read_key, *read_strength, *modes, *key, *strength, *erase, *add, *release, *allocate, *gate;
} Given;

typedef struct {
    real *read_key, *read_strength, *modes, *key, *strength, *erase, *add, *release, *allocate, *gate;
} Gradients;

/* What is carried from token to token, one after the other: (N, Q), (N, P), (P), (P), (R, P), (P). */
typedef struct {
    real *memory, *link, *precedence, *usage, *reading, *writing;
} Slots;

typedef struct {
    int64_t T, N, W, R, P, Q, size, chunk, reads, writes;
    const uint8_t *mask, *reset;
} Problem;

/* Intermediate values of one token that its adjoint needs. */
typedef struct {
    real *retention, *allocation, *before, *similar, *cosine, *inverse, *forward, *backward;
    int32_t *order;
} Tape;

/* Room for the adjoint of a token. */
typedef struct {
    real *a, *b, *c, *d, *e;
} Room;

static real *take(real **scratch, int64_t count) {
    real *p = *scratch;
    *scratch += count;
    return p;
}

static void copy(real *to, const real *from, int64_t count) { memcpy(to, from, (size_t)count * sizeof(real)); }
static void clear(real *p, int64_t count) { memset(p, 0, (size_t)count * sizeof(real)); }

static Slots slots_at(real *p, const Problem *q) {
    real *link = p + q->N * q->Q, *precedence = link + q->N * q->P, *reading = precedence + 2 * q->P;
    return (Slots){p, link, precedence, precedence + q->P, reading, reading + q->R * q->P};
}

INLINE real dot(const real *restrict a, const real *restrict b, int64_t count) {
    vec sum = vset(0);
    for (int64_t i = 0; i < count; i += LANES) sum += vload(a + i) * vload(b + i);
    return vsum(sum);
}

/* y += s x */
INLINE void axpy(real *restrict y, real s, const real *restrict x, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) vstore(y + i, vload(y + i) + s * vload(x + i));
}

/* out_n = A_n v for N rows, with zeros where there is padding. */
static void times(real *restrict out, const real *restrict A, const real *restrict v, int64_t N, int64_t P, int64_t Q) {
    int64_t n = 0;
    for (; n + 4 <= N; n += 4) {
        const real *a = A + n * Q;
        vec sum[4] = {vset(0), vset(0), vset(0), vset(0)};
        for (int64_t i = 0; i < Q; i += LANES) {
            const vec x = vload(v + i);
            for (int64_t k = 0; k < 4; k++) sum[k] += vload(a + k * Q + i) * x;
        }
        for (int64_t k = 0; k < 4; k++) out[n + k] = vsum(sum[k]);
    }
    for (; n < N; n++) out[n] = dot(A + n * Q, v, Q);
    for (n = N; n < P; n++) out[n] = 0;
}

/* out += sum_n v_n A_n */
static void mixed(real *restrict out, const real *restrict A, const real *restrict v, int64_t N, int64_t Q) {
    int64_t n = 0;
    for (; n + 4 <= N; n += 4) {
        const real *a = A + n * Q;
        for (int64_t i = 0; i < Q; i += LANES)
            vstore(
                out + i, vload(out + i) + v[n] * vload(a + i) + v[n + 1] * vload(a + Q + i) +
                             v[n + 2] * vload(a + 2 * Q + i) + v[n + 3] * vload(a + 3 * Q + i)
            );
    }
    for (; n < N; n++) axpy(out, v[n], A + n * Q, Q);
}

/* 1 / |M_n| */
static void norms(real *inverse, const real *M, const Problem *q) {
    for (int64_t n = 0; n < q->N; n++) inverse[n] = 1 / (real)ROOT(dot(M + n * q->Q, M + n * q->Q, q->Q) + EPS);
    clear(inverse + q->N, q->P - q->N);
}

/* C(M, k, beta); `key` (Q) is padded. Returns 1 / |k|. */
static real content(
    real *address, real *cosine, const real *inverse, const real *M, const real *key, real strength, const Problem *q
) {
    const int64_t N = q->N, P = q->P;
    const real scale = 1 / (real)ROOT(dot(key, key, q->Q) + EPS);
    times(cosine, M, key, N, P, q->Q);
    real high = -(real)__builtin_inf();
    for (int64_t n = 0; n < N; n++) {
        cosine[n] *= scale * inverse[n];
        real x = strength * cosine[n];
        address[n] = x;
        high = x > high ? x : high;
    }
    for (int64_t n = N; n < P; n++) address[n] = high;
    for (int64_t n = 0; n < P; n += LANES) vstore(address + n, vexp(vload(address + n) - high));
    clear(address + N, P - N);
    vec sum = vset(0);
    for (int64_t n = 0; n < P; n += LANES) sum += vload(address + n);
    const real inverse_sum = 1 / vsum(sum);
    for (int64_t n = 0; n < P; n += LANES) vstore(address + n, vload(address + n) * inverse_sum);
    return scale;
}

/* The adjoint of `content`, given dc of its result: gradients of key (W) and strength, and dM gets its part added. */
static void uncontent(
    real *d_key, real *d_strength, real *dM, real *work, real *wide, const real *dc, const real *address,
    const real *cosine, const real *inverse, const real *M, const real *key, real strength, real scale, const Problem *q
) {
    const int64_t N = q->N, Q = q->Q;
    const real mean = dot(dc, address, q->P);
    real d = 0, along = 0;
    clear(wide, Q);
    for (int64_t n = 0; n < N; n++) {
        const real logit = address[n] * (dc[n] - mean), d_cosine = logit * strength;
        d += logit * cosine[n];
        along += d_cosine * cosine[n];
        work[n] = d_cosine * scale * inverse[n];
        /* cos = k M / |k| |M|, by M: k / |k| |M| - cos M / |M|^2. */
        axpy(dM + n * Q, work[n], key, Q);
        axpy(dM + n * Q, -d_cosine * cosine[n] * inverse[n] * inverse[n], M + n * Q, Q);
    }
    mixed(wide, M, work, N, Q);
    for (int64_t w = 0; w < q->W; w++) d_key[w] = wide[w] - along * scale * scale * key[w];
    *d_strength = d;
}

/* Slots by rounded usage, those alike by number. `order` holds that of another token, which is nearly the same. */
static void sort(int32_t *order, real *rank, const real *usage, int64_t N) {
    for (int64_t n = 0; n < N; n++) rank[n] = ROUND(usage[n] / (real)ALIKE);
    for (int64_t j = 1; j < N; j++) {
        const int32_t n = order[j];
        const real own = rank[n];
        int64_t i = j;
        for (; i > 0; i--) {
            const int32_t other = order[i - 1];
            if (!(rank[other] > own || (rank[other] == own && other > n))) break;
            order[i] = other;
        }
        order[i] = n;
    }
}

static void pad(real *to, const real *from, int64_t count, int64_t padded) {
    copy(to, from, count);
    clear(to + count, padded - count);
}

/* The state after a token's write from that before; `key` is room for Q numbers. */
static void write_token(Slots after, Slots before, const Given *g, const Tape *tape, real *key, const Problem *q) {
    const int64_t N = q->N, P = q->P, Q = q->Q, W = q->W;
    const real *u = before.usage, *w = before.writing;
    for (int64_t n = 0; n < P; n++) tape->retention[n] = 1;
    for (int64_t r = 0; r < q->R; r++)
        for (int64_t n = 0; n < P; n++) tape->retention[n] *= 1 - g->release[r] * before.reading[r * P + n];
    for (int64_t n = 0; n < P; n++) after.usage[n] = (u[n] + w[n] - u[n] * w[n]) * tape->retention[n];

    sort(tape->order, tape->allocation, after.usage, N);
    clear(tape->allocation, P);
    real product = 1;
    for (int64_t j = 0; j < N; j++) {
        const int64_t n = tape->order[j];
        tape->before[n] = product;
        tape->allocation[n] = (1 - after.usage[n]) * product;
        product *= after.usage[n];
    }
    norms(tape->inverse, before.memory, q);
    pad(key, g->key, W, Q);
    content(tape->similar, tape->cosine, tape->inverse, before.memory, key, *g->strength, q);
    real *where = after.writing;
    const real gate = *g->gate, allocate = *g->allocate;
    for (int64_t n = 0; n < P; n++)
        where[n] = gate * (allocate * tape->allocation[n] + (1 - allocate) * tape->similar[n]);

    vec sum = vset(0);
    for (int64_t n = 0; n < P; n += LANES) sum += vload(where + n);
    const real kept = 1 - vsum(sum);
    for (int64_t n = 0; n < N; n++) {
        const real *restrict M = before.memory + n * Q, a = where[n];
        real *restrict to = after.memory + n * Q;
        for (int64_t i = 0; i < W; i++) to[i] = M[i] * (1 - a * g->erase[i]) + a * g->add[i];
        clear(to + W, Q - W);
    }
    for (int64_t i = 0; i < N; i++) {
        const vec a = vset(where[i]);
        for (int64_t j = 0; j < P; j += LANES)
            vstore(
                after.link + i * P + j, (1 - a - vload(where + j)) * vload(before.link + i * P + j) +
                                            a * vload(before.precedence + j)
            );
        after.link[i * P + i] = 0;
    }
    for (int64_t n = 0; n < P; n++) after.precedence[n] = kept * before.precedence[n] + where[n];
}

/* f_t and b_t of read head r, whose address was `reading`. */
static void follow(const Tape *tape, const Slots *s, const real *reading, const Problem *q) {
    times(tape->forward, s->link, reading, q->N, q->P, q->P);
    clear(tape->backward, q->P);
    mixed(tape->backward, s->link, reading, q->N, q->P);
}

/* Reads of a token after its write; `to` (R, P) are the new addresses, and may be the old ones. */
static void read_token(
    real *vectors, real *to, const Slots *s, const Given *g, const Tape *tape, real *key, const Problem *q
) {
    const int64_t P = q->P, Q = q->Q, W = q->W;
    norms(tape->inverse, s->memory, q);
    for (int64_t r = 0; r < q->R; r++) {
        const real *modes = g->modes + 3 * r;
        follow(tape, s, s->reading + r * P, q);
        pad(key, g->read_key + r * W, W, Q);
        content(tape->similar, tape->cosine, tape->inverse, s->memory, key, g->read_strength[r], q);
        for (int64_t n = 0; n < P; n++)
            to[r * P + n] = modes[0] * tape->backward[n] + modes[1] * tape->similar[n] + modes[2] * tape->forward[n];
        clear(key, Q);
        mixed(key, s->memory, to + r * P, q->N, Q);
        copy(vectors + r * W, key, W);
    }
}

static void spread(real *to, const real *from, int64_t rows, int64_t width, int64_t padded) {
    for (int64_t i = 0; i < rows; i++) pad(to + i * padded, from + i * width, width, padded);
}

static void close_up(real *to, const real *from, int64_t rows, int64_t width, int64_t padded) {
    for (int64_t i = 0; i < rows; i++) copy(to + i * width, from + i * padded, width);
}

/* Row b of the six tensors of a state. */
#define STATE(name) \
    real *name##memory, real *name##link, real *name##precedence, real *name##usage, real *name##reading, \
        real *name##writing
#define PACK(of, name) (Slots){name##memory, name##link, name##precedence, name##usage, name##reading, name##writing}

static void load(real *to, const Slots *from, int64_t b, const Problem *q) {
    const int64_t N = q->N;
    Slots s = slots_at(to, q);
    if (!from->memory) return;
    spread(s.memory, from->memory + b * N * q->W, N, q->W, q->Q);
    spread(s.link, from->link + b * N * N, N, N, q->P);
    spread(s.precedence, from->precedence + b * N, 1, N, q->P);
    spread(s.usage, from->usage + b * N, 1, N, q->P);
    spread(s.reading, from->reading + b * q->R * N, q->R, N, q->P);
    spread(s.writing, from->writing + b * N, 1, N, q->P);
}

static void store(const Slots *to, real *from, int64_t b, const Problem *q) {
    const int64_t N = q->N;
    Slots s = slots_at(from, q);
    close_up(to->memory + b * N * q->W, s.memory, N, q->W, q->Q);
    close_up(to->link + b * N * N, s.link, N, N, q->P);
    close_up(to->precedence + b * N, s.precedence, 1, N, q->P);
    close_up(to->usage + b * N, s.usage, 1, N, q->P);
    close_up(to->reading + b * q->R * N, s.reading, q->R, N, q->P);
    close_up(to->writing + b * N, s.writing, 1, N, q->P);
}

#define GIVEN_AT(TYPE, g, i) \
    (TYPE) { \
        q->reads ? (g)->read_key + (i) * q->R * q->W : NULL, q->reads ? (g)->read_strength + (i) * q->R : NULL, \
            q->reads ? (g)->modes + (i) * q->R * 3 : NULL, q->writes ? (g)->key + (i) * q->W : NULL, \
            q->writes ? (g)->strength + (i) : NULL, q->writes ? (g)->erase + (i) * q->W : NULL, \
            q->writes ? (g)->add + (i) * q->W : NULL, q->writes ? (g)->release + (i) * q->R : NULL, \
            q->writes ? (g)->allocate + (i) : NULL, q->writes ? (g)->gate + (i) : NULL \
    }

static Given given_at(const Given *g, int64_t i, const Problem *q) { return GIVEN_AT(Given, g, i); }
static Gradients gradients_at(const Gradients *g, int64_t i, const Problem *q) { return GIVEN_AT(Gradients, g, i); }

/* With slots in their own order. */
static Tape tape_in(real **scratch, int64_t P) {
    Tape t = {
        take(scratch, P), take(scratch, P), take(scratch, P), take(scratch, P), take(scratch, P), take(scratch, P),
        take(scratch, P), take(scratch, P), NULL,
    };
    t.order = (int32_t *)take(scratch, P);
    for (int64_t n = 0; n < P; n++) t.order[n] = (int32_t)n;
    return t;
}

/* A real token: the state `to` after it from `from`. The tapes are those of its write and of its last read. */
static void step(
    real *to, real *from, real *vectors, const Given *g, const Tape *tape, const Tape *seen, real *key, const Problem *q
) {
    Slots after = slots_at(to, q), before = slots_at(from, q);
    if (q->writes) {
        write_token(after, before, g, tape, key, q);
        copy(after.reading, before.reading, q->R * q->P);
    } else {
        copy(to, from, q->size);
    }
    if (q->reads) read_token(vectors, after.reading, &after, g, seen, key, q);
}

#define PARAMETERS \
    const real *read_key, const real *read_strength, const real *modes, const real *key, const real *strength, \
        const real *erase, const real *add, const real *release, const real *allocate, const real *gate, \
        const uint8_t *mask, const uint8_t *reset
#define GIVEN {read_key, read_strength, modes, key, strength, erase, add, release, allocate, gate}
#define SIZES \
    int64_t B, int64_t T, int64_t N, int64_t W, int64_t R, int64_t size, int64_t chunk, int64_t scratch_size, \
        int64_t threads
#define ROUND_UP(n) (((n) + PAD - 1) / PAD * PAD)
#define PROBLEM \
    {T, N, W, R, ROUND_UP(N), ROUND_UP(W), size, chunk, read_key != NULL, key != NULL, mask, reset}

/* Shapes as in reference.py, read (B, T, R, W). checkpoints, or NULL: (B, ceil(T / chunk), size), the state before
 * every chunk-th token. fresh may be NULLs if reset is NULL. scratch: (threads, scratch_size). */
EXPORT void FN(dnc)(
    PARAMETERS, STATE(), STATE(fresh_), real *read, STATE(last_), real *checkpoints, real *scratch, SIZES
) {
    const Problem all = PROBLEM;
    const Given given = GIVEN;
    const Slots first = PACK(, ), fresh = PACK(, fresh_), last = PACK(, last_);
    const int64_t chunks = (T + chunk - 1) / chunk;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        unsigned denormals = flush_denormals();
#pragma omp for schedule(static)
        for (int64_t b = 0; b < B; b++) {
            const Problem *q = &all;
            real *own = scratch + omp_get_thread_num() * scratch_size;
            clear(own, scratch_size);
            real *now = take(&own, size), *next = take(&own, size), *empty = take(&own, size);
            Tape tape = tape_in(&own, q->P);
            load(now, &first, b, q);
            if (reset) load(empty, &fresh, b, q);
            for (int64_t t = 0; t < T; t++) {
                const int64_t i = b * T + t;
                real *vectors = read_key ? read + i * R * W : NULL;
                if (checkpoints && t % chunk == 0) copy(checkpoints + (b * chunks + t / chunk) * size, now, size);
                if (mask && !mask[i]) {
                    if (vectors) clear(vectors, R * W);
                    continue;
                }
                if (reset && reset[i]) copy(now, empty, size);
                const Given g = given_at(&given, i, q);
                step(next, now, vectors, &g, &tape, &tape, own, q);
                real *old = now;
                now = next;
                next = old;
            }
            store(&last, now, b, q);
        }
        restore_denormals(denormals);
    }
}

#include "adjoint.h"
