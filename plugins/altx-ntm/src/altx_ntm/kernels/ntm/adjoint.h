/* The adjoint of the NTM's time loop: part of native.c.
 *
 * A chunk of tokens at a time, from the last: its memories are computed again from the one before the chunk, with the
 * addresses that the forward pass kept. dM and dA are the gradients of memory (W, P) and addresses (R+V, P).
 */

typedef struct {
    real *where, *previous, *d_ring, *d_similar, *shrink;
} Work;

/* Sums over slots. */
INLINE real dot(const real *a, const real *b, int64_t P) {
    vec sum = vset(0);
    for (int64_t n = 0; n < P; n += LANES) sum += vload(a + n) * vload(b + n);
    return vsum(sum);
}

/* Equations (9) to (7): dA of the address after becomes that of the address before; what is left, the gradient of
 * `content`, goes to work->d_similar. */
static void unshift(real *dA, const Look *k, const Work *w, const Heads *q, const HeadGradients *d, int64_t i,
                    const Problem *p) {
    const int64_t P = p->P, S = q->shifts, r = S / 2;
    const real mean = dot(w->where, dA, P), sharpness = q->sharpness[i], gate = q->gate[i], *shift = q->shift + i * S;
    vec sum = vset(0);
    for (int64_t n = 0; n < P; n += LANES) {
        vec shifted = vload(k->shifted + n), d_logit = vload(w->where + n) * (vload(dA + n) - mean);
        sum += d_logit * vlog(shifted);
        vstore(w->d_ring + r + n, d_logit * sharpness / shifted);
    }
    d->sharpness[i] = vsum(sum);
    for (int64_t j = 0; j < S; j++) d->shift[i * S + j] = dot(w->d_ring + r, k->ring + 2 * r - j, P);
    close_ring(w->d_ring, r, p->N);
    sum = vset(0);
    for (int64_t n = 0; n < P; n += LANES) {
        vec d_gated = vset(0);
        for (int64_t j = 0; j < S; j++) d_gated += shift[j] * vload(w->d_ring + j + n);
        vstore(dA + n, d_gated);
    }
    fill_padding(dA, p->N, P, 0);
    for (int64_t n = 0; n < P; n += LANES) {
        vec d_gated = vload(dA + n);
        sum += d_gated * (vload(k->content + n) - vload(w->previous + n));
        vstore(w->d_similar + n, gate * d_gated);
        vstore(dA + n, (1 - gate) * d_gated);
    }
    d->gate[i] = vsum(sum);
}

/* `rows` rows of into_memory, 4 at most. */
INLINE void into_block(
    real *restrict dM, const real *restrict M, const real *restrict d_similar, const real *restrict key, real *d_key,
    const real *restrict where, const real *restrict d_read, const real *restrict shrink, int64_t rows, int64_t P
) {
    vec sum[4];
    for (int64_t i = 0; i < rows; i++) sum[i] = vset(0);
    for (int64_t n = 0; n < P; n += LANES) {
        vec s = vload(d_similar + n), a = where ? vload(where + n) : s, q = shrink ? vload(shrink + n) : s;
        for (int64_t i = 0; i < rows; i++) {
            vec m = vload(M + i * P + n), d = vload(dM + i * P + n) + s * key[i];
            sum[i] += s * m;
            if (where) d += a * d_read[i];
            if (shrink) d -= q * m;
            vstore(dM + i * P + n, d);
        }
    }
    for (int64_t i = 0; i < rows; i++) d_key[i] = vsum(sum[i]);
}

/* dM += d_similar key^T + where d_read^T - shrink M, and d_key = M d_similar; any of where and shrink may be NULL. */
static void into_memory(
    real *dM, const real *M, const real *d_similar, const real *key, real *d_key, const real *where, const real *d_read,
    const real *shrink, int64_t W, int64_t P
) {
    int64_t w = 0;
    for (; w + 4 <= W; w += 4) {
        int64_t at = w * P;
        if (where && shrink)
            into_block(dM + at, M + at, d_similar, key + w, d_key + w, where, d_read + w, shrink, 4, P);
        else if (shrink)
            into_block(dM + at, M + at, d_similar, key + w, d_key + w, NULL, NULL, shrink, 4, P);
        else
            into_block(dM + at, M + at, d_similar, key + w, d_key + w, where, where ? d_read + w : NULL, NULL, 4, P);
    }
    for (; w < W; w++) {
        const real *vector = where ? d_read + w : NULL;
        into_block(dM + w * P, M + w * P, d_similar, key + w, d_key + w, where, vector, shrink, 1, P);
    }
}

