// The forward pass of attention.cu once more, for Hopper GPUs: wgmma and TMA (hopper.cuh).
//
//      a block       stays on its multiprocessor and takes tile after tile of 128 queries:
//                    warpgroup 0 fetches, 1 and 2 have 64 of the queries each.
//      fetching      one thread asks for queries, two tiles of them, and for tiles of keys and
//                    values. It runs ahead as places become free, into the block's next tiles too.
//      computing     scores of the next keys and sums over the last ones' values are started
//                    together; while the latter are added up, the former become weights:
//
//                        tensor cores    Q K1 | P0 V0      | Q K2 | P1 V1      | Q K3 | ...
//                        the same warps         softmax(1) |        softmax(2) |
//
//                    This goes on from one tile of queries to the next, so that short segments
//                    leave no gap. The two warpgroups take turns: one has its softmax while the
//                    other's products run.
//      shared        for D = 128: queries 32 KiB, 128 keys and as many values 32 KiB each, all
//      memory        twice: 192 KiB.
//      registers     of a computing thread: 64 scores, 32 with two weights each, D / 2 sums. The
//                    fetching warpgroup gives up most of its own for them.
//
// A tile's last rows may belong to the next segment: their scores become -inf, and their values 0,
// as 0 times something that is no number would not be 0.

#include "hopper.cuh"

constexpr int KEYS = 128, STAGES = 2;  // of a tile of keys or values; tiles of each in memory

template <int D>
struct Shape {
    static constexpr int QUERIES = TILE * Parts<D>::BYTES, WALKED = KEYS * Parts<D>::BYTES;
    static constexpr int BARRIERS = 2 * QUERIES + 2 * STAGES * WALKED, MEMORY = BARRIERS + 256;
    static_assert(WALKED % 1024 == 0, "the XOR starts anew every 1024 bytes");
};

struct Maps {
    Map q, k, v;
};

// One tile of queries of one head. Behind the last one: the last one.
struct Task {
    Tile tile;
    int head, query, end;  // query: the tile's first; end: of the keys that any sees

    __device__ Task(const Work& work, int i) {
        i = min(i, work.count * work.heads - 1);
        tile = work.tiles[i / work.heads];
        head = i % work.heads;
        query = tile.index * TILE;
        end = last_key(work, tile.length, query + TILE - 1);
    }
};

// Places in shared memory, and the barriers that tell when they are full and when free again.
// n: tiles of keys so far; round: of queries.
template <int D>
struct Places {
    using S = Shape<D>;
    uint32_t base;
    __device__ uint32_t queries(int round) const { return base + round % 2 * S::QUERIES; }
    __device__ uint32_t keys(int n) const {
        return base + 2 * S::QUERIES + n % STAGES * 2 * S::WALKED;
    }
    __device__ uint32_t values(int n) const { return keys(n) + S::WALKED; }
    __device__ uint32_t barrier(int i) const { return base + S::BARRIERS + 8 * i; }
    __device__ uint32_t queries_full(int round) const { return barrier(round % 2 * 2); }
    __device__ uint32_t queries_free(int round) const { return barrier(round % 2 * 2 + 1); }
    __device__ uint32_t keys_full(int n) const { return barrier(4 + n % STAGES * 4); }
    __device__ uint32_t keys_free(int n) const { return barrier(5 + n % STAGES * 4); }
    __device__ uint32_t values_full(int n) const { return barrier(6 + n % STAGES * 4); }
    __device__ uint32_t values_free(int n) const { return barrier(7 + n % STAGES * 4); }
    static constexpr int COUNT = 4 + 4 * STAGES;
    static __device__ int phase(int n) { return n / STAGES % 2; }
    static __device__ int phase_of_queries(int round) { return round / 2 % 2; }
};

template <int D>
static __device__ void fetch_all(const Work& work, const Maps& maps, const Places<D> at) {
    int n = 0, round = 0;
    for (int i = blockIdx.x; i < work.count * work.heads; i += gridDim.x, round++) {
        Task task(work, i);
        int token = task.tile.start, kv_head = task.head / (work.heads / work.kv_heads);
        wait_for(at.queries_free(round), at.phase_of_queries(round) ^ 1);  // at first: at once
        fetch<D, TILE>(at.queries(round), maps.q, task.head, token + task.query,
                       at.queries_full(round));
        for (int key = 0; key < task.end; key += KEYS, n++) {
            wait_for(at.keys_free(n), at.phase(n) ^ 1);
            fetch<D, KEYS>(at.keys(n), maps.k, kv_head, token + key, at.keys_full(n));
            wait_for(at.values_free(n), at.phase(n) ^ 1);
            fetch<D, KEYS>(at.values(n), maps.v, kv_head, token + key, at.values_full(n));
        }
    }
}

// What a row's softmax has come to; the last is what sums so far have to be multiplied with.
struct Softmax {
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, shrink[2];
};

