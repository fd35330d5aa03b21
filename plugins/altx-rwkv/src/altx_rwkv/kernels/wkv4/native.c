/* WKV of RWKV-4, forward and backward: see reference.py for the mathematics.
 *
 * Vectors lie across channels. Chunks of tokens come outside and blocks of channels inside, so that rows of k, v and y,
 * which are far apart in memory, are read in order. Threads share the blocks out: each channel belongs to one thread.
 * The state lives where the last one is returned. The backward pass finds the states before each token, which the
 * forward pass kept.
 */
#include "altx.h"

enum { CHUNK = 16 };

static const real EMPTY = (real)-1e38;

typedef struct {
    const real *k, *v;
    int64_t k_stride, v_stride;
    const real *w, *u;
    const int64_t *bounds, *lengths; /* (sequences + 1), or NULL; (sequences), or NULL */
    const uint8_t *reset;            /* (tokens), or NULL */
    int64_t length, sequences, width;
} Inputs;

INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t start_of(const Inputs *in, int64_t s) { return in->bounds ? in->bounds[s] : s * in->length; }

/* Where padding begins. */
INLINE int64_t stop_of(const Inputs *in, int64_t s) {
    if (!in->lengths) return start_of(in, s + 1);
    int64_t real_ones = in->lengths[s] < 0 ? 0 : in->lengths[s];
    return start_of(in, s) + min_of(real_ones, in->length);
}

/* Rows from `token` on to `stop`, in the columns of blocks low .. high, as zeros. */
static void clear(const Inputs *in, real *y, int64_t token, int64_t stop, int64_t low, int64_t high) {
    int64_t from = low * LANES, to = min_of(high * LANES, in->width);
    for (; token < stop && from < to; token++)
        memset(y + token * in->width + from, 0, (size_t)(to - from) * sizeof(real));
}

INLINE void forward_chunk(const Inputs *in, int64_t channel, int64_t lanes, int64_t token, int64_t stop, real *state,
                          real *y, real *kept) {
    vec w = vload_n(in->w + channel, lanes), u = vload_n(in->u + channel, lanes);
    vec mean = vload_n(state + channel, lanes), weight = vload_n(state + in->width + channel, lanes);
    for (int64_t t = token; t < stop; t++) {
        vec k = vload_n(in->k + t * in->k_stride + channel, lanes);
        vec v = vload_n(in->v + t * in->v_stride + channel, lanes);
        if (in->reset && in->reset[t]) mean = vset(0), weight = vset(EMPTY);
        if (kept) {
            vstore_n(kept + 2 * t * in->width + channel, mean, lanes);
            vstore_n(kept + (2 * t + 1) * in->width + channel, weight, lanes);
        }
        vec change = v - mean, decayed = weight + w, ahead = k - decayed;
        vstore_n(y + t * in->width + channel, mean + vsigmoid(k + u - weight) * change, lanes);
        mean += vsigmoid(ahead) * change;
        weight = vselect(ahead > 0, k, decayed) + vsoftplus(-vabs(ahead));
    }
    vstore_n(state + channel, mean, lanes);
    vstore_n(state + in->width + channel, weight, lanes);
}

#define INPUTS                                                                                                         \
    const real *k, int64_t k_stride, const real *v, int64_t v_stride, const real *w, const real *u,                    \
        const int64_t *bounds, const int64_t *lengths, const uint8_t *reset, int64_t length, int64_t sequences,        \
        int64_t width
#define GATHERED {k, v, k_stride, v_stride, w, u, bounds, lengths, reset, length, sequences, width}

/* y (tokens, width); last (sequences, 2, width), which holds the first states; kept (tokens, 2, width) or NULL. */
EXPORT void FN(wkv4)(INPUTS, real *y, real *last, real *kept, int64_t threads) {
    const Inputs in = GATHERED;
    int64_t blocks = (width + LANES - 1) / LANES;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        unsigned before = flush_denormals();
        int64_t id = omp_get_thread_num(), all = omp_get_num_threads();
        int64_t low = blocks * id / all, high = blocks * (id + 1) / all;
        for (int64_t s = 0; s < sequences; s++) {
            int64_t stop = stop_of(&in, s);
            real *state = last + 2 * s * width;
            for (int64_t t = start_of(&in, s); t < stop; t += CHUNK)
                for (int64_t b = low; b < high; b++) {
                    int64_t channel = b * LANES, end = min_of(t + CHUNK, stop);
                    if (width - channel >= LANES)
                        forward_chunk(&in, channel, LANES, t, end, state, y, kept);
                    else
                        forward_chunk(&in, channel, width - channel, t, end, state, y, kept);
                }
            clear(&in, y, stop, start_of(&in, s + 1), low, high);
        }
        restore_denormals(before);
    }
}

