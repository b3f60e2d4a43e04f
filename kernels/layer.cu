// What a decoder layer does to one new token of each row beside its products and its attention, on
// NVIDIA GPUs; bf16 and fp16.
//
// With one token a row, every kernel is done as soon as it has begun, and a layer's time is that of
// reading its weights and of the number of its kernels. PyTorch's operators for what stands here
// are some twenty-five.
//
// Built by kernels/build.py; only CUDA's own headers are needed.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "chain.cuh"

constexpr int WARPS = 4;  // of a block

// As kernels/layer.py lays it out.
struct Heads {
    const void *q, *k, *v;              // (tokens, H, D), and (tokens, KV, D)
    const void *q_norm, *k_norm;        // weights of the norms (D,)
    const float *cos, *sin;             // (tokens, D / 2)
    const int64_t* places;              // (tokens,) in the cache, whose rows lie end to end
    void *out, *keys, *values;          // (tokens, H, D), and the caches (places, KV, D)
    int tokens, heads, kv_heads;
    float eps;
};

// A warp has one head of one token, a lane the pairs (i, i + D / 2) of it: queries and keys are
// normed and turned by their position, keys and values enter the cache.
template <typename T, int D>
static __global__ void enter_heads(const Heads x) {
    let_next_begin();
    wait_for_last();
    int lane = threadIdx.x % 32, task = blockIdx.x * WARPS + threadIdx.x / 32;
    int all = x.heads + 2 * x.kv_heads, token = task / all, head = task % all;
    if (token >= x.tokens) return;
    bool is_q = head < x.heads, is_v = head >= x.heads + x.kv_heads;
    int kv_head = (head - x.heads) % x.kv_heads;
    int64_t given = is_q ? (int64_t)token * x.heads + head : (int64_t)token * x.kv_heads + kv_head;
    int64_t taken = is_q ? given : x.places[token] * x.kv_heads + kv_head;
    const T* from = (const T*)(is_q ? x.q : is_v ? x.v : x.k) + given * D;
    T* to = (T*)(is_q ? x.out : is_v ? x.values : x.keys) + taken * D;

    constexpr int PAIRS = D / 64;  // of a lane
    float a[PAIRS], b[PAIRS], sum = 0;
    for (int p = 0; p < PAIRS; p++) {
        int i = lane + 32 * p;
        a[p] = (float)from[i];
        b[p] = (float)from[i + D / 2];
        sum += a[p] * a[p] + b[p] * b[p];
    }
    if (!is_v) {
        for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
        float scale = rsqrtf(sum / D + x.eps);
        const T* weight = (const T*)(is_q ? x.q_norm : x.k_norm);
        for (int p = 0; p < PAIRS; p++) {
            int i = lane + 32 * p;
            // rounded between the two, as PyTorch's operators do
            float u = (float)(T)(a[p] * scale * (float)weight[i]);
            float w = (float)(T)(b[p] * scale * (float)weight[i + D / 2]);
            float c = x.cos[(int64_t)token * (D / 2) + i], s = x.sin[(int64_t)token * (D / 2) + i];
            a[p] = u * c - w * s;
            b[p] = w * c + u * s;
        }
    }
    for (int p = 0; p < PAIRS; p++) {
        to[lane + 32 * p] = (T)a[p];
        to[lane + 32 * p + D / 2] = (T)b[p];
    }
}

// gate = silu(gate) * up
template <typename T>
static __global__ void swiglu(T* gate, const T* up, int64_t count) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float x = (float)gate[i];
    gate[i] = (T)((float)(T)(x / (1 + __expf(-x))) * (float)up[i]);
}

template <typename T>
static int run(const Heads& x, int width, cudaStream_t stream) {
    int tasks = x.tokens * (x.heads + 2 * x.kv_heads), blocks = (tasks + WARPS - 1) / WARPS;
    if (width != 64 && width != 128) return cudaErrorInvalidValue;
    void (*kernel)(Heads) = enter_heads<T, 128>;
    if (width == 64) kernel = enter_heads<T, 64>;
    return launch_early(kernel, blocks, 32 * WARPS, 0, stream, x);
}

template <typename T>
static int run(void* gate, const void* up, int64_t count, cudaStream_t stream) {
    swiglu<T><<<(count + 255) / 256, 256, 0, stream>>>((T*)gate, (const T*)up, count);
    return cudaGetLastError();
}

// Both return an error of CUDA's, 0: none.
extern "C" int layer_heads(const Heads* x, int width, int is_bf16, int device, void* stream) {
    cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    auto stream_ = (cudaStream_t)stream;
    return is_bf16 ? run<__nv_bfloat16>(*x, width, stream_) : run<half>(*x, width, stream_);
}

extern "C" int layer_swiglu(void* gate, const void* up, int64_t count, int is_bf16, int device,
                            void* stream) {
    cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    auto stream_ = (cudaStream_t)stream;
    return is_bf16 ? run<__nv_bfloat16>(gate, up, count, stream_)
                   : run<half>(gate, up, count, stream_);
}

extern "C" const char* layer_error(int error) { return cudaGetErrorString((cudaError_t)error); }
