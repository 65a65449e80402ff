// Paged attention of many rows (queries x heads of one KV head) against some keys at a time, with a running softmax (prefill).
//
// A task packs a chunk of K and V once and takes it through its rows block by block: scores, softmax, and what they add to the result.
// A block computes only the keys that one of its rows sees.
#pragma once
#include "amx.h"
#include "attention.h"

namespace {

// How operands are laid out for the two products. `left` [rows][depth], `right` [depth][width] in steps of 16 columns.
struct Plain {  // fp32 fused multiply-add
    typedef float Left;
    typedef float Right;
    static constexpr int DEPTH = 1;  // elements of the depth that one entry of `right` takes
    static constexpr int ROWS = 64, BLOCK = 16, KEYS = 64;  // rows of a task, rows of a block, keys of a chunk
    static constexpr int STEP = 16;  // keys are computed by so many
    INLINE v16f step(v16f acc, const Left* x, const Right* w) { return acc + splat(*x) * load(w); }
};

#ifdef __AVX512BF16__
struct Pairs {  // two bfloat16 products into fp32
    typedef bf16 Left;
    typedef uint32_t Right;
    static constexpr int DEPTH = 2;
    static constexpr int ROWS = 64, BLOCK = 16, KEYS = 64, STEP = 16;
    INLINE v16f step(v16f acc, const Left* x, const Right* w) {
        int32_t pair;
        memcpy(&pair, x, 4);
        return (v16f)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_si512(w));
    }
};

#ifdef SWIFT_AMX
struct Unit : Pairs {  // the same pairs in the matrix unit; depths and widths are multiples of 32
    static constexpr int ROWS = 256, BLOCK = 32, KEYS = 256, STEP = 32;  // packing K and V takes as long as the products of 64 rows
};
#endif

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

// `count` K rows (a multiple of 16) -> [dim / 2][stride] pairs along the dimension; 2 | dim.
void pack_keys(Pairs, const bf16* const* rows, int count, int dim, uint32_t* out, int stride) {
    int pair = 0;
    for (; pair + 16 <= dim / 2; pair += 16)
        for (int t = 0; t < count; t += 16) transpose16((const uint32_t* const*)rows + t, pair, out + pair * stride + t, stride);
    for (; pair < dim / 2; pair++)
        for (int t = 0; t < count; t++) memcpy(out + pair * stride + t, rows[t] + 2 * pair, 4);
}

