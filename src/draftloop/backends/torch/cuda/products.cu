// Products of rows of activations with the weights of one layer. Up to 16 rows are a chunk. A program multiplies
// some of them with weights that it reads once; programs with other chunks ask for the same weights at the same
// time, so that all but one find them in the L2 cache: these come first in the grid.
//
// Contract: a row's bits do not depend on the other rows, nor on how many there are: the tensor cores hold the
// rows as columns, and every sum runs in an order that the shape alone fixes. Weights are bfloat16 [N, K] as a
// checkpoint has them, or 4-bit codes in the order of `packed.py`. Compiled for one cut at a time; the host
// defines
//   CODES     0: bfloat16 weights; else the size of a group of 4-bit codes (32, 64 or 128)
//   TILES     tiles of 16 outputs that a warp multiplies at once
//   WARPS     that share the inputs of those tiles, block of 64 by block
//   AHEAD     blocks whose weights a warp has asked for before it needs them
//   COLUMNS   8 rows of activations each: 1 or 2 make a chunk
//   CHUNKS    of a program, at most
//   PROGRAMS  that a multiprocessor has to have registers for
//   EPILOGUE  PLAIN, GATED or RESIDUAL, see `multiply`
//   SCALED    1: x still lacks its RMSNorm's factor, which is taken from `squares`
//
// Order of inputs. A tensor core adds up 16 products, and nobody asks which. So lane q of four takes 8 inputs in
// a row out of every 32, in two steps of four: one 16-byte load of x, and of each row of bfloat16 weights.

#define PLAIN 0
#define GATED 1
#define RESIDUAL 2

#define TILE 16
#define BLOCK 64
#define CHUNK_ROWS (COLUMNS * 8)
#define OUTPUTS ((EPILOGUE == GATED ? TILES / 2 : TILES) * TILE)
#define FRAGMENTS (CODES ? 1 : 4)

typedef unsigned int u32;
typedef unsigned short u16;

__device__ __forceinline__ void wait_for_the_kernel_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ uint4 read_once(const uint4* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

__device__ __forceinline__ float low_half(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ u16 to_bfloat16(float value) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ void add_product(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 word_of(const uint4& four, int index) {
    return index == 0 ? four.x : index == 1 ? four.y : index == 2 ? four.z : four.w;
}

__device__ __forceinline__ u32 add_scaled(u32 pair, u32 scales, u32 biases) {
    u32 sum;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(pair), "r"(scales), "r"(biases));
    return sum;
}

// Eight codes of a word as weights, rounded to bfloat16 once. A code becomes the last bits of 128's mantissa; what
// is left after 128 was taken away is exact. `upper` and `lower`: scale and bias of rows g and g + 8.
__device__ __forceinline__ void unpack(u32 (&a)[4], u32 word, u32 upper, u32 lower) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const u32 pair = r % 2 ? lower : upper;
        const u32 codes = add_scaled((word >> (4 * r) & 0x000f000fu) | 0x43004300u, 0x3f803f80u, 0xc300c300u);
        a[r] = add_scaled(codes, __byte_perm(pair, 0, 0x1010), __byte_perm(pair, 0, 0x3232));
    }
}

// What a warp has loaded of one block of 64 inputs: of one chunk's rows, and of the weights.
struct Inputs {
    uint4 x[COLUMNS][2];
};
struct Slot {
    uint4 weights[TILES][FRAGMENTS];
    uint4 pairs[TILES];
    Inputs inputs;
};

struct Place {
    int lane, g, q, blocks, tiles;
    // The i-th of this program's tiles; a program that hangs over the end repeats the last one.
    __device__ __forceinline__ long long tile(int i) const {
        const int step = EPILOGUE == GATED ? i >> 1 : i;
        const int inner = min((int)blockIdx.y * (OUTPUTS / TILE) + step, tiles - 1);
        return inner + (EPILOGUE == GATED && (i & 1) ? tiles : 0);
    }
};

__device__ __forceinline__ void load_weights(
    Slot& slot, const Place& at, const uint4* weight, const void* pairs, int block) {
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        const long long tile = at.tile(i);
#if CODES
        slot.weights[i][0] = read_once(weight + (tile * at.blocks + block) * 32 + at.lane);
#if CODES == 32
        slot.pairs[i] = __ldg((const uint4*)pairs + (tile * at.blocks + block) * 8 + at.g);
#else
        const long long group = (tile * at.blocks + block) / (CODES / BLOCK);
        const uint2 two = __ldg((const uint2*)pairs + group * 8 + at.g);
        slot.pairs[i] = make_uint4(two.x, two.y, two.x, two.y);
#endif
#else
        const long long row = (tile * TILE + at.g) * at.blocks + block;
        const uint4* from = weight + row * 8 + at.q;
        const uint4* lower = from + (long long)at.blocks * 64;
        slot.weights[i][0] = read_once(from);
        slot.weights[i][1] = read_once(lower);
        slot.weights[i][2] = read_once(from + 4);
        slot.weights[i][3] = read_once(lower + 4);
#endif
    }
}

