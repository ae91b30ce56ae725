/* A decoder's steps on x86 processors with AVX-512 VNNI, for few tokens at a time.
 *
 * Contract: every output row depends on its own input row alone, and is computed in the same order whatever
 * rows stand beside it and whoever computes it. So verifying K + 1 tokens gives the very bits of decoding
 * them one by one. Must not know layers or models: shapes come as arguments, memory belongs to the caller.
 *
 * Letters: T tokens, K inputs, N outputs, D hidden, H query heads, G key/value heads, R = H / G, E head width,
 * S cached tokens. bf16 is the upper half of a float32, as uint16_t.
 */
#include <immintrin.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

#define LANES 16     /* float32 values in a register; rows of a weight block */
#define TILE 8       /* tokens that share one pass over the weights */
#define AHEAD_BYTES 4096 /* weights are asked for so early: a quarter to a third less time than without */
#define SPINS 2000   /* pauses before a worker sleeps, about 0.1 ms: kernels of one step follow sooner */

/* ---- bf16, exp -------------------------------------------------------------------------------------- */

static inline __m512 widen(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

static inline __m512 load_bf16(const bf16 *x) { return widen(_mm256_loadu_si256((const __m256i *)x)); }

/* Round to nearest, ties to even. */
static inline __m256i narrow(__m512 x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}

static inline void store_bf16(bf16 *to, __m512 x) { _mm256_storeu_si256((__m256i *)to, narrow(x)); }

/* e^x to about 2 ulp, NaN for NaN: 2^n times a polynomial of the rest (Cody and Waite 1980). */
static inline __m512 exp_ps(__m512 x) {
    /* Of max and min the second operand survives where one is NaN. */
    x = _mm512_min_ps(_mm512_set1_ps(88.f), _mm512_max_ps(_mm512_set1_ps(-104.f), x));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 y = _mm512_set1_ps(1.9875691500e-4f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3981999507e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.3334519073e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.1665795894e-2f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.6666665459e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.0000001201e-1f));
    y = _mm512_fmadd_ps(y, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.f)));
    return _mm512_scalef_ps(y, n);
}

/* ---- workers ---------------------------------------------------------------------------------------- */

/* Tasks are taken one by one, so a worker that is late, or put aside by a busy machine, holds nobody up but
 * for the task in its hands. `gate` counts the workers inside a job; its upper bit says that one is open. */
typedef void (*Task)(void *arguments, long index);

#define OPEN (1u << 31)

static struct {
    pthread_mutex_t caller, lock;
    pthread_cond_t wake;
    atomic_uint gate, job, sleepers;
    atomic_long next;
    long count;
    Task task;
    void *arguments;
    int workers;
} pool = {.caller = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static void take_tasks(void) {
    for (long i; (i = atomic_fetch_add(&pool.next, 1)) < pool.count;) pool.task(pool.arguments, i);
}

/* Whether a job is open that this worker has not been in. */
static int wanted(unsigned seen) { return (atomic_load(&pool.gate) & OPEN) && atomic_load(&pool.job) != seen; }

static void *work(void *unused) {
    unsigned seen = 0;
    for (;;) {
        for (int i = 0; i < SPINS && !wanted(seen); i++) _mm_pause();
        if (!wanted(seen)) {
            pthread_mutex_lock(&pool.lock);
            atomic_fetch_add(&pool.sleepers, 1);
            while (!wanted(seen)) pthread_cond_wait(&pool.wake, &pool.lock);
            atomic_fetch_sub(&pool.sleepers, 1);
            pthread_mutex_unlock(&pool.lock);
        }
        unsigned gate = atomic_load(&pool.gate);
        if (!(gate & OPEN) || !atomic_compare_exchange_strong(&pool.gate, &gate, gate + 1)) continue;
        seen = atomic_load(&pool.job);
        take_tasks();
        atomic_fetch_sub(&pool.gate, 1);
    }
    return unused;
}

/* Start workers, once; later calls change nothing. Returns how many threads compute, the caller included. */
int dl_start(int threads) {
    pthread_mutex_lock(&pool.caller);
    while (pool.workers < threads - 1) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, NULL)) break;
        pthread_detach(thread);
        pool.workers++;
    }
    int found = pool.workers + 1;
    pthread_mutex_unlock(&pool.caller);
    return found;
}

static void run(Task task, void *arguments, long count) {
    /* A second caller computes alone, rather than wait. */
    if (count == 1 || !pool.workers || pthread_mutex_trylock(&pool.caller)) {
        for (long i = 0; i < count; i++) task(arguments, i);
        return;
    }
    pool.task = task;
    pool.arguments = arguments;
    pool.count = count;
    atomic_store(&pool.next, 0);
    atomic_fetch_add(&pool.job, 1);
    atomic_fetch_or(&pool.gate, OPEN);
    if (atomic_load(&pool.sleepers)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
    }
    take_tasks();
    atomic_fetch_and(&pool.gate, ~OPEN);
    for (int i = 0; atomic_load(&pool.gate); i++) {
        if (i < SPINS) _mm_pause();
        else sched_yield();
    }
    pthread_mutex_unlock(&pool.caller);
}

