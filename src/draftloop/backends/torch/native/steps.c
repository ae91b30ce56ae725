/* What stands between the products: norms, gates, attention. */
#include "kernels.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Sum of x · x over one row of n, n a multiple of 16. */
static float norm_scale(const float *x, long n, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < n; i += LANES) {
        __m512 v = _mm512_loadu_ps(x + i);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    return 1.f / sqrtf(_mm512_reduce_add_ps(sum) / (float)n + eps);
}

/* RMSNorm (Zhang and Sennrich 2019). x [T, D] float32, after adding `added` [T, D] bf16 to it where that is
 * not NULL; weight [D] float32 -> output [T, D] bf16. */
void dl_norm(float *x, const bf16 *added, const float *weight, bf16 *output, long tokens, long width, float eps) {
    for (long t = 0; t < tokens; t++, x += width, output += width) {
        if (added)
            for (long i = 0; i < width; i += LANES)
                _mm512_storeu_ps(x + i, _mm512_add_ps(_mm512_loadu_ps(x + i), load_bf16(added + t * width + i)));
        __m512 scale = _mm512_set1_ps(norm_scale(x, width, eps));
        for (long i = 0; i < width; i += LANES) {
            __m512 v = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), scale), _mm512_loadu_ps(weight + i));
            store_bf16(output + i, v);
        }
    }
}

/* silu(gate) · up: [T, 2 F] bf16 -> [T, F] bf16. */
typedef struct {
    const bf16 *input;
    bf16 *output;
    long width;
} Gate;

static void gate_row(void *arguments, long t) {
    Gate *a = arguments;
    const bf16 *gate = a->input + t * 2 * a->width, *up = gate + a->width;
    bf16 *to = a->output + t * a->width;
    const __m512 one = _mm512_set1_ps(1.f);
    for (long i = 0; i < a->width; i += LANES) {
        __m512 g = load_bf16(gate + i);
        __m512 e = exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), g));
        store_bf16(to + i, _mm512_mul_ps(_mm512_div_ps(g, _mm512_add_ps(one, e)), load_bf16(up + i)));
    }
}

void dl_gate(const bf16 *input, bf16 *output, long tokens, long width) {
    Gate a = {input, output, width};
    dl_run(gate_row, &a, tokens);
}

typedef struct {
    const bf16 *qkv;               /* [T, (H + 2 G) E] */
    const float *cos, *sin;        /* [T, E]; sin carries the sign of the rotated half */
    const float *q_norm, *k_norm;  /* [E] or NULL */
    bf16 *keys, *values;           /* [G, capacity, E] */
    bf16 *output;                  /* [T, H E] */
    float *queries;                /* [T, H, E] */
    long start, heads, groups, width, capacity;
    float eps;
    long parts;                    /* into which the R queries of a group are split */
} Attention;

/* One head's rotated row: half-split rotary embedding (Su et al. 2021). */
static void rotated(const Attention *a, const bf16 *from, const float *norm, long t, float *to) {
    float row[512];
    for (long i = 0; i < a->width; i += LANES) _mm512_storeu_ps(row + i, load_bf16(from + i));
    if (norm) {
        __m512 scale = _mm512_set1_ps(norm_scale(row, a->width, a->eps));
        for (long i = 0; i < a->width; i += LANES)
            _mm512_storeu_ps(row + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(row + i), scale), _mm512_loadu_ps(norm + i)));
    }
    const float *cos = a->cos + t * a->width, *sin = a->sin + t * a->width;
    long half = a->width / 2;
    for (long i = 0; i < a->width; i += LANES) {
        __m512 other = _mm512_loadu_ps(row + (i < half ? i + half : i - half));
        __m512 v = _mm512_mul_ps(_mm512_loadu_ps(row + i), _mm512_loadu_ps(cos + i));
        _mm512_storeu_ps(to + i, _mm512_fmadd_ps(other, _mm512_loadu_ps(sin + i), v));
    }
}

static void rotate_row(void *arguments, long t) {
    Attention *a = arguments;
    long width = a->width;
    const bf16 *row = a->qkv + t * (a->heads + 2 * a->groups) * width;
    for (long h = 0; h < a->heads; h++) {
        float *q = a->queries + (t * a->heads + h) * width;
        rotated(a, row + h * width, a->q_norm, t, q);
        /* The queries are rounded as the keys are, and as the layers' activations. */
        for (long i = 0; i < width; i += LANES) _mm512_storeu_ps(q + i, widen(narrow(_mm512_loadu_ps(q + i))));
    }
    for (long g = 0; g < a->groups; g++) {
        float key[512];
        long at = (g * a->capacity + a->start + t) * width;
        rotated(a, row + (a->heads + g) * width, a->k_norm, t, key);
        for (long i = 0; i < width; i += LANES) store_bf16(a->keys + at + i, _mm512_loadu_ps(key + i));
        memcpy(a->values + at, row + (a->heads + a->groups + g) * width, width * sizeof(bf16));
    }
}

