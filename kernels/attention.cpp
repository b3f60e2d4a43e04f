// Attention over packed segments on the CPU, forward and backward, full or causal, grouped queries.
//
// Like kernels/attention.py's reference it computes softmax(q k^T / sqrt(D)) v within each segment,
// but it never holds more of the scores than one tile of KEYS x QUERIES:
//
//                  queries, a tile at a time
//                 +--------+--------+
//      keys,      | scores |        |     running, for every query: the largest score so far,
//      a tile     +--------+--------+     the sum of exp(score - largest), and the sum of
//      at a time  |  next  |        |     exp(score - largest) * value.
//                 +--------+--------+
//
// When a later tile brings a larger score, the three are scaled down to it (online softmax, Milakov
// and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135). At the end the output is the
// sum of values over the sum of weights, and lse = largest + log(sum) is kept: the backward pass
// needs nothing else to compute any tile of the weights again.
//
// Scores lie with the keys downwards: so the queries of a tile fill vectors, and largest, sum and
// lse are vectors too. Nothing is ever summed up across a vector.
//
// A task is one key head of one segment, in the forward pass with up to CHUNK of its queries, and
// all the query heads that share it. Its rows are copied once into the layout that the products
// want; tasks write to places of their own, so any number of threads gives the same bits. All
// products go through `product` below, on registers: ROWS x 2 vectors.
//
// bf16 is converted where it is copied, and everything is added up in fp32.
// Built by kernels/build.py with -march=native; VECTOR floats are one register of that machine.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
constexpr int VECTOR = 16, ROWS = 12;  // 32 registers: 12 x 2 sums, 2 of b, 1 of a
#elif defined(__AVX2__)
constexpr int VECTOR = 8, ROWS = 6;  // 16 registers
#else
constexpr int VECTOR = 4, ROWS = 8;  // NEON has 32; elsewhere the compiler spills
#endif
constexpr int KEYS = 96;     // of a tile: a multiple of every ROWS
constexpr int QUERIES = 64;  // of a tile: its scores, 24 KiB, stay in the first cache
constexpr int CHUNK = 192;   // queries of a forward task

typedef float floats __attribute__((vector_size(4 * VECTOR)));
typedef float floats_anywhere __attribute__((vector_size(4 * VECTOR), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * VECTOR)));

static floats load(const float* p) { return *(const floats_anywhere*)p; }
static void store(float* p, floats x) { *(floats_anywhere*)p = x; }
static int padded(int n) { return (n + VECTOR - 1) / VECTOR * VECTOR; }
static int tiled(int queries) { return (queries + QUERIES - 1) / QUERIES * QUERIES; }
static void scale_row(float* x, int wide, float by) {
    for (int d = 0; d < wide; d += VECTOR) store(x + d, load(x + d) * by);
}

// Places for the copies that a task makes, one behind the other, each at the start of a cache line.
// A thread keeps the memory for all its tasks.
class Scratch {
    static constexpr size_t LINE = 16;  // numbers
    std::vector<float> memory;
    float* free;

  public:
    static constexpr size_t TAKES = 13;  // at most, for one task

    explicit Scratch(size_t numbers) : memory(numbers + (TAKES + 1) * LINE) { reset(); }
    void reset() {
        uintptr_t start = (uintptr_t)memory.data();
        free = (float*)((start + 63) / 64 * 64);
    }
    float* take(size_t n) {
        float* taken = free;
        free += (n + LINE - 1) / LINE * LINE;
        return taken;
    }
    float* zeros(size_t n) { return std::fill_n(take(n), n, 0.0f) - n; }
};

// ------------------------------------------------------------------------------------------------
// fp32 and bf16

struct bf16 {
    uint16_t bits;
};

static float to_float(float x) { return x; }
static float to_float(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

static void assign(float& to, float x) { to = x; }
static void assign(bf16& to, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x == x) bits += 0x7fff + (bits >> 16 & 1);  // to the nearest, ties to even
    to.bits = bits >> 16;
    if (x != x) to.bits |= 0x40;  // a NaN stays one
}

// ------------------------------------------------------------------------------------------------
// products of small matrices

// A matrix in memory: element (row, column) lies at data[row * step + column * across]. With
// across = 1 its rows are whole; with step = 1 it is the transpose of what is stored.
struct Matrix {
    float* data;
    int step, across = 1;
    Matrix below(int rows) const { return {data + rows * step, step, across}; }
    Matrix right(int columns) const { return {data + columns * across, step, across}; }
};

