// What attention.cu and Hopper's kernels share: a pack of segments as the host lays it out, which
// keys a query sees, and how a warp's rows go to memory.

#pragma once

#include "tiles.cuh"

constexpr int TILE = 128;  // rows of one entry of the list of tiles

// Element (token, head, channel) lies at data[token * row + head * head_step + channel].
struct Tensor {
    void* data;
    int64_t row, head_step;
    template <typename T>
    __device__ T* at(int64_t token, int head) const {
        return (T*)data + token * row + head * head_step;
    }
};

// Rows TILE * index and on of the segment at `start`.
struct Tile {
    int start, length, index;
};

struct Work {
    Tensor q, k, v, out, d_out, dq, dk, dv;
    float *lse, *delta;  // (heads, tokens)
    const Tile* tiles;
    int count;  // tiles
    int tokens, heads, kv_heads, causal;
    float scale;
};

template <int D>
struct Width {
    static constexpr int VALUE = D;
};

// act(Width<D>{}), for heads D wide.
template <typename Act>
static int with_width(int width, Act act) {
    switch (width) {
        case 64: return act(Width<64>{});
        case 72: return act(Width<72>{});
        case 80: return act(Width<80>{});
        case 128: return act(Width<128>{});
    }
    return cudaErrorInvalidValue;
}

extern "C" const char* error_text(int error) { return cudaGetErrorString((cudaError_t)error); }

// The keys that a query sees: those before this one.
static __device__ int last_key(const Work& work, int length, int query) {
    return work.causal ? min(length, query + 1) : length;
}

// Scores of keys that a query does not see become -inf. Both are counted from the segment's start.
template <int M, int N>
static __device__ void hide_keys(Sums<M, N>& scores, const Work& work, int length, int query,
                                 int key) {
    if (key + 8 * N <= last_key(work, length, query)) return;  // the first query sees them all
#pragma unroll
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++)
            for (int i = 0; i < 4; i++) {
                int end = last_key(work, length, query + row_of(2 * m + i / 2));
                if (key + column_of(n, i) >= end) scores.x[m][n][i] = -INFINITY;
            }
}

// Scores of queries that come before the key become -inf.
template <int M, int N>
static __device__ void hide_queries(Sums<M, N>& scores, int key, int query) {
    if (query >= key + 16 * M - 1) return;
#pragma unroll
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++)
            for (int i = 0; i < 4; i++)
                if (query + column_of(n, i) < key + row_of(2 * m + i / 2))
                    scores.x[m][n][i] = -INFINITY;
}

// A warp's rows of D numbers go to memory; the first `real` of them exist.
template <int D, typename T, int M, int N>
static __device__ void write_rows(const Sums<M, N>& sums, float times, T* to, int64_t step,
                                  int real) {
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        if (row_of(i) >= real) continue;
        T* row = to + row_of(i) * step;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            const float* two = sums.x[i / 2][n] + i % 2 * 2;
            *(uint32_t*)(row + column_of(n, 0)) = pair<T>(two[0] * times, two[1] * times);
        }
    }
}

// The end of the forward pass: sums become means, and the softmax's two numbers the row's lse.
template <typename T, int D, int M, int N>
static __device__ void write_output(Sums<M, N>& sums, const float (&largest)[2 * M],
                                    float (&sum)[2 * M], const Work& work, Tile tile, int head,
                                    int query) {
    float inverse[2 * M];
    for (int r = 0; r < 2 * M; r++) {
        sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
        sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
        inverse[r] = 1 / sum[r];
        int row = query + row_of(r);
        if (threadIdx.x % 4 == 0 && row < tile.length)
            work.lse[(int64_t)head * work.tokens + tile.start + row] =
                largest[r] * work.scale + logf(sum[r]);
    }
    scale_rows(sums, inverse);
    write_rows<D>(sums, 1, work.out.at<T>(tile.start + query, head), work.out.row,
                  tile.length - query);
}

// ------------------------------------------------------------------------------------------------
// the first step of the backward pass

template <typename T>
struct alignas(16) Eight {
    T of[8];
};

// delta = rowsum(dO * O). 16 lanes have a row, 8 channels each.
template <typename T, int D>
static __global__ void __launch_bounds__(THREADS) sum_of_products(const Work work) {
    int64_t row = (int64_t)blockIdx.x * (THREADS / 16) + threadIdx.x / 16;
    int64_t token = row / work.heads;
    int head = row % work.heads, lane = threadIdx.x % 16;
    float sum = 0;
    if (token < work.tokens && lane < D / 8) {
        auto x = *(const Eight<T>*)(work.out.at<const T>(token, head) + lane * 8);
        auto y = *(const Eight<T>*)(work.d_out.at<const T>(token, head) + lane * 8);
        for (int i = 0; i < 8; i++) sum += (float)x.of[i] * (float)y.of[i];
    }
    for (int i = 1; i < 16; i *= 2) sum += __shfl_xor_sync(~0u, sum, i);
    if (token < work.tokens && lane == 0) work.delta[head * (int64_t)work.tokens + token] = sum;
}

template <typename T, int D>
static int run_sum_of_products(const Work& work, cudaStream_t stream) {
    constexpr int ROWS = THREADS / 16;
    int64_t rows = (int64_t)work.tokens * work.heads;
    sum_of_products<T, D><<<(rows + ROWS - 1) / ROWS, THREADS, 0, stream>>>(work);
    return cudaGetLastError();
}
