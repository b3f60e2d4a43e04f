// What hopper.cu and hopper_backward.cu share: the instructions that only Hopper GPUs (sm_90a)
// have, and how tiles lie in shared memory for them.
//
//      TMA       copies whole tiles, asked for by one thread, and counts their bytes in at a
//                barrier in shared memory.
//      wgmma     products of a warpgroup, 4 warps, which it starts and need not wait for. a comes
//                from shared memory or registers, b from shared memory; 64 rows of c stay in
//                registers, as those of mma (tiles.cuh) do: warp w has rows 16 w and on.
//
// wgmma reads rows as TMA lays them: 64 columns, 128 bytes, with chunks of 16 bytes mixed up by
// XOR. What D = 72 and 80 have beyond 64 comes as rows of 16 columns, 32 bytes; behind column 72
// TMA writes zeros.

#pragma once

#include <cudaTypedefs.h>

#include "pack.cuh"

constexpr int GROUP = 128;            // threads of a warpgroup
constexpr int GROUP_ROWS = TILE / 2;  // rows of a tile that one of two computing warpgroups has
constexpr int COMPUTING_WARPS = 8;
constexpr int NOT_TAKEN = -1;  // instead of an error of CUDA's: steps that TMA cannot go in

// ------------------------------------------------------------------------------------------------
// barriers in shared memory. A phase of one ends when all have arrived and all bytes have come;
// phases are told apart as even (0) and odd (1).

static __device__ void make_barrier(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
static __device__ void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
static __device__ void arrive_and_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}
// A warp arrives: all of its lanes are done with what the barrier guards.
static __device__ void leave(uint32_t barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(barrier);
}
// This thread arrives when all its cp.async have.
static __device__ void arrive_with_copies(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
static __device__ void wait_for(uint32_t barrier, int phase) {
    uint32_t over;
    do {
        asm volatile(
            "{.reg .pred over;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
            "selp.u32 %0, 1, 0, over;}"
            : "=r"(over) : "r"(barrier), "r"(phase) : "memory");
    } while (!over);
}
// Barrier `id` of the block's own sixteen: `count` threads come; some wait for the others, and some
// only say that they came.
static __device__ void meet(int id, int count) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}
static __device__ void pass_by(int id, int count) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// ------------------------------------------------------------------------------------------------
// tiles in shared memory

// D channels of a row: some parts of 64, and one of 16 where D is 72 or 80. All rows' first parts
// come first.
template <int D>
struct Parts {
    static constexpr int WIDE = D / 64, NARROW = D % 64 ? 1 : 0;
    static constexpr int COLUMNS = 64 * WIDE + 16 * NARROW;
    static constexpr int BYTES = 2 * COLUMNS;  // of a row
};

// How TMA finds rows of a tensor: (tokens, heads, D) cut into parts.
struct Map {
    CUtensorMap wide, narrow;
};

static __device__ void copy_part(uint32_t to, const CUtensorMap& map, int column, int head,
                                 int token, uint32_t arrival) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4}], [%5];"
        ::"r"(to), "l"(&map), "r"(column), "r"(head), "r"(token), "r"(arrival) : "memory");
}

// ROWS rows begin to come; rows that the tensor does not have become zeros.
template <int D, int ROWS>
static __device__ void fetch(uint32_t to, const Map& map, int head, int token, uint32_t arrival) {
    using P = Parts<D>;
    arrive_and_expect(arrival, ROWS * P::BYTES);
    for (int i = 0; i < P::WIDE; i++)
        copy_part(to + i * ROWS * 128, map.wide, 64 * i, head, token, arrival);
    if (P::NARROW) copy_part(to + P::WIDE * ROWS * 128, map.narrow, 64, head, token, arrival);
}

// What wgmma is told of a tile: where it begins, from where to where its blocks of 8 rows are, and
// for values of more than 64 columns those of 64 columns. BYTES: of a row, 128 or 32.
template <int BYTES>
static __device__ uint64_t described(uint32_t place, int next_columns = 16) {
    uint64_t mixed = BYTES == 128 ? 1 : 3, next_rows = 8 * BYTES;
    return place >> 4 | (uint64_t)(next_columns >> 4) << 16 | next_rows >> 4 << 32 | mixed << 62;
}

