/* The adjoint of the DNC's time loop: part of native.c.
 *
 * A chunk of tokens at a time, from the last: its states are computed again from the one before the chunk, which the
 * forward pass kept.
 */

/* Room for the adjoint of a token: (R, P), then (P). */
typedef struct {
    real *back, *ahead, *forward, *backward, *found, *work, *shrink, *links;
} Room;

/* L's gradient from f = L w and b = L^T w: dL += df w^T + w db^T, of all heads. */
static void unfollow(
    real *restrict dL, const real *restrict df, const real *restrict db, const real *restrict w, const Problem *q
) {
    const int64_t N = q->N, P = q->P;
    int64_t n = 0;
    for (; n + 4 <= N; n += 4) {
        real *G = dL + n * P;
        for (int64_t r = 0; r < q->R; r++) {
            const real *f = df + r * P + n, *from = w + r * P, *at = from + n, *b = db + r * P;
            const vec f0 = vset(f[0]), f1 = vset(f[1]), f2 = vset(f[2]), f3 = vset(f[3]);
            const vec w0 = vset(at[0]), w1 = vset(at[1]), w2 = vset(at[2]), w3 = vset(at[3]);
            for (int64_t i = 0; i < P; i += LANES) {
                const vec x = vload(from + i), y = vload(b + i);
                vstore(G + i, vload(G + i) + f0 * x + w0 * y);
                vstore(G + P + i, vload(G + P + i) + f1 * x + w1 * y);
                vstore(G + 2 * P + i, vload(G + 2 * P + i) + f2 * x + w2 * y);
                vstore(G + 3 * P + i, vload(G + 3 * P + i) + f3 * x + w3 * y);
            }
        }
    }
    for (; n < N; n++)
        for (int64_t r = 0; r < q->R; r++) {
            axpy(dL + n * P, df[r * P + n], w + r * P, P);
            axpy(dL + n * P, w[r * P + n], db + r * P, P);
        }
}

/* Gradients through the reads of a token: d is that of the state after it, and becomes that of the state after its
 * write. `s` is that state, with the read addresses before in `before` and those after in `after`. */
static void unread(
    const Slots *d, const real *d_vectors, const Slots *s, const real *before, const real *after, const Given *g,
    const Gradients *out, const Tape *tape, const Room *room, const Problem *q
) {
    const int64_t P = q->P, W = q->W;
    for (int64_t r = 0; r < q->R; r++) {
        const real *modes = g->modes + 3 * r, *found = tape->found + r * P;
        real *dw = d->reading + r * P;
        if (d_vectors) {
            const real *v = d_vectors + r * W;
            mixed(dw, s->memory, v, W, P);
            for (int64_t w = 0; w < W; w++) axpy(d->memory + w * P, v[w], after + r * P, P);
        }
        out->modes[3 * r] = dot(dw, tape->backward + r * P, P);
        out->modes[3 * r + 1] = dot(dw, found, P);
        out->modes[3 * r + 2] = dot(dw, tape->forward + r * P, P);
        for (int64_t n = 0; n < P; n += LANES) {
            const vec grad = vload(dw + n);
            vstore(room->back + r * P + n, modes[0] * grad);
            vstore(room->found + n, modes[1] * grad);
            vstore(room->ahead + r * P + n, modes[2] * grad);
        }
        uncontent(
            out->read_key + r * W, out->read_strength + r, d->memory, room->work, room->shrink, room->found, found,
            tape->read_cosine + r * P, tape->read_inverse, s->memory, g->read_key + r * W, g->read_strength[r], q
        );
    }
    follow(room->forward, room->backward, s->link, room->back, room->ahead, q);
    for (int64_t n = 0; n < q->R * P; n += LANES)
        vstore(d->reading + n, vload(room->forward + n) + vload(room->backward + n));
    unfollow(d->link, room->ahead, room->back, before, q);
}

