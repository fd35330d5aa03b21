/* The adjoint of the DNC's time loop: part of native.c.
 *
 * A chunk of tokens at a time, from the last: its states are computed again from the one before the chunk, which the
 * forward pass kept.
 */

/* Gradients through the reads of a token: d is that of the state after it, and becomes that of the state after its
 * write. `s` is that state, with the read addresses before in `before` and those after in `after`. */
static void unread(
    const Slots *d, const real *d_vectors, const Slots *s, const real *before, const real *after, const Given *g,
    const Gradients *out, const Tape *tape, const Room *room, real *key, const Problem *q
) {
    const int64_t N = q->N, P = q->P, Q = q->Q, W = q->W;
    norms(tape->inverse, s->memory, q);
    for (int64_t r = 0; r < q->R; r++) {
        const real *modes = g->modes + 3 * r, *old = before + r * P;
        real *dw = d->reading + r * P;
        if (d_vectors) {
            pad(key, d_vectors + r * W, W, Q);
            times(room->a, s->memory, key, N, P, Q);
            for (int64_t n = 0; n < P; n++) dw[n] += room->a[n];
            for (int64_t n = 0; n < N; n++) axpy(d->memory + n * Q, after[r * P + n], key, Q);
        }
        follow(tape, s, old, q);
        pad(key, g->read_key + r * W, W, Q);
        const real strength = g->read_strength[r];
        const real scale = content(tape->similar, tape->cosine, tape->inverse, s->memory, key, strength, q);
        out->modes[3 * r] = dot(dw, tape->backward, P);
        out->modes[3 * r + 1] = dot(dw, tape->similar, P);
        out->modes[3 * r + 2] = dot(dw, tape->forward, P);
        for (int64_t n = 0; n < P; n++) {
            room->a[n] = modes[0] * dw[n]; /* of b_t */
            room->b[n] = modes[1] * dw[n]; /* of the content */
            room->c[n] = modes[2] * dw[n]; /* of f_t */
        }
        uncontent(
            out->read_key + r * W, out->read_strength + r, d->memory, room->d, room->e, room->b, tape->similar,
            tape->cosine, tape->inverse, s->memory, key, strength, scale, q
        );
        /* f = L w, b = L^T w. */
        times(dw, s->link, room->a, N, P, P);
        mixed(dw, s->link, room->c, N, P);
        for (int64_t i = 0; i < N; i++) {
            real *G = d->link + i * P;
            const real forward = room->c[i], backward = old[i];
            for (int64_t j = 0; j < P; j += LANES)
                vstore(G + j, vload(G + j) + forward * vload(old + j) + backward * vload(room->a + j));
        }
    }
}

/* Gradients through the write of a token: d of the state after it becomes that of the state before, `s`. */
static void unwrite(
    const Slots *d, const Slots *s, const Slots *after, const Given *g, const Gradients *out, const Tape *tape,
    const Room *room, real *key, const Problem *q
) {
    const int64_t N = q->N, P = q->P, Q = q->Q, W = q->W;
    const real *where = after->writing;
    real *dw = d->writing, *dp = room->a;

    /* p_t */
    const real lost = dot(d->precedence, s->precedence, P);
    vec sum = vset(0);
    for (int64_t n = 0; n < P; n += LANES) sum += vload(where + n);
    const real kept = 1 - vsum(sum);
    for (int64_t n = 0; n < N; n++) {
        dw[n] += d->precedence[n] - lost;
        dp[n] = kept * d->precedence[n];
    }
    clear(dp + N, P - N);
    /* L_t */
    real *columns = room->b;
    clear(columns, P);
    for (int64_t i = 0; i < N; i++) {
        real *G = d->link + i * P;
        const real *L = s->link + i * P, a = where[i];
        G[i] = 0;
        vec row = vset(0);
        for (int64_t j = 0; j < P; j += LANES) {
            const vec grad = vload(G + j), old = vload(L + j), through = grad * old;
            row += grad * vload(s->precedence + j) - through;
            vstore(columns + j, vload(columns + j) + through);
            vstore(dp + j, vload(dp + j) + grad * a);
            vstore(G + j, (1 - a - vload(where + j)) * grad);
        }
        dw[i] += vsum(row);
    }
    for (int64_t n = 0; n < N; n++) dw[n] -= columns[n];
    copy(d->precedence, dp, P);
    /* M_t */
    clear(out->erase, W);
    clear(out->add, W);
    for (int64_t n = 0; n < N; n++) {
        real *restrict G = d->memory + n * Q;
        const real *restrict M = s->memory + n * Q, a = where[n];
        real *restrict d_erase = out->erase, *restrict d_add = out->add;
        real moved = 0;
        for (int64_t w = 0; w < W; w++) {
            moved += G[w] * (g->add[w] - M[w] * g->erase[w]);
            d_erase[w] -= G[w] * M[w] * a;
            d_add[w] += G[w] * a;
            G[w] *= 1 - a * g->erase[w];
        }
        dw[n] += moved;
    }
    /* w_t^w */
    const real gate = *g->gate, allocate = *g->allocate;
    const real allocated = dot(dw, tape->allocation, P), similar = dot(dw, tape->similar, P);
    *out->gate = allocate * allocated + (1 - allocate) * similar;
    *out->allocate = gate * (allocated - similar);
    for (int64_t n = 0; n < P; n++) room->c[n] = gate * (1 - allocate) * dw[n];
    pad(key, g->key, W, Q);
    const real scale = 1 / (real)ROOT(dot(key, key, Q) + EPS);
    uncontent(
        out->key, out->strength, d->memory, room->d, room->e, room->c, tape->similar, tape->cosine, tape->inverse,
        s->memory, key, *g->strength, scale, q
    );
    /* a_t, from the most used slot to the least: `later` is the gradient of the product up to and with this one. */
    real later = 0;
    for (int64_t j = N - 1; j >= 0; j--) {
        const int64_t n = tape->order[j];
        const real da = gate * allocate * dw[n], u = after->usage[n];
        d->usage[n] += (later - da) * tape->before[n];
        later = da * (1 - u) + later * u;
    }
    /* u_t */
    for (int64_t r = 0; r < q->R; r++) {
        real freed = 0;
        for (int64_t n = 0; n < N; n++) {
            real others = d->usage[n] * (s->usage[n] + s->writing[n] - s->usage[n] * s->writing[n]);
            for (int64_t k = 0; k < q->R; k++)
                if (k != r) others *= 1 - g->release[k] * s->reading[k * P + n];
            freed -= others * s->reading[r * P + n];
            d->reading[r * P + n] -= others * g->release[r];
        }
        out->release[r] = freed;
    }
    for (int64_t n = 0; n < N; n++) {
        const real du = d->usage[n] * tape->retention[n];
        d->usage[n] = du * (1 - s->writing[n]);
        dw[n] = du * (1 - s->usage[n]);
    }
}

