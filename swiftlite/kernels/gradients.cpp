// Gradients of the small steps (fused.cpp), softmax of attention scores and of logits with theirs: one pass over memory each.
// Sums and products are float32, rounded once to the tensors' type.
#include <cmath>

#include "steps.h"

namespace {

// dx = r * (w g - x * r^2 * mean(x * w g)), r = 1 / rms(x); rows of x as in rms_norm, g and dx contiguous.
template <class T>
void norm_back(T* dx, const T* g, const T* x, const T* w, int64_t rows, int64_t inner, int64_t outer_stride, int64_t inner_stride, int dim,
               float eps, int kind, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * dim > 32768)
    for (int64_t row = 0; row < rows; row++) {
        const T *from = x + row / inner * outer_stride + row % inner * inner_stride, *grad = g + row * dim;
        T* to = dx + row * dim;
        const float plus = kind == ONE_PLUS_WEIGHT ? 1.0f : 0.0f;
        v16f squares = {}, products = {};
        int d = 0;
        for (; d + 16 <= dim; d += 16) {
            const v16f v = load(from + d);
            squares += v * v, products += v * (load(w + d) + plus) * load(grad + d);
        }
        float square = sum(squares), product = sum(products);
        for (; d < dim; d++) {
            const float v = to_float(from[d]);
            square += v * v, product += v * (to_float(w[d]) + plus) * to_float(grad[d]);
        }
        const float r = 1.0f / std::sqrt(square / dim + eps), back = r * r * r * product / dim;
        d = 0;
        for (; d + 16 <= dim; d += 16) store(to + d, load(grad + d) * (load(w + d) + plus) * r - load(from + d) * back);
        for (; d < dim; d++) put(to + d, to_float(grad[d]) * (to_float(w[d]) + plus) * r - to_float(from[d]) * back);
    }
}

// The transpose of rope's rotation: out[T][heads][dim] from g by strides.
template <class T>
void rope_back(T* out, const T* g, const T* cos, const T* sin, int64_t tokens, int heads, int dim, int64_t token_stride, int64_t head_stride,
               int threads) {
    const int half = dim / 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * heads * dim > 32768)
    for (int64_t i = 0; i < tokens * heads; i++) {
        const int64_t token = i / heads;
        const T *from = g + token * token_stride + i % heads * head_stride, *c = cos + token * dim, *s = sin + token * dim;
        T* to = out + i * dim;
        int d = 0;
        for (; d + 16 <= half; d += 16) {
            const v16f a = load(from + d), b = load(from + half + d);
            store(to + d, a * load(c + d) + b * load(s + half + d));
            store(to + half + d, b * load(c + half + d) - a * load(s + d));
        }
        for (; d < half; d++) {
            const float a = to_float(from[d]), b = to_float(from[half + d]);
            put(to + d, a * to_float(c[d]) + b * to_float(s[half + d]));
            put(to + half + d, b * to_float(c[half + d]) - a * to_float(s[d]));
        }
    }
}

// dgate and dup of silu(gate) * up; all contiguous, `count` numbers.
template <class T>
void silu_mul_back(T* dgate, T* dup, const T* g, const T* gate, const T* up, int64_t count, int threads) {
    constexpr int64_t PIECE = 4096;
#pragma omp parallel for schedule(static) num_threads(threads) if (count > 16384)
    for (int64_t start = 0; start < count; start += PIECE) {
        const int64_t end = start + PIECE < count ? start + PIECE : count;
        int64_t i = start;
        for (; i + 16 <= end; i += 16) {
            const v16f x = load(gate + i), grad = load(g + i), share = 1.0f / (1.0f + exp16(-x));
            store(dgate + i, grad * load(up + i) * share * (1.0f + x * (1.0f - share)));
            store(dup + i, grad * x * share);
        }
        for (; i < end; i++) {
            const float x = to_float(gate[i]), grad = to_float(g[i]), share = 1.0f / (1.0f + std::exp(-x));
            put(dgate + i, grad * to_float(up[i]) * share * (1.0f + x * (1.0f - share)));
            put(dup + i, grad * x * share);
        }
    }
}

// The keys [first, last) of a row of scores that query `query` of its block sees; key 0 is `offset` tokens before the block.
struct Seen {
    int64_t first, last;
    Seen(int64_t query, int64_t keys, int64_t offset, int64_t window) {
        last = offset + query + 1 < keys ? offset + query + 1 : keys;
        first = window && last > window ? last - window : 0;
    }
};

// x[rows][keys] -> softmax(scale * x) in place over the keys that row % queries sees; the others become 0.
template <class T>
void softmax(T* x, int64_t rows, int64_t queries, int64_t keys, int64_t offset, int64_t window, float scale, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * keys > 8192)
    for (int64_t row = 0; row < rows; row++) {
        T* s = x + row * keys;
        const Seen seen(row % queries, keys, offset, window);
        v16f tops = splat(-INFINITY), sums = {};
        int64_t i = seen.first;
        for (; i + 16 <= seen.last; i += 16) {
            const v16f v = load(s + i);
            tops = v > tops ? v : tops;
        }
        float top = highest(tops), total = 0;
        for (; i < seen.last; i++) top = to_float(s[i]) > top ? to_float(s[i]) : top;
        // e^x twice is cheaper than float32 scores in memory
        for (i = seen.first; i + 16 <= seen.last; i += 16) sums += exp16((load(s + i) - top) * scale);
        total = sum(sums);
        for (; i < seen.last; i++) total += std::exp((to_float(s[i]) - top) * scale);
        const float factor = 1.0f / total;
        for (i = seen.first; i + 16 <= seen.last; i += 16) store(s + i, exp16((load(s + i) - top) * scale) * factor);
        for (; i < seen.last; i++) put(s + i, std::exp((to_float(s[i]) - top) * scale) * factor);
        memset((void*)s, 0, seen.first * sizeof(T));
        memset((void*)(s + seen.last), 0, (keys - seen.last) * sizeof(T));
    }
}

