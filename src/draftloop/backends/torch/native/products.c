/* Products with 4-bit weights, their unpacking for training, and an adapter beside them. */
#include "kernels.h"

#include <math.h>
#include <string.h>

#define TILE 8       /* tokens that share one pass over the weights */
#define AHEAD_BYTES 4096 /* weights are asked for so early: a quarter to a third less time than without */

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
        dl_run(round_inputs, &p, tokens);
    long blocks = (outputs + LANES - 1) / LANES;
    dl_run(multiply_blocks, &p, (blocks + BLOCKS_A_TASK - 1) / BLOCKS_A_TASK);
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

/* ---- an adapter beside a product -------------------------------------------------------------------- */

#define RANKS_A_TASK 4
#define OUTPUTS_A_TASK 512

typedef struct {
    const bf16 *input, *a, *b;
    const int32_t *first; /* [N / 16]: the rank that a block's rows of b begin with */
    bf16 *output;
    float *inner; /* [T, R] */
    long tokens, inputs, ranks, outputs, span;
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
            const float *inner = p->inner + t * p->ranks + p->first[n / LANES];
            const bf16 *b = p->b + n * p->span;
            for (long r = 0; r < p->span; r++, b += LANES) {
                _mm_prefetch((const char *)b + AHEAD_BYTES, _MM_HINT_T0);
                sum = _mm512_fmadd_ps(_mm512_set1_ps(inner[r]), load_bf16(b), sum);
            }
            store_bf16(y, sum);
        }
}

/* output [T, N] += (input [T, K] · a [R, K]^T) · b, all bf16; K and N multiples of 16. b [N / 16, span, 16] has, for
 * each block of outputs, the `span` ranks from first[block] on that it depends on. inner: scratch of T · R floats. */
void dl_adapt(const bf16 *input, const bf16 *a, const bf16 *b, const int32_t *first, bf16 *output, float *inner,
              long tokens, long inputs, long ranks, long outputs, long span) {
    Adapter p = {input, a, b, first, output, inner, tokens, inputs, ranks, outputs, span};
    dl_run(adapt_inner, &p, (ranks + RANKS_A_TASK - 1) / RANKS_A_TASK);
    dl_run(adapt_outer, &p, (outputs + OUTPUTS_A_TASK - 1) / OUTPUTS_A_TASK);
}
