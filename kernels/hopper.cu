// The forward pass of attention.cu once more, with what only Hopper GPUs (sm_90a) have: matrix
// products that a warpgroup of 4 warps starts and need not wait for (wgmma), and copies of whole
// tiles by a unit of their own (TMA), which count their bytes in at barriers in shared memory.
//
//      a block       stays on its multiprocessor and takes tile after tile of 128 queries: warpgroup
//                    0 fetches, 1 and 2 have 64 of the queries each.
//      fetching      one thread asks for queries, and for keys and values 128 at a time into STAGES
//                    places. It runs ahead, into the block's next tile of queries too: so a short
//                    segment's first copies cost nothing.
//      computing     scores of the next keys and sums over the last ones' values are started
//                    together; while the latter are added up, the former become weights:
//
//                        tensor cores    Q K1 | P0 V0      | Q K2 | P1 V1      | Q K3 | ...
//                        the same warps         softmax(1) |        softmax(2) |
//
//                    and the two warpgroups take turns, so that one has its softmax while the
//                    other's products run.
//      shared        for D = 128: queries 32 KiB, keys and values 32 KiB each, twice: 160 KiB.
//      registers     of a computing thread: 64 scores, 32 with two weights each, D / 2 sums. The
//                    fetching warpgroup gives up most of its own for them.
//
// wgmma reads rows that lie as TMA writes them: 64 columns, 128 bytes, with chunks of 16 bytes mixed
// up by XOR. What D = 72 and 80 have beyond 64 comes as rows of 16 columns, 32 bytes; behind
// column 72 TMA writes zeros. A tile's last rows may belong to the next segment: their scores become
// -inf, and their values 0, as 0 times something that is no number would not be 0.
//
// Scores, weights and sums lie in registers as those of mma (tiles.cuh) do, with 64 rows instead of
// 16: warp w of the four has rows 16 w and on.

#include <cudaTypedefs.h>

#include "pack.cuh"

constexpr int GROUP = 128;               // threads of a warpgroup
constexpr int GROUP_ROWS = TILE / 2;     // queries of a warpgroup
#ifndef V_KEYS
#define V_KEYS 128
#define V_STAGES 2
#endif
constexpr int KEYS = V_KEYS, STAGES = V_STAGES;    // of a tile of keys or values; tiles of each in memory
constexpr int COMPUTING_WARPS = 8;
constexpr int NOT_TAKEN = -1;
#ifndef TURNS
#define TURNS 1
#endif

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
// Barrier `id` of the block's own sixteen: `count` threads wait, or some of them only say they came.
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
    static constexpr int QUERIES = TILE * BYTES, WALKED = KEYS * BYTES;
    static constexpr int BARRIERS = QUERIES + 2 * STAGES * WALKED, MEMORY = BARRIERS + 256;
    static_assert(WALKED % 1024 == 0, "the XOR starts anew every 1024 bytes");
};

// How TMA finds rows of a tensor: (tokens, heads, D) cut into parts.
struct Map {
    CUtensorMap wide, narrow;
};
struct Maps {
    Map q, k, v;
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

// A warpgroup's scores begin to be computed. queries: the block's, of which it has those from `row`.
template <typename T, int D>
static __device__ void begin_scores(Sums<1, KEYS / 8>& c, uint32_t queries, int row,
                                    uint32_t keys) {
    using P = Parts<D>;
    begin_products();
#pragma unroll
    for (int i = 0; i < 4 * P::WIDE; i++) {
        int part = i / 4, column = i % 4 * 32;  // in bytes
        uint64_t a = described<128>(queries + (part * TILE + row) * 128 + column);
        uint64_t b = described<128>(keys + part * KEYS * 128 + column);
        if (i == 0) multiply_rows<T, KEYS, 0>(c.x[0], a, b);
        else multiply_rows<T, KEYS, 1>(c.x[0], a, b);
    }
    if constexpr (P::NARROW) {
        uint64_t a = described<32>(queries + P::WIDE * TILE * 128 + row * 32);
        multiply_rows<T, KEYS, 1>(c.x[0], a, described<32>(keys + P::WIDE * KEYS * 128));
    }
    end_products();
}

// Weights as wgmma takes them: [i] are those of 16 keys.
struct Weights {
    uint32_t x[KEYS / 16][4];
};

template <typename T>
static __device__ void round_to(Weights& weights, const Sums<1, KEYS / 8>& scores) {
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) {
        const float* two = scores.x[0][i / 2] + i % 2 * 2;
        weights.x[i / 4][i % 4] = pair<T>(two[0], two[1]);
    }
}

