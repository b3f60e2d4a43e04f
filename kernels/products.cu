// Products of one or two vectors with large matrices, on NVIDIA GPUs from sm_80 on; bf16 and fp16.
//
// Where a step has one token, each weight meets one number, so the time is that of reading the
// weights:
//
//      on the way     a warp has a row of the matrix, of which each lane asks for 16 x 16 bytes
//                     before it uses the first. The one block of a multiprocessor, of 16 warps,
//                     waits for 128 KiB; it goes on to further rows by itself.
//      first          a block asks for its first weights while the kernel before still runs
//                     (chain.cuh), as soon as a multiprocessor is free, and only then waits for
//                     the vectors that this one leaves.
//      few kernels    the norm before a product, the matrices that multiply the same vectors, the
//                     sum or SwiGLU behind it are one kernel.
//
// Each number of the result is added up by one warp, so every run gives the same bits.
//
// Built by kernels/build.py; only CUDA's own headers are needed.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "chain.cuh"

constexpr int WARPS = 16, THREADS = 32 * WARPS;
constexpr int LOADS = 16;        // of 16 bytes, that a lane waits for
constexpr int LANE = 8;          // numbers in 16 bytes
constexpr int WARP = 32 * LANE;  // numbers that a warp reads at a time

struct Matrix {
    const void* weight;  // (rows, width)
    void* out;           // (tokens, rows)
    int rows;
};

// As kernels/products.py lays it out.
struct Work {
    const void* x;       // (tokens, width)
    const void* norm;    // (width,) weight of an RMSNorm of x, or null
    const void* plus;    // (tokens, rows), added to the product, or null
    Matrix matrices[3];  // all multiply x
    int count, tokens, width;
    int swiglu;  // 1: of two matrices, silu(first product) * second goes to the first one's out
    float eps;
};

template <typename T>
static __device__ float inner(uint4 a, uint4 b) {
    const T *u = (const T*)&a, *v = (const T*)&b;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < LANE; i++) sum += (float)u[i] * (float)v[i];
    return sum;
}

static __device__ float warp_sum(float x) {
    for (int other = 16; other; other /= 2) x += __shfl_xor_sync(~0u, x, other);
    return x;
}

// The work's vectors come to shared memory, (TOKENS, width), normed where they are to be.
template <typename T, int TOKENS>
static __device__ void bring(const Work& work, T* x) {
    __shared__ float parts[WARPS];
    for (int t = 0; t < TOKENS; t++) {
        const uint4* from = (const uint4*)((const T*)work.x + (int64_t)t * work.width);
        uint4* to = (uint4*)(x + t * work.width);
        float sum = 0;
        for (int i = threadIdx.x; i < work.width / LANE; i += THREADS) {
            to[i] = from[i];
            sum += inner<T>(to[i], to[i]);
        }
        if (!work.norm) continue;
        sum = warp_sum(sum);
        __syncthreads();  // all have read the parts of the vector before
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
        __syncthreads();
        sum = 0;
        for (int w = 0; w < WARPS; w++) sum += parts[w];
        float scale = rsqrtf(sum / work.width + work.eps);
        // each thread what it has brought
        for (int i = threadIdx.x; i < work.width / LANE; i += THREADS) {
            T* at = (T*)&to[i];
            const T* weight = (const T*)work.norm + LANE * i;
            for (int j = 0; j < LANE; j++) at[j] = (T)((float)at[j] * scale * (float)weight[j]);
        }
    }
    __syncthreads();
}

// A lane's part of LOADS / M * WARP numbers of a row each of M matrices, from `begin` on.
template <typename T, int M>
static __device__ void fetch(uint4 (&bits)[M][LOADS / M], const T* const (&rows)[M], int begin,
                             int width) {
#pragma unroll
    for (int i = 0; i < LOADS / M; i++) {
        int k = begin + i * WARP + threadIdx.x % 32 * LANE;
        // read once, so not to be kept
        for (int m = 0; m < M; m++)
            if (k < width) bits[m][i] = __ldcs((const uint4*)(rows[m] + k));
    }
}

