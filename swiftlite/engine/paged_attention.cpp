// Paged attention on the CPU: store new K and V by slot, then attend through block tables. One call per layer and step.
//
// Pools are [blocks, G, S, D] (see kv.py). A call takes any mix of sequences; work is cut into tasks that threads take in turn:
//   rows    one query of one sequence and KV head, all its H/G query heads together: each K and V is read once (decode).
//           Long contexts are split, and the parts are merged by their softmax weights.
//   tiles   64 rows (queries x heads of one KV head) against 64 keys at a time, with a running softmax (prefill). With
//           AVX512-BF16 both products are pairs-of-bfloat16 dot products on repacked K and V; else fp32.
// The softmax is fp32 throughout. Nothing outside a sequence's own tokens is read.
#include <algorithm>
#include <cmath>
#include <vector>

#include "steps.h"

namespace {

struct Args {
    void* out;  // [T, H, Dv], contiguous
    const void *q, *k, *v;  // [T, H, Dk], [T, G, Dk], [T, G, Dv] by strides; the last dimension is contiguous
    void *keys, *values;
    const int64_t* slots;  // [T]; -1: not stored
    const int32_t* tables;  // block tables, one after another
    const int32_t* sequences;  // [n][4]: query_start, query_len, context_len, offset of its table
    // When cos is given, q and k come before norm and rotation: both are done on the way, q into `rotated` [T, H, Dk].
    const void *cos, *sin;  // [T, Dk]
    const void *q_norm, *k_norm;  // [Dk], or nullptr: no norm
    void* rotated;
    int64_t q_token, q_head, k_token, k_head, v_token, v_head;
    int32_t tokens, num_sequences, heads, kv_heads, key_dim, value_dim, block_size, window, is_bf16, threads;  // window 0: none
    int32_t norm_kind;
    float scale, softcap, eps;  // softcap 0: none
};

struct Task {
    int32_t query, count;  // rows of the batch: first query and how many (rows: 1)
    int32_t head;  // KV head
    int32_t position;  // of the first query
    int32_t begin, end;  // keys
    const int32_t* table;
    float* partial;  // rows: where max, sum and accumulator of a split go; nullptr: write the result
    int64_t cost;
};

constexpr int ROWS = 64, KEYS = 64, CHUNK = 256;
constexpr float NEVER = -1e30f;  // below any score, and finite
// of two vectors of 32 halves: pairs of the first 16 (plus 16: of the second 16)
alignas(64) const uint16_t INTERLEAVE[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                             8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};

// Pointers to the K and V rows of `count` tokens from position `begin` on.
template <class T>
INLINE void fill_rows(const Args& a, const Task& task, int begin, int count, const T** k, const T** v) {
    int index = begin / a.block_size, offset = begin % a.block_size;
    for (int t = 0; t < count; index++, offset = 0) {
        const int64_t row = ((int64_t)task.table[index] * a.kv_heads + task.head) * a.block_size + offset;
        const T *key = (const T*)a.keys + row * a.key_dim, *value = (const T*)a.values + row * a.value_dim;
        for (; offset < a.block_size && t < count; offset++, t++, key += a.key_dim, value += a.value_dim) k[t] = key, v[t] = value;
    }
}

INLINE v16f finish_scores(v16f s, const Args& a) {
    s *= a.scale;
    return a.softcap > 0 ? a.softcap * tanh16(s / a.softcap) : s;
}

// ---- rows (decode) -------------------------------------------------------------------------------------------------

template <class T>
INLINE float dot(const T* x, const T* y, int dim) {
    v16f acc = {};
    int d = 0;
    for (; d + 16 <= dim; d += 16) acc += load(x + d) * load(y + d);
    float s = sum(acc);
    for (; d < dim; d++) s += to_float(x[d]) * to_float(y[d]);
    return s;
}

#ifdef __AVX512BF16__
// Scores of R query heads (1, 2, 4, 8 or 16) against count keys (rows k; up to 15 pointers beyond are readable), 32 * DIM32 wide.
template <int DIM32, int R>
void scores_of(const bf16* const* q, const bf16* const* k, int count, float* s) {
    constexpr int TOKENS = 16 / R;
    for (int t = 0; t < count; t += TOKENS) {
        v16f acc[16] = {};
        for (int i = 0; i < DIM32; i++) {
            __m512bh rows[R];
            for (int r = 0; r < R; r++) rows[r] = (__m512bh)_mm512_loadu_si512(q[r] + 32 * i);
            for (int j = 0; j < TOKENS; j++) {
                const __m512bh key = (__m512bh)_mm512_loadu_si512(k[t + j] + 32 * i);
                for (int r = 0; r < R; r++) acc[r * TOKENS + j] = (v16f)_mm512_dpbf16_ps((__m512)acc[r * TOKENS + j], rows[r], key);
            }
        }
        float all[16];
        store(all, sums(acc));
        for (int r = 0; r < R; r++) memcpy(s + r * CHUNK + t, all + r * TOKENS, TOKENS * sizeof(float));
    }
}

template <int DIM32>
void scores_by_heads(const bf16* const* q, int group, const bf16* const* k, int count, float* s) {
    int r = 0;
    for (; r + 4 <= group; r += 4) scores_of<DIM32, 4>(q + r, k, count, s + r * CHUNK);
    for (; r + 2 <= group; r += 2) scores_of<DIM32, 2>(q + r, k, count, s + r * CHUNK);
    for (; r < group; r++) scores_of<DIM32, 1>(q + r, k, count, s + r * CHUNK);
}

bool fast_scores(const bf16* const* q, int group, const bf16* const* k, int count, float* s, int dim) {
    switch (dim) {
        case 64: scores_by_heads<2>(q, group, k, count, s); return true;
        case 96: scores_by_heads<3>(q, group, k, count, s); return true;
        case 128: scores_by_heads<4>(q, group, k, count, s); return true;
        case 192: scores_by_heads<6>(q, group, k, count, s); return true;
        case 256: scores_by_heads<8>(q, group, k, count, s); return true;
        default: return false;
    }
}

// acc[R][32 * N columns from d] += p[R][count] * v[count], p rounded to bfloat16; 2 | count
template <int N, int R>
INLINE void mix_pairs(float* acc, int stride, const bf16* p, const bf16* const* v, int d, int count, __m512i first, __m512i second) {
    __m512 sums[R][2 * N];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < 2 * N; n++) sums[r][n] = _mm512_loadu_ps(acc + r * stride + d + 16 * n);
    for (int t = 0; t < count; t += 2) {
        __m512bh values[2 * N];
        for (int n = 0; n < N; n++) {
            const __m512i x = _mm512_loadu_si512(v[t] + d + 32 * n), y = _mm512_loadu_si512(v[t + 1] + d + 32 * n);
            values[2 * n] = (__m512bh)_mm512_permutex2var_epi16(x, first, y);
            values[2 * n + 1] = (__m512bh)_mm512_permutex2var_epi16(x, second, y);
        }
        for (int r = 0; r < R; r++) {
            int32_t pair;
            memcpy(&pair, p + r * CHUNK + t, 4);
            const __m512bh weight = (__m512bh)_mm512_set1_epi32(pair);
            for (int n = 0; n < 2 * N; n++) sums[r][n] = _mm512_dpbf16_ps(sums[r][n], weight, values[n]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < 2 * N; n++) _mm512_storeu_ps(acc + r * stride + d + 16 * n, sums[r][n]);
}

template <int R>
INLINE void mix_pairs_all(float* acc, int dim, const bf16* p, const bf16* const* v, int count) {
    const __m512i first = _mm512_load_si512(INTERLEAVE), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    int d = 0;
    if (R <= 2)
        for (; d + 128 <= dim; d += 128) mix_pairs<4, R>(acc, dim, p, v, d, count, first, second);
    for (; d + 64 <= dim; d += 64) mix_pairs<2, R>(acc, dim, p, v, d, count, first, second);
    for (; d + 32 <= dim; d += 32) mix_pairs<1, R>(acc, dim, p, v, d, count, first, second);
}

bool fast_mix(float* acc, int dim, const float* p, int group, const bf16* const* v, int count, bf16* rounded_p) {
    if (dim % 32) return false;
    const int even = (count + 1) & ~1;  // the pointer beyond is readable and its weight is zero
    for (int i = 0; i < group * CHUNK; i += CHUNK)
        for (int t = 0; t < even; t += 16) store(rounded_p + i + t, load(p + i + t));
    int r = 0;
    for (; r + 4 <= group; r += 4) mix_pairs_all<4>(acc + r * dim, dim, rounded_p + r * CHUNK, v, even);
    for (; r + 2 <= group; r += 2) mix_pairs_all<2>(acc + r * dim, dim, rounded_p + r * CHUNK, v, even);
    for (; r < group; r++) mix_pairs_all<1>(acc + r * dim, dim, rounded_p + r * CHUNK, v, even);
    return true;
}
#else
bool fast_scores(const bf16* const*, int, const bf16* const*, int, float*, int) { return false; }
bool fast_mix(float*, int, const float*, int, const bf16* const*, int, bf16*) { return false; }
#endif
bool fast_scores(const float* const*, int, const float* const*, int, float*, int) { return false; }
bool fast_mix(float*, int, const float*, int, const float* const*, int, bf16*) { return false; }

// acc[R][16 * N columns from d] += p[R][count] * v[count]
template <class T, int N, int R>
INLINE void mix(float* acc, int acc_stride, const float* p, const T* const* v, int d, int count) {
    v16f sums[R][N];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) sums[r][n] = load(acc + r * acc_stride + d + 16 * n);
    for (int t = 0; t < count; t++) {
        v16f values[N];
        for (int n = 0; n < N; n++) values[n] = load(v[t] + d + 16 * n);
        for (int r = 0; r < R; r++) {
            v16f weight = splat(p[r * CHUNK + t]);
            for (int n = 0; n < N; n++) sums[r][n] += weight * values[n];
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) store(acc + r * acc_stride + d + 16 * n, sums[r][n]);
}

template <class T, int R>
INLINE void mix_all(float* acc, int dim, const float* p, const T* const* v, int count) {
    int d = 0;
    for (; d + 64 <= dim; d += 64) mix<T, 4, R>(acc, dim, p, v, d, count);
    for (; d + 16 <= dim; d += 16) mix<T, 1, R>(acc, dim, p, v, d, count);
    for (; d < dim; d++)
        for (int r = 0; r < R; r++)
            for (int t = 0; t < count; t++) acc[r * dim + d] += p[r * CHUNK + t] * to_float(v[t][d]);
}

template <class T>
void run_rows(const Args& a, const Task& task, std::vector<float>& scratch) {
    const int group = a.heads / a.kv_heads, dim = a.value_dim;
    scratch.resize((size_t)group * (CHUNK + CHUNK / 2 + dim + 2) + 64);
    float *s = scratch.data(), *acc = s + group * CHUNK, *maximum = acc + group * dim, *total = maximum + group;
    bf16* rounded_p = (bf16*)(total + group);
    std::fill(acc, acc + group * dim, 0.f);
    std::fill(maximum, maximum + group, NEVER);
    std::fill(total, total + group, 0.f);
    std::vector<const T*> q(group);
    for (int r = 0; r < group; r++) q[r] = (const T*)a.q + task.query * a.q_token + (task.head * group + r) * a.q_head;
    const T *k[CHUNK + 16], *v[CHUNK + 16];
    for (int begin = task.begin; begin < task.end; begin += CHUNK) {
        const int count = std::min(CHUNK, task.end - begin);
        fill_rows(a, task, begin, count, k, v);
        for (int t = count; t < count + 16; t++) k[t] = k[count - 1], v[t] = v[count - 1];  // for steps of 16; weighed zero
        if (!fast_scores(q.data(), group, k, count, s, a.key_dim))
            for (int t = 0; t < count; t++)
                for (int r = 0; r < group; r++) s[r * CHUNK + t] = dot(q[r], k[t], a.key_dim);
        for (int r = 0; r < group; r++) {
            float* row = s + r * CHUNK;
            const int padded = (count + 15) & ~15;
            for (int t = count; t < padded; t++) row[t] = -INFINITY;
            v16f top = splat(NEVER);
            for (int t = 0; t < padded; t += 16) {
                v16f x = finish_scores(load(row + t), a);
                if (t + 16 > count)
                    for (int i = count - t; i < 16; i++) x[i] = -INFINITY;
                store(row + t, x);
                top = x > top ? x : top;
            }
            const float high = std::max(maximum[r], highest(top));
            const float rescale = high == maximum[r] ? 1.f : std::exp(maximum[r] - high);
            maximum[r] = high;
            v16f part = {};
            for (int t = 0; t < padded; t += 16) {
                v16f x = exp16(load(row + t) - high);
                store(row + t, x);
                part += x;
            }
            total[r] = total[r] * rescale + sum(part);
            if (rescale != 1.f)
                for (int d = 0; d < dim; d++) acc[r * dim + d] *= rescale;
        }
        if (fast_mix(acc, dim, s, group, v, count, rounded_p)) continue;
        int r = 0;
        for (; r + 4 <= group; r += 4) mix_all<T, 4>(acc + r * dim, dim, s + r * CHUNK, v, count);
        for (; r + 2 <= group; r += 2) mix_all<T, 2>(acc + r * dim, dim, s + r * CHUNK, v, count);
        for (; r < group; r++) mix_all<T, 1>(acc + r * dim, dim, s + r * CHUNK, v, count);
    }
    for (int r = 0; r < group; r++) {
        if (task.partial) {
            float* to = task.partial + r * (dim + 2);
            to[0] = maximum[r], to[1] = total[r];
            std::copy(acc + r * dim, acc + (r + 1) * dim, to + 2);
        } else {
            T* out = (T*)a.out + ((int64_t)task.query * a.heads + task.head * group + r) * dim;
            for (int d = 0; d < dim; d++) put(out + d, acc[r * dim + d] / total[r]);
        }
    }
}

// Merge the `parts` splits of one query and KV head.
template <class T>
void merge(const Args& a, const Task& first, int parts) {
    const int group = a.heads / a.kv_heads, dim = a.value_dim;
    for (int r = 0; r < group; r++) {
        const float* from = first.partial + r * (dim + 2);
        const int64_t step = (int64_t)group * (dim + 2);
        float high = NEVER, total = 0;
        for (int i = 0; i < parts; i++) high = std::max(high, from[i * step]);
        std::vector<float> acc(dim, 0.f);
        for (int i = 0; i < parts; i++) {
            const float weight = std::exp(from[i * step] - high);
            total += weight * from[i * step + 1];
            for (int d = 0; d < dim; d++) acc[d] += weight * from[i * step + 2 + d];
        }
        T* out = (T*)a.out + ((int64_t)first.query * a.heads + first.head * group + r) * dim;
        for (int d = 0; d < dim; d++) put(out + d, acc[d] / total);
    }
}

// ---- tiles (prefill) -----------------------------------------------------------------------------------------------

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

// ---- tasks ---------------------------------------------------------------------------------------------------------

template <class T>
INLINE void prepare_row(const Args& a, T* to, const T* from, const void* norm, int64_t token) {
    if (norm) {
        norm_row(to, from, (const T*)norm, a.key_dim, a.eps, a.norm_kind);
        from = to;
    }
    rope_row(to, from, (const T*)a.cos + token * a.key_dim, (const T*)a.sin + token * a.key_dim, a.key_dim);
}

template <class T>
void attend(Args a) {
    const T* raw_q = (const T*)a.q;
    const int64_t raw_token = a.q_token, raw_head = a.q_head;
    if (a.cos) a.q = a.rotated, a.q_token = (int64_t)a.heads * a.key_dim, a.q_head = a.key_dim;
    const int group = a.heads / a.kv_heads, few = 8, per_tile = std::max(1, ROWS / group);
    int64_t cached = 0;
    for (int i = 0; i < a.num_sequences; i++) {
        const int32_t* s = a.sequences + 4 * i;
        if (s[1] < few) cached += (int64_t)s[1] * (s[2] + s[1]) * a.kv_heads;
    }
    const int split = (int)std::max<int64_t>(256, (cached / (4 * a.threads) + 15) & ~(int64_t)15);
    std::vector<Task> tasks;
    struct Merge {
        size_t task;
        int parts;
    };
    std::vector<Merge> merges;
    size_t partials = 0;
    for (int i = 0; i < a.num_sequences; i++) {
        const int32_t* s = a.sequences + 4 * i;
        const int32_t* table = a.tables + s[3];
        const int step = s[1] < few ? 1 : per_tile;
        for (int first = 0; first < s[1]; first += step) {
            const int count = std::min(step, s[1] - first), position = s[2] + first, end = position + count;
            const int begin = a.window ? std::max(0, position + 1 - a.window) : 0;
            for (int head = 0; head < a.kv_heads; head++) {
                const int parts = s[1] < few ? (end - begin + split - 1) / split : 1;
                if (parts > 1) merges.push_back({tasks.size(), parts});
                for (int part = 0; part < parts; part++) {
                    const int from = parts > 1 ? begin + part * split : begin, to = parts > 1 ? std::min(end, from + split) : end;
                    tasks.push_back({s[0] + first, s[1] < few ? 0 : count, head, position, from, to, table, nullptr, (int64_t)count * (to - from)});
                    if (parts > 1) partials += (size_t)group * (a.value_dim + 2);
                }
            }
        }
    }
    std::vector<float> workspace(partials);
    float* next = workspace.data();
    for (const Merge& m : merges)
        for (int part = 0; part < m.parts; part++, next += (size_t)group * (a.value_dim + 2)) tasks[m.task + part].partial = next;
    std::vector<uint32_t> order(tasks.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](uint32_t x, uint32_t y) { return tasks[x].cost > tasks[y].cost; });

    const int64_t pairs = (int64_t)a.tokens * a.kv_heads, total = tasks.size(), joined = merges.size();
#pragma omp parallel num_threads(a.threads)
    {
        if (a.cos) {
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < (int64_t)a.tokens * a.heads; i++) {
                const int64_t token = i / a.heads, head = i % a.heads;
                prepare_row(a, (T*)a.rotated + i * a.key_dim, raw_q + token * raw_token + head * raw_head, a.q_norm, token);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < pairs; i++) {
            const int64_t token = i / a.kv_heads, head = i % a.kv_heads, slot = a.slots[token];
            if (slot < 0) continue;
            const int64_t row = (slot / a.block_size * a.kv_heads + head) * a.block_size + slot % a.block_size;
            const T* k = (const T*)a.k + token * a.k_token + head * a.k_head;
            if (a.cos)
                prepare_row(a, (T*)a.keys + row * a.key_dim, k, a.k_norm, token);
            else
                memcpy((T*)a.keys + row * a.key_dim, k, a.key_dim * sizeof(T));
            memcpy((T*)a.values + row * a.value_dim, (const T*)a.v + token * a.v_token + head * a.v_head, a.value_dim * sizeof(T));
        }
        static thread_local std::vector<float> scratch;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < total; i++) {
            const Task& task = tasks[order[i]];
            if (task.count)
                tile_of(a, task, scratch, T());
            else
                run_rows<T>(a, task, scratch);
        }
        if (joined) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < joined; i++) merge<T>(a, tasks[merges[i].task], merges[i].parts);
        }
    }
}

}  // namespace

extern "C" void swift_paged_attention(const Args* args) {
    if (args->is_bf16)
        attend<bf16>(*args);
    else
        attend<float>(*args);
}
