/* Products with 4-bit weights, their unpacking for training, and an adapter beside them. */
#include "kernels.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define TILE 8       /* tokens that share one pass over the weights */
#define AHEAD_BYTES 4096 /* weights are asked for so early: a quarter to a third less time than without */

/* Weights: blocks of 16 rows. A block holds, group by group, K / 8 words of each row, interleaved by row, then
 * 16 scales and 16 biases in bf16. A word has the codes of 8 inputs, the first in its low bits: w = scale ·
 * code + bias. Inputs are rounded to 16 bits by group (x = scale · (256 · high + low)), their products with
 * the codes are whole numbers, and sums of those are exact in any order. */
typedef struct {
    const uint32_t *weights;
    const bf16 *bias; /* [N] or NULL */
    long inputs, outputs, group;
    /* An adapter beside it adds (x · a) · b: a [R / RANKS, K / 16, RANKS, 16], b [N / 16, span, 16] with, for each
     * block, the `span` ranks from first_rank[block] on that it depends on. b is NULL where there is none. */
    const bf16 *a, *b;
    const int32_t *first_rank; /* [N / 16] */
    long ranks, span;
} Layer;

typedef struct {
    const Layer *layer;
    const bf16 *input;
    bf16 *output;
    long tokens;
    int8_t *high, *low; /* [T, K]; each 8 inputs in the order 0 2 4 6 1 3 5 7, as the codes' nibbles come */
    float *scales, *sums; /* [T, K / group] */
    float *inner; /* [T, R] */
} Product;

#define SMALLEST 1e-33f /* what is smaller counts as 0: its inverse would overflow */

