// The backward pass of attention.cu once more, for Hopper GPUs: wgmma and TMA (hopper.cuh).
//
// Two kernels as there, dK and dV for tiles of keys and dQ for tiles of queries, and nothing is
// added up in memory. What both do:
//
//      a block       stays on its multiprocessor and takes tile after tile of 128 rows, its own:
//                    keys and values, or q and dO. Warp 0 fetches; warpgroups 1 and 2 have 64 rows
//                    each, and walk over tiles of 64 rows of the other two tensors.
//      computing     the next tile's first product is started together with this one's last, and
//                    its second right after: scores become weights while those run. A warpgroup
//                    that waits leaves the tensor cores to the other.
//      shared        for D = 128: 64 KiB of own rows; walked ones 32 KiB, three times: 160 KiB.
//      registers     of a thread with keys: 2 x D / 2 sums, 32 scores, 32 gradients of weights, and
//                    16 with two of either, rounded: for D = 128 208 of its 240, and no more fit.

#include "hopper.cuh"

constexpr int WALKED = 64;  // rows of a walked tile

template <int D>
struct Shape {
    static constexpr int OWNED = D == 128 ? 1 : 2, STAGES = D == 128 ? 3 : 4;
    static constexpr int OWN = TILE * Parts<D>::BYTES, TENSOR = WALKED * Parts<D>::BYTES;  // bytes
    static constexpr int STAGE = 2 * TENSOR + 1024;  // and with keys, lse and delta of queries
    static constexpr int STAGED = OWNED * 2 * OWN, BARRIERS = STAGED + STAGES * STAGE;
    static constexpr int MEMORY = BARRIERS + 256;
    static_assert(TENSOR % 1024 == 0, "the XOR starts anew every 1024 bytes");
};

struct Maps {
    Map own[2], walked[2];  // k, v and q, dO; or q, dO and k, v
};

// A tile of keys of a key head, or of queries of a head, and what is walked over: `steps` tiles of
// each of some heads, from row `first` of the segment on.
struct Task {
    Tile tile;
    int own, head, walked_head, first, steps, total;

    __device__ Task(const Work& work, int i, bool keys) {
        int heads = keys ? work.kv_heads : work.heads, group = work.heads / work.kv_heads;
        tile = work.tiles[i / heads];
        head = i % heads;
        // The list begins with the last, longest tiles of queries; for keys the first are longest.
        int index = keys ? (tile.length - 1) / TILE - tile.index : tile.index;
        own = index * TILE;
        first = keys && work.causal ? own : 0;
        int end = keys ? tile.length : last_key(work, tile.length, own + TILE - 1);
        steps = (end - first + WALKED - 1) / WALKED;
        walked_head = keys ? head * group : head / group;
        total = keys ? steps * group : steps;
    }
    __device__ int row(int step) const { return first + step % steps * WALKED; }
};

// Places in shared memory, and the barriers that tell when they are full and when free again.
// n: walked tiles so far; round: own ones.
template <int D>
struct Places {
    using S = Shape<D>;
    uint32_t base;
    __device__ uint32_t own(int round) const { return base + round % S::OWNED * 2 * S::OWN; }
    __device__ uint32_t walked(int n) const {
        return base + S::STAGED + n % S::STAGES * S::STAGE;
    }
    __device__ uint32_t barrier(int i) const { return base + S::BARRIERS + 8 * i; }
    __device__ uint32_t own_full(int round) const { return barrier(round % S::OWNED * 2); }
    __device__ uint32_t own_free(int round) const { return barrier(round % S::OWNED * 2 + 1); }
    __device__ uint32_t full(int n) const { return barrier(4 + n % S::STAGES * 2); }
    __device__ uint32_t free(int n) const { return barrier(5 + n % S::STAGES * 2); }
    static constexpr int COUNT = 4 + 2 * S::STAGES;
    static __device__ int phase(int n) { return n / S::STAGES % 2; }
    static __device__ int own_phase(int round) { return round / S::OWNED % 2; }
};