/* Equations (9) to (5), and (2) if d_read, of all heads of one kind in token t, which looked at M with 1 / |M| in
 * look->inverse. `after` and `before` are their addresses (heads, N), dA (heads, P). */
static void unlook(
    real *dM, real *dA, const real *M, const Look *k, const Work *work, const Heads *q, const HeadGradients *d,
    const real *after, const real *before, const real *d_read, int64_t t, const Problem *p
) {
    const int64_t P = p->P, W = p->W;
    memset(work->shrink, 0, (size_t)P * sizeof(real));
    for (int64_t h = 0; h < q->heads; h++) {
        const int64_t i = t * q->heads + h;
        const real *key = q->key + i * W, *vectors = d_read ? d_read + i * W : NULL;
        copy(work->where, after + h * p->N, p->N);
        copy(work->previous, before + h * p->N, p->N);
        if (vectors) columns(dA + h * P, M, vectors, W, P, 1);
        look_at(k, M, q, i, work->previous, p);
        unshift(dA + h * P, k, work, q, d, i, p);

        const real mean = dot(k->content, work->d_similar, P), scale = key_inverse(key, W);
        vec strength = vset(0);
        for (int64_t n = 0; n < P; n += LANES) {
            vec inverse = vload(k->inverse + n), cosine = vload(k->cosine + n);
            vec d_logit = vload(k->content + n) * (vload(work->d_similar + n) - mean);
            vec d_cosine = d_logit * q->strength[i];
            strength += d_logit * cosine;
            vstore(work->d_similar + n, d_cosine * inverse * scale);
            vstore(work->shrink + n, vload(work->shrink + n) + d_cosine * cosine * inverse * inverse);
        }
        d->strength[i] = vsum(strength);
        const real *shrink = h == q->heads - 1 ? work->shrink : NULL;
        into_memory(
            dM, M, work->d_similar, key, d->key + i * W, vectors ? work->where : NULL, vectors, shrink, W, P
        );
        /* The key's own length: sum of d_cosine cosine, times key / |key|^2. */
        const real along = q->strength[i] * d->strength[i] * scale * scale;
        for (int64_t w = 0; w < W; w++) d->key[i * W + w] -= along * key[w];
    }
}

/* Equation (4), one head: gradients of what it adds and, added to dA, of its address. */
static void unadd(real *d_add, real *dA, const real *dM, const real *where, const real *add, const Problem *p) {
    rows(d_add, dM, where, p->W, p->P);
    columns(dA, dM, add, p->W, p->P, 1);
}

/* `rows` rows of unerase, 4 at most. */
INLINE void unerase_block(
    real *d_erase, real *restrict dA, real *restrict dM, const real *restrict stage, const real *restrict where,
    const real *restrict erase, int64_t rows, int64_t P
) {
    vec sum[4];
    for (int64_t i = 0; i < rows; i++) sum[i] = vset(0);
    for (int64_t n = 0; n < P; n += LANES) {
        vec a = vload(where + n), d_where = vload(dA + n);
        for (int64_t i = 0; i < rows; i++) {
            vec d = vload(dM + i * P + n), product = d * vload(stage + i * P + n);
            sum[i] -= a * product;
            d_where -= product * erase[i];
            vstore(dM + i * P + n, d - d * (a * erase[i]));
        }
        vstore(dA + n, d_where);
    }
    for (int64_t i = 0; i < rows; i++) d_erase[i] = vsum(sum[i]);
}

/* Equation (3), one head that erased from `stage`: the same, and dM becomes the gradient of `stage`. */
static void unerase(
    real *d_erase, real *dA, real *dM, const real *stage, const real *where, const real *erase, const Problem *p
) {
    const int64_t P = p->P;
    int64_t w = 0;
    for (; w + 4 <= p->W; w += 4)
        unerase_block(d_erase + w, dA, dM + w * P, stage + w * P, where, erase + w, 4, P);
    for (; w < p->W; w++) unerase_block(d_erase + w, dA, dM + w * P, stage + w * P, where, erase + w, 1, P);
}

