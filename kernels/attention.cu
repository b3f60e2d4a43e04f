// Attention over packed segments on NVIDIA GPUs from sm_80 on, forward and backward, full or
// causal, grouped queries; bf16 and fp16, head widths 64, 72, 80 and 128.
//
// It computes what kernels/attention.cpp does, tile by tile with the online softmax explained
// there. What differs is where things lie:
//
//      a block    4 warps own a tile of rows of one head: queries, or in dK's and dV's pass keys.
//                 They walk along the segment's other side, tile after tile, and nobody else adds
//                 to their rows. So nothing is added up in memory, and every run gives the same
//                 bits.
//      a warp     owns 16 or 32 of the rows. Scores, weights and sums of its rows stay in its
//                 registers, as the tensor cores' mma instruction leaves them.
//      shared     holds the rows of the block, and the walked tile twice: while one is multiplied,
//      memory     cp.async brings the next.
//
// The instructions, products and the softmax stand in tiles.cuh, what a pack is in pack.cuh.
// Built by kernels/build.py; only CUDA's own headers are needed.

#include "pack.cuh"

// ------------------------------------------------------------------------------------------------
// the walk of a tile of queries along its keys

// A tile of keys and then of values, which begins at `key` of the segment.
template <typename T, int D, int KEYS>
static __device__ void fetch_keys(uint32_t to, const Work& work, Tile tile, int kv_head, int key) {
    int real = tile.length - key, token = tile.start + key;
    fetch_rows<D, KEYS>(to, work.k.at<T>(token, kv_head), work.k.row, real);
    fetch_rows<D, KEYS>(to + KEYS * Rows<D>::BYTES, work.v.at<T>(token, kv_head), work.v.row, real);
}

// Calls step(key, keys) for tiles of KEYS keys: the first of a tile, and where it and then its
// values lie in shared memory, at one of two places from `walked` on. The first tile has been asked
// for. query: this warp's first of `rows`; tiles of which it sees nothing are left out.
template <typename T, int D, int KEYS, typename Step>
static __device__ void walk_over_keys(const Work& work, Tile tile, int kv_head, uint32_t walked,
                                      int query, int rows, Step step) {
    constexpr int PLACE = 2 * KEYS * Rows<D>::BYTES;
    int end = last_key(work, tile.length, tile.index * TILE + TILE - 1);
    for (int key = 0; key < end; key += KEYS) {
        wait_for_copies();  // and all warps are done with the tile before
        int after = key + KEYS;
        uint32_t other = walked + after / KEYS % 2 * PLACE;
        if (after < end) fetch_keys<T, D, KEYS>(other, work, tile, kv_head, after);
        if (query < tile.length && key < last_key(work, tile.length, query + rows - 1))
            step(key, walked + key / KEYS % 2 * PLACE);
    }
}

// ------------------------------------------------------------------------------------------------
// forward

template <int D>
struct ForwardShape {
    static constexpr int M = 2, KEYS = 64;
    static constexpr int OWN = TILE * Rows<D>::BYTES, WALKED = KEYS * Rows<D>::BYTES;
    static constexpr int MEMORY = OWN + 4 * WALKED;  // queries, and twice keys and values
};