// The product of one row each of M matrices with x, to where a lane can take it.
template <typename T, int TOKENS, int M>
static __device__ void use(const uint4 (&bits)[M][LOADS / M], const T* x, int begin, int width,
                           float (&sums)[M][TOKENS]) {
#pragma unroll
    for (int i = 0; i < LOADS / M; i++) {
        int k = begin + i * WARP + threadIdx.x % 32 * LANE;
        if (k < width)
            for (int t = 0; t < TOKENS; t++) {
                uint4 numbers = *(const uint4*)(x + t * width + k);
                for (int m = 0; m < M; m++) sums[m][t] += inner<T>(bits[m][i], numbers);
            }
    }
}

// Row `row` of all matrices, counted through: that row of the one that it falls in.
static __device__ const Matrix& find(const Work& work, int& row) {
    int m = 0;
    while (row >= work.matrices[m].rows) row -= work.matrices[m++].rows;
    return work.matrices[m];
}

// M: 2 where a warp has a row of both matrices, for SwiGLU.
template <typename T, int TOKENS, int M>
static __global__ void __launch_bounds__(THREADS) multiply(const Work work, int all) {
    extern __shared__ uint4 memory[];
    T* x = (T*)memory;
    // A warp without a row goes through the loop once as well: all must meet in `bring`.
    bool brought = false;
    int first = blockIdx.x * WARPS + threadIdx.x / 32;
    for (int number = first; number < all || !brought; number += gridDim.x * WARPS) {
        int row = min(number, all - 1);
        const Matrix& matrix = find(work, row);
        const T* rows[M];
        for (int m = 0; m < M; m++) {
            const Matrix& from = m ? work.matrices[m] : matrix;
            rows[m] = (const T*)from.weight + (int64_t)row * work.width;
        }
        uint4 bits[M][LOADS / M];
        // Before waiting: so the kernel just before may write anything but weights.
        fetch<T, M>(bits, rows, 0, work.width);
        if (!brought) {
            let_next_begin();
            wait_for_last();
            bring<T, TOKENS>(work, x);
        }
        brought = true;

        float sums[M][TOKENS] = {};
        for (int begin = 0; begin < work.width; begin += LOADS / M * WARP) {
            if (begin) fetch<T, M>(bits, rows, begin, work.width);
            use<T, TOKENS, M>(bits, x, begin, work.width, sums);
        }
        for (int t = 0; t < TOKENS; t++) {
            for (int m = 0; m < M; m++) sums[m][t] = warp_sum(sums[m][t]);
            if (threadIdx.x % 32 != t || number >= all) continue;
            // rounded after each operation, as PyTorch's are
            int64_t place = (int64_t)t * matrix.rows + row;
            float result = (float)(T)sums[0][t];
            if (M == 2) {
                float silu = (float)(T)(result / (1 + __expf(-result)));
                result = silu * (float)(T)sums[M - 1][t];
            } else if (work.plus) {
                result += (float)((const T*)work.plus)[place];
            }
            ((T*)matrix.out)[place] = (T)result;
        }
    }
}

template <typename T, int TOKENS, int M>
static int launch(const Work& work, int processors, cudaStream_t stream) {
    int all = 0;
    for (int m = 0; m < (M == 2 ? 1 : work.count); m++) all += work.matrices[m].rows;
    int bytes = TOKENS * work.width * sizeof(T);
    auto kernel = multiply<T, TOKENS, M>;
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    int blocks = min((all + WARPS - 1) / WARPS, processors);
    return launch_early(kernel, blocks, THREADS, bytes, stream, work, all);
}

template <typename T, int TOKENS>
static int launch(const Work& work, int processors, cudaStream_t stream) {
    return work.swiglu ? launch<T, TOKENS, 2>(work, processors, stream)
                       : launch<T, TOKENS, 1>(work, processors, stream);
}

template <typename T>
static int launch(const Work& work, int processors, cudaStream_t stream) {
    if (work.tokens == 1) return launch<T, 1>(work, processors, stream);
    if (work.tokens == 2) return launch<T, 2>(work, processors, stream);
    return cudaErrorInvalidValue;
}

// Returns an error of CUDA's, 0: none.
extern "C" int products(const Work* work, int is_bf16, int processors, int device, void* stream) {
    cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    return is_bf16 ? launch<__nv_bfloat16>(*work, processors, (cudaStream_t)stream)
                   : launch<half>(*work, processors, (cudaStream_t)stream);
}

extern "C" const char* products_error(int error) { return cudaGetErrorString((cudaError_t)error); }