/* ---- 4-bit products --------------------------------------------------------------------------------- */

/* Weights: blocks of 16 rows. A block holds, group by group, K / 8 words of each row, interleaved by row, then
 * 16 scales and 16 biases in bf16. A word has the codes of 8 inputs, the first in its low bits: w = scale ·
 * code + bias. Inputs are rounded to 16 bits by group (x = scale · (256 · high + low)), their products with
 * the codes are whole numbers, and sums of those are exact in any order. */
typedef struct {
    const uint32_t *weights;
    const bf16 *input;
    const bf16 *bias;
    bf16 *output;
    long tokens, inputs, outputs, group;
    int8_t *high, *low; /* [T, K]; each 8 inputs in the order 0 2 4 6 1 3 5 7, as the codes' nibbles come */
    float *scales, *sums; /* [T, K / group] */
} Product;

#define SMALLEST 1e-33f /* what is smaller counts as 0: its inverse would overflow */

static void round_inputs(void *arguments, long t) {
    Product *p = arguments;
    long groups = p->inputs / p->group;
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    for (long g = 0; g < groups; g++) {
        const bf16 *x = p->input + t * p->inputs + g * p->group;
        int8_t *high = p->high + t * p->inputs + g * p->group, *low = p->low + t * p->inputs + g * p->group;
        __m512 largest = _mm512_setzero_ps();
        __mmask16 no_number = 0;
        for (long k = 0; k < p->group; k += LANES) {
            __m512 size = _mm512_abs_ps(load_bf16(x + k));
            largest = _mm512_max_ps(largest, size);
            no_number |= _mm512_cmp_ps_mask(size, _mm512_set1_ps(INFINITY), _CMP_NLT_UQ);
        }
        float most = _mm512_reduce_max_ps(largest), scale = most / 32512.f;
        float inverse = most > SMALLEST ? 32512.f / most : 0.f;
        if (no_number) scale = NAN, inverse = 0.f;
        __m512i total = _mm512_setzero_si512();
        for (long k = 0; k < p->group; k += 8) {
            __m256 values = _mm512_castps512_ps256(
                widen(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(x + k)))));
            __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(values, _mm256_set1_ps(inverse)));
            whole = _mm256_permutevar8x32_epi32(whole, order);
            total = _mm512_add_epi32(total, _mm512_zextsi256_si512(whole));
            __m256i upper = _mm256_srai_epi32(_mm256_add_epi32(whole, _mm256_set1_epi32(128)), 8);
            __m256i lower = _mm256_sub_epi32(whole, _mm256_slli_epi32(upper, 8));
            _mm_storel_epi64((__m128i *)(high + k), _mm256_cvtepi32_epi8(upper));
            _mm_storel_epi64((__m128i *)(low + k), _mm256_cvtepi32_epi8(lower));
        }
        p->scales[t * groups + g] = scale;
        p->sums[t * groups + g] = scale * (float)_mm512_reduce_add_epi32(total);
    }
}

static inline __m512i four(const int8_t *x) {
    int32_t word;
    memcpy(&word, x, 4);
    return _mm512_set1_epi32(word);
}