template <typename T, int D>
static __global__ void __launch_bounds__(THREADS, 2) forward(const Work work) {
    using S = ForwardShape<D>;
    extern __shared__ __align__(1024) char memory[];
    uint32_t queries = __cvta_generic_to_shared(memory), walked = queries + S::OWN;
    Tile tile = work.tiles[blockIdx.x / work.heads];
    int head = blockIdx.x % work.heads, kv_head = head / (work.heads / work.kv_heads);
    int length = tile.length, block_query = tile.index * TILE;
    int query = block_query + threadIdx.x / 32 * 16 * S::M;  // this warp's first

    fetch_rows<D, TILE>(queries, work.q.at<T>(tile.start + block_query, head), work.q.row,
                        length - block_query);
    fetch_keys<T, D, S::KEYS>(walked, work, tile, kv_head, 0);

    Sums<S::M, D / 8> sums;
    float largest[2 * S::M], sum[2 * S::M], shrink[2 * S::M];
    for (int r = 0; r < 2 * S::M; r++) largest[r] = -INFINITY, sum[r] = 0;
    float factor = work.scale * LOG2_E;
    auto step = [&](int key, uint32_t keys) {
        auto scores = rows_by_rows<T, D, S::M, S::KEYS / 8>(
            queries + (query - block_query) * Rows<D>::BYTES, keys);
        hide_keys(scores, work, length, query, key);
        soften(scores, factor, largest, sum, shrink);
        scale_rows(sums, shrink);
        add_weighted_rows<T, D>(sums, scores, keys + S::WALKED);
    };
    walk_over_keys<T, D, S::KEYS>(work, tile, kv_head, walked, query, 16 * S::M, step);
    write_output<T, D>(sums, largest, sum, work, tile, head, query);
}

// ------------------------------------------------------------------------------------------------
// backward: with P the weights and dP = dO V^T, dS = P * (dP - delta); then dV = P^T dO,
// dQ = dS K and dK = dS^T Q, the last two times the scale of q.

template <int D>
struct QueriesShape {
    static constexpr int M = 2, KEYS = 32;
    static constexpr int OWN = TILE * Rows<D>::BYTES, WALKED = KEYS * Rows<D>::BYTES;
    static constexpr int MEMORY = 2 * OWN + 4 * WALKED;  // q, dO, and twice keys and values
};

template <typename T, int D>
static __global__ void __launch_bounds__(THREADS) backward_queries(const Work work) {
    using S = QueriesShape<D>;
    extern __shared__ __align__(1024) char memory[];
    uint32_t queries = __cvta_generic_to_shared(memory), walked = queries + 2 * S::OWN;
    Tile tile = work.tiles[blockIdx.x / work.heads];
    int head = blockIdx.x % work.heads, kv_head = head / (work.heads / work.kv_heads);
    int length = tile.length, block_query = tile.index * TILE;
    int query = block_query + threadIdx.x / 32 * 16 * S::M;  // this warp's first

    int token = tile.start + block_query, real = length - block_query;
    fetch_rows<D, TILE>(queries, work.q.at<T>(token, head), work.q.row, real);
    fetch_rows<D, TILE>(queries + S::OWN, work.d_out.at<T>(token, head), work.d_out.row, real);
    fetch_keys<T, D, S::KEYS>(walked, work, tile, kv_head, 0);

    float lse[2 * S::M], delta[2 * S::M];
    for (int r = 0; r < 2 * S::M; r++) {
        int row = query + row_of(r);
        int64_t at = (int64_t)head * work.tokens + tile.start + row;
        lse[r] = row < length ? work.lse[at] * LOG2_E : 0;
        delta[r] = row < length ? work.delta[at] : 0;
    }
    Sums<S::M, D / 8> dq;
    float factor = work.scale * LOG2_E;
    uint32_t rows = queries + (query - block_query) * Rows<D>::BYTES;
    auto step = [&](int key, uint32_t keys) {
        auto p = rows_by_rows<T, D, S::M, S::KEYS / 8>(rows, keys);
        hide_keys(p, work, length, query, key);
        auto ds = rows_by_rows<T, D, S::M, S::KEYS / 8>(rows + S::OWN, keys + S::WALKED);
#pragma unroll
        for (int m = 0; m < S::M; m++)
            for (int n = 0; n < S::KEYS / 8; n++)
                for (int i = 0; i < 4; i++) {
                    int r = 2 * m + i / 2;
                    float weight = exp2_of(p.x[m][n][i] * factor - lse[r]);
                    ds.x[m][n][i] = weight * (ds.x[m][n][i] - delta[r]);
                }
        add_weighted_rows<T, D>(dq, ds, keys);
    };
    walk_over_keys<T, D, S::KEYS>(work, tile, kv_head, walked, query, 16 * S::M, step);
    write_rows<D>(dq, work.scale, work.dq.at<T>(tile.start + query, head), work.dq.row,
               length - query);
}

