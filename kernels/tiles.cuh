// What the CUDA kernels share: the GPU's instructions, rows in shared memory, products of a warp,
// and one step of the online softmax. Hopper's kernels take from it how numbers lie in registers,
// and the softmax.
//
// All products are one of two: `rows_by_rows` (Q K^T, dO V^T: both from shared memory, added up
// over D) and `add_weighted_rows` (P V, dS K: weights from registers, added up over tokens).
//
// mma.m16n8k16 multiplies a (16, 16) by b (16, 8) and adds it to c (16, 8) in fp32. Lane l holds,
// with g = l / 4 and t = l % 4,
//      of c   rows g and g + 8, columns 2t and 2t + 1      c[0] c[1] | c[2] c[3]
//      of a   the same of each half of 8 columns           a[0], a[1] | a[2], a[3]: pairs
//      of b   rows 2t and 2t + 1 of each half, column g    b[0] | b[1]: pairs
// So two c beside each other are one a, once rounded. ldmatrix fetches 8 x 8 pieces in this
// layout, each lane naming one row of 16 bytes; with .trans it gives the transpose.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

typedef __nv_bfloat16 bf16;
constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr float LOG2_E = 1.44269504f;

// ------------------------------------------------------------------------------------------------
// instructions

static __device__ void copy_16_bytes(uint32_t to, const void* from, bool real) {
    int bytes = real ? 16 : 0;  // what is not read becomes zeros
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}
static __device__ void copy_4_bytes(uint32_t to, const void* from, bool real) {
    int bytes = real ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes));
}
// What was asked for since the last call is a group; groups arrive in their order.
static __device__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LATE>
static __device__ void wait_for_groups() {  // all of this thread but the LATE youngest
    asm volatile("cp.async.wait_group %0;" ::"n"(LATE) : "memory");
}
// All copies of this thread have arrived, and after the barrier those of all threads.
static __device__ void wait_for_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
}

static __device__ void load_4(uint32_t (&x)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from));
}
static __device__ void load_2(uint32_t (&x)[2], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(x[0]), "=r"(x[1]) : "r"(from));
}
static __device__ void load_4_transposed(uint32_t (&x)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from));
}
static __device__ void load_2_transposed(uint32_t (&x)[2], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(x[0]), "=r"(x[1]) : "r"(from));
}

#define MMA(SHAPE, TYPE, A, B) \
    "mma.sync.aligned." SHAPE ".row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, " A ", " B \
    ", {%0, %1, %2, %3};"