/* One block of 16 rows for M tokens from `first` on. */
static inline __attribute__((always_inline)) void block_of(const Product *p, long block, long first, const int M) {
    long groups = p->inputs / p->group, words = p->group / 8;
    const uint32_t *w = p->weights + block * groups * (words + 1) * LANES;
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512 sums[TILE];
    for (int m = 0; m < M; m++) sums[m] = _mm512_setzero_ps();
    for (long g = 0; g < groups; g++) {
        __m512i high[TILE], low[TILE];
        for (int m = 0; m < M; m++) high[m] = low[m] = _mm512_setzero_si512();
        for (long i = 0; i < words; i++, w += LANES) {
            _mm_prefetch((const char *)w + AHEAD_BYTES, _MM_HINT_T0);
            __m512i codes = _mm512_loadu_si512(w);
            __m512i even = _mm512_and_si512(codes, nibble);
            __m512i odd = _mm512_and_si512(_mm512_srli_epi32(codes, 4), nibble);
            long k = g * p->group + i * 8;
            for (int m = 0; m < M; m++) {
                const int8_t *h = p->high + (first + m) * p->inputs + k, *l = p->low + (first + m) * p->inputs + k;
                high[m] = _mm512_dpbusd_epi32(high[m], even, four(h));
                low[m] = _mm512_dpbusd_epi32(low[m], even, four(l));
                high[m] = _mm512_dpbusd_epi32(high[m], odd, four(h + 4));
                low[m] = _mm512_dpbusd_epi32(low[m], odd, four(l + 4));
            }
        }
        _mm_prefetch((const char *)w + AHEAD_BYTES, _MM_HINT_T0);
        __m512 scale = load_bf16((const bf16 *)w), bias = load_bf16((const bf16 *)w + LANES);
        w += LANES;
        for (int m = 0; m < M; m++) {
            long at = (first + m) * groups + g;
            __m512 whole = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[m], 8), low[m]));
            sums[m] = _mm512_fmadd_ps(_mm512_mul_ps(whole, _mm512_set1_ps(p->scales[at])), scale, sums[m]);
            sums[m] = _mm512_fmadd_ps(bias, _mm512_set1_ps(p->sums[at]), sums[m]);
        }
    }
    long left = p->outputs - block * LANES;
    __mmask16 mask = left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1);
    __m512 bias = _mm512_setzero_ps();
    if (p->bias) bias = widen(_mm256_maskz_loadu_epi16(mask, p->bias + block * LANES));
    for (int m = 0; m < M; m++) {
        bf16 *to = p->output + (first + m) * p->outputs + block * LANES;
        _mm256_mask_storeu_epi16(to, mask, narrow(_mm512_add_ps(sums[m], bias)));
    }
}

static void multiply_block(const Product *p, long block) {
    for (long first = 0; first < p->tokens; first += TILE) {
        switch (p->tokens - first) {
            case 1: block_of(p, block, first, 1); break;
            case 2: block_of(p, block, first, 2); break;
            case 3: block_of(p, block, first, 3); break;
            case 4: block_of(p, block, first, 4); break;
            case 5: block_of(p, block, first, 5); break;
            case 6: block_of(p, block, first, 6); break;
            case 7: block_of(p, block, first, 7); break;
            default: block_of(p, block, first, 8);
        }
    }
}

#define BLOCKS_A_TASK 8

static void multiply_blocks(void *arguments, long index) {
    Product *p = arguments;
    long blocks = (p->outputs + LANES - 1) / LANES, end = (index + 1) * BLOCKS_A_TASK;
    for (long b = index * BLOCKS_A_TASK; b < (end < blocks ? end : blocks); b++) multiply_block(p, b);
}

/* input [T, K] bf16, weights as above, bias [N] bf16 or NULL -> output [T, N] bf16; group a multiple of 16.
 * scratch: T · (2 K + 8 K / group) bytes, aligned to 4. */
void dl_int4(const uint32_t *weights, const bf16 *input, const bf16 *bias, bf16 *output, char *scratch,
             long tokens, long inputs, long outputs, long group) {
    long cells = tokens * (inputs / group);
    float *scales = (float *)scratch, *sums = scales + cells;
    int8_t *high = (int8_t *)(sums + cells), *low = high + tokens * inputs;
    Product p = {weights, input, bias, output, tokens, inputs, outputs, group, high, low, scales, sums};
    if (tokens < TILE)
        for (long t = 0; t < tokens; t++) round_inputs(&p, t);
    else
        run(round_inputs, &p, tokens);
    long blocks = (outputs + LANES - 1) / LANES;
    run(multiply_blocks, &p, (blocks + BLOCKS_A_TASK - 1) / BLOCKS_A_TASK);
}

/* ---- unpacking, for training ------------------------------------------------------------------------ */

typedef struct {
    const uint32_t *words;
    const float *scales, *biases;
    bf16 *output;
    long rows, columns, group;
} Unpacking;

#define ROWS_A_TASK 64

static void unpack_rows(void *arguments, long index) {
    Unpacking *p = arguments;
    long groups = p->columns / p->group;
    long end = (index + 1) * ROWS_A_TASK < p->rows ? (index + 1) * ROWS_A_TASK : p->rows;
    const __m512i nibble = _mm512_set1_epi32(15);
    const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    for (long n = index * ROWS_A_TASK; n < end; n++)
        for (long g = 0; g < groups; g++) {
            __m512 scale = _mm512_set1_ps(p->scales[n * groups + g]), bias = _mm512_set1_ps(p->biases[n * groups + g]);
            long at = n * p->columns + g * p->group;
            for (long k = at; k < at + p->group; k += LANES) {
                __m512i pair = _mm512_inserti64x4(_mm512_set1_epi32((int)p->words[k / 8]),
                                                  _mm256_set1_epi32((int)p->words[k / 8 + 1]), 1);
                __m512i codes = _mm512_and_si512(_mm512_srlv_epi32(pair, shifts), nibble);
                store_bf16(p->output + k, _mm512_fmadd_ps(_mm512_cvtepi32_ps(codes), scale, bias));
            }
        }
}