// ------------------------------------------------------------------------------------------------
// products

static __device__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
static __device__ void end_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// All of this warp are done but the LATE youngest groups. The compiler must not use c before.
template <int LATE, int N>
static __device__ void wait_for_products(Sums<1, N>& c) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LATE) : "memory");
    for (auto& four : c.x[0])
        for (float& number : four) asm volatile("" : "+f"(number)::"memory");
}

#define TWO(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3]), \
    "+f"(c[i + 1][0]), "+f"(c[i + 1][1]), "+f"(c[i + 1][2]), "+f"(c[i + 1][3])
#define EIGHT(i) TWO(i), TWO(i + 2), TWO(i + 4), TWO(i + 6)
#define C16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define C64 C16 ", %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define C128 C64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, " \
    "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// c (64, N) = or += a (64, 16) b (N, 16)^T, both in shared memory
#define SCORES(N, TYPE, C, AB, ADDING, NUMBERS...) asm volatile( \
    "{.reg .pred add;\nsetp.ne.b32 add, " ADDING ", 0;\n" \
    "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE \
    " {" C "}, " AB ", add, 1, 1, 0, 0;}" \
    : NUMBERS : "l"(a), "l"(b), "n"(ADD))
#define SCORES_64(TYPE) SCORES("64", TYPE, C64, "%32, %33", "%34", EIGHT(0))
#define SCORES_128(TYPE) SCORES("128", TYPE, C128, "%64, %65", "%66", EIGHT(0), EIGHT(8))

template <typename T, int N, int ADD>
static __device__ void multiply_rows(float (*c)[4], uint64_t a, uint64_t b) {
    constexpr bool BF16 = std::is_same_v<T, bf16>;
    if constexpr (N == 64 && BF16) SCORES_64("bf16");
    if constexpr (N == 64 && !BF16) SCORES_64("f16");
    if constexpr (N == 128 && BF16) SCORES_128("bf16");
    if constexpr (N == 128 && !BF16) SCORES_128("f16");
}

// c (64, N) += a (64, 16) b (16, N), a in registers
#define VALUES(N, TYPE, C, A, B, NUMBERS...) asm volatile( \
    "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE \
    " {" C "}, {" A "}, " B ", 1, 1, 1, 1;" \
    : NUMBERS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define VALUES_16(TYPE) VALUES("16", TYPE, C16, "%8, %9, %10, %11", "%12", TWO(0))
#define VALUES_64(TYPE) VALUES("64", TYPE, C64, "%32, %33, %34, %35", "%36", EIGHT(0))
#define VALUES_128(TYPE) \
    VALUES("128", TYPE, C128, "%64, %65, %66, %67", "%68", EIGHT(0), EIGHT(8))

template <typename T, int N>
static __device__ void add_values(float (*c)[4], const uint32_t (&a)[4], uint64_t b) {
    constexpr bool BF16 = std::is_same_v<T, bf16>;
    if constexpr (N == 16 && BF16) VALUES_16("bf16");
    if constexpr (N == 16 && !BF16) VALUES_16("f16");
    if constexpr (N == 64 && BF16) VALUES_64("bf16");
    if constexpr (N == 64 && !BF16) VALUES_64("f16");
    if constexpr (N == 128 && BF16) VALUES_128("bf16");
    if constexpr (N == 128 && !BF16) VALUES_128("f16");
}

// A warpgroup's c (64, N) = a b^T begins to be computed, over D. a: a tile of A_ROWS rows, of which
// the group has those from `row`; b: a tile of N.
template <typename T, int D, int A_ROWS, int N>
static __device__ void begin_rows_by_rows(Sums<1, N / 8>& c, uint32_t a, int row, uint32_t b) {
    using P = Parts<D>;
    begin_products();
#pragma unroll
    for (int i = 0; i < 4 * P::WIDE; i++) {
        int part = i / 4, column = i % 4 * 32;  // in bytes
        uint64_t of_a = described<128>(a + (part * A_ROWS + row) * 128 + column);
        uint64_t of_b = described<128>(b + part * N * 128 + column);
        if (i == 0) multiply_rows<T, N, 0>(c.x[0], of_a, of_b);
        else multiply_rows<T, N, 1>(c.x[0], of_a, of_b);
    }
    if constexpr (P::NARROW) {
        uint64_t of_a = described<32>(a + P::WIDE * A_ROWS * 128 + row * 32);
        multiply_rows<T, N, 1>(c.x[0], of_a, described<32>(b + P::WIDE * N * 128));
    }
    end_products();
}

