// A step of decoding on a CPU: one new token of each row of the cache, through all layers of a
// decoder. Of a small model this takes PyTorch's operators, some forty a layer, longer to call than
// to compute; here it is one call.
//
// Activations lie with the channels downwards and the tokens across, (channels, TOKENS): norms,
// RoPE and SwiGLU are loops over channels, in which each vector holds the same channel of several
// tokens, and products take the weights as they lie in the model, (out, in). Only attention looks
// at tokens one by one. A task is a block of tokens: it goes through all layers by itself, so that
// no thread waits for another, and no token's result depends on its neighbours.

#include "attention.cpp"

// Tokens of a task. Where there are fewer, zeros fill it up: so all go through the same
// instructions, and a token's result has the same bits among any others.
constexpr int TOKENS = 2 * VECTOR;
constexpr int CHANNELS = 64;  // that attention sums up at once, in registers

// Weights, each matrix (out, in): the parameters of model.DecoderLayer, in its order.
struct Layer {
    float *norm, *q, *k, *v, *o, *q_norm, *k_norm, *mlp_norm, *gate, *up, *down;
};

// As kernels/step.py lays it out.
struct Step {
    const Layer* layers;
    float *norm, *frequencies;       // the last norm (channels,); of RoPE (width / 2,)
    float *keys, *values;            // caches (layers, rows, capacity, KV, D)
    float* x;                        // (tokens, channels): embeddings, then hidden states
    const int64_t* positions;        // (tokens,)
    const int32_t* lengths;          // (tokens,): keys before the new ones
    float eps;
    int32_t tokens, layer_count, channels, inner, heads, kv_heads, width, rows, capacity;
};

// out = x / sqrt(mean of x^2 + eps) * weight, token by token: x and out (channels, TOKENS).
static void normalise(const float* x, const float* weight, int channels, float eps, float* out) {
    for (int j = 0; j < TOKENS; j += VECTOR, x += VECTOR, out += VECTOR) {
        floats sum = {}, scale = {};
        for (int c = 0; c < channels; c++) sum += load(x + c * TOKENS) * load(x + c * TOKENS);
        for (int i = 0; i < VECTOR; i++) scale[i] = 1 / std::sqrt(sum[i] / channels + eps);
        for (int c = 0; c < channels; c++)
            store(out + c * TOKENS, load(x + c * TOKENS) * scale * weight[c]);
    }
}

// Turns the pairs (i, i + width / 2) of a head (width, TOKENS); cos and sin (width / 2, TOKENS).
static void rotate(float* x, const float* cos, const float* sin, int width) {
    int half = width / 2 * TOKENS;
    for (int i = 0; i < half; i += VECTOR) {
        floats a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(x + i, a * c - b * s);
        store(x + half + i, b * c + a * s);
    }
}

// gate = gate / (1 + e^-gate) * up
static void swiglu(float* gate, const float* up, int count) {
    for (int i = 0; i < count; i += VECTOR) {
        floats x = load(gate + i), minus = -x;
        floats power = exponential(minus > 87.0f ? floats{} + 87.0f : minus);
        store(gate + i, x / (1.0f + power) * load(up + i));
    }
}

