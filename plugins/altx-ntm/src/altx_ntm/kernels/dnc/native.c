/* The DNC's time loop and its adjoint. Rows of the batch are independent, so threads share them.
 *
 * What has a number per slot lies in rows of P numbers, N rounded up to PAD, with zeros behind the N-th, so that loops
 * run over whole vectors: the memory is (W, P), slots last. Equations are those of reference.py.
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

/* What is carried from token to token, one after the other: (W, P), (N, P), (P), (P), (R, P), (P). */
typedef struct {
    real *memory, *link, *precedence, *usage, *reading, *writing;
} Slots;

typedef struct {
    int64_t N, W, R, P, size, reads, writes;
} Problem;

/* What the adjoint of a token needs of its write, (P), `order` in the order of usage, and of its reads, (R, P). */
typedef struct {
    real *retention, *allocation, *before, *similar, *cosine, *inverse;
    int32_t *order;
    real *read_inverse, *found, *read_cosine, *forward, *backward;
} Tape;

static real *take(real **scratch, int64_t count) {
    real *p = *scratch;
    *scratch += count;
    return p;
}

static void copy(real *to, const real *from, int64_t count) { memcpy(to, from, (size_t)count * sizeof(real)); }
static void clear(real *p, int64_t count) { memset(p, 0, (size_t)count * sizeof(real)); }

static Slots slots_at(real *p, const Problem *q) {
    real *link = p + q->W * q->P, *precedence = link + q->N * q->P, *reading = precedence + 2 * q->P;
    return (Slots){p, link, precedence, precedence + q->P, reading, reading + q->R * q->P};
}

/* Numbers of a tape. */
static int64_t tape_size(const Problem *q) { return (8 + 4 * q->R) * q->P; }

static Tape tape_at(real *p, const Problem *q) {
    const int64_t P = q->P, heads = q->R * P;
    real *reads = p + 8 * P;
    return (Tape){
        p, p + P, p + 2 * P, p + 3 * P, p + 4 * P, p + 5 * P, (int32_t *)(p + 6 * P),
        p + 7 * P, reads, reads + heads, reads + 2 * heads, reads + 3 * heads,
    };
}

/* Slots in some order. */
static void ordered(int32_t *order, int64_t N) {
    for (int64_t n = 0; n < N; n++) order[n] = (int32_t)n;
}

INLINE real dot(const real *restrict a, const real *restrict b, int64_t P) {
    vec sum = vset(0);
    for (int64_t i = 0; i < P; i += LANES) sum += vload(a + i) * vload(b + i);
    return vsum(sum);
}

INLINE real total(const real *a, int64_t P) {
    vec sum = vset(0);
    for (int64_t i = 0; i < P; i += LANES) sum += vload(a + i);
    return vsum(sum);
}

/* y += s x */
INLINE void axpy(real *restrict y, real s, const real *restrict x, int64_t P) {
    for (int64_t i = 0; i < P; i += LANES) vstore(y + i, vload(y + i) + s * vload(x + i));
}

/* out += sum_w v_w A_w, for W rows. */
static void mixed(real *restrict out, const real *restrict A, const real *restrict v, int64_t W, int64_t P) {
    int64_t w = 0;
    for (; w + 4 <= W; w += 4) {
        const real *a = A + w * P;
        for (int64_t i = 0; i < P; i += LANES)
            vstore(
                out + i, vload(out + i) + v[w] * vload(a + i) + v[w + 1] * vload(a + P + i) +
                             v[w + 2] * vload(a + 2 * P + i) + v[w + 3] * vload(a + 3 * P + i)
            );
    }
    for (; w < W; w++) axpy(out, v[w], A + w * P, P);
}

/* For every head forward = L x and backward = L^T y, all (R, P): four rows of L serve all heads while they are near. */
static void follow(
    real *restrict forward, real *restrict backward, const real *restrict L, const real *restrict x,
    const real *restrict y, const Problem *q
) {
    const int64_t N = q->N, P = q->P;
    clear(forward, q->R * P);
    clear(backward, q->R * P);
    int64_t n = 0;
    for (; n + 4 <= N; n += 4) {
        const real *a = L + n * P;
        for (int64_t r = 0; r < q->R; r++) {
            const real *from = x + r * P, *at = y + r * P + n;
            real *back = backward + r * P;
            vec sum[4] = {vset(0), vset(0), vset(0), vset(0)};
            const vec y0 = vset(at[0]), y1 = vset(at[1]), y2 = vset(at[2]), y3 = vset(at[3]);
            for (int64_t i = 0; i < P; i += LANES) {
                const vec v = vload(from + i), a0 = vload(a + i), a1 = vload(a + P + i), a2 = vload(a + 2 * P + i),
                          a3 = vload(a + 3 * P + i);
                sum[0] += a0 * v;
                sum[1] += a1 * v;
                sum[2] += a2 * v;
                sum[3] += a3 * v;
                vstore(back + i, vload(back + i) + y0 * a0 + y1 * a1 + y2 * a2 + y3 * a3);
            }
            for (int64_t k = 0; k < 4; k++) forward[r * P + n + k] = vsum(sum[k]);
        }
    }
    for (; n < N; n++)
        for (int64_t r = 0; r < q->R; r++) {
            forward[r * P + n] = dot(L + n * P, x + r * P, P);
            axpy(backward + r * P, y[r * P + n], L + n * P, P);
        }
}