__device__ __forceinline__ void load_inputs(Inputs& to, const Place& at, const u16* x, int rows, int block) {
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
        const int row = 8 * c + at.g;
        const uint4* from = (const uint4*)(x + ((long long)row * at.blocks + block) * BLOCK) + at.q;
        to.x[c][0] = row < rows ? from[0] : make_uint4(0, 0, 0, 0);
        to.x[c][1] = row < rows ? from[4] : make_uint4(0, 0, 0, 0);
    }
}

// The weights of 16 outputs by 16 inputs, as a tensor core takes them.
__device__ __forceinline__ void take_weights(u32 (&a)[4], const Slot& slot, int i, int half, int step) {
#if CODES
    unpack(a, word_of(slot.weights[i][0], 2 * half + step), word_of(slot.pairs[i], 2 * half),
           word_of(slot.pairs[i], 2 * half + 1));
#else
    const uint4 &upper = slot.weights[i][2 * half], &lower = slot.weights[i][2 * half + 1];
    a[0] = word_of(upper, 2 * step), a[1] = word_of(lower, 2 * step);
    a[2] = word_of(upper, 2 * step + 1), a[3] = word_of(lower, 2 * step + 1);
#endif
}

// total += the products of a block's weights, taken once, with all chunks' inputs; `x` is the first chunk's.
__device__ __forceinline__ void multiply_block(
    float (&total)[CHUNKS][TILES][COLUMNS][4], const Slot& slot, const Place& at, const u16* x, int rows, int block) {
    Inputs inputs[CHUNKS];
    inputs[0] = slot.inputs;
#pragma unroll
    for (int chunk = 1; chunk < CHUNKS; ++chunk) {
        const int skipped = chunk * CHUNK_ROWS;
        load_inputs(inputs[chunk], at, x + (long long)skipped * at.blocks * BLOCK, rows - skipped, block);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
                u32 a[4];
                take_weights(a, slot, i, half, step);
#pragma unroll
                for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
                    for (int c = 0; c < COLUMNS; ++c) {
                        const uint4& in = inputs[chunk].x[c][half];
                        add_product(total[chunk][i][c], a, word_of(in, 2 * step), word_of(in, 2 * step + 1));
                    }
            }
}

// Each row's 1 / sqrt(mean x² + eps), out of the sums of squares that RESIDUAL left. All that a warp reads is
// asked for at once.
__device__ __forceinline__ void find_factors(
    float* factors, const float* squares, int num_squares, int rows, int width, float eps) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float sums[(CHUNKS * CHUNK_ROWS + WARPS - 1) / WARPS] = {};
#pragma unroll
    for (int r = 0; r < (CHUNKS * CHUNK_ROWS + WARPS - 1) / WARPS; ++r)
        if (warp + r * WARPS < rows) {
            const float* from = squares + (warp + r * WARPS) * num_squares;
#pragma unroll 4
            for (int i = lane; i < num_squares; i += 32) sums[r] += from[i];
        }
#pragma unroll
    for (int r = 0; r < (CHUNKS * CHUNK_ROWS + WARPS - 1) / WARPS; ++r) {
        if (warp + r * WARPS >= rows) break;
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sums[r] += __shfl_xor_sync(0xffffffffu, sums[r], step);
        if (lane == 0) factors[warp + r * WARPS] = rsqrtf(sums[r] / width + eps);
    }
}

// What the warps of a program found: [warp][row][output]. So padded, the lanes of a warp write to 32 banks.
typedef float Parts[WARPS][CHUNK_ROWS][TILES * TILE + 4];

// Where results go, and what is done to them on the way: see `multiply`.
struct Results {
    void* y;
    u16* next;
    const float* gain;
    float* squares;
    int first, rows, outputs;
};

// A program's sum over its warps of one row's output `column`; GATED: of the second half's too.
__device__ __forceinline__ float2 sum_of(const Parts& parts, const float* factors, int row, int column) {
    float value = 0, second = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        value += parts[w][row][column];
        if (EPILOGUE == GATED) second += parts[w][row][column + TILE];
    }
    if (SCALED) {
        value *= factors[row];
        second *= factors[row];
    }
    return make_float2(value, second);
}