/* Gradients through the write of a token: d of the state after it becomes that of the state before, `s`. */
static void unwrite(
    const Slots *d, const Slots *s, const Slots *after, const Given *g, const Gradients *out, const Tape *tape,
    const Room *room, const Problem *q
) {
    const int64_t N = q->N, P = q->P;
    const real *where = after->writing;
    real *dw = d->writing, *dp = room->work;

    /* p_t */
    const real lost = dot(d->precedence, s->precedence, P), kept = 1 - total(where, P);
    for (int64_t n = 0; n < N; n++) dw[n] += d->precedence[n] - lost;
    for (int64_t n = 0; n < P; n++) dp[n] = kept * d->precedence[n];
    /* L_t */
    real *columns = room->links;
    clear(columns, P);
    for (int64_t i = 0; i < N; i++) {
        real *G = d->link + i * P;
        const real *L = s->link + i * P, a = where[i];
        G[i] = 0;
        vec row = vset(0);
        for (int64_t j = 0; j < P; j += LANES) {
            const vec grad = vload(G + j), through = grad * vload(L + j);
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
    for (int64_t w = 0; w < q->W; w++) {
        real *G = d->memory + w * P;
        const real *M = s->memory + w * P, erase = g->erase[w], add = g->add[w];
        vec erased = vset(0), added = vset(0);
        for (int64_t n = 0; n < P; n += LANES) {
            const vec grad = vload(G + n), m = vload(M + n), a = vload(where + n);
            vstore(dw + n, vload(dw + n) + grad * (add - m * erase));
            erased += grad * m * a;
            added += grad * a;
            vstore(G + n, grad * (1 - a * erase));
        }
        out->erase[w] = -vsum(erased);
        out->add[w] = vsum(added);
    }
    /* w_t^w */
    const real gate = *g->gate, allocate = *g->allocate;
    const real allocated = dot(dw, tape->allocation, P), similar = dot(dw, tape->similar, P);
    *out->gate = allocate * allocated + (1 - allocate) * similar;
    *out->allocate = gate * (allocated - similar);
    for (int64_t n = 0; n < P; n += LANES) vstore(room->found + n, gate * (1 - allocate) * vload(dw + n));
    uncontent(
        out->key, out->strength, d->memory, room->work, room->shrink, room->found, tape->similar, tape->cosine,
        tape->inverse, s->memory, g->key, *g->strength, q
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
        vec freed = vset(0);
        for (int64_t n = 0; n < P; n += LANES) {
            const vec u = vload(s->usage + n), w = vload(s->writing + n), reading = vload(s->reading + r * P + n);
            vec others = vload(d->usage + n) * (u + w - u * w);
            for (int64_t k = 0; k < q->R; k++)
                if (k != r) others *= 1 - g->release[k] * vload(s->reading + k * P + n);
            freed += others * reading;
            vstore(d->reading + r * P + n, vload(d->reading + r * P + n) - others * g->release[r]);
        }
        out->release[r] = -vsum(freed);
    }
    for (int64_t n = 0; n < P; n += LANES) {
        const vec du = vload(d->usage + n) * vload(tape->retention + n);
        vstore(d->usage + n, du * (1 - vload(s->writing + n)));
        vstore(dw + n, du * (1 - vload(s->usage + n)));
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
    const int64_t chunks = (T + chunk - 1) / chunk, P = all.P;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        unsigned denormals = flush_denormals();
#pragma omp for schedule(static)
        for (int64_t b = 0; b < B; b++) {
            const Problem *q = &all;
            real *own = scratch + omp_get_thread_num() * scratch_size;
            clear(own, scratch_size);
            real *grad = take(&own, size), *empty = take(&own, size), *d_empty = take(&own, size);
            real *states = take(&own, (chunk + 1) * size);
            real *tapes = take(&own, chunk * tape_size(q));
            ordered(tape_at(tapes, q).order, N);
            Room room = {
                take(&own, R * P), take(&own, R * P), take(&own, R * P), take(&own, R * P),
                take(&own, P), take(&own, P), take(&own, P), take(&own, P),
            };
            real *vectors = own;
            load(grad, &last, b, q);
            if (reset) load(empty, &fresh, b, q);
            const Slots d = slots_at(grad, q);
            for (int64_t start = (T - 1) / chunk * chunk; T && start >= 0; start -= chunk) {
                const int64_t stop = start + chunk < T ? start + chunk : T;
                /* The states before and after the real tokens, one after the other, but before a reset `empty`. */
                int64_t count = 0;
                const int32_t *last_order = NULL;
                copy(states, checkpoints + (b * chunks + start / chunk) * size, size);
                for (int64_t t = start; t < stop; t++) {
                    const int64_t i = b * T + t;
                    if (mask && !mask[i]) continue;
                    const Given g = given_at(&given, i, q);
                    real *before = states + count * size;
                    const Tape tape = tape_at(tapes + count * tape_size(q), q);
                    if (count++) memcpy(tape.order, last_order, (size_t)N * sizeof(int32_t));
                    last_order = tape.order;
                    step(before + size, reset && reset[i] ? empty : before, vectors, &g, &tape, q);
                }
                for (int64_t t = stop - 1; t >= start; t--) {
                    const int64_t i = b * T + t;
                    if (mask && !mask[i]) continue;
                    const int64_t again = reset && reset[i];
                    const Tape tape = tape_at(tapes + --count * tape_size(q), q);
                    const Given g = given_at(&given, i, q);
                    const Gradients out = gradients_at(&gradients, i, q);
                    const Slots before = slots_at(again ? empty : states + count * size, q);
                    const Slots after = slots_at(states + (count + 1) * size, q);
                    if (q->reads) {
                        const real *d_vectors = d_read ? d_read + i * R * W : NULL;
                        unread(&d, d_vectors, &after, before.reading, after.reading, &g, &out, &tape, &room, q);
                    }
                    if (q->writes) unwrite(&d, &before, &after, &g, &out, &tape, &room, q);
                    if (again) add_to(d_empty, grad, size);
                }
            }
            store(&d_first, grad, b, q);
            store(&d_fresh, d_empty, b, q);
        }
        restore_denormals(denormals);
    }
}
