// Paged attention of 64 rows (queries x heads of one KV head) against 64 keys at a time, with a running softmax (prefill).
#pragma once
#include "attention.h"

namespace {

// How operands are laid out for the two products. `left` [rows][depth], `right` [depth][width] in steps of 16 columns.
struct Plain {  // fp32 fused multiply-add
    typedef float Left;
    typedef float Right;
    static constexpr int DEPTH = 1;  // elements of the depth that one step takes
    INLINE v16f step(v16f acc, const Left* x, const Right* w) { return acc + splat(*x) * load(w); }
};

#ifdef __AVX512BF16__
struct Pairs {  // two bfloat16 products into fp32
    typedef bf16 Left;
    typedef uint32_t Right;
    static constexpr int DEPTH = 2;
    INLINE v16f step(v16f acc, const Left* x, const Right* w) {
        int32_t pair;
        memcpy(&pair, x, 4);
        return (v16f)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_si512(w));
    }
};

INLINE void transpose16(const uint32_t* const* rows, int column, uint32_t* out, int stride) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(rows[i] + column);
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        __m512i low = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), low2 = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        __m512i high = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd), high2 = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
        _mm512_storeu_si512(out + (i)*stride, _mm512_shuffle_i32x4(low, low2, 0x88));
        _mm512_storeu_si512(out + (8 + i) * stride, _mm512_shuffle_i32x4(low, low2, 0xdd));
        _mm512_storeu_si512(out + (4 + i) * stride, _mm512_shuffle_i32x4(high, high2, 0x88));
        _mm512_storeu_si512(out + (12 + i) * stride, _mm512_shuffle_i32x4(high, high2, 0xdd));
    }
}

// K rows -> [dim / 2][KEYS] pairs along the dimension; 2 | dim. Rows beyond `count` are a row of zeros.
void pack_keys(Pairs, const bf16* const* rows, int dim, uint32_t* out) {
    int pair = 0;
    for (; pair + 16 <= dim / 2; pair += 16)
        for (int t = 0; t < KEYS; t += 16) transpose16((const uint32_t* const*)rows + t, pair, out + pair * KEYS + t, KEYS);
    for (; pair < dim / 2; pair++)
        for (int t = 0; t < KEYS; t++) memcpy(out + pair * KEYS + t, rows[t] + 2 * pair, 4);
}

// V rows -> [KEYS / 2][width] pairs along the keys, width = dim rounded up to 16.
void pack_values(Pairs, const bf16* const* rows, int dim, int width, uint32_t* out) {
    const __m512i first = _mm512_load_si512(INTERLEAVE), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (int t = 0; t < KEYS; t += 2) {
        uint32_t* to = out + t / 2 * width;
        int d = 0;
        for (; d + 32 <= dim; d += 32) {
            __m512i x = _mm512_loadu_si512(rows[t] + d), y = _mm512_loadu_si512(rows[t + 1] + d);
            _mm512_storeu_si512(to + d, _mm512_permutex2var_epi16(x, first, y));
            _mm512_storeu_si512(to + d + 16, _mm512_permutex2var_epi16(x, second, y));
        }
        for (; d < dim; d++) to[d] = rows[t][d].bits | (uint32_t)rows[t + 1][d].bits << 16;
        for (; d < width; d++) to[d] = 0;
    }
}
#endif

template <class T>
void pack_keys(Plain, const T* const* rows, int dim, float* out) {
    for (int t = 0; t < KEYS; t++)
        for (int d = 0; d < dim; d++) out[d * KEYS + t] = to_float(rows[t][d]);
}

template <class T>
void pack_values(Plain, const T* const* rows, int dim, int width, float* out) {
    for (int t = 0; t < KEYS; t++) {
        for (int d = 0; d < dim; d++) out[t * width + d] = to_float(rows[t][d]);
        for (int d = dim; d < width; d++) out[t * width + d] = 0;
    }
}

// out[4 rows][16 * N columns] (+)= left [4][depth] x right [depth][columns]
template <class P, int N, bool ADD>
INLINE void product(float* out, int out_stride, const typename P::Left* left, int left_stride, const typename P::Right* right,
                    int right_stride, int steps) {
    v16f acc[4][N];
    for (int r = 0; r < 4; r++)
        for (int n = 0; n < N; n++) acc[r][n] = ADD ? load(out + r * out_stride + 16 * n) : v16f{};
    for (int i = 0; i < steps; i++)
        for (int r = 0; r < 4; r++)
            for (int n = 0; n < N; n++) acc[r][n] = P::step(acc[r][n], left + r * left_stride + i * P::DEPTH, right + i * right_stride + 16 * n);
    for (int r = 0; r < 4; r++)
        for (int n = 0; n < N; n++) store(out + r * out_stride + 16 * n, acc[r][n]);
}

