// Causal attention within documents that lie end to end, and its gradient (training), on the matrix unit.
//
// A task is one document and one KV head. Every product takes 32 rows as they lie in memory (queries, keys, weights) through panels
// of 32 columns (panels.h). Whole rows of scores are held, so a softmax is plain; nothing is kept for the backward but one number a
// query. The backward goes through the scores twice, once by queries (gradient of q) and once by keys (of k and v): to multiply twice
// is cheaper here than to turn weights over or to gather results in memory. Weights are rounded to bfloat16 before they multiply.
#include "unit.h"

struct SegmentAttention {
    bf16* out;                  // [T][H][Dv]; not needed for the backward
    float* levels;              // [H][T]: log2 of a query's sum of e^score
    const bf16 *q, *k, *v;      // [T][H][Dk], [T][G][Dk], [T][G][Dv] by strides
    const bf16* grad;           // of out, by strides; this and the next three for the backward
    bf16 *grad_q, *grad_k, *grad_v;  // [T][H][Dk], [T][G][Dk], [T][G][Dv]
    const int64_t* starts;      // [documents + 1]
    int64_t q_token, q_head, k_token, k_head, v_token, v_head, grad_token, grad_head;
    int64_t tokens, documents, heads, kv_heads, key_dim, value_dim, window;  // window 0: none; 32 | dims
    float scale;                // above 0
};

#ifdef SWIFT_AMX
#include <cmath>

namespace {

typedef SegmentAttention Args;
constexpr float LOG2_E = 1.44269504f;
constexpr int SIDE = 32, SQUARE = SIDE * SIDE;  // rows of a block, columns of a panel
const RowBlocks SQUARES(SIDE);

// Rows of one document and head.
struct Rows {
    const bf16* x;
    int64_t stride, count, dim;
    const bf16* operator[](int64_t row) const { return x + row * stride; }
};

// A task's memory, `bytes` in all. It grows with the document (0.3 GB for one of 32,000 tokens with 7 heads of 128 together).
class Scratch {
   public:
    explicit Scratch(int64_t bytes) {
        static thread_local std::vector<__m512i> memory;
        place = kept<char>(memory, bytes);
    }
    template <class T>
    T* take(int64_t count) {
        T* taken = (T*)place;
        place += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
        return taken;
    }