// With keys, a warp's lanes bring lse and delta of walked queries; lane 0 asks for everything else.
// Whoever waits here also arrives: a lane that nobody waits for could miss a whole turn of phases.
template <int D, bool KEYS>
static __device__ void fetch_all(const Work& work, const Maps& maps, const Places<D> at,
                                 int tasks) {
    using S = Shape<D>;
    bool speaks = threadIdx.x == 0;
    int n = 0, round = 0;
    for (int i = blockIdx.x; i < tasks; i += gridDim.x, round++) {
        Task task(work, i, KEYS);
        int start = task.tile.start;
        wait_for(at.own_free(round), at.own_phase(round) ^ 1);  // at first: at once
        for (int x = 0; x < 2 && speaks; x++)
            fetch<D, TILE>(at.own(round) + x * S::OWN, maps.own[x], task.head, start + task.own,
                           at.own_full(round));
        for (int step = 0; step < task.total; step++, n++) {
            int head = task.walked_head + step / task.steps, row = task.row(step);
            wait_for(at.free(n), at.phase(n) ^ 1);
            for (int x = 0; x < 2 && speaks; x++)
                fetch<D, WALKED>(at.walked(n) + x * S::TENSOR, maps.walked[x], head, start + row,
                                 at.full(n));
            if (!KEYS) continue;
            int64_t from = (int64_t)head * work.tokens + start + row;
            uint32_t to = at.walked(n) + 2 * S::TENSOR;
            for (int j = threadIdx.x; j < WALKED; j += 32) {
                bool real = row + j < task.tile.length;
                copy_4_bytes(to + 4 * j, work.lse + from + j, real);
                copy_4_bytes(to + 4 * (WALKED + j), work.delta + from + j, real);
            }
            arrive_with_copies(at.full(n));
        }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// Waits for a walked tile. Rows behind the segment's end become zeros: with lse and delta 0 too, a
// weight of 1 and gradients of 0.
template <int D>
static __device__ void wait_for_walked(const Places<D> at, int n, int real, char* memory) {
    wait_for(at.full(n), at.phase(n));
    if (real >= WALKED) return;
    for (int x = 0; x < 2; x++)
        clear_rows<D, WALKED>(memory + (at.walked(n) - at.base) + x * Shape<D>::TENSOR, real);
}

template <typename T, int D>
static __device__ void compute_queries(const Work& work, const Places<D> at, char* memory,
                                       int tasks) {
    using S = Shape<D>;
    int first_row = (threadIdx.x / GROUP - 1) * GROUP_ROWS;
    float factor = work.scale * LOG2_E;
    int n = 0, round = 0;
    for (int i = blockIdx.x; i < tasks; i += gridDim.x, round++) {
        Task task(work, i, false);
        int length = task.tile.length, query = task.own + first_row + threadIdx.x % GROUP / 32 * 16;
        float lse[2], delta[2];
        for (int r = 0; r < 2; r++) {
            int row = query + row_of(r);
            int64_t place = (int64_t)task.head * work.tokens + task.tile.start + row;
            lse[r] = row < length ? work.lse[place] * LOG2_E : 0;
            delta[r] = row < length ? work.delta[place] : 0;
        }
        Sums<1, Parts<D>::COLUMNS / 8> dq;
        Sums<1, WALKED / 8> p, ds;
        Weights<WALKED> weights;
        auto begin_scores = [&](int n) {
            begin_rows_by_rows<T, D, TILE, WALKED>(p, at.own(round), first_row, at.walked(n));
        };
        wait_for(at.own_full(round), at.own_phase(round));
        wait_for_walked(at, n, length, memory);
        begin_scores(n);
        for (int step = 0;; step++, n++) {
            begin_rows_by_rows<T, D, TILE, WALKED>(ds, at.own(round) + S::OWN, first_row,
                                                   at.walked(n) + S::TENSOR);
            if (step) wait_for_products<2>(p);  // the last step's products need not be done
            else wait_for_products<1>(p);
            hide_keys(p, work, length, query, step * WALKED);
#pragma unroll
            for (int j = 0; j < WALKED / 8; j++)
                for (int c = 0; c < 4; c++)
                    p.x[0][j][c] = exp2_of(p.x[0][j][c] * factor - lse[c / 2]);
            wait_for_products<1>(dq);
            if (step) leave(at.free(n - 1));
            wait_for_products<0>(ds);
#pragma unroll
            for (int j = 0; j < WALKED / 8; j++)
                for (int c = 0; c < 4; c++)
                    ds.x[0][j][c] = p.x[0][j][c] * (ds.x[0][j][c] - delta[c / 2]);
            round_to<T>(weights, ds);
            if (step + 1 == task.total) break;
            wait_for_walked(at, n + 1, length - (step + 1) * WALKED, memory);
            begin_scores(n + 1);
            begin_weighted_rows<T, D>(dq, weights, at.walked(n));
        }
        leave(at.own_free(round));
        begin_weighted_rows<T, D>(dq, weights, at.walked(n));
        wait_for_products<0>(dq);
        leave(at.free(n));
        n++;
        write_rows<D>(dq, work.scale, work.dq.at<T>(task.tile.start + query, task.head),
                      work.dq.row, length - query);
    }
}

template <typename T, int D>
static __device__ void compute_keys(const Work& work, const Places<D> at, char* memory, int tasks) {
    using S = Shape<D>;
    int first_row = (threadIdx.x / GROUP - 1) * GROUP_ROWS;
    float factor = work.scale * LOG2_E;
    int n = 0, round = 0;
    for (int i = blockIdx.x; i < tasks; i += gridDim.x, round++) {
        Task task(work, i, true);
        int length = task.tile.length, key = task.own + first_row + threadIdx.x % GROUP / 32 * 16;
        Sums<1, Parts<D>::COLUMNS / 8> dk, dv;
        Sums<1, WALKED / 8> p, ds;  // (keys, queries)
        Weights<WALKED> weights;
        auto begin_scores = [&](int n) {
            begin_rows_by_rows<T, D, TILE, WALKED>(p, at.own(round), first_row, at.walked(n));
        };
        wait_for(at.own_full(round), at.own_phase(round));
        wait_for_walked(at, n, length - task.row(0), memory);
        begin_scores(n);
        for (int step = 0;; step++, n++) {
            begin_rows_by_rows<T, D, TILE, WALKED>(ds, at.own(round) + S::OWN, first_row,
                                                   at.walked(n) + S::TENSOR);
            const char* staged = memory + (at.walked(n) - at.base) + 2 * S::TENSOR;
            const float2* lse = (const float2*)staged + threadIdx.x % 4;  // of 8 j + 2 lanes
            const float2* delta = lse + WALKED / 2;
            if (step) wait_for_products<2>(p);  // the last step's products need not be done
            else wait_for_products<1>(p);
            if (work.causal) hide_queries(p, key, task.row(step));
#pragma unroll
            for (int j = 0; j < WALKED / 8; j++)
                for (int c = 0; c < 4; c++) {
                    float shift = (c % 2 ? lse[4 * j].y : lse[4 * j].x) * LOG2_E;
                    p.x[0][j][c] = exp2_of(p.x[0][j][c] * factor - shift);
                }
            wait_for_products<1>(dk);
            if (step) leave(at.free(n - 1));
            round_to<T>(weights, p);
            begin_weighted_rows<T, D>(dv, weights, at.walked(n) + S::TENSOR);
            wait_for_products<0>(ds);  // and dv: there are no registers for both kinds of weights
#pragma unroll
            for (int j = 0; j < WALKED / 8; j++)
                for (int c = 0; c < 4; c++)
                    ds.x[0][j][c] =
                        p.x[0][j][c] * (ds.x[0][j][c] - (c % 2 ? delta[4 * j].y : delta[4 * j].x));
            round_to<T>(weights, ds);
            if (step + 1 == task.total) break;
            wait_for_walked(at, n + 1, length - task.row(step + 1), memory);
            begin_scores(n + 1);
            begin_weighted_rows<T, D>(dk, weights, at.walked(n));
        }
        leave(at.own_free(round));
        begin_weighted_rows<T, D>(dk, weights, at.walked(n));
        wait_for_products<0>(dk);
        wait_for_products<0>(dv);
        leave(at.free(n));
        n++;
        int token = task.tile.start + key, real = length - key;
        write_rows<D>(dk, work.scale, work.dk.at<T>(token, task.head), work.dk.row, real);
        write_rows<D>(dv, 1, work.dv.at<T>(token, task.head), work.dv.row, real);
    }
}

template <typename T, int D, bool KEYS>
static __global__ void __launch_bounds__(3 * GROUP, 1)
backward(const Work work, const __grid_constant__ Maps maps) {
    extern __shared__ __align__(1024) char memory[];
    Places<D> at{(uint32_t)__cvta_generic_to_shared(memory)};
    int tasks = work.count * (KEYS ? work.kv_heads : work.heads);
    if (threadIdx.x == 0) {
        for (int i = 0; i < at.COUNT; i++) {
            // two tensors, and beside walked queries each lane's part of lse and delta
            int fills = i >= 4 && KEYS ? 2 + 32 : 2;
            make_barrier(at.barrier(i), i % 2 ? COMPUTING_WARPS : fills);
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x < GROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x < (KEYS ? 32 : 1)) fetch_all<D, KEYS>(work, maps, at, tasks);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        if (KEYS) compute_keys<T, D>(work, at, memory, tasks);
        else compute_queries<T, D>(work, at, memory, tasks);
    }
}

// ------------------------------------------------------------------------------------------------
// the host's side

template <typename T, int D, bool KEYS>
static int launch(const Work& work, const Maps& maps, int multiprocessors, cudaStream_t stream) {
    auto kernel = backward<T, D, KEYS>;
    int tasks = work.count * (KEYS ? work.kv_heads : work.heads), memory = Shape<D>::MEMORY;
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, memory);
    if (error != cudaSuccess) return error;
    kernel<<<min(multiprocessors, tasks), 3 * GROUP, memory, stream>>>(work, maps);
    return cudaGetLastError();
}

template <typename T, int D>
static int run(const Work& work, int device, cudaStream_t stream) {
    Maps keys{}, queries{};
    bool good = true;
    auto add = [&](Map& own, Map& walked, const Tensor& x, int heads) {
        good &= describe<T, D>(own, x, work.tokens, heads, TILE);
        good &= describe<T, D>(walked, x, work.tokens, heads, WALKED);
    };
    add(queries.own[0], keys.walked[0], work.q, work.heads);
    add(queries.own[1], keys.walked[1], work.d_out, work.heads);
    add(keys.own[0], queries.walked[0], work.k, work.kv_heads);
    add(keys.own[1], queries.walked[1], work.v, work.kv_heads);
    if (!good) return NOT_TAKEN;
    int blocks;
    cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device);
    int error = run_sum_of_products<T, D>(work, stream);
    if (!error) error = launch<T, D, true>(work, keys, blocks, stream);
    if (!error) error = launch<T, D, false>(work, queries, blocks, stream);
    return error;
}

template <typename T>
static int run(const Work& work, int width, int device, cudaStream_t stream) {
    return with_width(width, [&](auto d) { return run<T, d.VALUE>(work, device, stream); });
}

// As attention.cu's function `attention`, backward only. Returns NOT_TAKEN for steps that TMA
// cannot go in; nothing is written then.
extern "C" int hopper(const Tensor* x, float* lse, float* delta, const Tile* tiles, int count,
                      int tokens, int heads, int kv_heads, int width, int causal, int is_bf16,
                      int device, void* stream) {
    cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    Work work{x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], lse, delta, tiles, count,
              tokens, heads, kv_heads, causal, 1 / sqrtf((float)width)};
    return (is_bf16 ? run<bf16> : run<half>)(work, width, device, (cudaStream_t)stream);
}
