// Attention of a few new queries to the long cache before them, on NVIDIA GPUs from sm_80 on; bf16
// and fp16, head widths 64, 80 and 128.
//
// A query meets every key of its row once, so the time is that of reading the cache:
//
//      once       the query heads that share a key head are rows of one product, together with the
//                 row's other new tokens: keys and values are read once for all of them.
//      by many    a row's keys are cut into parts, a block for each, or one long row would keep one
//                 multiprocessor busy while others wait. In a block each warp walks over tiles of
//                 its own, the next one on its way, without ever waiting for other warps.
//      merged     each warp ends with the mean of its values, weighted by its own softmax, and with
//                 lse2, log2 of its sum of exponentials. `merge` makes of several such results the
//                 one over all their keys: first in a block, then, in a second kernel, over parts.
//
// Lengths are read from the GPU's memory. So a CUDA graph that holds these kernels can be replayed
// while the rows grow: parts behind a row's end have nothing to do. No row is added to by two
// blocks, so every run gives the same bits.
//
// Built by kernels/build.py; only CUDA's own headers are needed.

#include "chain.cuh"
#include "tiles.cuh"

constexpr int QUERIES = 16;  // rows of a product: query heads times new tokens
constexpr int KEYS = 16;     // of a warp's tile
// Tiles of a warp in shared memory: one in use, the others coming. Two of them leave room for three
// blocks on a multiprocessor of Hopper, 96 KiB on their way, and fit into every GPU from sm_80 on.
constexpr int STAGES = 2;
// A hidden key's score. Finite, as the difference of two is taken where a query sees no key yet;
// and a power of two, as that difference is of products, one of them rounded: so both are exact.
constexpr float HIDDEN = -0x1p100f;

struct Work {
    const void *q, *k, *v;        // (batch, queries, heads, D), and caches (rows, capacity, KV, D)
    const int* lengths;           // (batch,): keys before the new ones
    const int* rows;              // (batch,): row of the caches; null: the first, the second, ...
    void* out;                    // as q
    float *part_out, *part_lse2;  // (batch, parts, KV, G * queries, D), and the same without D
    int64_t row, token;           // steps of the caches
    int batch, queries, heads, kv_heads, cache_rows, capacity;
    int parts, part_keys;  // of a row at most, and keys of each

    __device__ int group() const { return heads / kv_heads; }
    __device__ int products() const { return group() * queries; }  // rows that share a key head
    __device__ int row_of_cache(int b) const { return rows ? rows[b] : b; }
    // Keys of a row, the new ones included. None where the numbers would lead astray.
    __device__ int keys_of(int b) const {
        int row = row_of_cache(b);
        return row >= 0 && row < cache_rows ? min(lengths[b] + queries, capacity) : 0;
    }
    // Where the result of a part stands; row: of the products.
    __device__ int64_t place(int b, int part, int kv_head, int row) const {
        return (((int64_t)b * parts + part) * kv_heads + kv_head) * products() + row;
    }
};

// One number of the output over all keys, from those of `count` groups of keys; they lie so many
// numbers apart. lse2 becomes that of all keys.
static __device__ float merge(const float* out, int64_t out_step, const float* part_lse2,
                              int64_t lse2_step, int count, float& lse2) {
    float top = -INFINITY, sum = 0, mean = 0;
    for (int i = 0; i < count; i++) top = fmaxf(top, part_lse2[i * lse2_step]);
    for (int i = 0; i < count; i++) {
        float weight = exp2_of(part_lse2[i * lse2_step] - top);
        sum += weight;
        mean += weight * out[i * out_step];
    }
    lse2 = top + log2f(sum);
    return sum > 0 ? mean / sum : 0;  // a row without keys
}

// ------------------------------------------------------------------------------------------------
// a part of a row's keys

template <int D>
struct Shape {
    static constexpr int TILE = KEYS * Rows<D>::BYTES, STAGE = 2 * TILE;  // keys and values
    static constexpr int OWN = QUERIES * Rows<D>::BYTES;
    static constexpr int MEMORY = OWN + WARPS * STAGES * STAGE;
    static_assert(MEMORY >= WARPS * QUERIES * (D + 1) * 4);  // which then holds the warps' results
};