// Here keys are the rows, and queries the columns. Narrow heads leave registers for 32 rows.
template <int D>
struct KeysShape {
    static constexpr int M = D > 72 ? 1 : 2, QUERIES = D > 72 ? 64 : 32;
    static constexpr int KEYS = WARPS * 16 * M;
    static constexpr int OWN = KEYS * Rows<D>::BYTES, WALKED = QUERIES * Rows<D>::BYTES;
    static constexpr int STAGE = 2 * WALKED + 2 * QUERIES * 4;  // q, dO, lse, delta
    static constexpr int FRESH = (STAGE + 1023) / 1024 * 1024;  // the next begins a round
    static constexpr int MEMORY = 2 * OWN + 2 * FRESH;
};

template <typename T, int D>
static __global__ void __launch_bounds__(THREADS) backward_keys(const Work work) {
    using S = KeysShape<D>;
    constexpr int PARTS = TILE / S::KEYS;
    extern __shared__ __align__(1024) char memory[];
    uint32_t keys = __cvta_generic_to_shared(memory), walked = keys + 2 * S::OWN;
    Tile tile = work.tiles[blockIdx.x / work.kv_heads / PARTS];
    int kv_head = blockIdx.x % work.kv_heads, part = blockIdx.x / work.kv_heads % PARTS;
    int length = tile.length, group = work.heads / work.kv_heads;
    // The list begins with the last, longest tiles of queries; for keys the first are longest.
    int index = (length + TILE - 1) / TILE - 1 - tile.index;
    int block_key = index * TILE + part * S::KEYS;
    if (block_key >= length) return;
    int key = block_key + threadIdx.x / 32 * 16 * S::M;  // this warp's first
    int first = work.causal ? block_key / S::QUERIES * S::QUERIES : 0;  // query that sees any
    int steps = (length - first + S::QUERIES - 1) / S::QUERIES;         // of a head

    auto fetch = [&](int step, uint32_t to) {
        int head = kv_head * group + step / steps, query = first + step % steps * S::QUERIES;
        int real = length - query, token = tile.start + query;
        fetch_rows<D, S::QUERIES>(to, work.q.at<T>(token, head), work.q.row, real);
        fetch_rows<D, S::QUERIES>(to + S::WALKED, work.d_out.at<T>(token, head), work.d_out.row,
                                  real);
        int i = threadIdx.x % S::QUERIES;
        const float* from = threadIdx.x < S::QUERIES ? work.lse : work.delta;
        from += (int64_t)head * work.tokens + token;
        if (threadIdx.x < 2 * S::QUERIES)
            copy_4_bytes(to + 2 * S::WALKED + 4 * threadIdx.x, from + i, i < real);
    };
    int token = tile.start + block_key, real = length - block_key;
    fetch_rows<D, S::KEYS>(keys, work.k.at<T>(token, kv_head), work.k.row, real);
    fetch_rows<D, S::KEYS>(keys + S::OWN, work.v.at<T>(token, kv_head), work.v.row, real);
    fetch(0, walked);

    Sums<S::M, D / 8> dk, dv;
    float factor = work.scale * LOG2_E;
    uint32_t rows = keys + (key - block_key) * Rows<D>::BYTES;
    for (int step = 0; step < group * steps; step++) {
        uint32_t queries = walked + step % 2 * S::FRESH;
        int query = first + step % steps * S::QUERIES;
        wait_for_copies();
        if (step + 1 < group * steps) fetch(step + 1, walked + (step + 1) % 2 * S::FRESH);
        if (key >= length || (work.causal && query + S::QUERIES <= key)) continue;
        auto p = rows_by_rows<T, D, S::M, S::QUERIES / 8>(rows, queries);
        if (work.causal) hide_queries(p, key, query);
        // Behind the segment's end q, dO, lse and delta are 0: a weight of 1, gradients of 0.
        const float* lse = (const float*)(memory + (queries - keys) + 2 * S::WALKED);
        const float* delta = lse + S::QUERIES;
#pragma unroll
        for (int m = 0; m < S::M; m++)
            for (int n = 0; n < S::QUERIES / 8; n++)
                for (int i = 0; i < 4; i++)
                    p.x[m][n][i] =
                        exp2_of(p.x[m][n][i] * factor - lse[column_of(n, i)] * LOG2_E);
        add_weighted_rows<T, D>(dv, p, queries + S::WALKED);
        auto ds = rows_by_rows<T, D, S::M, S::QUERIES / 8>(rows + S::OWN, queries + S::WALKED);
#pragma unroll
        for (int m = 0; m < S::M; m++)
            for (int n = 0; n < S::QUERIES / 8; n++)
                for (int i = 0; i < 4; i++)
                    ds.x[m][n][i] = p.x[m][n][i] * (ds.x[m][n][i] - delta[column_of(n, i)]);
        add_weighted_rows<T, D>(dk, ds, queries);
    }
    token = tile.start + key, real = length - key;
    write_rows<D>(dk, work.scale, work.dk.at<T>(token, kv_head), work.dk.row, real);
    write_rows<D>(dv, 1, work.dv.at<T>(token, kv_head), work.dv.row, real);
}