// c (R, N vectors) = a (R, k) b (k, N vectors), or c += a b. b and c have whole rows.
template <int R, int N>
static void product_in_registers(int k, Matrix a, Matrix b, Matrix c, bool add) {
    floats sum[R][N] = {};
    for (int i = 0; i < k; i++) {
        floats row[N];
        for (int n = 0; n < N; n++) row[n] = load(b.data + i * b.step + n * VECTOR);
        for (int r = 0; r < R; r++) {
            float x = a.data[r * a.step + i * a.across];
            for (int n = 0; n < N; n++) sum[r][n] += x * row[n];
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) {
            float* to = c.data + r * c.step + n * VECTOR;
            store(to, add ? load(to) + sum[r][n] : sum[r][n]);
        }
}

template <int N>
static void product_of_columns(int rows, int k, Matrix a, Matrix b, Matrix c, bool add) {
    constexpr int R = ROWS * 2 / N;  // as many sums as there are registers
    int r = 0;
    for (; r + R <= rows; r += R) product_in_registers<R, N>(k, a.below(r), b, c.below(r), add);
    for (; r + R / 2 <= rows; r += R / 2)
        product_in_registers<R / 2, N>(k, a.below(r), b, c.below(r), add);
    for (; r < rows; r++) product_in_registers<1, N>(k, a.below(r), b, c.below(r), add);
}

// c (rows, columns) = a (rows, k) b (k, columns), or c += a b; columns is a multiple of VECTOR.
static void product(int rows, int columns, int k, Matrix a, Matrix b, Matrix c, bool add) {
    int n = 0;
    for (; n + 2 * VECTOR <= columns; n += 2 * VECTOR)
        product_of_columns<2>(rows, k, a, b.right(n), c.right(n), add);
    if (n < columns) product_of_columns<1>(rows, k, a, b.right(n), c.right(n), add);
}

// e^x to 2 units in the last place, 0 below -87: 2^n 2^f with n whole and |f| <= 1/2.
static floats exponential(floats x) {
    floats y = x * 1.44269504f;
    y = y < -126.0f ? floats{} - 126.0f : y;
    floats shifted = y + 12582912.0f;  // 1.5 * 2^23: whole numbers are all that is left
    floats n = shifted - 12582912.0f;
    // the rest of x, not of y: a rounded y times ln 2 would be off in the last places
    floats f = x - n * 0.693359375f + n * 2.12194440e-4f;
    floats p = f * (1.0f / 720) + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    ints power = (__builtin_convertvector(n, ints) + 127) << 23;
    floats result = p * (floats)power;
    return x < -87.0f ? floats{} : result;
}

// ------------------------------------------------------------------------------------------------
// what the passes share

// One of the arguments: element (token, head, channel) lies at data[token * row + head * head_step
// + channel].
template <typename T>
struct Tensor {
    T* data;
    int64_t row, head_step;
    T* at(int64_t token, int head) const { return data + token * row + head * head_step; }
};

struct Shape {
    int heads, kv_heads, width;  // width: D
    bool causal;
    int group() const { return heads / kv_heads; }
    float scale() const { return 1 / std::sqrt((float)width); }
};

// Queries first..last of the segment at `start` that has `length` tokens, for one key head.
struct Task {
    int64_t start;
    int length, kv_head, first, last;
    int64_t work() const { return (int64_t)length * (last - first); }
};

// Rows of one head as fp32, `wide` floats each with zeros behind the first `width`.
template <typename T>
static void copy_rows(const Tensor<const T>& x, int64_t token, int head, int rows, int width,
                      int wide, float times, float* out) {
    for (int r = 0; r < rows; r++, out += wide) {
        const T* row = x.at(token + r, head);
        for (int d = 0; d < width; d++) out[d] = to_float(row[d]) * times;
        for (int d = width; d < wide; d++) out[d] = 0;
    }
}

// The transpose of fp32 rows: out[d * columns + row], zeros behind the last row.
static void transpose(const float* x, int rows, int width, int wide, int columns, float* out) {
    for (int d = 0; d < width; d++) {
        for (int r = 0; r < rows; r++) out[d * columns + r] = x[r * wide + d];
        for (int r = rows; r < columns; r++) out[d * columns + r] = 0;
    }
}

template <typename T>
static void write_rows(const float* x, int rows, int width, int wide, const Tensor<T>& out,
                       int64_t token, int head) {
    for (int r = 0; r < rows; r++)
        for (int d = 0; d < width; d++) assign(out.at(token + r, head)[d], x[r * wide + d]);
}

// Scores (keys, columns) of queries that come before the key become -inf; both are counted from the
// segment's start.
static void hide_later_keys(float* scores, int keys, int columns, int first_key, int first_query) {
    for (int i = 0; i < keys; i++)
        for (int j = 0; j < std::min(columns, first_key + i - first_query); j++)
            scores[i * columns + j] = -INFINITY;
}

// ------------------------------------------------------------------------------------------------
// forward

// Takes a tile of scores (keys, columns) into the running softmax of its queries: scores become
// weights. shrink: what sums so far have to be multiplied with, as largest has grown.
static void soften(float* scores, int keys, int columns, float* largest, float* sum,
                   float* shrink) {
    for (int j = 0; j < columns; j += VECTOR) {
        floats before = load(largest + j), top = before;
        for (int i = 0; i < keys; i++) {
            floats x = load(scores + i * columns + j);
            top = x > top ? x : top;
        }
        floats total = {};
        for (int i = 0; i < keys; i++) {
            floats weight = exponential(load(scores + i * columns + j) - top);
            store(scores + i * columns + j, weight);
            total += weight;
        }
        floats less = exponential(before - top);  // 0 at the first tile, where before is -inf
        store(largest + j, top);
        store(sum + j, load(sum + j) * less + total);
        store(shrink + j, less);
    }
}

template <typename T>
struct Forward {
    Tensor<const T> q, k, v;
    Tensor<T> out;
    float* lse;      // (heads, all tokens)
    int64_t tokens;  // all of them
    Shape shape;

    size_t scratch(const Task& task) const {
        size_t wide = padded(shape.width);
        size_t queries = shape.group() * tiled(task.last - task.first);
        return queries * (2 * wide + 2) + (2 * KEYS + QUERIES) * wide + (KEYS + 1) * QUERIES;
    }

    void task(const Task& task, Scratch& scratch) const {
        auto [start, length, kv_head, first, last] = task;
        int width = shape.width, wide = padded(width), group = shape.group();
        int room = tiled(last - first);  // of one query head
        float* q_across = scratch.take(group * room * wide);  // tile after tile, (D, columns) each
        float* sums = scratch.take(group * room * wide);
        float* largest = scratch.take(group * room);
        float* sum = scratch.zeros(group * room);
        float* rows_of_q = scratch.take(QUERIES * wide);
        float* rows_of_k = scratch.take(KEYS * wide);
        float* rows_of_v = scratch.take(KEYS * wide);
        float* scores = scratch.take(KEYS * QUERIES);
        float* shrink = scratch.take(QUERIES);
        std::fill_n(largest, group * room, -INFINITY);
        for (int g = 0; g < group; g++)
            for (int query = first; query < last; query += QUERIES) {
                int rows = std::min(QUERIES, last - query);
                copy_rows(q, start + query, kv_head * group + g, rows, width, wide, shape.scale(),
                          rows_of_q);
                transpose(rows_of_q, rows, width, wide, padded(rows),
                          q_across + (g * room + query - first) * wide);
            }

        int end = shape.causal ? last : length;  // behind the last key that anybody sees
        for (int key = 0; key < end; key += KEYS) {
            int keys = std::min(KEYS, end - key);
            copy_rows(k, start + key, kv_head, keys, width, wide, 1, rows_of_k);
            copy_rows(v, start + key, kv_head, keys, width, wide, 1, rows_of_v);
            for (int g = 0; g < group; g++)
                for (int query = first; query < last; query += QUERIES) {
                    int rows = std::min(QUERIES, last - query), columns = padded(rows);
                    if (shape.causal && query + rows <= key) continue;  // all of them come before
                    int at = g * room + query - first;
                    product(keys, columns, width, {rows_of_k, wide},
                            {q_across + at * wide, columns}, {scores, columns}, false);
                    if (shape.causal) hide_later_keys(scores, keys, columns, key, query);
                    soften(scores, keys, columns, largest + at, sum + at, shrink);
                    for (int r = 0; key && r < rows; r++)
                        if (shrink[r] != 1) scale_row(sums + (at + r) * wide, wide, shrink[r]);
                    product(rows, wide, keys, {scores, 1, columns}, {rows_of_v, wide},
                            {sums + at * wide, wide}, key > 0);
                }
        }

        for (int g = 0; g < group; g++) {
            int head = kv_head * group + g;
            for (int r = 0; r < last - first; r++) {
                int at = g * room + r;
                scale_row(sums + at * wide, wide, 1 / sum[at]);
                lse[head * tokens + start + first + r] = largest[at] + std::log(sum[at]);
            }
            write_rows(sums + g * room * wide, last - first, width, wide, out, start + first, head);
        }
    }
};

// ------------------------------------------------------------------------------------------------
// backward
//
// With P the weights, dP = dO V^T and delta = rowsum(dO * O), the scores' gradient is
// dS = P * (dP - delta); then dV = P^T dO, dQ = dS K and dK = dS^T Q, each times the scale of q.

// Scores (keys, columns) become weights, and dP becomes dS.
static void gradient_of_scores(float* weights, float* d_scores, int keys, int columns,
                               const float* lse, const float* delta) {
    for (int i = 0; i < keys; i++)
        for (int j = 0; j < columns; j += VECTOR) {
            float *p = weights + i * columns + j, *ds = d_scores + i * columns + j;
            floats weight = exponential(load(p) - load(lse + j));
            store(p, weight);
            store(ds, weight * (load(ds) - load(delta + j)));
        }
}

template <typename T>
struct Backward {
    Tensor<const T> q, k, v, out, d_out;
    const float* lse;
    Tensor<T> dq, dk, dv;
    int64_t tokens;
    Shape shape;

    size_t scratch(const Task& task) const {
        size_t wide = padded(shape.width), room = tiled(task.length);
        return room * (7 * wide + 2) + 2 * KEYS * wide + 2 * KEYS * QUERIES;
    }

    // All of one key head of a segment: so dK and dV are added up here, and nowhere else.
    void task(const Task& task, Scratch& scratch) const {
        auto [start, length, kv_head, first, last] = task;
        int width = shape.width, wide = padded(width), room = tiled(length);
        float* rows_of_q = scratch.take(room * wide);
        float* rows_of_do = scratch.take(room * wide);
        float* q_across = scratch.take(room * wide);  // tile after tile, (D, columns) each
        float* do_across = scratch.take(room * wide);
        float* delta = scratch.take(room);
        float* tops = scratch.take(room);  // lse of each query
        float* rows_of_dq = scratch.take(room * wide);
        float* rows_of_dk = scratch.zeros(room * wide);
        float* rows_of_dv = scratch.zeros(room * wide);
        float* rows_of_k = scratch.take(KEYS * wide);
        float* rows_of_v = scratch.take(KEYS * wide);
        float* weights = scratch.take(KEYS * QUERIES);
        float* d_scores = scratch.take(KEYS * QUERIES);
        for (int g = 0; g < shape.group(); g++) {
            int head = kv_head * shape.group() + g;
            copy_rows(q, start, head, length, width, wide, shape.scale(), rows_of_q);
            copy_rows(d_out, start, head, length, width, wide, 1, rows_of_do);
            for (int query = 0; query < length; query += QUERIES) {
                int rows = std::min(QUERIES, length - query), columns = padded(rows);
                int at = query * wide;
                transpose(rows_of_q + at, rows, width, wide, columns, q_across + at);
                transpose(rows_of_do + at, rows, width, wide, columns, do_across + at);
            }
            std::fill_n(delta, room, 0.0f);
            std::fill_n(tops, room, 0.0f);
            for (int r = 0; r < length; r++) {
                const T* row = out.at(start + r, head);
                const float* d_row = rows_of_do + r * wide;
                for (int d = 0; d < width; d++) delta[r] += d_row[d] * to_float(row[d]);
                tops[r] = lse[head * tokens + start + r];
            }
            for (int key = 0; key < length; key += KEYS) {
                int keys = std::min(KEYS, length - key);
                copy_rows(k, start + key, kv_head, keys, width, wide, 1, rows_of_k);
                copy_rows(v, start + key, kv_head, keys, width, wide, 1, rows_of_v);
                // the first tile with a query that sees any of these keys
                int query = shape.causal ? key / QUERIES * QUERIES : 0;
                for (; query < length; query += QUERIES) {
                    int rows = std::min(QUERIES, length - query), columns = padded(rows);
                    int at = query * wide;
                    Matrix p{weights, columns}, ds{d_scores, columns};
                    product(keys, columns, width, {rows_of_k, wide}, {q_across + at, columns}, p,
                            false);
                    product(keys, columns, width, {rows_of_v, wide}, {do_across + at, columns}, ds,
                            false);
                    if (shape.causal) hide_later_keys(weights, keys, columns, key, query);
                    gradient_of_scores(weights, d_scores, keys, columns, tops + query,
                                       delta + query);
                    product(keys, wide, rows, p, {rows_of_do + at, wide},
                            {rows_of_dv + key * wide, wide}, true);
                    product(keys, wide, rows, ds, {rows_of_q + at, wide},
                            {rows_of_dk + key * wide, wide}, true);
                    product(rows, wide, keys, {d_scores, 1, columns}, {rows_of_k, wide},
                            {rows_of_dq + at, wide}, key > 0);
                }
            }
            for (int r = 0; r < length; r++) scale_row(rows_of_dq + r * wide, wide, shape.scale());
            write_rows(rows_of_dq, length, width, wide, dq, start, head);
        }
        write_rows(rows_of_dk, length, width, wide, dk, start, kv_head);
        write_rows(rows_of_dv, length, width, wide, dv, start, kv_head);
    }
};

// ------------------------------------------------------------------------------------------------
// the tasks of a pack

// Every key head of every segment, its queries in chunks; long ones come first, so that the threads
// end together.
static std::vector<Task> tasks_of(const int32_t* starts, int segments, int kv_heads, int chunk) {
    std::vector<Task> tasks;
    for (int s = 0; s < segments; s++) {
        int length = starts[s + 1] - starts[s];
        int step = chunk ? chunk : std::max(1, length);
        for (int kv_head = 0; kv_head < kv_heads; kv_head++)
            for (int first = 0; first < length; first += step) {
                int last = std::min(length, first + step);
                tasks.push_back({starts[s], length, kv_head, first, last});
            }
    }
    std::stable_sort(tasks.begin(), tasks.end(),
                     [](const Task& a, const Task& b) { return a.work() > b.work(); });
    return tasks;
}

template <typename Pass>
static void run(const Pass& pass, const std::vector<Task>& tasks, int threads) {
    if (tasks.empty()) return;
    size_t numbers = pass.scratch(tasks[0]);  // the largest comes first
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch(numbers);
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < tasks.size(); i++) {
            scratch.reset();
            pass.task(tasks[i], scratch);
        }
    }
}