template <typename T, int D>
static __device__ void compute_all(const Work& work, const Places<D> at, char* memory) {
    int group = threadIdx.x / GROUP - 1, first_row = group * GROUP_ROWS;
    int row = first_row + threadIdx.x % GROUP / 32 * 16;  // this warp's first of a tile
    float factor = work.scale * LOG2_E;
    Sums<1, Parts<D>::COLUMNS / 8> sums;
    Sums<1, KEYS / 8> scores;
    Weights<KEYS> weights;
    Softmax softmax;

    int i = blockIdx.x, n = 0, round = 0, key = 0;
    Task task(work, i), after(work, i + gridDim.x);
    auto begin_scores = [&](int round, int n) {
        begin_rows_by_rows<T, D, TILE, KEYS>(scores, at.queries(round), first_row, at.keys(n));
    };
    auto soften_scores = [&](const Task& task, int round, int n, int key) {
        leave(at.keys_free(n));
        if (key + KEYS >= task.end) leave(at.queries_free(round));
        hide_keys(scores, work, task.tile.length, task.query + row, key);
        soften(scores, factor, softmax.largest, softmax.sum, softmax.shrink);
    };
    auto wait_for_values = [&] {
        wait_for(at.values_full(n), at.phase(n));
        int real = task.tile.length - key;
        if (real < KEYS) clear_rows<D, KEYS>(memory + (at.values(n) - at.base), real);
    };
    wait_for(at.queries_full(0), 0);
    wait_for(at.keys_full(0), 0);
    begin_scores(0, 0);
    wait_for_products<0>(scores);
    soften_scores(task, 0, 0, 0);
    round_to<T>(weights, scores);
    if (group == 1) pass_by(3, 2 * GROUP);  // group 0 has the first turn
    while (true) {
        bool last = key + KEYS >= task.end;  // of this task: then the next one's scores begin
        if (last && i + gridDim.x >= work.count * work.heads) break;
        if (last) wait_for(at.queries_full(round + 1), at.phase_of_queries(round + 1));
        wait_for(at.keys_full(n + 1), at.phase(n + 1));
        wait_for_values();
        meet(3 + group, 2 * GROUP);
        begin_scores(round + last, n + 1);
        begin_weighted_rows<T, D>(sums, weights, at.values(n));
        pass_by(4 - group, 2 * GROUP);
        wait_for_products<1>(scores);
        Softmax done = softmax;
        if (last) softmax = Softmax();
        Task next = task;
        if (last) next = after;
        soften_scores(next, round + last, n + 1, last ? 0 : key + KEYS);
        wait_for_products<0>(sums);
        leave(at.values_free(n));
        if (last) {
            write_output<T, D>(sums, done.largest, done.sum, work, task.tile, task.head,
                               task.query + row);
            sums = Sums<1, Parts<D>::COLUMNS / 8>();
            i += gridDim.x, round++, key = 0;
            task = after;
            after = Task(work, i + gridDim.x);
        } else {
            scale_rows(sums, softmax.shrink);
            key += KEYS;
        }
        round_to<T>(weights, scores);
        n++;
    }
    wait_for_values();
    begin_weighted_rows<T, D>(sums, weights, at.values(n));
    wait_for_products<0>(sums);
    write_output<T, D>(sums, softmax.largest, softmax.sum, work, task.tile, task.head,
                       task.query + row);
}

template <typename T, int D>
static __global__ void __launch_bounds__(3 * GROUP, 1)
forward(const Work work, const __grid_constant__ Maps maps) {
    extern __shared__ __align__(1024) char memory[];
    Places<D> at{(uint32_t)__cvta_generic_to_shared(memory)};
    if (threadIdx.x == 0) {
        // whoever fills a place is one thread, and those who read it are eight warps
        for (int i = 0; i < at.COUNT; i++)
            make_barrier(at.barrier(i), i % 2 ? COMPUTING_WARPS : 1);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x < GROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 0) fetch_all<D>(work, maps, at);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        compute_all<T, D>(work, at, memory);
    }
}

// ------------------------------------------------------------------------------------------------
// the host's side

template <typename T, int D>
static int run(const Work& work, int device, cudaStream_t stream) {
    using S = Shape<D>;
    Maps maps{};
    if (!describe<T, D>(maps.q, work.q, work.tokens, work.heads, TILE) ||
        !describe<T, D>(maps.k, work.k, work.tokens, work.kv_heads, KEYS) ||
        !describe<T, D>(maps.v, work.v, work.tokens, work.kv_heads, KEYS))
        return NOT_TAKEN;
    int blocks;
    cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device);
    cudaError_t error = cudaFuncSetAttribute(
        forward<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::MEMORY);
    if (error != cudaSuccess) return error;
    blocks = min(blocks, work.count * work.heads);
    forward<T, D><<<blocks, 3 * GROUP, S::MEMORY, stream>>>(work, maps);
    return cudaGetLastError();
}

template <typename T>
static int run(const Work& work, int width, int device, cudaStream_t stream) {
    return with_width(width, [&](auto d) { return run<T, d.VALUE>(work, device, stream); });
}

// As attention.cu's function `attention`, forward only. Returns NOT_TAKEN for steps that TMA cannot
// go in; nothing is written then.
extern "C" int hopper(const Tensor* x, float* lse, float*, const Tile* tiles, int count, int tokens,
                      int heads, int kv_heads, int width, int causal, int is_bf16, int device,
                      void* stream) {
    cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    Tensor none{};
    Work work{x[0], x[1], x[2], x[3], none, none, none, none, lse, nullptr, tiles, count,
              tokens, heads, kv_heads, causal, 1 / sqrtf((float)width)};
    return (is_bf16 ? run<bf16> : run<half>)(work, width, device, (cudaStream_t)stream);
}
