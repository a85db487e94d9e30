/* The machine's limit: loops that move an optimizer's bytes and compute next to nothing.

   The arithmetic only has to keep the compiler from leaving anything out and the numbers from overflowing or getting
   denormal. Software prefetching and unrolling by hand were tried and gained nothing over what the compiler makes. */

#include <pthread.h>
#include <stddef.h>

#define MAX_THREADS 256
#define ALONE 65536 /* elements a thread; for fewer, starting a thread takes longer than the work */

enum { ADD, MOMENTUM, TWO_PASSES, ADAM };

typedef struct {
    int loop, part, parts;
    size_t tensors;
    const size_t *sizes;
    float **p, **g, **m, **v;
} job;

volatile float fusedbun_sink; /* what the first pass found has to go somewhere */

static void add(float *restrict p, const float *restrict g, size_t n) {
    for (size_t i = 0; i < n; i++) p[i] += -1e-6f * g[i];
}

static void momentum(float *restrict p, const float *restrict g, float *restrict m, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float a = 0.9f * m[i] + g[i];
        m[i] = a;
        p[i] -= 1e-6f * a;
    }
}

static float sum(const float *restrict g, size_t n) {
    float s = 0;
    for (size_t i = 0; i < n; i++) s += g[i];
    return s;
}

static void adam(float *restrict p, const float *restrict g, float *restrict m, float *restrict v, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float a = 0.9f * m[i] + g[i], b = 0.99f * v[i] + g[i] * g[i];
        m[i] = a;
        v[i] = b;
        p[i] -= 1e-6f * a * b;
    }
}

static void slice(const job *j, size_t k, size_t from, size_t n) {
    switch (j->loop) {
    case ADD: add(j->p[k] + from, j->g[k] + from, n); break;
    case TWO_PASSES: fusedbun_sink = sum(j->g[k] + from, n); /* fall through */
    case MOMENTUM: momentum(j->p[k] + from, j->g[k] + from, j->m[k] + from, n); break;
    case ADAM: adam(j->p[k] + from, j->g[k] + from, j->m[k] + from, j->v[k] + from, n); break;
    }
}

/* A part of all elements, as if the tensors lay behind one another; it begins and ends on a cache line of a tensor. */
static void *work(void *argument) {
    const job *j = argument;
    size_t total = 0, start = 0;
    for (size_t k = 0; k < j->tensors; k++) total += j->sizes[k];
    size_t from = total / j->parts * j->part, to = j->part + 1 == j->parts ? total : total / j->parts * (j->part + 1);
    for (size_t k = 0; k < j->tensors; k++) {
        size_t n = j->sizes[k], first = from > start ? from - start : 0, last = to > start ? to - start : 0;
        first = first < n ? first / 16 * 16 : n;
        last = last < n ? last / 16 * 16 : n;
        if (first < last) slice(j, k, first, last - first);
        start += n;
    }
    return NULL;
}

/* One step over all tensors; returns 0, or an error number where a thread cannot be started. */
int fusedbun_step(int loop, int threads, size_t tensors, const size_t *sizes, float **p, float **g, float **m, float **v) {
    pthread_t others[MAX_THREADS];
    job jobs[MAX_THREADS];
    size_t total = 0;
    for (size_t k = 0; k < tensors; k++) total += sizes[k];
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (total < (size_t)threads * ALONE) threads = 1;
    int started = 1, error = 0;
    for (int t = 0; t < threads; t++) jobs[t] = (job){loop, t, threads, tensors, sizes, p, g, m, v};
    for (; started < threads && !error; started += !error)
        error = pthread_create(&others[started], NULL, work, &jobs[started]);
    work(&jobs[0]);
    for (int t = 1; t < started; t++) pthread_join(others[t], NULL);
    return error;
}
