// One row of a norm and of a rotary embedding, with the rounding of the eager torch code.
#pragma once
#include <cmath>

#include "vectors.h"

enum NormKind { ROUND_THEN_WEIGHT = 0, WEIGHT_IN_FLOAT = 1, ONE_PLUS_WEIGHT = 2 };

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

// to[16] = silu(gate) * up; gate, up and silu rounded first
template <class T>
INLINE void gated(T* to, v16f gate, v16f up) {
    const v16f x = rounded(gate, to);
    store(to, rounded(x / (1.0f + exp16(-x)), to) * rounded(up, to));
}

// to[dim] = silu(gate) * up, silu rounded first
template <class T>
INLINE void gate_row(T* to, const T* gate, const T* up, int dim) {
    int d = 0;
    for (; d + 16 <= dim; d += 16) gated(to + d, load(gate + d), load(up + d));
    for (; d < dim; d++) {
        float x = to_float(gate[d]);
        put(to + d, rounded1(x / (1.0f + std::exp(-x)), to) * to_float(up[d]));
    }
}

// to[dim] = a + b, rounded
template <class T>
INLINE void add_row(T* to, const T* a, const T* b, int dim) {
    int d = 0;
    for (; d + 16 <= dim; d += 16) store(to + d, load(a + d) + load(b + d));
    for (; d < dim; d++) put(to + d, to_float(a[d]) + to_float(b[d]));
}

// to[dim] = x * cos + rotate_half(x) * sin, each product rounded; `to` may be `from`
template <class T>
INLINE void rope_row(T* to, const T* from, const T* cos, const T* sin, int dim) {
    const int half = dim / 2;
    int d = 0;
    for (; d + 16 <= half; d += 16) {
        v16f a = load(from + d), b = load(from + half + d);
        store(to + d, rounded(a * load(cos + d), to) - rounded(b * load(sin + d), to));
        store(to + half + d, rounded(b * load(cos + half + d), to) + rounded(a * load(sin + half + d), to));
    }
    for (; d < half; d++) {
        float a = to_float(from[d]), b = to_float(from[half + d]);
        put(to + d, rounded1(a * to_float(cos[d]), to) - rounded1(b * to_float(sin[d]), to));
        put(to + half + d, rounded1(b * to_float(cos[half + d]), to) + rounded1(a * to_float(sin[half + d]), to));
    }
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