// ------------------------------------------------------------------------------------------------
// decoding: a few new queries of each row against the keys that it has in a cache

// As kernels/decode.py lays it out; decode.cu explains it, and reads what is left out here.
struct Decode {
    const void *q, *k, *v;        // (batch, queries, heads, D), and caches (rows, capacity, KV, D)
    const int32_t *lengths;       // (batch,): keys before the new ones
    const int32_t *rows;          // (batch,): row of the caches; null: the first, the second, ...
    void* out;                    // as q
    float *part_out, *part_lse2;
    int64_t row, token;           // steps of the caches
    int32_t batch, queries, heads, kv_heads, cache_rows, capacity, parts, part_keys;
};

// All queries of a row that share a key head: they are the columns of its scores.
template <typename T>
static void decode_head(const Decode& x, int width, int b, int kv_head, Scratch& scratch) {
    int wide = padded(width), group = x.heads / x.kv_heads, count = group * x.queries;
    int columns = padded(count), row = x.rows ? x.rows[b] : b;
    bool there = row >= 0 && row < x.cache_rows;
    int end = there ? std::min(x.lengths[b] + x.queries, x.capacity) : 0;
    Tensor<const T> q{(const T*)x.q, (int64_t)x.heads * width, width};
    Tensor<const T> k{(const T*)x.k + row * x.row, x.token, width};
    Tensor<const T> v{(const T*)x.v + row * x.row, x.token, width};
    float* rows_of_q = scratch.take(count * wide);
    float* q_across = scratch.take(wide * columns);
    float* sums = scratch.zeros(count * wide);
    float *largest = scratch.take(columns), *sum = scratch.zeros(columns);
    float *shrink = scratch.take(columns), *scores = scratch.take(KEYS * columns);
    float *rows_of_k = scratch.take(KEYS * wide), *rows_of_v = scratch.take(KEYS * wide);
    std::fill_n(largest, columns, -INFINITY);
    for (int n = 0; n < count; n++)
        copy_rows(q, (int64_t)b * x.queries + n / group, kv_head * group + n % group, 1, width,
                  wide, 1 / std::sqrt((float)width), rows_of_q + n * wide);
    transpose(rows_of_q, count, width, wide, columns, q_across);

    for (int key = 0; key < end; key += KEYS) {
        int keys = std::min(KEYS, end - key);
        copy_rows(k, key, kv_head, keys, width, wide, 1, rows_of_k);
        copy_rows(v, key, kv_head, keys, width, wide, 1, rows_of_v);
        product(keys, columns, width, {rows_of_k, wide}, {q_across, columns}, {scores, columns},
                false);
        for (int n = 0; n < count; n++)
            for (int i = std::max(0, x.lengths[b] + n / group + 1 - key); i < keys; i++)
                scores[i * columns + n] = -INFINITY;
        soften(scores, keys, columns, largest, sum, shrink);
        for (int n = 0; n < count; n++) scale_row(sums + n * wide, wide, shrink[n]);
        product(count, wide, keys, {scores, 1, columns}, {rows_of_v, wide}, {sums, wide},
                key > 0);
    }

    Tensor<T> out{(T*)x.out, (int64_t)x.heads * width, width};
    for (int n = 0; n < count; n++) {
        scale_row(sums + n * wide, wide, end > 0 ? 1 / sum[n] : 0);
        write_rows(sums + n * wide, 1, width, wide, out, (int64_t)b * x.queries + n / group,
                   kv_head * group + n % group);
    }
}