template <class T, class P>
void run_tile(const Args& a, const Task& task, std::vector<float>& scratch) {
    typedef typename P::Left Left;
    typedef typename P::Right Right;
    const int group = a.heads / a.kv_heads, dim = a.value_dim, width = (dim + 15) & ~15, depth = a.key_dim;
    const int rows = task.count * group, padded = (rows + 3) & ~3;
    // floats: scores, output, keys, values, max, sum; then left operands q and p, zeros
    const size_t floats = (size_t)padded * (KEYS + width + 2) + (size_t)KEYS * (depth + width);
    const size_t lefts = (size_t)padded * (depth + KEYS) * sizeof(Left) / 4 + 32, zeros = std::max(depth, dim) + 16;
    scratch.resize(floats + lefts + zeros + 64);
    float* s = (float*)(((uintptr_t)scratch.data() + 63) & ~(uintptr_t)63);
    float* out = s + (size_t)padded * KEYS;
    Right* keys = (Right*)(out + (size_t)padded * width);
    Right* values = keys + (size_t)KEYS * depth;
    float *maximum = (float*)(values + (size_t)KEYS * width), *total = maximum + padded;
    Left *q = (Left*)(total + padded), *p = q + (size_t)padded * depth;
    T* nothing = (T*)(p + (size_t)padded * KEYS);
    memset((void*)nothing, 0, zeros * 4);
    std::fill(out, out + (size_t)padded * width, 0.f);
    std::fill(maximum, maximum + padded, NEVER);
    std::fill(total, total + padded, 0.f);
    for (int row = 0; row < rows; row++) {
        const T* from = (const T*)a.q + (task.query + row / group) * a.q_token + (task.head * group + row % group) * a.q_head;
        int d = 0;
        for (; d + 16 <= depth; d += 16) store(q + (size_t)row * depth + d, load(from + d));
        for (; d < depth; d++) put(q + (size_t)row * depth + d, to_float(from[d]));
    }
    memset((void*)(q + (size_t)rows * depth), 0, (size_t)(padded - rows) * depth * sizeof(Left));
    const T *k[KEYS], *v[KEYS];
    for (int begin = task.begin; begin < task.end; begin += KEYS) {
        const int count = std::min(KEYS, task.end - begin);
        fill_rows(a, task, begin, count, k, v);
        for (int t = count; t < KEYS; t++) k[t] = v[t] = nothing;
        pack_keys(P(), k, depth, keys);
        pack_values(P(), v, dim, width, values);
        for (int row = 0; row < padded; row += 4)
            product<P, 4, false>(s + row * KEYS, KEYS, q + (size_t)row * depth, depth, keys, KEYS, depth / P::DEPTH);
        for (int row = 0; row < padded; row++) {
            float* x = s + row * KEYS;
            const int at = task.position + std::min(row, rows - 1) / group;
            const int high_key = at - begin;  // the last key seen, from `begin`
            const int low_key = a.window ? at - a.window + 1 - begin : 0;  // the first
            v16f top = splat(NEVER), parts[KEYS / 16];
            const bool whole = high_key >= KEYS - 1 && low_key <= 0;
            for (int t = 0; t < KEYS / 16; t++) {
                parts[t] = finish_scores(load(x + 16 * t), a);
                if (!whole) {
                    const v16i index = v16i{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + 16 * t;
                    parts[t] = ((index > high_key) | (index < low_key)) ? splat(-INFINITY) : parts[t];
                }
                top = parts[t] > top ? parts[t] : top;
            }
            const float high = std::max(maximum[row], highest(top));
            v16f part = {};
            for (int t = 0; t < KEYS / 16; t++) {
                parts[t] = exp16(parts[t] - high);
                part += parts[t];
                store(p + (size_t)row * KEYS + 16 * t, parts[t]);
            }
            const float rescale = high == maximum[row] ? 1.f : std::exp(maximum[row] - high);
            maximum[row] = high;
            total[row] = total[row] * rescale + sum(part);
            if (rescale != 1.f)
                for (int d = 0; d < width; d += 16) store(out + (size_t)row * width + d, load(out + (size_t)row * width + d) * rescale);
        }
        const int steps = (count + P::DEPTH - 1) / P::DEPTH;
        for (int row = 0; row < padded; row += 4) {
            int d = 0;
            for (; d + 64 <= width; d += 64)
                product<P, 4, true>(out + (size_t)row * width + d, width, p + (size_t)row * KEYS, KEYS, values + d, width, steps);
            for (; d < width; d += 16)
                product<P, 1, true>(out + (size_t)row * width + d, width, p + (size_t)row * KEYS, KEYS, values + d, width, steps);
        }
    }
    for (int row = 0; row < rows; row++) {
        T* to = (T*)a.out + ((int64_t)(task.query + row / group) * a.heads + task.head * group + row % group) * dim;
        const float* from = out + (size_t)row * width;
        const float factor = 1.f / total[row];
        int d = 0;
        for (; d + 16 <= dim; d += 16) store(to + d, load(from + d) * factor);
        for (; d < dim; d++) put(to + d, from[d] * factor);
    }
}

INLINE void tile_of(const Args& a, const Task& task, std::vector<float>& scratch, float) { run_tile<float, Plain>(a, task, scratch); }
INLINE void tile_of(const Args& a, const Task& task, std::vector<float>& scratch, bf16) {
#ifdef __AVX512BF16__
    if (a.key_dim % 2 == 0) return run_tile<bf16, Pairs>(a, task, scratch);
#endif
    run_tile<bf16, Plain>(a, task, scratch);
}

}  // namespace
