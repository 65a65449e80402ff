// Sixteen floats at a time, in the compiler's own vector types: it lowers them to AVX-512, AVX2, NEON or plain code.
// bfloat16 is stored as its 16 bits; arithmetic is in fp32, rounding to bfloat16 is to nearest even.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

typedef float v16f __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));
typedef uint32_t v16u __attribute__((vector_size(64)));
typedef uint16_t v16h __attribute__((vector_size(32)));

struct bf16 {
    uint16_t bits;
};

#define INLINE static inline __attribute__((always_inline))

INLINE v16f splat(float x) { return v16f{} + x; }

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
    uint32_t u = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
INLINE void put(float* p, float x) { *p = x; }
INLINE void put(bf16* p, float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    p->bits = x != x ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

INLINE v16f load(const float* p) {
    v16f v;
    memcpy(&v, p, 64);
    return v;
}
INLINE v16f load(const bf16* p) {
    v16h h;
    memcpy(&h, p, 32);
    return (v16f)(__builtin_convertvector(h, v16u) << 16);
}
INLINE void store(float* p, v16f v) { memcpy(p, &v, 64); }
INLINE void store(bf16* p, v16f v) {
#ifdef __AVX512BF16__
    __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &rounded, 32);
#else
    v16u u = (v16u)v;
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    u = v != v ? v16u{} + 0x7fc0 : u;
    v16h h = __builtin_convertvector(u, v16h);
    memcpy(p, &h, 32);
#endif
}

#define FOLD(combine)                                                                                       \
    v16f w = __builtin_shuffle(v, v16i{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});              \
    v = combine;                                                                                            \
    w = __builtin_shuffle(v, v16i{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});                   \
    v = combine;                                                                                            \
    w = __builtin_shuffle(v, v16i{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});                   \
    v = combine;                                                                                            \
    w = __builtin_shuffle(v, v16i{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});                   \
    v = combine;                                                                                            \
    return v[0];
INLINE float sum(v16f v) { FOLD(v + w) }
INLINE float highest(v16f v) { FOLD(v > w ? v : w) }

// Sums of 16 vectors; in lanes, by a tree of pairwise adds.
INLINE v16f sums(const v16f* v) {
    v16f a[8], b[4], c[2];
    for (int i = 0; i < 8; i++) {
        v16f x = v[i], y = v[i + 8];  // lanes of x in the lower half of each pair
        a[i] = __builtin_shuffle(x, y, v16i{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}) +
               __builtin_shuffle(x, y, v16i{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
    }
    for (int i = 0; i < 4; i++) {
        v16f x = a[i], y = a[i + 4];
        b[i] = __builtin_shuffle(x, y, v16i{0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23}) +
               __builtin_shuffle(x, y, v16i{8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28, 29, 14, 15, 30, 31});
    }
    for (int i = 0; i < 2; i++) {
        v16f x = b[i], y = b[i + 2];
        c[i] = __builtin_shuffle(x, y, v16i{0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23}) +
               __builtin_shuffle(x, y, v16i{8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31});
    }
    v16f d = __builtin_shuffle(c[0], c[1], v16i{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}) +
             __builtin_shuffle(c[0], c[1], v16i{8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
    // d holds, lane by lane, v[bit-reversed order]; put it right
    return __builtin_shuffle(d, v16i{0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15});
}

// e^x to about one unit in the last place; 0 below -87, e^88 above 88, NaN stays NaN.
INLINE v16f exp16(v16f x) {
    v16f c = x > splat(88.f) ? splat(88.f) : x;
    c = c < splat(-87.f) ? splat(-87.f) : c;
    v16f t = c * 1.44269504f;
    v16i n = __builtin_convertvector(t + (t < 0 ? splat(-0.5f) : splat(0.5f)), v16i);  // to the nearest
    v16f nf = __builtin_convertvector(n, v16f);
    v16f r = c - nf * 0.693359375f + nf * 2.12194440e-4f;
    v16f p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    v16f scaled = p * (v16f)((n + 127) << 23);
    scaled = x < splat(-87.f) ? v16f{} : scaled;
    return x != x ? x : scaled;
}

INLINE v16f tanh16(v16f x) { return 1.0f - 2.0f / (exp16(x + x) + 1.0f); }
