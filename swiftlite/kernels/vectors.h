// Sixteen floats at a time, in the compiler's own vector types: it lowers them to AVX-512, AVX2, NEON or plain code.
// bfloat16 is stored as its 16 bits; arithmetic is in fp32, rounding to bfloat16 is to nearest even.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
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
#define INLINE_MEMBER inline __attribute__((always_inline))

const v16i LANES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

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

// 16 vectors -> in lane i the sum (the highest) of vector i's lanes, by a tree of pairs.
#define TREE(combine)                                                                                                     \
    v16f a[8], b[4], c[2];                                                                                                \
    for (int i = 0; i < 8; i++) { /* lanes of v[i] in the lower half of each pair */                                      \
        const v16f x = __builtin_shuffle(v[i], v[i + 8], v16i{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}),   \
                   y = __builtin_shuffle(v[i], v[i + 8], v16i{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}); \
        a[i] = combine;                                                                                                   \
    }                                                                                                                     \
    for (int i = 0; i < 4; i++) {                                                                                         \
        const v16f x = __builtin_shuffle(a[i], a[i + 4], v16i{0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23}),   \
                   y = __builtin_shuffle(a[i], a[i + 4], v16i{8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28, 29, 14, 15, 30, 31}); \
        b[i] = combine;                                                                                                   \
    }                                                                                                                     \
    for (int i = 0; i < 2; i++) {                                                                                         \
        const v16f x = __builtin_shuffle(b[i], b[i + 2], v16i{0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23}),   \
                   y = __builtin_shuffle(b[i], b[i + 2], v16i{8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31}); \
        c[i] = combine;                                                                                                   \
    }                                                                                                                     \
    const v16f x = __builtin_shuffle(c[0], c[1], v16i{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}),           \
               y = __builtin_shuffle(c[0], c[1], v16i{8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});     \
    const v16f d = combine; /* in bit-reversed order; put it right */                                                     \
    return __builtin_shuffle(d, v16i{0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15});
INLINE v16f sums(const v16f* v) { TREE(x + y) }
INLINE v16f highests(const v16f* v) { TREE(x > y ? x : y) }

// e^x to about one unit in the last place; 0 below -87, e^88 above 88, NaN stays NaN.
INLINE v16f exp16(v16f x) {
#ifdef __AVX512F__  // rounding and scaling are single instructions here
    const __m512 c = _mm512_min_ps(_mm512_set1_ps(88.f), (__m512)x), n = _mm512_roundscale_ps(_mm512_mul_ps(c, _mm512_set1_ps(1.44269504f)), 0);
    v16f r = (v16f)_mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), c);
    r = (v16f)_mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), (__m512)r);
#else
    v16f c = x > splat(88.f) ? splat(88.f) : x;
    c = c < splat(-87.f) ? splat(-87.f) : c;
    v16f t = c * 1.44269504f;
    v16i n = __builtin_convertvector(t + (t < 0 ? splat(-0.5f) : splat(0.5f)), v16i);  // to the nearest
    v16f nf = __builtin_convertvector(n, v16f);
    v16f r = c - nf * 0.693359375f + nf * 2.12194440e-4f;
#endif
    v16f p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
#ifdef __AVX512F__
    const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.f), _CMP_NLT_UQ);  // NaN too
    return (v16f)_mm512_maskz_scalef_ps(kept, (__m512)p, n);
#else
    v16f scaled = p * (v16f)((n + 127) << 23);
    scaled = x < splat(-87.f) ? v16f{} : scaled;
    return x != x ? x : scaled;
#endif
}

// 2^x for x <= 0, to 3e-6; 0 below -126, NaN stays NaN.
INLINE v16f exp2_16(v16f x) {
#ifdef __AVX512F__
    const __m512 n = _mm512_roundscale_ps((__m512)x, 0);
    const v16f f = x - (v16f)n;
    v16f p = splat(1.33335581e-3f);  // ln(2)^k / k!
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
    return (v16f)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.f), _CMP_NLT_UQ), (__m512)p, n);
#else
    return exp16(x * 0.693147181f);
#endif
}

INLINE v16f tanh16(v16f x) { return 1.0f - 2.0f / (exp16(x + x) + 1.0f); }
