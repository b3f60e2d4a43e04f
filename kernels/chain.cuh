// Kernels that follow one another closely, on Hopper GPUs and later ones: a kernel may begin while
// the one before it in the stream still runs, and wait for it where it needs its results. So its
// start, and what it can read before, costs no time of its own. On older GPUs each begins when the
// one before has ended.
//
// Every thread of such a kernel calls wait_for_last, or a kernel could end before the one before it.

#pragma once

#include <cuda_runtime.h>

// The stream's next kernel, if it is launched so, may begin where there is room.
static __device__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// From here on, all that the kernels before have written is there.
static __device__ void wait_for_last() {
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
}

// kernel<<<blocks, threads, bytes, stream>>>(given...), that begins early. An error of CUDA's.
template <typename... Wanted, typename... Given>
static cudaError_t launch_early(void (*kernel)(Wanted...), dim3 blocks, int threads, int bytes,
                                cudaStream_t stream, Given... given) {
    cudaFuncAttributes built;
    cudaError_t error = cudaFuncGetAttributes(&built, kernel);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = built.ptxVersion >= 90;  // else it would begin early, and not wait
    return cudaLaunchKernelEx(&config, kernel, Wanted(given)...);
}