static float total(floats x) {
    float sums[VECTOR];
    store(sums, x);
    for (int half = VECTOR / 2; half; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}

// softmax(q k' / sqrt(D)) v for the queries of one token that share a key head: q and out
// (group, D), k and v (keys, D) with `step` numbers from key to key; scores: room for
// (group, padded(keys)).
static void attend_token(const float* q, int group, int width, const float* k, const float* v,
                         int64_t step, int keys, float* scores, float* out) {
    int wide = padded(keys);
    float scale = 1 / std::sqrt((float)width);
    std::fill_n(scores, group * wide, -INFINITY);
    for (int i = 0; i < keys; i++) {
        for (int d = 0; d < width; d += 16) {  // a cache line: what is read next is asked for now
            __builtin_prefetch(k + (i + 8) * step + d);
            __builtin_prefetch(v + i * step + d);
        }
        for (int g = 0; g < group; g++) {
            floats sum = {};
            for (int d = 0; d < width; d += VECTOR)
                sum += load(q + g * width + d) * load(k + i * step + d);
            scores[g * wide + i] = total(sum) * scale;
        }
    }
    for (int g = 0; g < group; g++, scores += wide, out += width) {
        float largest = *std::max_element(scores, scores + keys);
        floats sum = {};
        for (int i = 0; i < wide; i += VECTOR) {
            floats weights = exponential(load(scores + i) - largest);
            store(scores + i, weights);
            sum += weights;
        }
        for (int d = 0; d < width; d += CHANNELS) {
            floats mean[CHANNELS / VECTOR] = {};
            for (int i = 0; i < keys; i++)
                for (int n = 0; n < CHANNELS / VECTOR; n++)
                    mean[n] += scores[i] * load(v + i * step + d + n * VECTOR);
            for (int n = 0; n < CHANNELS / VECTOR; n++)
                store(out + d + n * VECTOR, mean[n] / total(sum));
        }
    }
}

// Tokens first .. first + count through all layers.
struct Block {
    const Step& s;
    int first, count;
    int q_width = s.heads * s.width, kv_width = s.kv_heads * s.width;
    int group = s.heads / s.kv_heads;  // queries that share a key head
    Scratch memory{size_t(TOKENS) * (2 * s.channels + s.width + 3 * q_width + 4 * kv_width +
                                   2 * s.inner) + size_t(group) * padded(s.capacity)};
    float *x = take(s.channels), *normed = take(s.channels);
    float *cos = take(s.width), *sin = cos + s.width / 2 * TOKENS;
    float *q = take(q_width), *k = take(kv_width), *v = take(kv_width);
    float *gate = take(s.inner), *up = take(s.inner);
    float *q_rows = take(q_width), *k_rows = take(kv_width), *v_rows = take(kv_width);
    float *out_rows = take(q_width), *scores = memory.take(group * padded(s.capacity));

    float* take(int channels) { return memory.take(size_t(channels) * TOKENS); }

    // to (out, TOKENS) = weight (out, in) from (in, TOKENS), or to += it
    void multiply(float* weight, float* from, int in, float* to, int out, bool add = false) {
        product(out, TOKENS, in, {weight, in}, {from, TOKENS}, {to, TOKENS}, add);
    }

    void run() {
        float* mine = s.x + (int64_t)first * s.channels;
        transpose(mine, count, s.channels, s.channels, TOKENS, x);
        for (int i = 0; i < s.width / 2; i++)
            for (int b = 0; b < TOKENS; b++) {
                float angle = b < count ? s.positions[first + b] * s.frequencies[i] : 0;
                cos[i * TOKENS + b] = std::cos(angle);
                sin[i * TOKENS + b] = std::sin(angle);
            }
        for (int i = 0; i < s.layer_count; i++) {
            const Layer& layer = s.layers[i];
            normalise(x, layer.norm, s.channels, s.eps, normed);
            attend(i);
            multiply(layer.o, q, q_width, x, s.channels, true);
            normalise(x, layer.mlp_norm, s.channels, s.eps, normed);
            multiply(layer.gate, normed, s.channels, gate, s.inner);
            multiply(layer.up, normed, s.channels, up, s.inner);
            swiglu(gate, up, s.inner * TOKENS);
            multiply(layer.down, gate, s.inner, x, s.channels, true);
        }
        normalise(x, s.norm, s.channels, s.eps, normed);
        transpose(normed, s.channels, count, TOKENS, s.channels, mine);
    }

    // Keys and values of `normed` enter the cache; q becomes what its tokens see there.
    void attend(int i) {
        const Layer& layer = s.layers[i];
        multiply(layer.q, normed, s.channels, q, q_width);
        multiply(layer.k, normed, s.channels, k, kv_width);
        multiply(layer.v, normed, s.channels, v, kv_width);
        for (int h = 0; h < s.heads + s.kv_heads; h++) {
            bool is_q = h < s.heads;
            float* head = is_q ? q + h * s.width * TOKENS : k + (h - s.heads) * s.width * TOKENS;
            normalise(head, is_q ? layer.q_norm : layer.k_norm, s.width, s.eps, head);
            rotate(head, cos, sin, s.width);
        }
        transpose(q, q_width, count, TOKENS, q_width, q_rows);  // (count, H, D)
        transpose(k, kv_width, count, TOKENS, kv_width, k_rows);  // (count, KV, D)
        transpose(v, kv_width, count, TOKENS, kv_width, v_rows);

        int64_t row = (int64_t)s.capacity * kv_width;
        for (int b = 0; b < count; b++) {
            int64_t start = ((int64_t)i * s.rows + first + b) * row;
            int64_t before = s.lengths[first + b];
            std::copy_n(k_rows + b * kv_width, kv_width, s.keys + start + before * kv_width);
            std::copy_n(v_rows + b * kv_width, kv_width, s.values + start + before * kv_width);
            for (int h = 0; h < s.kv_heads; h++) {
                int64_t head = start + h * s.width, place = b * q_width + h * group * s.width;
                attend_token(q_rows + place, group, s.width, s.keys + head, s.values + head,
                             kv_width, before + 1, scores, out_rows + place);
            }
        }
        transpose(out_rows, count, q_width, q_width, TOKENS, q);
    }
};

// Returns the first token that does not fit into its row of the cache, -1: none.
extern "C" int decoder_step(const Step* step, int threads) {
    const Step& s = *step;
    for (int b = 0; b < s.tokens; b++)
        if (b >= s.rows || s.lengths[b] < 0 || s.lengths[b] >= s.capacity) return b;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int first = 0; first < s.tokens; first += TOKENS)
        Block{s, first, std::min(TOKENS, s.tokens - first)}.run();
    return -1;
}