   private:
    char* place;
};

// 32 rows from `row` on; a block that is not whole is filled up with zeros in `spare` [SIDE][dim].
struct Block {
    const bf16* x;
    int64_t stride;
    Block(const Rows& rows, int64_t row, bf16* spare) : x(rows[row]), stride(rows.stride) {
        const int64_t there = rows.count - row;
        if (there >= SIDE) return;
        for (int64_t r = 0; r < there; r++) memcpy((void*)(spare + r * rows.dim), rows[row + r], rows.dim * sizeof(bf16));
        memset((void*)(spare + there * rows.dim), 0, (SIDE - there) * rows.dim * sizeof(bf16));
        x = spare, stride = rows.dim;
    }
    Block(const bf16* from, int64_t apart) : x(from), stride(apart) {}
};

// Panels whose columns are rows, pairs along the dimension: [panels][dim / 2][32][2]. Rows that are not there are zero.
void pack_rows(bf16* to, const Rows& rows) {
    for (int64_t row = 0; row < rows.count; row += SIDE) pack_panel(to + row * rows.dim, rows[row], rows.stride, rows.dim, rows.count - row);
}

// Panels whose columns are dimensions, pairs along the rows, which are `padded` with zeros: [dim / 32][padded / 2][32][2]
void pack_columns(bf16* to, const Rows& rows, int64_t padded) {
    for (int64_t d = 0; d < rows.dim; d += WIDTH, to += padded * WIDTH) pack_panel_across(to, rows.x + d, rows.stride, rows.count, padded);
}

INLINE void add_product(const Block& x, const bf16* panel, int64_t k) {
    add_products<true, false>(x.x, x.stride, SIDE / 2, PanelSteps{panel}, k, [](int64_t) {});
}

// sums[SIDE][SIDE] = x panel
INLINE void product(float* sums, const Block& x, const bf16* panel, int64_t k) {
    clear_sums(SQUARES);
    add_product(x, panel, k);
    store_sums(sums, SQUARES);
}

// The tiles' sums, each row times its factor, into the first `rows` rows of `out`.
INLINE void write_rows(bf16* out, int64_t stride, int64_t rows, const float* factors) {
    alignas(64) float sums[SQUARE];
    store_sums(sums, SQUARES);
    for (int64_t r = 0; r < rows && r < SIDE; r++)
        for (int c = 0; c < SIDE; c += 16) store(out + r * stride + c, load(sums + r * SIDE + c) * (factors ? factors[r] : 1.0f));
}

// 16 columns from `column` on: x within [first, last], else `other`.
INLINE v16f within(v16f x, int64_t column, int64_t first, int64_t last, float other) {
    if (column >= first && column + 15 <= last) return x;
    const v16i at = LANES + (int32_t)column;
    return (at < (int32_t)first) | (at > (int32_t)last) ? splat(other) : x;
}

// One document and KV head of a call.
struct Task {
    const Args& a;
    int64_t start, count, padded, group, head, kv_head;  // head: the first of its group
    Task(const Args& args, int64_t document, int64_t kv)
        : a(args), start(args.starts[document]), count(args.starts[document + 1] - start), padded((count + SIDE - 1) / SIDE * SIDE),
          group(args.heads / args.kv_heads), head(kv * group), kv_head(kv) {}
    Rows q(int64_t i) const { return {a.q + start * a.q_token + (head + i) * a.q_head, a.q_token, count, a.key_dim}; }
    Rows k() const { return {a.k + start * a.k_token + kv_head * a.k_head, a.k_token, count, a.key_dim}; }
    Rows v() const { return {a.v + start * a.v_token + kv_head * a.v_head, a.v_token, count, a.value_dim}; }
    Rows grad(int64_t i) const { return {a.grad + start * a.grad_token + (head + i) * a.grad_head, a.grad_token, count, a.value_dim}; }
    // The first panel of keys that queries from `query` on see, the last of queries that see keys up to `key`.
    int64_t first_panel(int64_t query) const { return a.window ? std::max((int64_t)0, query - a.window + 1) / SIDE : 0; }
    int64_t last_panel(int64_t key) const { return std::min(padded - 1, a.window ? key + a.window - 1 : padded) / SIDE; }
    int64_t first_key(int64_t query) const { return a.window ? std::max((int64_t)0, query - a.window + 1) : 0; }
    int64_t last_query(int64_t key) const { return a.window ? std::min(count - 1, key + a.window - 1) : count - 1; }
};

void forward(const Task& t) {
    const Args& a = t.a;
    const int64_t dim = std::max(a.key_dim, a.value_dim), apart = t.padded;
    Scratch scratch(t.padded * (a.key_dim + a.value_dim) * 2 + t.padded * SIDE * 6 + SIDE * dim * 2 + 512);
    bf16 *keys = scratch.take<bf16>(t.padded * a.key_dim), *values = scratch.take<bf16>(t.padded * a.value_dim);
    bf16 *weights = scratch.take<bf16>(SIDE * apart), *spare = scratch.take<bf16>(SIDE * dim);
    float* scores = scratch.take<float>(SIDE * t.padded);  // [panel][SIDE][SIDE]
    pack_rows(keys, t.k());
    pack_columns(values, t.v(), t.padded);
    const float factor = a.scale * LOG2_E;
    for (int64_t i = 0; i < t.group; i++)
        for (int64_t row = 0; row < t.count; row += SIDE) {
            const int64_t first = t.first_panel(row), panels = row / SIDE + 1 - first, there = std::min((int64_t)SIDE, t.count - row);
            const Block x(t.q(i), row, spare);
            for (int64_t j = 0; j < panels; j++) product(scores + j * SQUARE, x, keys + (first + j) * SIDE * a.key_dim, a.key_dim);
            float shares[SIDE];
            for (int64_t r = 0; r < SIDE; r++) {
                const int64_t last = row + r - first * SIDE, begin = t.first_key(row + r) - first * SIDE;
                v16f top = splat(-INFINITY), total = {};
                for (int64_t c = 0; c < panels * SIDE; c += 16) {
                    float* at = scores + c / SIDE * SQUARE + r * SIDE + c % SIDE;
                    const v16f s = within(load(at), c, begin, last, -INFINITY);
                    store(at, s);
                    top = s > top ? s : top;
                }
                const float high = highest(top) * factor;
                for (int64_t c = 0; c < panels * SIDE; c += 16) {
                    const v16f weight = exp2_16(load(scores + c / SIDE * SQUARE + r * SIDE + c % SIDE) * factor - high);
                    total += weight;
                    store(weights + r * apart + c, weight);
                }
                const float sum_of = sum(total);
                shares[r] = 1.0f / sum_of;
                if (r < there) a.levels[(t.head + i) * a.tokens + t.start + row + r] = high + std::log2(sum_of);
            }
            bf16* out = a.out + ((t.start + row) * a.heads + t.head + i) * a.value_dim;
            for (int64_t d = 0; d < a.value_dim; d += WIDTH) {
                clear_sums(SQUARES);
                add_product(Block(weights, apart), values + d * t.padded + first * SQUARE, panels * SIDE);
                write_rows(out + d, a.heads * a.value_dim, there, shares);
            }
        }
}

void backward(const Task& t) {
    const Args& a = t.a;
    const int64_t dims = a.key_dim + a.value_dim, apart = t.padded, group = t.group;
    Scratch scratch(t.padded * (2 * a.key_dim + a.value_dim) * 2 + group * t.padded * (2 * dims * 2 + 2 * SIDE * 2 + 8) + SIDE * dims * 2 +
                     2 * SIDE * t.padded * 4 + 4096);
    bf16 *key_panels = scratch.take<bf16>(t.padded * a.key_dim), *value_panels = scratch.take<bf16>(t.padded * a.value_dim);
    bf16* keys = scratch.take<bf16>(t.padded * a.key_dim);
    bf16 *query_panels = scratch.take<bf16>(group * t.padded * a.key_dim), *grad_panels = scratch.take<bf16>(group * t.padded * a.value_dim);
    bf16 *queries = scratch.take<bf16>(group * t.padded * a.key_dim), *grads = scratch.take<bf16>(group * t.padded * a.value_dim);
    bf16 *weights = scratch.take<bf16>(group * SIDE * apart), *slopes = scratch.take<bf16>(group * SIDE * apart);  // gradient of the scores
    bf16 *spare = scratch.take<bf16>(SIDE * a.key_dim), *spare_v = scratch.take<bf16>(SIDE * a.value_dim);
    float *scores = scratch.take<float>(SIDE * t.padded), *back = scratch.take<float>(SIDE * t.padded);  // and the weights' gradient
    // Of each query: its level, and the mean of its weights' gradient. From its rounded result the mean would be cheaper, but where one
    // key has nearly all the weight, the difference to the mean is all that there is.
    float *levels = scratch.take<float>(group * t.padded), *means = scratch.take<float>(group * t.padded);
    pack_rows(key_panels, t.k());
    pack_rows(value_panels, t.v());
    pack_columns(keys, t.k(), t.padded);
    const float factor = a.scale * LOG2_E;
    for (int64_t i = 0; i < group; i++) {
        const Rows q = t.q(i), grad = t.grad(i);
        float *level = levels + i * t.padded, *mean = means + i * t.padded;
        std::fill(level + t.count, level + t.padded, 0.0f);
        std::fill(mean + t.count, mean + t.padded, 0.0f);
        memcpy(level, a.levels + (t.head + i) * a.tokens + t.start, t.count * sizeof(float));
        for (int64_t row = 0; row < t.count; row += SIDE) {
            const int64_t first = t.first_panel(row), panels = row / SIDE + 1 - first, there = std::min((int64_t)SIDE, t.count - row);
            const Block x(q, row, spare), g(grad, row, spare_v);
            for (int64_t j = 0; j < panels; j++) {
                product(scores + j * SQUARE, x, key_panels + (first + j) * SIDE * a.key_dim, a.key_dim);
                product(back + j * SQUARE, g, value_panels + (first + j) * SIDE * a.value_dim, a.value_dim);
            }
            for (int64_t r = 0; r < there; r++) {
                const int64_t last = row + r - first * SIDE, begin = t.first_key(row + r) - first * SIDE;
                v16f total = {};
                for (int64_t c = 0; c < panels * SIDE; c += 16) {
                    const int64_t at = c / SIDE * SQUARE + r * SIDE + c % SIDE;
                    const v16f weight = within(exp2_16(load(scores + at) * factor - level[row + r]), c, begin, last, 0.0f);
                    store(scores + at, weight);
                    total += within(weight * load(back + at), c, begin, last, 0.0f);
                }
                mean[row + r] = sum(total);
                for (int64_t c = 0; c < panels * SIDE; c += 16) {
                    const int64_t at = c / SIDE * SQUARE + r * SIDE + c % SIDE;
                    const v16f slope = load(scores + at) * (load(back + at) - mean[row + r]) * a.scale;
                    store(slopes + r * apart + c, within(slope, c, begin, last, 0.0f));
                }
            }
            bf16* out = a.grad_q + ((t.start + row) * a.heads + t.head + i) * a.key_dim;
            for (int64_t d = 0; d < a.key_dim; d += WIDTH) {
                clear_sums(SQUARES);
                add_product(Block(slopes, apart), keys + d * t.padded + first * SQUARE, panels * SIDE);
                write_rows(out + d, a.heads * a.key_dim, there, nullptr);
            }
        }
        pack_rows(query_panels + i * t.padded * a.key_dim, q);
        pack_rows(grad_panels + i * t.padded * a.value_dim, grad);
        pack_columns(queries + i * t.padded * a.key_dim, q, t.padded);
        pack_columns(grads + i * t.padded * a.value_dim, grad, t.padded);
    }
    for (int64_t row = 0; row < t.count; row += SIDE) {
        const int64_t first = row / SIDE, panels = t.last_panel(row + SIDE - 1) + 1 - first, there = std::min((int64_t)SIDE, t.count - row);
        const Block x(t.k(), row, spare), v(t.v(), row, spare_v);
        for (int64_t i = 0; i < group; i++)
            for (int64_t j = 0; j < panels; j++) {
                product(scores, x, query_panels + (i * t.padded + (first + j) * SIDE) * a.key_dim, a.key_dim);
                product(back, v, grad_panels + (i * t.padded + (first + j) * SIDE) * a.value_dim, a.value_dim);
                const int64_t query = (first + j) * SIDE;
                for (int64_t r = 0; r < SIDE; r++)
                    for (int c = 0; c < SIDE; c += 16) {
                        const int64_t number = i * t.padded + query + c, to = (i * SIDE + r) * apart + j * SIDE + c, end = t.last_query(row + r);
                        const v16f weight =
                            within(exp2_16(load(scores + r * SIDE + c) * factor - load(levels + number)), query + c, row + r, end, 0.0f);
                        store(weights + to, weight);
                        const v16f slope = weight * (load(back + r * SIDE + c) - load(means + number)) * a.scale;
                        store(slopes + to, within(slope, query + c, row + r, end, 0.0f));
                    }
            }
        const auto gather = [&](bf16* out, int64_t dim, const bf16* left, const bf16* right) {
            for (int64_t d = 0; d < dim; d += WIDTH) {
                clear_sums(SQUARES);
                for (int64_t i = 0; i < group; i++)
                    add_product(Block(left + i * SIDE * apart, apart), right + i * t.padded * dim + d * t.padded + first * SQUARE, panels * SIDE);
                write_rows(out + ((t.start + row) * a.kv_heads + t.kv_head) * dim + d, a.kv_heads * dim, there, nullptr);
            }
        };
        gather(a.grad_v, a.value_dim, weights, grads);
        gather(a.grad_k, a.key_dim, slopes, queries);
    }
}

}  // namespace
#endif

extern "C" {
// Longest documents first: a long one begun last would keep one thread waiting for another.
void swift_segment_attention(const SegmentAttention* args, int back, int threads) {
#ifdef SWIFT_AMX
    const Args& a = *args;
    std::vector<int64_t> order(a.documents);
    for (int64_t i = 0; i < a.documents; i++) order[i] = i;
    const auto length = [&](int64_t i) { return a.starts[i + 1] - a.starts[i]; };
    std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return length(x) > length(y); });
#pragma omp parallel num_threads(threads)
    {
        const Tiles tiles = SQUARES.tiles();
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < a.documents * a.kv_heads; i++) {
            const Task task(a, order[i / a.kv_heads], i % a.kv_heads);
            back ? backward(task) : forward(task);
        }
    }
#endif
}
}