// Weights of N tokens as wgmma takes them: [i] are those of 16.
template <int N>
struct Weights {
    uint32_t x[N / 16][4];
};

template <typename T, int N>
static __device__ void round_to(Weights<N>& weights, const Sums<1, N / 8>& numbers) {
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
        const float* two = numbers.x[0][i / 2] + i % 2 * 2;
        weights.x[i / 4][i % 4] = pair<T>(two[0], two[1]);
    }
}

// c (64, D) += weights (64, N) b (N, D) begins to be computed.
template <typename T, int D, int N>
static __device__ void begin_weighted_rows(Sums<1, Parts<D>::COLUMNS / 8>& c,
                                           const Weights<N>& weights, uint32_t b) {
    using P = Parts<D>;
    begin_products();
#pragma unroll
    for (int i = 0; i < N / 16; i++) {
        uint64_t wide = described<128>(b + i * 16 * 128, N * 128);
        add_values<T, 64 * P::WIDE>(c.x[0], weights.x[i], wide);
        if constexpr (P::NARROW) {
            uint64_t narrow = described<32>(b + P::WIDE * N * 128 + i * 16 * 32);
            add_values<T, 16>(c.x[0] + 8 * P::WIDE, weights.x[i], narrow);
        }
    }
    end_products();
}

// Of a tile of N rows those from `first` on become zeros, seen by the tensor cores. Both warpgroups
// do it, each for itself: the same zeros, and neither waits for the other.
template <int D, int N>
static __device__ void clear_rows(char* tile, int first) {
    using P = Parts<D>;
    auto clear = [&](char* part, int row_bytes) {
        int i = first * row_bytes + threadIdx.x % GROUP * 16;
        for (; i < N * row_bytes; i += GROUP * 16) *(uint4*)(part + i) = uint4{};
    };
    for (int i = 0; i < P::WIDE; i++) clear(tile + i * N * 128, 128);
    if (P::NARROW) clear(tile + P::WIDE * N * 128, 32);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    meet(threadIdx.x / GROUP, GROUP);
}

// ------------------------------------------------------------------------------------------------
// the host's side

// CUDA's own function that describes a tensor to TMA, from the driver that is there.
static PFN_cuTensorMapEncodeTiled_v12000 encoder() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                     &result);
    return (PFN_cuTensorMapEncodeTiled_v12000)found;
}

// Parts of `columns` channels of `rows` tokens of one head.
template <typename T>
static bool describe(CUtensorMap& map, const Tensor& x, int tokens, int heads, int width,
                     int columns, int rows) {
    static const auto encode = encoder();
    auto type = std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                        : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    auto mixed = columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_32B;
    cuuint64_t sizes[] = {(cuuint64_t)width, (cuuint64_t)heads, (cuuint64_t)tokens};
    cuuint64_t steps[] = {2 * (cuuint64_t)x.head_step, 2 * (cuuint64_t)x.row};  // bytes
    cuuint32_t part[] = {(cuuint32_t)columns, 1, (cuuint32_t)rows}, every[] = {1, 1, 1};
    return encode && !encode(&map, type, 3, x.data, sizes, steps, part, every,
                             CU_TENSOR_MAP_INTERLEAVE_NONE, mixed,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// How tiles of `rows` rows of x are found; false: steps that TMA cannot go in.
template <typename T, int D>
static bool describe(Map& map, const Tensor& x, int tokens, int heads, int rows) {
    return describe<T>(map.wide, x, tokens, heads, D, 64, rows) &&
           (!Parts<D>::NARROW || describe<T>(map.narrow, x, tokens, heads, D, 16, rows));
}