template <typename T, int D>
static __device__ void begin_sums(Sums<1, Parts<D>::COLUMNS / 8>& c, const Weights& weights,
                                  uint32_t values) {
    using P = Parts<D>;
    begin_products();
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++) {
        uint64_t wide = described<128>(values + i * 16 * 128, KEYS * 128);
#ifdef SPLIT
        for (int w = 0; w < P::WIDE; w++)
            add_values<T, 64>(c.x[0] + 8 * w, weights.x[i],
                              described<128>(values + w * KEYS * 128 + i * 16 * 128));
#else
        add_values<T, 64 * P::WIDE>(c.x[0], weights.x[i], wide);
#endif
        if constexpr (P::NARROW) {
            uint64_t narrow = described<32>(values + P::WIDE * KEYS * 128 + i * 16 * 32);
            add_values<T, 16>(c.x[0] + 8 * P::WIDE, weights.x[i], narrow);
        }
    }
    end_products();
}

// Rows from `first` on become zeros, seen by the tensor cores. Both warpgroups do it, each for
// itself: the same zeros, and neither waits for the other.
template <int D>
static __device__ void clear_rows(char* values, int first, int group) {
    using P = Parts<D>;
    auto clear = [&](char* part, int row_bytes) {
        for (int i = first * row_bytes + threadIdx.x % GROUP * 16; i < KEYS * row_bytes;
             i += GROUP * 16)
            *(uint4*)(part + i) = uint4{};
    };
    for (int i = 0; i < P::WIDE; i++) clear(values + i * KEYS * 128, 128);
    if (P::NARROW) clear(values + P::WIDE * KEYS * 128, 32);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    meet(1 + group, GROUP);
}

// ------------------------------------------------------------------------------------------------
// the kernel

// One tile of queries of one head.
struct Task {
    Tile tile;
    int head, kv_head, query, end;  // query: the tile's first; end: of the keys that any sees

    __device__ Task(const Work& work, int i) : tile(work.tiles[i / work.heads]) {
        head = i % work.heads;
        kv_head = head / (work.heads / work.kv_heads);
        query = tile.index * TILE;
        end = last_key(work, tile.length, query + TILE - 1);
    }
};

// Places in shared memory, and the barriers that tell when they are full and when free again.
template <int D>
struct Places {
    uint32_t base;
    __device__ uint32_t keys(int n) const {
        return base + Parts<D>::QUERIES + n % STAGES * 2 * Parts<D>::WALKED;
    }
    __device__ uint32_t values(int n) const { return keys(n) + Parts<D>::WALKED; }
    __device__ uint32_t barrier(int i) const { return base + Parts<D>::BARRIERS + 8 * i; }
    __device__ uint32_t queries_full() const { return barrier(0); }
    __device__ uint32_t queries_free() const { return barrier(1); }
    __device__ uint32_t keys_full(int n) const { return barrier(2 + n % STAGES * 4); }
    __device__ uint32_t keys_free(int n) const { return barrier(3 + n % STAGES * 4); }
    __device__ uint32_t values_full(int n) const { return barrier(4 + n % STAGES * 4); }
    __device__ uint32_t values_free(int n) const { return barrier(5 + n % STAGES * 4); }
    static __device__ int phase(int n) { return n / STAGES % 2; }  // n: tiles of keys so far
};

template <int D>
static __device__ void fetch_all(const Work& work, const Maps& maps, const Places<D> at) {
    int n = 0, round = 0;
    for (int i = blockIdx.x; i < work.count * work.heads; i += gridDim.x, round++) {
        Task task(work, i);
        wait_for(at.queries_free(), (round + 1) % 2);  // in round 0: at once
        int token = task.tile.start + task.query;
        fetch<D, TILE>(at.base, maps.q, task.head, token, at.queries_full());
        for (int key = 0; key < task.end; key += KEYS, n++) {
            token = task.tile.start + key;
            wait_for(at.keys_free(n), at.phase(n) ^ 1);
            fetch<D, KEYS>(at.keys(n), maps.k, task.kv_head, token, at.keys_full(n));
            wait_for(at.values_free(n), at.phase(n) ^ 1);
            fetch<D, KEYS>(at.values(n), maps.v, task.kv_head, token, at.values_full(n));
        }
    }
}