template <typename T>
static void decode(const Decode& x, int width, int threads) {
    size_t count = x.heads / x.kv_heads * x.queries, columns = padded(count), wide = padded(width);
    size_t numbers = (2 * count + columns + 2 * KEYS) * wide + (3 + KEYS) * columns;
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch(numbers);
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < x.batch * x.kv_heads; i++) {
            scratch.reset();
            decode_head<T>(x, width, i / x.kv_heads, i % x.kv_heads, scratch);
        }
    }
}

// ------------------------------------------------------------------------------------------------
// what kernels/ours.py and kernels/decode.py call

extern "C" void attention_decode(const Decode* x, int width, int is_bf16, int threads) {
    (is_bf16 ? decode<bf16> : decode<float>)(*x, width, threads);
}

// A tensor's address and steps, as kernels/ours.py passes them.
struct Argument {
    void* data;
    int64_t row, head_step;
    template <typename T>
    Tensor<T> as() const {
        return {(T*)data, row, head_step};
    }
};

template <typename T>
static void forward(const Argument* x, float* lse, const int32_t* starts, int segments,
                    const Shape& shape, int threads) {
    Forward<T> pass{x[0].as<const T>(), x[1].as<const T>(), x[2].as<const T>(), x[3].as<T>(),
                    lse,                starts[segments],   shape};
    std::vector<Task> tasks = tasks_of(starts, segments, shape.kv_heads, CHUNK);
    run(pass, tasks, threads);
}