/* 1 / |M_n| */
static void norms(real *inverse, const real *M, const Problem *q) {
    const int64_t P = q->P;
    for (int64_t n = 0; n < P; n += LANES) {
        vec sum = vset(EPS);
        for (int64_t w = 0; w < q->W; w++) sum += vload(M + w * P + n) * vload(M + w * P + n);
        vstore(inverse + n, sum);
    }
    for (int64_t n = 0; n < q->N; n++) inverse[n] = 1 / (real)ROOT(inverse[n]);
    clear(inverse + q->N, P - q->N);
}

/* 1 / |k| */
static real scale_of(const real *key, const Problem *q) {
    vec sum = vset(0);
    for (int64_t w = 0; w < q->W; w += LANES) {
        const vec k = vload_n(key + w, q->W - w);
        sum += k * k;
    }
    return 1 / (real)ROOT(vsum(sum) + EPS);
}

/* C(M, k, beta) */
static void content(
    real *restrict address, real *restrict cosine, const real *restrict inverse, const real *restrict M,
    const real *restrict key, real strength, const Problem *q
) {
    const int64_t N = q->N, P = q->P;
    const real scale = scale_of(key, q);
    clear(cosine, P);
    mixed(cosine, M, key, q->W, P);
    for (int64_t n = 0; n < P; n += LANES) {
        const vec c = vload(cosine + n) * scale * vload(inverse + n);
        vstore(cosine + n, c);
        vstore(address + n, strength * c);
    }
    /* Where there is no slot there is a number that does not become the highest. */
    for (int64_t n = N; n < P; n++) address[n] = address[0];
    vec highest = vload(address);
    for (int64_t n = LANES; n < P; n += LANES) {
        const vec x = vload(address + n);
        highest = vselect(x > highest, x, highest);
    }
    real lanes[LANES], high;
    vstore(lanes, highest);
    high = lanes[0];
    for (int64_t n = 1; n < LANES; n++) high = lanes[n] > high ? lanes[n] : high;
    for (int64_t n = 0; n < P; n += LANES) vstore(address + n, vexp(vload(address + n) - high));
    clear(address + N, P - N);
    const real inverse_sum = 1 / total(address, P);
    for (int64_t n = 0; n < P; n += LANES) vstore(address + n, vload(address + n) * inverse_sum);
}

/* The adjoint of `content`, given dc of its result: gradients of key (W) and strength, and dM gets its part added.
 * `work` and `shrink` are room for P numbers each. */