static void round_inputs(const Product *p, long t) {
    long groups = p->layer->inputs / p->layer->group;
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    for (long g = 0; g < groups; g++) {
        const bf16 *x = p->input + t * p->layer->inputs + g * p->layer->group;
        int8_t *high = p->high + t * p->layer->inputs + g * p->layer->group, *low = p->low + t * p->layer->inputs + g * p->layer->group;
        __m512 largest = _mm512_setzero_ps();
        __mmask16 no_number = 0;
        for (long k = 0; k < p->layer->group; k += LANES) {
            __m512 size = _mm512_abs_ps(load_bf16(x + k));
            largest = _mm512_max_ps(largest, size);
            no_number |= _mm512_cmp_ps_mask(size, _mm512_set1_ps(INFINITY), _CMP_NLT_UQ);
        }
        float most = _mm512_reduce_max_ps(largest), scale = most / 32512.f;
        float inverse = most > SMALLEST ? 32512.f / most : 0.f;
        if (no_number) scale = NAN, inverse = 0.f;
        __m512i total = _mm512_setzero_si512();
        for (long k = 0; k < p->layer->group; k += 8) {
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

#define RANKS 4 /* computed side by side, so that no sum waits for its own last addition */

static void inner_ranks(const Product *p, long rank) {
    for (long t = 0; t < p->tokens; t++) {
        const bf16 *x = p->input + t * p->layer->inputs, *a = p->layer->a + rank * p->layer->inputs;
        __m512 sums[RANKS];
        for (int r = 0; r < RANKS; r++) sums[r] = _mm512_setzero_ps();
        for (long k = 0; k < p->layer->inputs; k += LANES) {
            __m512 values = load_bf16(x + k);
            for (int r = 0; r < RANKS; r += 2) _mm_prefetch((const char *)(a + r * LANES) + AHEAD_BYTES, _MM_HINT_T0);
            for (int r = 0; r < RANKS; r++, a += LANES) sums[r] = _mm512_fmadd_ps(values, load_bf16(a), sums[r]);
        }
        for (int r = 0; r < RANKS; r++) p->inner[t * p->layer->ranks + rank + r] = _mm512_reduce_add_ps(sums[r]);
    }
}

/* What the blocks need: rounded inputs, and the adapter's inner products. */
static void prepare(void *arguments, long index) {
    Product *p = arguments;
    if (index < p->tokens)
        round_inputs(p, index);
    else
        inner_ranks(p, (index - p->tokens) * RANKS);
}

static inline __m512i four(const int8_t *x) {
    int32_t word;
    memcpy(&word, x, 4);
    return _mm512_set1_epi32(word);
}

/* One block of 16 rows for M tokens from `first` on. */
static inline __attribute__((always_inline)) void block_of(const Product *p, long block, long first, const int M) {
    long groups = p->layer->inputs / p->layer->group, words = p->layer->group / 8;
    const uint32_t *w = p->layer->weights + block * groups * (words + 1) * LANES;
    const __m512i nibble = _mm512_set1_epi8(15);
    const bf16 *b = p->layer->b ? p->layer->b + block * p->layer->span * LANES : NULL;
    __m512 sums[TILE];
    for (int m = 0; m < M; m++) sums[m] = _mm512_setzero_ps();
    /* The next block's: this one takes longer than memory does. */
    for (long r = 0; b && r < p->layer->span; r += 2)
        _mm_prefetch((const char *)(b + (p->layer->span + r) * LANES), _MM_HINT_T0);
    for (long g = 0; g < groups; g++) {
        __m512i high[TILE], low[TILE];
        for (int m = 0; m < M; m++) high[m] = low[m] = _mm512_setzero_si512();
        for (long i = 0; i < words; i++, w += LANES) {
            _mm_prefetch((const char *)w + AHEAD_BYTES, _MM_HINT_T0);
            __m512i codes = _mm512_loadu_si512(w);
            __m512i even = _mm512_and_si512(codes, nibble);
            __m512i odd = _mm512_and_si512(_mm512_srli_epi32(codes, 4), nibble);
            long k = g * p->layer->group + i * 8;
            for (int m = 0; m < M; m++) {
                const int8_t *h = p->high + (first + m) * p->layer->inputs + k, *l = p->low + (first + m) * p->layer->inputs + k;
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
    long left = p->layer->outputs - block * LANES;
    __mmask16 mask = left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1);
    __m512 bias = _mm512_setzero_ps();
    if (p->layer->bias) bias = widen(_mm256_maskz_loadu_epi16(mask, p->layer->bias + block * LANES));
    for (long r = 0; b && r < p->layer->span; r++, b += LANES) {
        __m512 row = load_bf16(b);
        const float *inner = p->inner + first * p->layer->ranks + p->layer->first_rank[block] + r;
        for (int m = 0; m < M; m++) sums[m] = _mm512_fmadd_ps(_mm512_set1_ps(inner[m * p->layer->ranks]), row, sums[m]);
    }
    for (int m = 0; m < M; m++) {
        bf16 *to = p->output + (first + m) * p->layer->outputs + block * LANES;
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
    long blocks = (p->layer->outputs + LANES - 1) / LANES, end = (index + 1) * BLOCKS_A_TASK;
    for (long b = index * BLOCKS_A_TASK; b < (end < blocks ? end : blocks); b++) multiply_block(p, b);
}

/* Memory that a thread that multiplies keeps, of so many bytes at least; NULL where there is none. */
static char *scratch(size_t bytes) {
    static _Thread_local char *kept;
    static _Thread_local size_t size;
    if (bytes > size) {
        free(kept);
        kept = malloc(bytes);
        size = kept ? bytes : 0;
    }
    return kept;
}

/* input [T, K] bf16 -> output [T, N] bf16, rounded once; group a multiple of 16, with an adapter N too.
 * Returns 0 where there is no memory. */
int dl_multiply(const Layer *layer, const bf16 *input, bf16 *output, long tokens) {
    long cells = tokens * (layer->inputs / layer->group), inner = layer->b ? tokens * layer->ranks : 0;
    float *floats = (float *)scratch(sizeof(float) * (size_t)(2 * cells + inner) + 2 * (size_t)(tokens * layer->inputs));
    if (!floats) return 0;
    int8_t *high = (int8_t *)(floats + 2 * cells + inner);
    Product p = {layer, input, output, tokens, high, high + tokens * layer->inputs, floats, floats + cells,
                 floats + 2 * cells};
    long tasks = tokens + (layer->b ? layer->ranks / RANKS : 0);
    if (tasks < TILE)
        for (long i = 0; i < tasks; i++) prepare(&p, i);
    else
        dl_run(prepare, &p, tasks);
    long blocks = (layer->outputs + LANES - 1) / LANES;
    dl_run(multiply_blocks, &p, (blocks + BLOCKS_A_TASK - 1) / BLOCKS_A_TASK);
    return 1;
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
    dl_run(unpack_rows, &p, (rows + ROWS_A_TASK - 1) / ROWS_A_TASK);
}