// `count` V rows (a multiple of 2) -> [count / 2][width] pairs along the keys, width = dim rounded up to 16.
void pack_values(Pairs, const bf16* const* rows, int count, int dim, int width, uint32_t* out) {
    const __m512i first = _mm512_load_si512(INTERLEAVE), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (int t = 0; t < count; t += 2) {
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
void pack_keys(Plain, const T* const* rows, int count, int dim, float* out, int stride) {
    for (int t = 0; t < count; t++)
        for (int d = 0; d < dim; d++) out[d * stride + t] = to_float(rows[t][d]);
}

template <class T>
void pack_values(Plain, const T* const* rows, int count, int dim, int width, float* out) {
    for (int t = 0; t < count; t++) {
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

// out[a block's rows][width] (+)= left [rows][depth] x right [depth][width], rows of the three being so many elements apart
template <bool ADD, class P>
INLINE void block(P, float* out, int out_stride, int width, const typename P::Left* left, int left_stride, const typename P::Right* right,
                  int right_stride, int depth) {
    const int steps = (depth + P::DEPTH - 1) / P::DEPTH;
    for (int row = 0; row < P::BLOCK; row += 4, out += 4 * out_stride, left += 4 * left_stride) {
        int d = 0;
        for (; d + 64 <= width; d += 64) product<P, 4, ADD>(out + d, out_stride, left, left_stride, right + d, right_stride, steps);
        for (; d < width; d += 16) product<P, 1, ADD>(out + d, out_stride, left, left_stride, right + d, right_stride, steps);
    }
}

#ifdef SWIFT_AMX
template <bool ADD>
INLINE void block(Unit, float* out, int out_stride, int width, const bf16* left, int left_stride, const uint32_t* right, int right_stride,
                  int depth) {
    const int64_t bytes = out_stride * 4;
    for (int d = 0; d < width; d += 32) {
        float *top = out + d, *bottom = top + 16 * out_stride;
        if (ADD) {
            _tile_loadd(0, top, bytes);
            _tile_loadd(1, top + 16, bytes);
            _tile_loadd(2, bottom, bytes);
            _tile_loadd(3, bottom + 16, bytes);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int i = 0; i < depth; i += 32) {
            _tile_loadd(4, left + i, left_stride * 2);
            _tile_loadd(6, right + i / 2 * right_stride + d, right_stride * 4);
            _tile_loadd(7, right + i / 2 * right_stride + d + 16, right_stride * 4);
            _tile_loadd(5, left + 16 * left_stride + i, left_stride * 2);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, top, bytes);
        _tile_stored(1, top + 16, bytes);
        _tile_stored(2, bottom, bytes);
        _tile_stored(3, bottom + 16, bytes);
    }
}
#endif

// One softmax step of 16 rows: scores s[16][stride] of `columns` keys become weights p[16][stride]; maximum, total and out[16][width]
// keep up. Row r sees the keys from last[r] - window + 1 (window 0: all) up to last[r]. Maxima are exponents of two.
template <class Left>
INLINE void soften_rows(const Args& a, float* s, Left* p, int stride, int columns, const int* last, float* maximum, float* total, float* out,
                        int width) {
    constexpr float LOG2_E = 1.44269504f;
    const float factor = a.softcap > 0 ? LOG2_E : a.scale * LOG2_E;  // from what lies in s
    if (a.softcap > 0)
        for (int r = 0; r < 16; r++)
            for (int t = 0; t < columns; t += 16) store(s + r * stride + t, finish_scores(load(s + r * stride + t), a));
    v16f of_rows[16];
    for (int r = 0; r < 16; r++) {
        float* x = s + r * stride;
        const int first = a.window ? last[r] - a.window + 1 : 0;
        v16f top = splat(NEVER);
        if (last[r] < columns - 1 || first > 0)
            for (int t = 0; t < columns; t += 16)
                store(x + t, ((LANES + t > last[r]) | (LANES + t < first)) ? splat(-INFINITY) : load(x + t));
        for (int t = 0; t < columns; t += 16) {
            const v16f part = load(x + t);
            top = part > top ? part : top;
        }
        of_rows[r] = top;
    }
    const v16f before = load(maximum), found = highests(of_rows) * factor, high = found > before ? found : before;
    const v16f rescale = exp2_16(before - high);
    store(maximum, high);
    for (int r = 0; r < 16; r++) {
        v16f part = {};
        for (int t = 0; t < columns; t += 16) {
            const v16f weight = exp2_16(load(s + r * stride + t) * factor - maximum[r]);
            part += weight;
            store(p + r * stride + t, weight);
        }
        of_rows[r] = part;
    }
    store(total, load(total) * rescale + sums(of_rows));
    float factors[16];
    store(factors, rescale);
    for (int r = 0; r < 16; r++)
        if (factors[r] != 1.f)
            for (int d = 0; d < width; d += 16) store(out + r * width + d, load(out + r * width + d) * factors[r]);
}

template <class T, class P>
void run_tile(const Args& a, const Task& task, std::vector<float>& scratch) {
    typedef typename P::Left Left;
    typedef typename P::Right Right;
    constexpr int KEYS = P::KEYS, BLOCK = P::BLOCK;
    const int group = a.heads / a.kv_heads, dim = a.value_dim, width = (dim + 15) & ~15, depth = a.key_dim;
    const int rows = task.count * group, padded = (rows + BLOCK - 1) / BLOCK * BLOCK;
    // floats: scores, output, keys, values, max, sum, position; then left operands q and p, zeros
    const size_t floats = (size_t)BLOCK * KEYS + (size_t)padded * (width + 3) + (size_t)KEYS * (depth + width);
    const size_t lefts = ((size_t)padded * depth + (size_t)BLOCK * KEYS) * sizeof(Left) / 4 + 32, zeros = std::max(depth, dim) + 16;
    scratch.resize(floats + lefts + zeros + 64);
    float* s = (float*)(((uintptr_t)scratch.data() + 63) & ~(uintptr_t)63);
    float* out = s + BLOCK * KEYS;
    Right* keys = (Right*)(out + (size_t)padded * width);
    Right* values = keys + (size_t)KEYS * depth;
    float *maximum = (float*)(values + (size_t)KEYS * width), *total = maximum + padded;
    int* position = (int*)(total + padded);
    Left *q = (Left*)(position + padded), *p = q + (size_t)padded * depth;
    T* nothing = (T*)(p + BLOCK * KEYS);
    memset((void*)nothing, 0, zeros * 4);
    std::fill(out, out + (size_t)padded * width, 0.f);
    std::fill(maximum, maximum + padded, NEVER);
    std::fill(total, total + padded, 0.f);
    for (int row = 0; row < padded; row++) position[row] = task.position + std::min(row, rows - 1) / group;
    for (int row = 0; row < rows; row++) {
        const T* from = (const T*)a.q + (task.query + row / group) * a.q_token + (task.head * group + row % group) * a.q_head;
        int d = 0;
        for (; d + 16 <= depth; d += 16) store(q + (size_t)row * depth + d, load(from + d));
        for (; d < depth; d++) put(q + (size_t)row * depth + d, to_float(from[d]));
    }
    memset((void*)(q + (size_t)rows * depth), 0, (size_t)(padded - rows) * depth * sizeof(Left));
    const T *k[KEYS], *v[KEYS];
    for (int begin = task.begin; begin < task.end; begin += KEYS) {
        const int count = std::min(KEYS, task.end - begin), packed = (count + P::STEP - 1) / P::STEP * P::STEP;
        fill_rows(a, task, begin, count, k, v);
        for (int t = count; t < packed; t++) k[t] = v[t] = nothing;
        pack_keys(P(), k, packed, depth, keys, KEYS);
        pack_values(P(), v, packed, dim, width, values);
        for (int row = 0; row < padded; row += BLOCK) {
            const int seen = std::min(count, position[row + BLOCK - 1] - begin + 1);  // by the block's last row
            if (seen <= 0 || (a.window && position[row] - a.window + 1 >= begin + count)) continue;
            const int columns = (seen + P::STEP - 1) / P::STEP * P::STEP;
            block<false>(P(), s, KEYS, columns, q + (size_t)row * depth, depth, keys, KEYS, depth);
            float* mixed = out + (size_t)row * width;
            for (int r = 0; r < BLOCK; r += 16) {
                int last[16];
                for (int i = 0; i < 16; i++) last[i] = position[row + r + i] - begin;
                soften_rows(a, s + r * KEYS, p + r * KEYS, KEYS, columns, last, maximum + row + r, total + row + r, mixed + r * width, width);
            }
            block<true>(P(), mixed, width, width, p, KEYS, values, width, columns);
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

enum Way { PLAIN, PAIRS, UNIT };

INLINE Way way_of(const Args& a, float) { return PLAIN; }
INLINE Way way_of(const Args& a, bf16) {
#ifdef SWIFT_AMX
    if (a.key_dim % 32 == 0 && a.value_dim % 32 == 0 && amx_ready()) return UNIT;
#endif
#ifdef __AVX512BF16__
    if (a.key_dim % 2 == 0) return PAIRS;
#endif
    return PLAIN;
}

// Rows of a task.
INLINE int rows_of(Way way) {
#ifdef SWIFT_AMX
    if (way == UNIT) return Unit::ROWS;
#endif
    return Plain::ROWS;
}

INLINE void tile_of(Way, const Args& a, const Task& task, std::vector<float>& scratch, float) { run_tile<float, Plain>(a, task, scratch); }
INLINE void tile_of(Way way, const Args& a, const Task& task, std::vector<float>& scratch, bf16) {
#ifdef SWIFT_AMX
    if (way == UNIT) {
        const Tiles tiles({16, 16, 16, 16, 16, 16, 16, 16}, {64, 64, 64, 64, 64, 64, 64, 64});
        return run_tile<bf16, Unit>(a, task, scratch);
    }
#endif
#ifdef __AVX512BF16__
    if (way == PAIRS) return run_tile<bf16, Pairs>(a, task, scratch);
#endif
    run_tile<bf16, Plain>(a, task, scratch);
}

}  // namespace