typedef struct {
    const real *kept, *dy;       /* dy may be NULL */
    real *dk, *dv, *dw, *du;
} Gradients;

INLINE void backward_chunk(const Inputs *in, const Gradients *out, int64_t channel, int64_t lanes, int64_t token,
                           int64_t stop, real *dstate) {
    vec w = vload_n(in->w + channel, lanes), u = vload_n(in->u + channel, lanes);
    vec dw = vload_n(out->dw + channel, lanes), du = vload_n(out->du + channel, lanes);
    vec dmean = vload_n(dstate + channel, lanes), dweight = vload_n(dstate + in->width + channel, lanes);
    for (int64_t t = stop - 1; t >= token; t--) {
        int64_t at = t * in->width + channel;
        vec k = vload_n(in->k + t * in->k_stride + channel, lanes);
        vec v = vload_n(in->v + t * in->v_stride + channel, lanes);
        vec mean = vload_n(out->kept + 2 * t * in->width + channel, lanes);
        vec weight = vload_n(out->kept + (2 * t + 1) * in->width + channel, lanes);
        vec dy = out->dy ? vload_n(out->dy + at, lanes) : vset(0);
        vec change = v - mean, now = vsigmoid(k + u - weight), next = vsigmoid(k - weight - w);
        /* Gradients of what the two sigmoids are of. */
        vec of_now = dy * change * now * (1 - now), of_next = dmean * change * next * (1 - next);
        vec to_past = dweight * (1 - next) - of_next;
        vstore_n(out->dk + at, of_now + of_next + dweight * next, lanes);
        vstore_n(out->dv + at, dy * now + dmean * next, lanes);
        du += of_now;
        dw += to_past;
        dmean = dy * (1 - now) + dmean * (1 - next);
        dweight = to_past - of_now;
        if (in->reset && in->reset[t]) dmean = dweight = vset(0);
    }
    vstore_n(dstate + channel, dmean, lanes);
    vstore_n(dstate + in->width + channel, dweight, lanes);
    vstore_n(out->dw + channel, dw, lanes);
    vstore_n(out->du + channel, du, lanes);
}

/* dk, dv (tokens, width); dw, du (width), zeros at first; dstate (sequences, 2, width), the gradient of the last states
 * at first, then that of the first ones. */
EXPORT void FN(wkv4_backward)(INPUTS, const real *kept, const real *dy, real *dk, real *dv, real *dw, real *du,
                              real *dstate, int64_t threads) {
    const Inputs in = GATHERED;
    const Gradients out = {kept, dy, dk, dv, dw, du};
    int64_t blocks = (width + LANES - 1) / LANES;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        unsigned before = flush_denormals();
        int64_t id = omp_get_thread_num(), all = omp_get_num_threads();
        int64_t low = blocks * id / all, high = blocks * (id + 1) / all;
        for (int64_t s = 0; s < sequences; s++) {
            int64_t start = start_of(&in, s), stop = stop_of(&in, s);
            for (int64_t end = stop; end > start; end -= CHUNK)
                for (int64_t b = low; b < high; b++) {
                    int64_t channel = b * LANES, t = end - CHUNK > start ? end - CHUNK : start;
                    if (width - channel >= LANES)
                        backward_chunk(&in, &out, channel, LANES, t, end, dstate + 2 * s * width);
                    else
                        backward_chunk(&in, &out, channel, width - channel, t, end, dstate + 2 * s * width);
                }
            clear(&in, dk, stop, start_of(&in, s + 1), low, high);
            clear(&in, dv, stop, start_of(&in, s + 1), low, high);
        }
        restore_denormals(before);
    }
}