template <typename T, int D>
static __device__ void compute_all(const Work& work, const Places<D> at, char* memory, int group) {
    bool speaks = threadIdx.x % 32 == 0;  // for its warp
    float factor = work.scale * LOG2_E;
    int n = 0, round = 0;
    if (TURNS && group == 1) pass_by(3, 2 * GROUP);  // group 0 has the first turn
    for (int i = blockIdx.x; i < work.count * work.heads; i += gridDim.x, round++) {
        Task task(work, i);
        int length = task.tile.length, row = group * GROUP_ROWS;
        int query = task.query + row + threadIdx.x % GROUP / 32 * 16;  // this warp's first
        Sums<1, Parts<D>::COLUMNS / 8> sums;
        Sums<1, KEYS / 8> scores;
        Weights weights;
        float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, shrink[2];

        wait_for(at.queries_full(), round % 2);
        wait_for(at.keys_full(n), at.phase(n));
        begin_scores<T, D>(scores, at.base, row, at.keys(n));
        wait_for_products<0>(scores);
        if (speaks) arrive(at.keys_free(n));
        hide_keys(scores, work, length, query, 0);
        soften(scores, factor, largest, sum, shrink);
        round_to<T>(weights, scores);
        int key = KEYS;
        for (; key < task.end; key += KEYS, n++) {
            wait_for(at.keys_full(n + 1), at.phase(n + 1));
            if (TURNS) meet(3 + group, 2 * GROUP);
            begin_scores<T, D>(scores, at.base, row, at.keys(n + 1));
            wait_for(at.values_full(n), at.phase(n));
            begin_sums<T, D>(sums, weights, at.values(n));
            if (TURNS) pass_by(4 - group, 2 * GROUP);
            wait_for_products<1>(scores);
            if (speaks) arrive(at.keys_free(n + 1));
            hide_keys(scores, work, length, query, key);
            soften(scores, factor, largest, sum, shrink);
            wait_for_products<0>(sums);
            if (speaks) arrive(at.values_free(n));
            scale_rows(sums, shrink);
            round_to<T>(weights, scores);
        }
        if (speaks) arrive(at.queries_free());
        wait_for(at.values_full(n), at.phase(n));
        int real = length - (key - KEYS);
        if (real < KEYS) clear_rows<D>(memory + (at.values(n) - at.base), real, group);
        begin_sums<T, D>(sums, weights, at.values(n));
        wait_for_products<0>(sums);
        if (speaks) arrive(at.values_free(n));
        n++;
        write_output<T, D>(sums, largest, sum, work, task.tile, task.head, query);
    }
}

template <typename T, int D>
static __global__ void __launch_bounds__(3 * GROUP, 1)
forward(const Work work, const __grid_constant__ Maps maps) {
    extern __shared__ __align__(1024) char memory[];
    Places<D> at{(uint32_t)__cvta_generic_to_shared(memory)};
    if (threadIdx.x == 0) {
        // whoever fills a place is one thread, and those who read it are eight warps
        for (int i = 0; i < 2 + 4 * STAGES; i++)
            make_barrier(at.barrier(i), i % 2 ? COMPUTING_WARPS : 1);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x < GROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 0) fetch_all<D>(work, maps, at);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        compute_all<T, D>(work, at, memory, threadIdx.x / GROUP - 1);
    }
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

template <typename T, int D>
static int run(const Work& work, int device, cudaStream_t stream) {
    using P = Parts<D>;
    Maps maps{};
    bool good = true;
    auto add = [&](Map& map, const Tensor& x, int heads, int rows) {
        good &= describe<T>(map.wide, x, work.tokens, heads, D, 64, rows);
        if (P::NARROW) good &= describe<T>(map.narrow, x, work.tokens, heads, D, 16, rows);
    };
    add(maps.q, work.q, work.heads, TILE);
    add(maps.k, work.k, work.kv_heads, KEYS);
    add(maps.v, work.v, work.kv_heads, KEYS);
    if (!good) return NOT_TAKEN;
    int blocks;
    cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device);
    cudaError_t error = cudaFuncSetAttribute(
        forward<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, P::MEMORY);
    if (error != cudaSuccess) return error;
    blocks = min(blocks, work.count * work.heads);
    forward<T, D><<<blocks, 3 * GROUP, P::MEMORY, stream>>>(work, maps);
    return cudaGetLastError();
}

template <typename T>
static int run(const Work& work, int width, int device, cudaStream_t stream) {
    switch (width) {
        case 64: return run<T, 64>(work, device, stream);
        case 72: return run<T, 72>(work, device, stream);
        case 80: return run<T, 80>(work, device, stream);
        case 128: return run<T, 128>(work, device, stream);
    }
    return cudaErrorInvalidValue;
}

// As attention.cu's function `attention`, forward only. Returns NOT_TAKEN for steps that TMA cannot
// go in; nothing is written then.
extern "C" int hopper_forward(const Tensor* x, float* lse, const Tile* tiles, int count, int tokens,
                              int heads, int kv_heads, int width, int causal, int is_bf16,
                              int device, void* stream) {
    cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    Tensor none{};
    Work work{x[0], x[1], x[2], x[3], none, none, none, none, lse, nullptr, tiles, count,
              tokens, heads, kv_heads, causal, 1 / sqrtf((float)width)};
    return (is_bf16 ? run<bf16> : run<half>)(work, width, device, (cudaStream_t)stream);
}

extern "C" const char* error_text(int error) { return cudaGetErrorString((cudaError_t)error); }