static void add_to(real *sum, real *p, int64_t count) {
    for (int64_t i = 0; i < count; i++) sum[i] += p[i];
    clear(p, count);
}

/* As dnc, given its checkpoints, and gradients of what it returns, which may be NULLs. Then gradients of all arguments,
 * those of parameters as they were where a token is masked. */
EXPORT void FN(dnc_backward)(
    const real *d_read, STATE(d_last_), real *checkpoints, PARAMETERS, STATE(fresh_), real *d_read_key,
    real *d_read_strength, real *d_modes, real *d_key, real *d_strength, real *d_erase, real *d_add, real *d_release,
    real *d_allocate, real *d_gate, STATE(d_), STATE(d_fresh_), real *scratch, SIZES
) {
    const Problem all = PROBLEM;
    const Given given = GIVEN;
    const Gradients gradients = {
        d_read_key, d_read_strength, d_modes, d_key, d_strength, d_erase, d_add, d_release, d_allocate, d_gate,
    };
    const Slots last = PACK(, d_last_), fresh = PACK(, fresh_), d_first = PACK(, d_), d_fresh = PACK(, d_fresh_);
    const int64_t chunks = (T + chunk - 1) / chunk, P = all.P, Q = all.Q;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        unsigned denormals = flush_denormals();
#pragma omp for schedule(static)
        for (int64_t b = 0; b < B; b++) {
            const Problem *q = &all;
            real *own = scratch + omp_get_thread_num() * scratch_size;
            clear(own, scratch_size);
            real *grad = take(&own, size), *empty = take(&own, size), *d_empty = take(&own, size);
            real *states = take(&own, (chunk + 1) * size), *last_state = take(&own, size);
            Tape tape = tape_in(&own, P), seen = tape_in(&own, P);
            const int64_t most = P > Q ? P : Q;
            Room room = {take(&own, most), take(&own, most), take(&own, most), take(&own, most), take(&own, most)};
            real *key_room = take(&own, Q), *vectors = own;
            load(grad, &last, b, q);
            if (reset) load(empty, &fresh, b, q);
            Slots d = slots_at(grad, q);
            for (int64_t start = (T - 1) / chunk * chunk; T && start >= 0; start -= chunk) {
                const int64_t stop = start + chunk < T ? start + chunk : T;
                /* The state before each real token, one after the other. */
                int64_t count = 0;
                copy(states, checkpoints + (b * chunks + start / chunk) * size, size);
                for (int64_t t = start; t < stop; t++) {
                    const int64_t i = b * T + t;
                    if (mask && !mask[i]) continue;
                    real *before = states + count++ * size;
                    if (reset && reset[i]) copy(before, empty, size);
                    const Given g = given_at(&given, i, q);
                    step(before + size, before, vectors, &g, &tape, &seen, key_room, q);
                }
                for (int64_t t = stop - 1; t >= start; t--) {
                    const int64_t i = b * T + t;
                    if (mask && !mask[i]) continue;
                    real *from = states + --count * size;
                    const Given g = given_at(&given, i, q);
                    const Gradients out = gradients_at(&gradients, i, q);
                    const Slots before = slots_at(from, q), after = slots_at(last_state, q);
                    /* Once more, for what the tapes hold; a reset may have taken the place of what came after. */
                    step(last_state, from, vectors, &g, &tape, &seen, key_room, q);
                    if (q->reads) {
                        const real *d_vectors = d_read ? d_read + i * R * W : NULL;
                        unread(
                            &d, d_vectors, &after, before.reading, after.reading, &g, &out, &seen, &room, key_room, q
                        );
                    }
                    if (q->writes) unwrite(&d, &before, &after, &g, &out, &tape, &room, key_room, q);
                    if (reset && reset[i]) add_to(d_empty, grad, size);
                }
            }
            store(&d_first, grad, b, q);
            store(&d_fresh, d_empty, b, q);
        }
        restore_denormals(denormals);
    }
}