// c += a b with 16 columns of a
template <typename T>
static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, bf16>)
        asm(MMA("m16n8k16", "bf16", "{%4, %5, %6, %7}", "{%8, %9}")
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm(MMA("m16n8k16", "f16", "{%4, %5, %6, %7}", "{%8, %9}")
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += a b with 8 columns of a
template <typename T>
static __device__ void mma(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
    if constexpr (std::is_same_v<T, bf16>)
        asm(MMA("m16n8k8", "bf16", "{%4, %5}", "{%6}")
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(b));
    else
        asm(MMA("m16n8k8", "f16", "{%4, %5}", "{%6}")
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(b));
}

static __device__ float exp2_of(float x) {  // 0 at -inf
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two numbers rounded into one register; `low` comes first in memory.
template <typename T>
static __device__ uint32_t pair(float low, float high) {
    if constexpr (std::is_same_v<T, bf16>) {
        __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
        return *(uint32_t*)&x;
    } else {
        __half2 x = __floats2half2_rn(low, high);
        return *(uint32_t*)&x;
    }
}

// ------------------------------------------------------------------------------------------------
// rows in shared memory

// The 8 rows of a piece must lie in different banks. Rows of 72 do, being 4 banks more than a
// round of 32; rows of 80 do with a gap of 8; elsewhere row r's chunks of 16 bytes are mixed up
// by XOR with r % 8.
template <int D>
struct Rows {
    static constexpr bool MIXED = D % 64 == 0;
    static constexpr int BYTES = 2 * (D == 80 ? 88 : D);
    static constexpr int CHUNKS = D / 8;
    static __device__ uint32_t at(int row, int chunk) {
        return row * BYTES + 16 * (MIXED ? chunk ^ row % 8 : chunk);
    }
    // From the place of a row's chunk 0 or 1 further on by an even number of chunks.
    static __device__ uint32_t right(uint32_t place, int chunks) {
        return MIXED ? place ^ 16 * chunks : place + 16 * chunks;
    }
};

// COUNT rows of one head, of which the first `real` are there, begin to come into shared memory.
// A thread has one chunk of every AT_ONCE-th row.
template <int D, int COUNT, typename T>
static __device__ void fetch_rows(uint32_t to, const T* from, int step, int real) {
    constexpr int CHUNKS = Rows<D>::CHUNKS, AT_ONCE = THREADS / CHUNKS;
    int first = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    if (first == AT_ONCE) return;  // D = 72 and 80: the last threads have none
    from += first * step + chunk * 8;
#pragma unroll
    for (int i = 0; i < (COUNT + AT_ONCE - 1) / AT_ONCE; i++, from += AT_ONCE * step) {
        int row = first + i * AT_ONCE;
        if (COUNT % AT_ONCE == 0 || row < COUNT)
            copy_16_bytes(to + Rows<D>::at(row, chunk), from, row < real);
    }
}

// ------------------------------------------------------------------------------------------------
// products. A warp has M x 16 rows; x[m][n] is the c of rows 16 m and columns 8 n.

template <int M, int N>
struct Sums {
    float x[M][N][4];
    __device__ Sums() {
        for (auto& row : x)
            for (auto& c : row)
                for (float& number : c) number = 0;
    }
};

// (M x 16, N x 8) = a (M x 16, D) b (N x 8, D)^T
template <typename T, int D, int M, int N>
static __device__ Sums<M, N> rows_by_rows(uint32_t a, uint32_t b) {
    using R = Rows<D>;
    Sums<M, N> c;
    int lane = threadIdx.x % 32;
    // pieces: rows 0 and 8 of chunk 0, rows 0 and 8 of chunk 1
    uint32_t a_lane = a + R::at(lane % 16, lane / 16);
    // pieces: chunks 0 and 1 of rows 0, chunks 0 and 1 of rows 8
    uint32_t b_lane = b + R::at(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int chunk = 0; chunk + 2 <= R::CHUNKS; chunk += 2) {
        uint32_t x[M][4], y[4];
#pragma unroll
        for (int m = 0; m < M; m++) load_4(x[m], R::right(a_lane, chunk) + m * 16 * R::BYTES);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            load_4(y, R::right(b_lane, chunk) + n * 8 * R::BYTES);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma<T>(c.x[m][n], x[m], y[0], y[1]);
                mma<T>(c.x[m][n + 1], x[m], y[2], y[3]);
            }
        }
    }
    if constexpr (R::CHUNKS % 2) {  // D = 72: the last 8
        uint32_t x[M][2], y[4];
        uint32_t last_of_a = a + R::at(lane % 16, R::CHUNKS - 1);
        uint32_t last_of_b = b + R::at(lane, R::CHUNKS - 1);  // pieces: rows 0, 8, 16, 24
#pragma unroll
        for (int m = 0; m < M; m++) load_2(x[m], last_of_a + m * 16 * R::BYTES);
#pragma unroll
        for (int n = 0; n < N; n += 4) {
            load_4(y, last_of_b + n * 8 * R::BYTES);
#pragma unroll
            for (int i = 0; i < 4; i++)
                for (int m = 0; m < M; m++) mma<T>(c.x[m][n + i], x[m], y[i]);
        }
    }
    return c;
}

// c (M x 16, D) += weights (M x 16, N x 8), rounded to T, times b (N x 8, D)
template <typename T, int D, int M, int N>
static __device__ void add_weighted_rows(Sums<M, D / 8>& c, const Sums<M, N>& weights, uint32_t b) {
    using R = Rows<D>;
    int lane = threadIdx.x % 32;
    // pieces: rows 0 and 8 of chunk 0, rows 0 and 8 of chunk 1
    uint32_t b_lane = b + R::at(lane % 16, lane / 16);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        uint32_t x[M][4], y[4];
#pragma unroll
        for (int m = 0; m < M; m++)
            for (int i = 0; i < 4; i++) {
                const float* half = weights.x[m][n + i / 2] + i % 2 * 2;
                x[m][i] = pair<T>(half[0], half[1]);
            }
#pragma unroll
        for (int chunk = 0; chunk + 2 <= R::CHUNKS; chunk += 2) {
            load_4_transposed(y, R::right(b_lane, chunk) + n * 8 * R::BYTES);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma<T>(c.x[m][chunk], x[m], y[0], y[1]);
                mma<T>(c.x[m][chunk + 1], x[m], y[2], y[3]);
            }
        }
        if constexpr (R::CHUNKS % 2) {
            uint32_t z[2];
            load_2_transposed(z, b + R::at(lane % 16, R::CHUNKS - 1) + n * 8 * R::BYTES);
#pragma unroll
            for (int m = 0; m < M; m++) mma<T>(c.x[m][R::CHUNKS - 1], x[m], z[0], z[1]);
        }
    }
}

// ------------------------------------------------------------------------------------------------
// a warp's rows

// Row 0 to 2 M of those that a lane holds numbers of: counted from its warp's first.
static __device__ int row_of(int i) { return threadIdx.x % 32 / 4 + 8 * i; }
static __device__ int column_of(int n, int i) { return 8 * n + threadIdx.x % 4 * 2 + i % 2; }

template <int M, int N>
static __device__ void scale_rows(Sums<M, N>& sums, const float (&by)[2 * M]) {
#pragma unroll
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++)
            for (int i = 0; i < 4; i++) sums.x[m][n][i] *= by[2 * m + i / 2];
}

// ------------------------------------------------------------------------------------------------
// the online softmax

// Takes scores of some keys into the running softmax of a warp's rows; they become weights.
// largest: score so far. sum: of the weights in this lane's columns only. shrink: what sums so far
// have to be multiplied with, as largest has grown.
template <int M, int N>
static __device__ void soften(Sums<M, N>& scores, float factor, float (&largest)[2 * M],
                              float (&sum)[2 * M], float (&shrink)[2 * M]) {
#pragma unroll
    for (int r = 0; r < 2 * M; r++) {
        float top = largest[r];
#pragma unroll
        for (int n = 0; n < N; n++)
            for (int i = 0; i < 2; i++) top = fmaxf(top, scores.x[r / 2][n][r % 2 * 2 + i]);
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        shrink[r] = exp2_of((largest[r] - top) * factor);  // 0 at the first tile
        largest[r] = top;
        sum[r] *= shrink[r];
        float shift = top * factor;
#pragma unroll
        for (int n = 0; n < N; n++)
            for (int i = 0; i < 2; i++) {
                float& x = scores.x[r / 2][n][r % 2 * 2 + i];
                x = exp2_of(x * factor - shift);
                sum[r] += x;
            }
    }
}