// g[rows][keys], the gradient of softmax's result y -> that of its input, in place.
template <class T>
void softmax_back(T* g, const T* y, int64_t rows, int64_t queries, int64_t keys, int64_t offset, int64_t window, float scale, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * keys > 8192)
    for (int64_t row = 0; row < rows; row++) {
        T* grad = g + row * keys;
        const T* p = y + row * keys;
        const Seen seen(row % queries, keys, offset, window);
        v16f products = {};
        int64_t i = seen.first;
        for (; i + 16 <= seen.last; i += 16) products += load(grad + i) * load(p + i);
        float mean = sum(products);
        for (; i < seen.last; i++) mean += to_float(grad[i]) * to_float(p[i]);
        for (i = seen.first; i + 16 <= seen.last; i += 16) store(grad + i, (load(grad + i) - mean) * load(p + i) * scale);
        for (; i < seen.last; i++) put(grad + i, (to_float(grad[i]) - mean) * to_float(p[i]) * scale);
        memset((void*)grad, 0, seen.first * sizeof(T));
        memset((void*)(grad + seen.last), 0, (keys - seen.last) * sizeof(T));
    }
}

// Of each row of logits z[rows][dim]: -log softmax(z)[label], whether the label is the first largest, and in place of z (if
// `back`) factor * (softmax(z) - one-hot of the label). A row with NaN gives NaN.
template <class T>
void cross_entropy(T* z, const int64_t* labels, const float* factors, float* nll, int64_t* hits, int64_t rows, int64_t dim, int back,
                   int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        T* s = z + row * dim;
        const int64_t label = labels[row];
        const float goal = to_float(s[label]);
        v16f tops = splat(-INFINITY), sums = {};
        int64_t i = 0;
        for (; i + 16 <= dim; i += 16) {
            const v16f v = load(s + i);
            tops = v > tops ? v : tops;
        }
        float top = highest(tops), total = 0;
        for (; i < dim; i++) top = to_float(s[i]) > top ? to_float(s[i]) : top;
        int64_t best = 0;
        if (goal == top)
            while (best < label && to_float(s[best]) != top) best++;
        hits[row] = goal == top && best == label;
        for (i = 0; i + 16 <= dim; i += 16) sums += exp16(load(s + i) - top);
        total = sum(sums);
        for (; i < dim; i++) total += std::exp(to_float(s[i]) - top);
        nll[row] = std::log(total) + top - goal;
        if (!back) continue;
        const float outer = factors ? factors[row] : 1.0f, factor = outer / total;
        for (i = 0; i + 16 <= dim; i += 16) store(s + i, exp16(load(s + i) - top) * factor);
        for (; i < dim; i++) put(s + i, std::exp(to_float(s[i]) - top) * factor);
        put(s + label, std::exp(goal - top) * factor - outer);
    }
}

}  // namespace

extern "C" {
void swift_norm_back(int is_bf16, void* dx, const void* g, const void* x, const void* w, int64_t rows, int64_t inner, int64_t outer_stride,
                     int64_t inner_stride, int dim, float eps, int kind, int threads) {
    TYPED(norm_back, (T*)dx, (const T*)g, (const T*)x, (const T*)w, rows, inner, outer_stride, inner_stride, dim, eps, kind, threads)
}
void swift_rope_back(int is_bf16, void* out, const void* g, const void* cos, const void* sin, int64_t tokens, int heads, int dim,
                     int64_t token_stride, int64_t head_stride, int threads) {
    TYPED(rope_back, (T*)out, (const T*)g, (const T*)cos, (const T*)sin, tokens, heads, dim, token_stride, head_stride, threads)
}
void swift_silu_mul_back(int is_bf16, void* dgate, void* dup, const void* g, const void* gate, const void* up, int64_t count, int threads) {
    TYPED(silu_mul_back, (T*)dgate, (T*)dup, (const T*)g, (const T*)gate, (const T*)up, count, threads)
}
void swift_softmax(int is_bf16, void* x, int64_t rows, int64_t queries, int64_t keys, int64_t offset, int64_t window, float scale,
                   int threads) {
    TYPED(softmax, (T*)x, rows, queries, keys, offset, window, scale, threads)
}
void swift_softmax_back(int is_bf16, void* g, const void* y, int64_t rows, int64_t queries, int64_t keys, int64_t offset, int64_t window,
                        float scale, int threads) {
    TYPED(softmax_back, (T*)g, (const T*)y, rows, queries, keys, offset, window, scale, threads)
}
void swift_cross_entropy(int is_bf16, void* z, const int64_t* labels, const float* factors, float* nll, int64_t* hits, int64_t rows,
                         int64_t dim, int back, int threads) {
    TYPED(cross_entropy, (T*)z, labels, factors, nll, hits, rows, dim, back, threads)
}
}