static void uncontent(
    real *d_key, real *d_strength, real *restrict dM, real *restrict work, real *restrict shrink,
    const real *restrict dc, const real *restrict address, const real *restrict cosine, const real *restrict inverse,
    const real *restrict M, const real *restrict key, real strength, const Problem *q
) {
    const int64_t P = q->P;
    const real mean = dot(dc, address, P), scale = scale_of(key, q);
    vec d = vset(0);
    for (int64_t n = 0; n < P; n += LANES) {
        const vec c = vload(cosine + n), over = vload(inverse + n);
        const vec logit = vload(address + n) * (vload(dc + n) - mean);
        d += logit * c;
        /* cos = k M / |k| |M|, by M: k / |k| |M| - cos M / |M|^2. */
        vstore(work + n, strength * logit * scale * over);
        vstore(shrink + n, strength * logit * c * over * over);
    }
    *d_strength = vsum(d);
    const real along = strength * *d_strength * scale * scale;
    for (int64_t w = 0; w < q->W; w++) {
        const real k = key[w], *row = M + w * P;
        real *G = dM + w * P;
        vec sum = vset(0);
        for (int64_t n = 0; n < P; n += LANES) {
            const vec m = vload(row + n), by = vload(work + n);
            sum += m * by;
            vstore(G + n, vload(G + n) + k * by - vload(shrink + n) * m);
        }
        d_key[w] = vsum(sum) - along * k;
    }
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

/* The state after a token's write from that before. */
static void write_token(Slots after, Slots before, const Given *g, const Tape *tape, const Problem *q) {
    const int64_t N = q->N, P = q->P;
    for (int64_t n = 0; n < P; n += LANES) {
        vec kept = vset(1);
        for (int64_t r = 0; r < q->R; r++) kept *= 1 - g->release[r] * vload(before.reading + r * P + n);
        const vec u = vload(before.usage + n), w = vload(before.writing + n);
        vstore(tape->retention + n, kept);
        vstore(after.usage + n, (u + w - u * w) * kept);
    }

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
    content(tape->similar, tape->cosine, tape->inverse, before.memory, g->key, *g->strength, q);
    real *restrict where = after.writing;
    const real gate = *g->gate, allocate = *g->allocate;
    for (int64_t n = 0; n < P; n += LANES)
        vstore(
            where + n, gate * (allocate * vload(tape->allocation + n) + (1 - allocate) * vload(tape->similar + n))
        );

    for (int64_t w = 0; w < q->W; w++) {
        const real *M = before.memory + w * P, erase = g->erase[w], add = g->add[w];
        real *to = after.memory + w * P;
        for (int64_t n = 0; n < P; n += LANES) {
            const vec a = vload(where + n);
            vstore(to + n, vload(M + n) * (1 - a * erase) + a * add);
        }
    }
    for (int64_t i = 0; i < N; i++) {
        const real a = where[i], *L = before.link + i * P;
        real *to = after.link + i * P;
        for (int64_t j = 0; j < P; j += LANES)
            vstore(to + j, (1 - a - vload(where + j)) * vload(L + j) + a * vload(before.precedence + j));
        to[i] = 0;
    }
    const real kept = 1 - total(where, P);
    for (int64_t n = 0; n < P; n += LANES)
        vstore(after.precedence + n, kept * vload(before.precedence + n) + vload(where + n));
}

/* Reads of a token after its write; `to` (R, P) are the new addresses, and may be the old ones. */
static void read_token(real *vectors, real *to, const Slots *s, const Given *g, const Tape *tape, const Problem *q) {
    const int64_t P = q->P, W = q->W;
    norms(tape->read_inverse, s->memory, q);
    follow(tape->forward, tape->backward, s->link, s->reading, s->reading, q);
    for (int64_t r = 0; r < q->R; r++) {
        const real *modes = g->modes + 3 * r, *forward = tape->forward + r * P, *backward = tape->backward + r * P;
        real *found = tape->found + r * P, *address = to + r * P;
        content(
            found, tape->read_cosine + r * P, tape->read_inverse, s->memory, g->read_key + r * W, g->read_strength[r], q
        );
        for (int64_t n = 0; n < P; n += LANES)
            vstore(
                address + n,
                modes[0] * vload(backward + n) + modes[1] * vload(found + n) + modes[2] * vload(forward + n)
            );
        for (int64_t w = 0; w < W; w++) vectors[r * W + w] = dot(s->memory + w * P, address, P);
    }
}

static void spread(real *to, const real *from, int64_t rows, const Problem *q) {
    for (int64_t i = 0; i < rows; i++) {
        copy(to + i * q->P, from + i * q->N, q->N);
        clear(to + i * q->P + q->N, q->P - q->N);
    }
}

static void close_up(real *to, const real *from, int64_t rows, const Problem *q) {
    for (int64_t i = 0; i < rows; i++) copy(to + i * q->N, from + i * q->P, q->N);
}

/* Row b of the six tensors of a state. */
#define STATE(name) \
    real *name##memory, real *name##link, real *name##precedence, real *name##usage, real *name##reading, \
        real *name##writing
#define PACK(of, name) (Slots){name##memory, name##link, name##precedence, name##usage, name##reading, name##writing}

static void load(real *to, const Slots *from, int64_t b, const Problem *q) {
    const int64_t N = q->N, W = q->W;
    Slots s = slots_at(to, q);
    if (!from->memory) return;
    for (int64_t n = 0; n < N; n++)
        for (int64_t w = 0; w < W; w++) s.memory[w * q->P + n] = from->memory[(b * N + n) * W + w];
    spread(s.link, from->link + b * N * N, N, q);
    spread(s.precedence, from->precedence + b * N, 1, q);
    spread(s.usage, from->usage + b * N, 1, q);
    spread(s.reading, from->reading + b * q->R * N, q->R, q);
    spread(s.writing, from->writing + b * N, 1, q);
}

static void store(const Slots *to, real *from, int64_t b, const Problem *q) {
    const int64_t N = q->N, W = q->W;
    Slots s = slots_at(from, q);
    for (int64_t n = 0; n < N; n++)
        for (int64_t w = 0; w < W; w++) to->memory[(b * N + n) * W + w] = s.memory[w * q->P + n];
    close_up(to->link + b * N * N, s.link, N, q);
    close_up(to->precedence + b * N, s.precedence, 1, q);
    close_up(to->usage + b * N, s.usage, 1, q);
    close_up(to->reading + b * q->R * N, s.reading, q->R, q);
    close_up(to->writing + b * N, s.writing, 1, q);
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

/* A real token: the state `to` after it from `from`. */
static void step(real *to, real *from, real *vectors, const Given *g, const Tape *tape, const Problem *q) {
    Slots after = slots_at(to, q), before = slots_at(from, q);
    if (q->writes) {
        write_token(after, before, g, tape, q);
        copy(after.reading, before.reading, q->R * q->P);
    } else {
        copy(to, from, q->size);
    }
    if (q->reads) read_token(vectors, after.reading, &after, g, tape, q);
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
#define PROBLEM {N, W, R, ROUND_UP(N), size, read_key != NULL, key != NULL}

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
            const Tape tape = tape_at(own, q);
            ordered(tape.order, N);
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
                const Given g = given_at(&given, i, q);
                step(next, reset && reset[i] ? empty : now, vectors, &g, &tape, q);
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