/* Equations (4) and (3) of token t. stages: room for V-1 memories. */
static void unwrite(
    real *d_erase, real *d_add, real *dM, real *dA, const real *M, const real *where, real *stages, int64_t t,
    const Problem *p
) {
    const int64_t V = p->writes.heads, P = p->P, W = p->W, at = t * V * W, size = W * P;
    for (int64_t v = 0; v < V; v++) {
        const int64_t i = at + v * W;
        unadd(d_add + i, dA + v * P, dM, where + v * P, p->add + i, p);
    }
    for (int64_t v = 0; v < V - 1; v++)
        erase_memory(stages + v * size, v ? stages + (v - 1) * size : M, where + v * P, p->erase + at + v * W, p);
    for (int64_t v = V - 1; v >= 0; v--) {
        const int64_t i = at + v * W;
        unerase(d_erase + i, dA + v * P, dM, v ? stages + (v - 1) * size : M, where + v * P, p->erase + i, p);
    }
}

static void add_to(real *sum, real *p, int64_t count) {
    for (int64_t i = 0; i < count; i++) sum[i] += p[i];
    memset(p, 0, (size_t)count * sizeof(real));
}

typedef struct {
    HeadGradients reads, writes;
    real *erase, *add;
    const real *read;
} Gradients;

static HeadGradients head_gradients_of(const HeadGradients *d, const Heads *q, int64_t b, const Problem *p) {
    int64_t i = b * p->T * q->heads;
    return (HeadGradients){d->key + i * p->W, d->strength + i, d->gate + i, d->shift + i * q->shifts, d->sharpness + i};
}

static Gradients gradients_of(const Gradients *all, int64_t b, const Problem *p) {
    int64_t written = b * p->T * p->writes.heads * p->W;
    return (Gradients){
        head_gradients_of(&all->reads, &p->reads, b, p), head_gradients_of(&all->writes, &p->writes, b, p),
        all->erase + written, all->add + written, all->read ? all->read + b * p->T * p->reads.heads * p->W : NULL,
    };
}

/* Gradients of one row, given those of its last memory and addresses in dM and dA, which become those of its first;
 * what a reset cuts off is added to fresh_dM and fresh_dA. fresh_memory (W, P); initial and fresh (R+V, N). */
static void backward_row(
    const Problem *p, const Gradients *d, real *dM, real *dA, real *fresh_dM, real *fresh_dA, const real *checkpoints,
    const real *addresses, const real *initial, const real *fresh_memory, const real *fresh, real *scratch
) {
    const int64_t R = p->reads.heads, V = p->writes.heads, H = R + V, N = p->N, P = p->P, size = p->W * P;
    const int64_t ring = P + most_shifts(p) + PAD;
    Look k = looking(&scratch, P, most_shifts(p));
    Work work = {take(&scratch, P), take(&scratch, P), take(&scratch, ring), take(&scratch, P), take(&scratch, P)};
    real *where = take(&scratch, V * P), *memories = take(&scratch, p->chunk * size), *after = take(&scratch, size);
    real *stages = scratch;
    for (int64_t start = (p->T - 1) / p->chunk * p->chunk; p->T && start >= 0; start -= p->chunk) {
        int64_t stop = start + p->chunk < p->T ? start + p->chunk : p->T, real_tokens = 0;
        /* The memory before each real token, one after the other. */
        copy(memories, checkpoints + start / p->chunk * size, size);
        for (int64_t t = start, last = -1; t < stop; t++) {
            if (p->mask && !p->mask[t]) continue;
            real *M = memories + real_tokens++ * size;
            if (last >= 0) {
                spread_out(where, addresses + (last * H + R) * N, V, p);
                write_memory(M, M - size, where, last, p);
            }
            if (p->reset && p->reset[t]) copy(M, fresh_memory, size);
            last = t;
        }
        for (int64_t t = stop - 1; t >= start; t--) {
            if (p->mask && !p->mask[t]) continue;
            const real *M = memories + --real_tokens * size, *now = addresses + t * H * N;
            const int starts = p->reset && p->reset[t];
            const real *before = starts ? fresh : t ? now - H * N : initial;
            spread_out(where, now + R * N, V, p);
            if (!p->write_first && V) unwrite(d->erase, d->add, dM, dA + R * P, M, where, stages, t, p);
            if (R) {
                const real *seen = M;
                if (p->write_first && V) {
                    write_memory(after, M, where, t, p);
                    seen = after;
                }
                norms(k.inverse, seen, p);
                unlook(dM, dA, seen, &k, &work, &p->reads, &d->reads, now, before, d->read, t, p);
            }
            if (p->write_first && V) unwrite(d->erase, d->add, dM, dA + R * P, M, where, stages, t, p);
            if (V) {
                if (p->write_first || !R) norms(k.inverse, M, p);
                unlook(
                    dM, dA + R * P, M, &k, &work, &p->writes, &d->writes, now + R * N, before + R * N, NULL, t, p
                );
            }
            if (starts) {
                add_to(fresh_dM, dM, size);
                add_to(fresh_dA, dA, H * P);
            }
        }
    }
}