/* Softmax of n scores in place, not normalized; returns their sum. */
static float exponentials(float *scores, long n) {
    __m512 largest = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (long s = 0; s < n; s += LANES) {
        __mmask16 mask = n - s >= LANES ? 0xffff : (__mmask16)((1u << (n - s)) - 1);
        largest = _mm512_mask_max_ps(largest, mask, largest, _mm512_loadu_ps(scores + s));
    }
    __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    for (long s = 0; s < n; s += LANES) {
        __mmask16 mask = n - s >= LANES ? 0xffff : (__mmask16)((1u << (n - s)) - 1);
        __m512 e = _mm512_maskz_mov_ps(mask, exp_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + s), most)));
        _mm512_storeu_ps(scores + s, e);
        total = _mm512_add_ps(total, e);
    }
    return _mm512_reduce_add_ps(total);
}

/* Memory of this thread for so many floats, kept: fresh pages would cost more than the scores. */
static float *room_for(long count) {
    static _Thread_local float *kept;
    static _Thread_local long room;
    if (room < count) {
        float *more = realloc(kept, count * sizeof(float));
        if (!more) return NULL;
        kept = more;
        room = count;
    }
    return kept;
}

#define MAX_TOGETHER 8 /* queries of a group that read the keys together */

/* Some queries of one token and group. Each head's result is the same whoever reads beside it. */
static void attend_part(void *arguments, long index) {
    Attention *a = arguments;
    long part = index % a->parts, g = index / a->parts % a->groups, t = index / a->parts / a->groups;
    long shared = a->heads / a->groups, width = a->width, seen = a->start + t + 1;
    long first = shared * part / a->parts, end = shared * (part + 1) / a->parts, row = (seen + LANES - 1) & -LANES;
    const bf16 *keys = a->keys + g * a->capacity * width, *values = a->values + g * a->capacity * width;
    const float scale = 1.f / sqrtf((float)width);
    float *scores = room_for(MAX_TOGETHER * row);
    if (!scores) {
        /* No memory: bits that are no number, which everybody after this notices. */
        memset(a->output + (t * a->heads + g * shared + first) * width, 0xff, (end - first) * width * sizeof(bf16));
        return;
    }
    for (long from = first; from < end; from += MAX_TOGETHER) {
        long count = end - from < MAX_TOGETHER ? end - from : MAX_TOGETHER;
        const float *q = a->queries + (t * a->heads + g * shared + from) * width;
        for (long s = 0; s < seen; s++) {
            const bf16 *key = keys + s * width;
            for (long r = 0; r < count; r++) {
                __m512 sum = _mm512_setzero_ps();
                for (long i = 0; i < width; i += LANES)
                    sum = _mm512_fmadd_ps(load_bf16(key + i), _mm512_loadu_ps(q + r * width + i), sum);
                scores[r * row + s] = _mm512_reduce_add_ps(sum) * scale;
            }
        }
        for (long r = 0; r < count; r++) {
            float total = exponentials(scores + r * row, seen);
            bf16 *to = a->output + (t * a->heads + g * shared + from + r) * width;
            for (long i = 0; i < width; i += 4 * LANES) {
                /* Four registers of one head's output stay while the values pass by. */
                __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
                long registers = (width - i) / LANES < 4 ? (width - i) / LANES : 4;
                for (long s = 0; s < seen; s++) {
                    __m512 weight = _mm512_set1_ps(scores[r * row + s]);
                    for (long j = 0; j < registers; j++)
                        sum[j] = _mm512_fmadd_ps(weight, load_bf16(values + s * width + i + j * LANES), sum[j]);
                }
                for (long j = 0; j < registers; j++)
                    store_bf16(to + i + j * LANES, _mm512_mul_ps(sum[j], _mm512_set1_ps(1.f / total)));
            }
        }
    }
}

/* Grouped-query attention (Ainslie et al. 2023) of T new tokens behind `start` cached ones: normalizes heads
 * where norms are given, rotates, appends keys and values to the cache, attends causally. width: a multiple of
 * 32, at most 512. queries: scratch of T · H · E floats. */
void dl_attend(const bf16 *qkv, const float *cos, const float *sin, const float *q_norm, const float *k_norm,
               bf16 *keys, bf16 *values, bf16 *output, float *queries, long tokens, long start, long heads,
               long groups, long width, long capacity, float eps) {
    Attention a = {qkv, cos, sin, q_norm, k_norm, keys, values, output, queries, start, heads, groups, width, capacity, eps, 1};
    dl_run(rotate_row, &a, tokens);
    long shared = heads / groups, threads = dl_threads();
    while (a.parts < shared && tokens * groups * a.parts < threads) a.parts++;
    dl_run(attend_part, &a, tokens * groups * a.parts);
}