// The block's rows of queries: row n belongs to new token n / group.
template <typename T, int D>
static __device__ void fetch_queries(uint32_t to, const Work& work, int b, int kv_head, int first) {
    constexpr int CHUNKS = Rows<D>::CHUNKS;
    int group = work.group();
    for (int i = threadIdx.x; i < QUERIES * CHUNKS; i += THREADS) {
        int row = i / CHUNKS, chunk = i % CHUNKS, n = first + row;
        int64_t token = (int64_t)b * work.queries + n / group;
        int head = kv_head * group + n % group;
        const T* from = (const T*)work.q + (token * work.heads + head) * D + chunk * 8;
        copy_16_bytes(to + Rows<D>::at(row, chunk), from, n < work.products());
    }
}

// A warp's tile of keys, or of values, of which the first `real` are there.
template <typename T, int D>
static __device__ void fetch_tile(uint32_t to, const T* from, int64_t step, int real) {
    constexpr int CHUNKS = Rows<D>::CHUNKS;
#pragma unroll
    for (int i = threadIdx.x % 32; i < KEYS * CHUNKS; i += 32) {
        int row = i / CHUNKS, chunk = i % CHUNKS;
        copy_16_bytes(to + Rows<D>::at(row, chunk), from + row * step + chunk * 8, row < real);
    }
}

template <typename T, int D>
static __global__ void __launch_bounds__(THREADS) read_part(const Work work) {
    using S = Shape<D>;
    extern __shared__ __align__(1024) char memory[];
    let_next_begin();
    wait_for_last();
    int kv_head = blockIdx.x % work.kv_heads, first = blockIdx.x / work.kv_heads * QUERIES;
    int part = blockIdx.y, b = blockIdx.z, warp = threadIdx.x / 32;
    int begin = part * work.part_keys, end = min(work.keys_of(b), begin + work.part_keys);
    if (begin >= end) return;

    uint32_t queries = __cvta_generic_to_shared(memory);
    uint32_t tiles = queries + S::OWN + warp * STAGES * S::STAGE;  // this warp's
    int64_t start = work.row_of_cache(b) * work.row + kv_head * D;
    auto fetch = [&](int tile) {
        int key = begin + (tile * WARPS + warp) * KEYS;
        if (key < end) {
            uint32_t to = tiles + tile % STAGES * S::STAGE;
            int64_t at = start + key * work.token;
            fetch_tile<T, D>(to, (const T*)work.k + at, work.token, end - key);
            fetch_tile<T, D>(to + S::TILE, (const T*)work.v + at, work.token, end - key);
        }
        end_group();  // an empty one too: counting them tells which tile has come
    };
    fetch_queries<T, D>(queries, work, b, kv_head, first);
    end_group();
    for (int tile = 0; tile < STAGES - 1; tile++) fetch(tile);
    wait_for_groups<STAGES - 1>();
    __syncthreads();  // all warps need all queries

    Sums<1, D / 8> sums;
    float largest[2], sum[2] = {0, 0}, shrink[2];
    int seen[2];  // keys of this lane's rows
    for (int r = 0; r < 2; r++) {
        largest[r] = -INFINITY;
        seen[r] = min(end, work.lengths[b] + (first + row_of(r)) / work.group() + 1);
    }
    float factor = LOG2_E / sqrtf((float)D);
    for (int tile = 0;; tile++) {
        int key = begin + (tile * WARPS + warp) * KEYS;
        if (key >= end) break;
        wait_for_groups<STAGES - 2>();
        __syncwarp();  // this tile has come for all lanes, and all are done with the one before
        fetch(tile + STAGES - 1);
        uint32_t keys = tiles + tile % STAGES * S::STAGE;
        auto scores = rows_by_rows<T, D, 1, KEYS / 8>(queries, keys);
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
            for (int i = 0; i < 4; i++)
                if (key + column_of(n, i) >= seen[i / 2]) scores.x[0][n][i] = HIDDEN;
        soften(scores, factor, largest, sum, shrink);
        scale_rows(sums, shrink);
        add_weighted_rows<T, D>(sums, scores, keys + S::TILE);
    }

    __syncthreads();  // all warps are done with their tiles: results take that memory
    float* out = (float*)memory;              // (WARPS, QUERIES, D)
    float* lse2 = out + WARPS * QUERIES * D;  // (WARPS, QUERIES)
    for (int r = 0; r < 2; r++) {
        sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
        sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
        shrink[r] = sum[r] > 0 ? 1 / sum[r] : 0;  // a warp without tiles
        int row = warp * QUERIES + row_of(r);
        if (threadIdx.x % 4 == 0) lse2[row] = largest[r] * factor + log2f(sum[r]);
    }
    scale_rows(sums, shrink);
#pragma unroll
    for (int n = 0; n < D / 8; n++)
        for (int i = 0; i < 4; i++)
            out[(warp * QUERIES + row_of(i / 2)) * D + column_of(n, i)] = sums.x[0][n][i];
    __syncthreads();
    for (int i = threadIdx.x; i < QUERIES * D; i += THREADS) {
        int row = i / D;
        if (first + row >= work.products()) break;
        float total;
        float x = merge(out + i, QUERIES * D, lse2 + row, QUERIES, WARPS, total);
        int64_t place = work.place(b, part, kv_head, first + row);
        work.part_out[place * D + i % D] = x;
        if (i % D == 0) work.part_lse2[place] = total;
    }
}