/* As ntm, given its checkpoints and addresses, and gradients of what it returns, which may be NULL. initial and fresh:
 * (B, R+V, N). Then gradients of all arguments, those of parameters zeros where a token is masked. */
EXPORT void FN(ntm_backward)(
    const real *d_read, const real *d_last_memory, const real *d_last_read_address, const real *d_last_write_address,
    const real *checkpoints, const real *addresses, PROBLEM_PARAMETERS, const real *initial, const real *fresh_memory,
    const real *fresh, real *d_read_key, real *d_read_strength, real *d_read_gate, real *d_read_shift,
    real *d_read_sharpness, real *d_write_key, real *d_write_strength, real *d_write_gate, real *d_write_shift,
    real *d_write_sharpness, real *d_erase, real *d_add, real *d_memory, real *d_read_address, real *d_write_address,
    real *d_fresh_memory, real *d_fresh_read_address, real *d_fresh_write_address, real *scratch, SIZE_PARAMETERS
) {
    const Problem all = PROBLEM;
    const Gradients gradients = {
        {d_read_key, d_read_strength, d_read_gate, d_read_shift, d_read_sharpness},
        {d_write_key, d_write_strength, d_write_gate, d_write_shift, d_write_sharpness}, d_erase, d_add, d_read,
    };
    const int64_t P = all.P, H = R + V, size = W * P, chunks = (T + chunk - 1) / chunk;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        unsigned denormals = flush_denormals();
        real *own = scratch + omp_get_thread_num() * scratch_size;
        real *dM = take(&own, size), *dA = take(&own, H * P), *fresh_dM = take(&own, size);
        real *fresh_dA = take(&own, H * P), *fresh_M = take(&own, size);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < B; b++) {
            const Problem p = row_of(&all, b);
            const Gradients d = gradients_of(&gradients, b, &p);
            memset(dM, 0, (size_t)scratch_size * sizeof(real));
            if (d_last_memory) turn_in(dM, d_last_memory + b * N * W, &p);
            if (d_last_read_address) spread_out(dA, d_last_read_address + b * R * N, R, &p);
            if (d_last_write_address) spread_out(dA + R * P, d_last_write_address + b * V * N, V, &p);
            if (reset) turn_in(fresh_M, fresh_memory + b * N * W, &p);
            backward_row(
                &p, &d, dM, dA, fresh_dM, fresh_dA, checkpoints + b * chunks * size, addresses + b * T * H * N,
                initial + b * H * N, fresh_M, fresh ? fresh + b * H * N : NULL, own
            );
            turn_out(d_memory + b * N * W, dM, &p);
            close_up(d_read_address + b * R * N, dA, R, &p);
            close_up(d_write_address + b * V * N, dA + R * P, V, &p);
            turn_out(d_fresh_memory + b * N * W, fresh_dM, &p);
            close_up(d_fresh_read_address + b * R * N, fresh_dA, R, &p);
            close_up(d_fresh_write_address + b * V * N, fresh_dA + R * P, V, &p);
        }
        restore_denormals(denormals);
    }
}