template <typename T>
static void backward(const Argument* x, const float* lse, const int32_t* starts, int segments,
                     const Shape& shape, int threads) {
    Backward<T> pass{x[0].as<const T>(), x[1].as<const T>(), x[2].as<const T>(),
                     x[3].as<const T>(), x[4].as<const T>(), lse,
                     x[5].as<T>(),       x[6].as<T>(),       x[7].as<T>(),
                     starts[segments],   shape};
    std::vector<Task> tasks = tasks_of(starts, segments, shape.kv_heads, 0);
    run(pass, tasks, threads);
}

// x: q, k, v, out. starts (segments + 1): where each segment begins, and where the last one ends.
// lse (heads, tokens) and out are written.
extern "C" void attention_forward(const Argument* x, float* lse, const int32_t* starts,
                                  int segments, int heads, int kv_heads, int width, int causal,
                                  int is_bf16, int threads) {
    Shape shape{heads, kv_heads, width, causal != 0};
    (is_bf16 ? forward<bf16> : forward<float>)(x, lse, starts, segments, shape, threads);
}

// x: q, k, v, out, d_out, dq, dk, dv; the last three are written.
extern "C" void attention_backward(const Argument* x, const float* lse, const int32_t* starts,
                                   int segments, int heads, int kv_heads, int width, int causal,
                                   int is_bf16, int threads) {
    Shape shape{heads, kv_heads, width, causal != 0};
    (is_bf16 ? backward<bf16> : backward<float>)(x, lse, starts, segments, shape, threads);
}
