// One row of a norm, of a sum, of a gate and of a rotary embedding, with the rounding of the eager torch code.
#pragma once
#include <cmath>

#include "vectors.h"

enum NormKind { ROUND_THEN_WEIGHT = 0, WEIGHT_IN_FLOAT = 1, ONE_PLUS_WEIGHT = 2 };
enum Activation { SILU = 0, GELU_TANH = 1 };

INLINE v16f rounded(v16f x, const float*) { return x; }
INLINE v16f rounded(v16f x, const bf16*) {
#ifdef __AVX512BF16__  // not through memory
    return (v16f)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)), 16);
#else
    bf16 h[16];
    store(h, x);
    return load(h);
#endif
}
INLINE float rounded1(float x, const float*) { return x; }
INLINE float rounded1(float x, const bf16*) {
    bf16 h;
    put(&h, x);
    return to_float(h);
}

// to[dim] = x / rms(x) * w
template <class T>
INLINE void norm_row(T* to, const T* from, const T* w, int dim, float eps, int kind) {
    v16f squares = {}, more = {};
    int d = 0;
    for (; d + 32 <= dim; d += 32) {
        v16f a = load(from + d), b = load(from + d + 16);
        squares += a * a, more += b * b;
    }
    float total = sum(squares + more);
    for (; d < dim; d++) total += to_float(from[d]) * to_float(from[d]);
    const float factor = 1.0f / std::sqrt(total / dim + eps);
    d = 0;
    for (; d + 16 <= dim; d += 16) {
        v16f y = load(from + d) * factor, weight = load(w + d);
        if (kind == ROUND_THEN_WEIGHT) y = rounded(y, to);
        store(to + d, y * (kind == ONE_PLUS_WEIGHT ? weight + 1.0f : weight));
    }
    for (; d < dim; d++) {
        float y = to_float(from[d]) * factor, weight = to_float(w[d]);
        if (kind == ROUND_THEN_WEIGHT) y = rounded1(y, to);
        put(to + d, y * (kind == ONE_PLUS_WEIGHT ? weight + 1.0f : weight));
    }
}

// silu(x) = x / (1 + e^-x). gelu by tanh: x (1 + tanh u) / 2 = x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3)
template <class V>
INLINE V exponent(V x, int activation) {
    return activation == GELU_TANH ? x * (-1.5957691216f - 0.0713548163f * x * x) : -x;
}

// to[16] = act(gate) * up; gate, up and act(gate) rounded first
template <class T>
INLINE void gated(T* to, v16f gate, v16f up, int activation) {
    const v16f x = rounded(gate, to);
    store(to, rounded(x / (1.0f + exp16(exponent(x, activation))), to) * rounded(up, to));
}

// to[dim] = act(gate) * up, act(gate) rounded first
template <class T>
INLINE void gate_row(T* to, const T* gate, const T* up, int dim, int activation) {
    int d = 0;
    for (; d + 16 <= dim; d += 16) gated(to + d, load(gate + d), load(up + d), activation);
    for (; d < dim; d++) {
        float x = to_float(gate[d]);
        put(to + d, rounded1(x / (1.0f + std::exp(exponent(x, activation))), to) * to_float(up[d]));
    }
}

// to[dim] = a + factor * b, both rounded
template <class T>
INLINE void add_row(T* to, const T* a, const T* b, float factor, int dim) {
    int d = 0;
    for (; d + 16 <= dim; d += 16) store(to + d, load(a + d) + rounded(load(b + d) * factor, to));
    for (; d < dim; d++) put(to + d, to_float(a[d]) + rounded1(to_float(b[d]) * factor, to));
}

// A norm's weight [dim], or null: no norm.
struct RowNorm {
    const void* w;
    float eps;
    int32_t kind;
};

// From a half of a layer to the next: total = a + factor * (norm `of` b) and out = norm `then` of that. Without `b` total is `a` and is not
// written; `out` may be null. total is not a or b.
template <class T>
INLINE void add_norm_row(T* out, T* total, const T* a, const T* b, const RowNorm& of, const RowNorm& then, float factor, int dim) {
    if (b) {
        if (of.w) norm_row(total, b, (const T*)of.w, dim, of.eps, of.kind);
        add_row(total, a, of.w ? total : b, factor, dim);
        a = total;
    }
    if (!out) return;
    if (then.w)
        norm_row(out, a, (const T*)then.w, dim, then.eps, then.kind);
    else
        memcpy(out, a, dim * sizeof(T));
}

// Which of a head's dimensions are rotated: the first `dims`, in two halves, or, as `pairs`, each with its neighbour. Products with cos and
// sin are rounded to their type, which is the rows' unless `wide`: float32.
struct Rotation {
    int32_t dims, pairs, wide;
};

// to[dims]: neighbours rotated by the angles of the first half of cos and sin [dims]; `to` may be `from`
template <class T, class C>
INLINE void rope_pairs(T* to, const T* from, const C* cos, const C* sin, int dims) {
    for (int d = 0; d < dims; d += 2) {
        const float a = to_float(from[d]), b = to_float(from[d + 1]), c = to_float(cos[d / 2]), s = to_float(sin[d / 2]);
        put(to + d, rounded1(a * c, cos) - rounded1(b * s, cos));
        put(to + d + 1, rounded1(b * c, cos) + rounded1(a * s, cos));
    }
}

// to[dims] = x * cos + rotate_half(x) * sin; `to` may be `from`
template <class T, class C>
INLINE void rope_halves(T* to, const T* from, const C* cos, const C* sin, int dims) {
    const int half = dims / 2;
    int d = 0;
    for (; d + 16 <= half; d += 16) {
        v16f a = load(from + d), b = load(from + half + d);
        store(to + d, rounded(a * load(cos + d), cos) - rounded(b * load(sin + d), cos));
        store(to + half + d, rounded(b * load(cos + half + d), cos) + rounded(a * load(sin + half + d), cos));
    }
    for (; d < half; d++) {
        float a = to_float(from[d]), b = to_float(from[half + d]);
        put(to + d, rounded1(a * to_float(cos[d]), cos) - rounded1(b * to_float(sin[d]), cos));
        put(to + half + d, rounded1(b * to_float(cos[half + d]), cos) + rounded1(a * to_float(sin[half + d]), cos));
    }
}

template <class C, class T>
INLINE void rope_by(T* to, const T* from, const void* cos, const void* sin, int64_t token, const Rotation& rotation) {
    const C *c = (const C*)cos + token * rotation.dims, *s = (const C*)sin + token * rotation.dims;
    if (rotation.pairs)
        rope_pairs(to, from, c, s, rotation.dims);
    else
        rope_halves(to, from, c, s, rotation.dims);
}

// to[dim]: from, rotated by the rows of `token` in cos and sin [T][rotation.dims]
template <class T>
INLINE void rope_row(T* to, const T* from, const void* cos, const void* sin, int64_t token, int dim, const Rotation& rotation) {
    if (rotation.wide)
        rope_by<float>(to, from, cos, sin, token, rotation);
    else
        rope_by<T>(to, from, cos, sin, token, rotation);
    if (to != from) memcpy(to + rotation.dims, from + rotation.dims, (dim - rotation.dims) * sizeof(T));
}

// In a function with `is_bf16`: the template `name` with T as bfloat16 or float32
#define TYPED(name, ...)   \
    if (is_bf16) {         \
        using T = bf16;    \
        name(__VA_ARGS__); \
    } else {               \
        using T = float;   \
        name(__VA_ARGS__); \
    }
