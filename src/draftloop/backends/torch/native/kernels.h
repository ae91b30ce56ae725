/* A decoder's steps on x86 processors with AVX-512 VNNI, for few tokens at a time: what all of them share.
 *
 * Contract: every output row depends on its own input row alone, and is computed in the same order whatever
 * rows stand beside it and whoever computes it. So verifying K + 1 tokens gives the very bits of decoding
 * them one by one. Must not know layers or models: shapes come as arguments, memory belongs to the caller.
 *
 * Letters: T tokens, K inputs, N outputs, D hidden, H query heads, G key/value heads, R = H / G, E head width,
 * S cached tokens. bf16 is the upper half of a float32, as uint16_t.
 */
#pragma once
#include <immintrin.h>
#include <stdint.h>

typedef uint16_t bf16;

#define LANES 16 /* float32 values in a register; rows of a weight block */

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

typedef void (*Task)(void *arguments, long index);

/* Do the tasks 0 ... count - 1, on all threads, and return when all are done. */
void dl_run(Task task, void *arguments, long count);

/* How many threads take tasks, the caller included. */
int dl_threads(void);