// ------------------------------------------------------------------------------------------------
// all parts together. A block has one query of one head, a thread one channel.

template <typename T, int D>
static __global__ void __launch_bounds__(D) merge_parts(const Work work) {
    let_next_begin();
    wait_for_last();
    int head = blockIdx.x % work.heads, token = blockIdx.x / work.heads;
    int b = token / work.queries, query = token % work.queries, group = work.group();
    int count = (max(work.keys_of(b), 0) + work.part_keys - 1) / work.part_keys;
    int64_t place = work.place(b, 0, head / group, query * group + head % group);
    int64_t step = work.place(0, 1, 0, 0);
    float lse2;
    float x = merge(work.part_out + place * D + threadIdx.x, step * D, work.part_lse2 + place, step,
                    count, lse2);
    ((T*)work.out)[(int64_t)blockIdx.x * D + threadIdx.x] = (T)x;
}

template <typename T, int D>
static int run(const Work& work, cudaStream_t stream) {
    using S = Shape<D>;
    int rows = work.heads / work.kv_heads * work.queries;
    dim3 blocks((rows + QUERIES - 1) / QUERIES * work.kv_heads, work.parts, work.batch);
    cudaError_t error = cudaFuncSetAttribute(
        read_part<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::MEMORY);
    if (error != cudaSuccess) return error;
    error = launch_early(read_part<T, D>, blocks, THREADS, S::MEMORY, stream, work);
    if (error != cudaSuccess) return error;
    int merged = work.batch * work.queries * work.heads;
    return launch_early(merge_parts<T, D>, merged, D, 0, stream, work);
}

template <typename T>
static int run(const Work& work, int width, cudaStream_t stream) {
    switch (width) {
        case 64: return run<T, 64>(work, stream);
        case 80: return run<T, 80>(work, stream);
        case 128: return run<T, 128>(work, stream);
    }
    return cudaErrorInvalidValue;
}

// work: as kernels/decode.py lays it out, addresses and steps multiples of 16 bytes.
// Returns an error of CUDA's, 0: none.
extern "C" int decode(const Work* work, int width, int is_bf16, int device, void* stream) {
    cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    return (is_bf16 ? run<bf16> : run<half>)(*work, width, (cudaStream_t)stream);
}

extern "C" const char* decode_error(int error) { return cudaGetErrorString((cudaError_t)error); }