// ------------------------------------------------------------------------------------------------
// the host's side

template <typename Kernel>
static int launch(Kernel kernel, int64_t blocks, int memory, const Work& work,
                  cudaStream_t stream) {
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, memory);
    if (error != cudaSuccess) return error;
    kernel<<<blocks, THREADS, memory, stream>>>(work);
    return cudaGetLastError();
}

template <typename T, int D>
static int run_forward(const Work& work, cudaStream_t stream) {
    int64_t blocks = (int64_t)work.count * work.heads;
    return launch(forward<T, D>, blocks, ForwardShape<D>::MEMORY, work, stream);
}

template <typename T, int D>
static int run_backward(const Work& work, cudaStream_t stream) {
    constexpr int PARTS = TILE / KeysShape<D>::KEYS;
    int64_t tiles = work.count;
    int error = run_sum_of_products<T, D>(work, stream);
    if (!error)
        error = launch(backward_keys<T, D>, tiles * PARTS * work.kv_heads, KeysShape<D>::MEMORY,
                       work, stream);
    if (!error)
        error = launch(backward_queries<T, D>, tiles * work.heads, QueriesShape<D>::MEMORY, work,
                       stream);
    return error;
}

template <typename T>
static int run(const Work& work, int width, bool backward, cudaStream_t stream) {
    return with_width(width, [&](auto d) {
        return (backward ? run_backward<T, d.VALUE> : run_forward<T, d.VALUE>)(work, stream);
    });
}

// x: q, k, v, out, and for the backward pass d_out, dq, dk, dv: on the device, channels beside each
// other, addresses and steps multiples of 16 bytes. tiles: `count` of them, on the device, longest
// first. lse and delta (heads, tokens). Forward writes out and lse; backward delta, dq, dk, dv.
// Returns an error of CUDA's, 0: none.
extern "C" int attention(const Tensor* x, float* lse, float* delta, const Tile* tiles, int count,
                         int tokens, int heads, int kv_heads, int width, int causal, int is_bf16,
                         int backward, int device, void* stream) {
    cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    Tensor none{};
    Work work{x[0], x[1], x[2], x[3], none, none, none, none, lse, delta, tiles, count,
              tokens, heads, kv_heads, causal, 1 / sqrtf((float)width)};
    if (backward) work.d_out = x[4], work.dq = x[5], work.dk = x[6], work.dv = x[7];
    return (is_bf16 ? run<bf16> : run<half>)(work, width, backward, (cudaStream_t)stream);
}