__device__ __forceinline__ void finish(const Parts& parts, const float* factors, const Results& to) {
    // Whole warps go round, so that they can add up squares among themselves.
    for (int e = threadIdx.x; e < (to.rows * OUTPUTS + 31) / 32 * 32; e += WARPS * 32) {
        const int row = min(e / OUTPUTS, to.rows - 1), o = e % OUTPUTS, n = blockIdx.y * OUTPUTS + o;
        const bool known = e / OUTPUTS < to.rows && n < to.outputs;
        const int column = EPILOGUE == GATED ? o / TILE * 2 * TILE + o % TILE : o;
        const float2 sums = sum_of(parts, factors, row, column);
        float value = sums.x;
        const long long at = (long long)(to.first + row) * to.outputs + n;
        if (EPILOGUE == PLAIN && known) ((float*)to.y)[at] = value;
        if (EPILOGUE == GATED && known)
            ((u16*)to.y)[at] = to_bfloat16(value / (1.0f + __expf(-value)) * sums.y);
        if (EPILOGUE == RESIDUAL) {
            float square = 0;
            if (known) {
                value += ((float*)to.y)[at];
                ((float*)to.y)[at] = value;
                to.next[at] = to_bfloat16(value * to.gain[n]);
                square = value * value;
            }
#pragma unroll
            for (int step = OUTPUTS / 2; step > 0; step /= 2)
                square += __shfl_xor_sync(0xffffffffu, square, step);
            if (o == 0 && e / OUTPUTS < to.rows) to.squares[(to.first + row) * gridDim.y + blockIdx.y] = square;
        }
    }
}

// x [T, K] bfloat16 times the weights [N, K] (GATED: [2N, K]):
//   PLAIN     y [T, N] float32
//   GATED     y [T, N] bfloat16 = silu(first half) · second half
//   RESIDUAL  y [T, N] float32 += product; next [T, N] bfloat16 = y · gain; squares_out [T, programs]: each
//             program's sum of y²
// What comes next multiplies `next` and applies the norm's factor to its own result (SCALED).
extern "C" __global__ void __launch_bounds__(WARPS * 32, PROGRAMS) multiply(
    const u16* x, const uint4* weight, const void* pairs, const float* squares, void* y, u16* next,
    const float* gain, float* squares_out, int num_squares, int rows, int outputs, int width, float eps) {
    __shared__ Parts parts;
    __shared__ float factors[CHUNKS * CHUNK_ROWS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Place at = {lane, lane / 4, lane % 4, width / BLOCK, (outputs + TILE - 1) / TILE};
    const int first_row = blockIdx.x * CHUNKS * CHUNK_ROWS;
    x += (long long)first_row * width;
    rows = min(rows - first_row, CHUNKS * CHUNK_ROWS);
    Slot slots[AHEAD];
    float total[CHUNKS][TILES][COLUMNS][4] = {};
#pragma unroll
    for (int p = 0; p < AHEAD; ++p)
        if (warp + p * WARPS < at.blocks) load_weights(slots[p], at, weight, pairs, warp + p * WARPS);
    wait_for_the_kernel_before();
#pragma unroll
    for (int p = 0; p < AHEAD; ++p)
        if (warp + p * WARPS < at.blocks) load_inputs(slots[p].inputs, at, x, rows, warp + p * WARPS);
    if (SCALED) find_factors(factors, squares + first_row * num_squares, num_squares, rows, width, eps);
    for (int first = warp; first < at.blocks; first += AHEAD * WARPS) {
#pragma unroll
        for (int p = 0; p < AHEAD; ++p) {
            const int block = first + p * WARPS, later = block + AHEAD * WARPS;
            if (block < at.blocks) {
                multiply_block(total, slots[p], at, x, rows, block);
                if (later < at.blocks) {
                    load_weights(slots[p], at, weight, pairs, later);
                    load_inputs(slots[p].inputs, at, x, rows, later);
                }
            }
        }
    }
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        const int skipped = chunk * CHUNK_ROWS;
        if (skipped >= rows) break;
        // What the chunk before left has been read.
        if (chunk > 0) __syncthreads();
#pragma unroll
        for (int i = 0; i < TILES; ++i)
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    parts[warp][8 * c + 2 * at.q + e % 2][TILE * i + at.g + 8 * (e / 2)] =
                        total[chunk][i][c][e];
        __syncthreads();
        const int left = min(rows - skipped, CHUNK_ROWS);
        finish(parts, factors + skipped, Results{y, next, gain, squares_out, first_row + skipped, left, outputs});
    }
}

#if CODES
// The 4-bit weights as rows of bfloat16 [N, K]: a word of codes a thread.
extern "C" __global__ void unpack_rows(
    const u32* words, const u32* pairs, u16* dense, int outputs, int width, long long count) {
    const long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= count) return;
    const u32 word = words[index];
    const int s = index % 4, lane = index / 4 % 32, g = lane / 4, q = lane % 4, blocks = width / BLOCK;
    const long long at = index / 128, tile = at / blocks, block = at % blocks;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
        const long long row = tile * TILE + g + 8 * lower;
        if (row >= outputs) continue;
        const u32 pair = CODES == 32 ? pairs[((at * 8 + g) * 2 + s / 2) * 2 + lower]
                                     : pairs[((at / (CODES / BLOCK)) * 8 + g) * 2 + lower];
        u16* to = dense + row * width + block * BLOCK + s / 2 * 32 + 8 * q + s % 2 * 4;
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {
                const u32 code = word >> (4 * (lower + 2 * r + 4 * odd)) & 15;
                to[2 * r + odd] = to_bfloat16(__fmaf_rn((float)code, low_half(pair), high_half(pair)));
            }
    }
}
#endif