/* MLX affine rows, words [N, K / 8], scales and biases [N, K / group] float32 -> [N, K] bf16. */
void dl_unpack(const uint32_t *words, const float *scales, const float *biases, bf16 *output, long rows,
               long columns, long group) {
    Unpacking p = {words, scales, biases, output, rows, columns, group};
    run(unpack_rows, &p, (rows + ROWS_A_TASK - 1) / ROWS_A_TASK);
}

/* ---- an adapter beside a product -------------------------------------------------------------------- */

#define RANKS_A_TASK 4
#define OUTPUTS_A_TASK 512

typedef struct {
    const bf16 *input, *a, *b;
    bf16 *output;
    float *inner; /* [T, R] */
    long tokens, inputs, ranks, outputs;
} Adapter;

static void adapt_inner(void *arguments, long index) {
    Adapter *p = arguments;
    long end = (index + 1) * RANKS_A_TASK < p->ranks ? (index + 1) * RANKS_A_TASK : p->ranks;
    for (long r = index * RANKS_A_TASK; r < end; r++)
        for (long t = 0; t < p->tokens; t++) {
            const bf16 *x = p->input + t * p->inputs, *a = p->a + r * p->inputs;
            __m512 sum = _mm512_setzero_ps();
            for (long k = 0; k < p->inputs; k += LANES) sum = _mm512_fmadd_ps(load_bf16(x + k), load_bf16(a + k), sum);
            p->inner[t * p->ranks + r] = _mm512_reduce_add_ps(sum);
        }
}

static void adapt_outer(void *arguments, long index) {
    Adapter *p = arguments;
    long end = (index + 1) * OUTPUTS_A_TASK < p->outputs ? (index + 1) * OUTPUTS_A_TASK : p->outputs;
    for (long t = 0; t < p->tokens; t++)
        for (long n = index * OUTPUTS_A_TASK; n < end; n += LANES) {
            bf16 *y = p->output + t * p->outputs + n;
            __m512 sum = load_bf16(y);
            for (long r = 0; r < p->ranks; r++) {
                __m512 inner = _mm512_set1_ps(p->inner[t * p->ranks + r]);
                sum = _mm512_fmadd_ps(inner, load_bf16(p->b + r * p->outputs + n), sum);
            }
            store_bf16(y, sum);
        }
}

/* output [T, N] += (input [T, K] · a [R, K]^T) · b [R, N], all bf16; K and N multiples of 16. inner: scratch of
 * T · R floats. */
void dl_adapt(const bf16 *input, const bf16 *a, const bf16 *b, bf16 *output, float *inner, long tokens, long inputs,
              long ranks, long outputs) {
    Adapter p = {input, a, b, output, inner, tokens, inputs, ranks, outputs};
    run(adapt_inner, &p, (ranks + RANKS_A_TASK - 1) / RANKS_A_TASK);
    run(adapt_outer, &p, (outputs + OUTPUTS_A_TASK - 1) / OUTPUTS_A_TASK);
}

/* ---- between the products --------------------------------------------------------------------------- */

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
    run(gate_row, &a, tokens);
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

#define MAX_TOGETHER 8 /* queries of a group that read the keys together */

/* Some queries of one token and group. Each head's result is the same whoever reads beside it. */
static void attend_part(void *arguments, long index) {
    Attention *a = arguments;
    long part = index % a->parts, g = index / a->parts % a->groups, t = index / a->parts / a->groups;
    long shared = a->heads / a->groups, width = a->width, seen = a->start + t + 1;
    long first = shared * part / a->parts, end = shared * (part + 1) / a->parts, row = (seen + LANES - 1) & -LANES;
    const bf16 *keys = a->keys + g * a->capacity * width, *values = a->values + g * a->capacity * width;
    const float scale = 1.f / sqrtf((float)width);
    float *scores = malloc(MAX_TOGETHER * row * sizeof(float));
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
    free(scores);
}

/* Grouped-query attention (Ainslie et al. 2023) of T new tokens behind `start` cached ones: normalizes heads
 * where norms are given, rotates, appends keys and values to the cache, attends causally. width: a multiple of
 * 32, at most 512. queries: scratch of T · H · E floats. */
void dl_attend(const bf16 *qkv, const float *cos, const float *sin, const float *q_norm, const float *k_norm,
               bf16 *keys, bf16 *values, bf16 *output, float *queries, long tokens, long start, long heads,
               long groups, long width, long capacity, float eps) {
    Attention a = {qkv, cos, sin, q_norm, k_norm, keys, values, output, queries, start, heads, groups, width, capacity, eps, 1};
    run(rotate_row, &a, tokens);
    long shared = heads / groups, threads = pool.workers + 1;
    while (a.parts < shared && tokens * groups * a.parts < threads) a.parts++;
    run(attend_part, &a, tokens * groups * a.parts);
}
