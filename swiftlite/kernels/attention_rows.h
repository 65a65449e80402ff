// Paged attention of one query and some KV heads, all query heads of each together (decode): each K and V row is read once.
//
// Decode waits for memory, so a chunk of tokens is read through all heads of a task before the next chunk: a block's heads lie side by
// side, and memory reads such a run faster than the same head of block after block. The next head's rows are fetched on the way.
#pragma once
#include "attention.h"

namespace {

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
// Scores of R query heads (1, 2 or 4) against count keys (rows k, moved by `shift`; up to 15 pointers beyond are readable); 32 | dim.
// The rows `next` elements further are fetched.
template <int R>
void scores_of(const bf16* const* q, const bf16* const* k, int64_t shift, int64_t next, int count, float* s, int dim) {
    constexpr int TOKENS = 16 / R;
    for (int t = 0; t < count; t += TOKENS) {
        v16f acc[16] = {};
        for (int i = 0; i < dim; i += 32) {
            __m512bh rows[R];
            for (int r = 0; r < R; r++) rows[r] = (__m512bh)_mm512_loadu_si512(q[r] + i);
            for (int j = 0; j < TOKENS; j++) {
                const bf16* at = k[t + j] + shift + i;
                const __m512bh key = (__m512bh)_mm512_loadu_si512(at);
                __builtin_prefetch(at + next, 0, 2);
                for (int r = 0; r < R; r++) acc[r * TOKENS + j] = (v16f)_mm512_dpbf16_ps((__m512)acc[r * TOKENS + j], rows[r], key);
            }
        }
        float all[16];
        store(all, sums(acc));
        for (int r = 0; r < R; r++) memcpy(s + r * CHUNK + t, all + r * TOKENS, TOKENS * sizeof(float));
    }
}

bool fast_scores(const bf16* const* q, int group, const bf16* const* k, int64_t shift, int64_t next, int count, float* s, int dim) {
    if (dim % 32) return false;
    int r = 0;
    for (; r + 4 <= group; r += 4) scores_of<4>(q + r, k, shift, next, count, s + r * CHUNK, dim);
    for (; r + 2 <= group; r += 2) scores_of<2>(q + r, k, shift, next, count, s + r * CHUNK, dim);
    for (; r < group; r++) scores_of<1>(q + r, k, shift, next, count, s + r * CHUNK, dim);
    return true;
}

// acc[R][32 * N columns from d] += p[R][count] * v[count], p rounded to bfloat16; 2 | count; shift and next as above
template <int N, int R>
INLINE void mix_pairs(float* acc, int stride, const bf16* p, const bf16* const* v, int64_t shift, int64_t next, int d, int count,
                      __m512i first, __m512i second) {
    __m512 sums[R][2 * N];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < 2 * N; n++) sums[r][n] = _mm512_loadu_ps(acc + r * stride + d + 16 * n);
    for (int t = 0; t < count; t += 2) {
        __m512bh values[2 * N];
        for (int n = 0; n < N; n++) {
            const bf16 *at = v[t] + shift + d + 32 * n, *then = v[t + 1] + shift + d + 32 * n;
            const __m512i x = _mm512_loadu_si512(at), y = _mm512_loadu_si512(then);
            __builtin_prefetch(at + next, 0, 2);
            __builtin_prefetch(then + next, 0, 2);
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
INLINE void mix_pairs_all(float* acc, int dim, const bf16* p, const bf16* const* v, int64_t shift, int64_t next, int count) {
    const __m512i first = _mm512_load_si512(INTERLEAVE), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    int d = 0;
    if (R <= 2)
        for (; d + 128 <= dim; d += 128) mix_pairs<4, R>(acc, dim, p, v, shift, next, d, count, first, second);
    for (; d + 64 <= dim; d += 64) mix_pairs<2, R>(acc, dim, p, v, shift, next, d, count, first, second);
    for (; d + 32 <= dim; d += 32) mix_pairs<1, R>(acc, dim, p, v, shift, next, d, count, first, second);
}

bool fast_mix(float* acc, int dim, const float* p, int group, const bf16* const* v, int64_t shift, int64_t next, int count,
              bf16* rounded_p) {
    if (dim % 32) return false;
    const int even = (count + 1) & ~1;  // the pointer beyond is readable and its weight is zero
    for (int i = 0; i < group * CHUNK; i += CHUNK)
        for (int t = 0; t < even; t += 16) store(rounded_p + i + t, load(p + i + t));
    int r = 0;
    for (; r + 4 <= group; r += 4) mix_pairs_all<4>(acc + r * dim, dim, rounded_p + r * CHUNK, v, shift, next, even);
    for (; r + 2 <= group; r += 2) mix_pairs_all<2>(acc + r * dim, dim, rounded_p + r * CHUNK, v, shift, next, even);
    for (; r < group; r++) mix_pairs_all<1>(acc + r * dim, dim, rounded_p + r * CHUNK, v, shift, next, even);
    return true;
}
#else
bool fast_scores(const bf16* const*, int, const bf16* const*, int64_t, int64_t, int, float*, int) { return false; }
bool fast_mix(float*, int, const float*, int, const bf16* const*, int64_t, int64_t, int, bf16*) { return false; }
#endif
bool fast_scores(const float* const*, int, const float* const*, int64_t, int64_t, int, float*, int) { return false; }
bool fast_mix(float*, int, const float*, int, const float* const*, int64_t, int64_t, int, bf16*) { return false; }

// acc[R][16 * N columns from d] += p[R][count] * v[count]
template <class T, int N, int R>
INLINE void mix(float* acc, int acc_stride, const float* p, const T* const* v, int64_t shift, int d, int count) {
    v16f sums[R][N];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) sums[r][n] = load(acc + r * acc_stride + d + 16 * n);
    for (int t = 0; t < count; t++) {
        v16f values[N];
        for (int n = 0; n < N; n++) values[n] = load(v[t] + shift + d + 16 * n);
        for (int r = 0; r < R; r++) {
            v16f weight = splat(p[r * CHUNK + t]);
            for (int n = 0; n < N; n++) sums[r][n] += weight * values[n];
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) store(acc + r * acc_stride + d + 16 * n, sums[r][n]);
}

template <class T, int R>
INLINE void mix_all(float* acc, int dim, const float* p, const T* const* v, int64_t shift, int count) {
    int d = 0;
    for (; d + 64 <= dim; d += 64) mix<T, 4, R>(acc, dim, p, v, shift, d, count);
    for (; d + 16 <= dim; d += 16) mix<T, 1, R>(acc, dim, p, v, shift, d, count);
    for (; d < dim; d++)
        for (int r = 0; r < R; r++)
            for (int t = 0; t < count; t++) acc[r * dim + d] += p[r * CHUNK + t] * to_float(v[t][shift + d]);
}

// One softmax step of a query's heads: scores s[group][CHUNK] of `count` keys become weights; sums and accumulators keep up.
INLINE void soften(const Args& a, float* s, int count, int group, int dim, float* acc, float* maximum, float* total) {
    const int padded = (count + 15) & ~15;
    for (int r = 0; r < group; r++) {
        float* row = s + r * CHUNK;
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
}

template <class T>
void run_rows(const Args& a, const Task& task, std::vector<float>& scratch) {
    const int group = a.heads / a.kv_heads, dim = a.value_dim, rows = task.heads * group;
    const int64_t key_head = (int64_t)a.block_size * a.key_dim, value_head = (int64_t)a.block_size * dim;  // from head to head
    scratch.resize((size_t)group * (CHUNK + CHUNK / 2) + (size_t)rows * (dim + 2) + 64);
    float *s = scratch.data(), *acc = s + group * CHUNK, *maximum = acc + rows * dim, *total = maximum + rows;
    bf16* rounded_p = (bf16*)(total + rows);
    std::fill(acc, acc + rows * dim, 0.f);
    std::fill(maximum, maximum + rows, NEVER);
    std::fill(total, total + rows, 0.f);
    std::vector<const T*> q(rows);
    for (int r = 0; r < rows; r++) q[r] = (const T*)a.q + task.query * a.q_token + (task.head * group + r) * a.q_head;
    const T *k[CHUNK + 16], *v[CHUNK + 16];
    const int chunk = task.heads > 1 ? SHORT_CHUNK : CHUNK;  // one head alone runs along its own rows
    for (int begin = task.begin; begin < task.end; begin += chunk) {
        const int count = std::min(chunk, task.end - begin);
        fill_rows(a, task, begin, count, k, v);
        for (int t = count; t < count + 16; t++) k[t] = k[count - 1], v[t] = v[count - 1];  // for steps of 16; weighed zero
        for (int head = 0; head < task.heads; head++) {
            const T* const* query = q.data() + head * group;
            float* mixed = acc + head * group * dim;
            const int64_t key = head * key_head, value = head * value_head, more = head + 1 < task.heads;  // is there a head to fetch?
            if (!fast_scores(query, group, k, key, more * key_head, count, s, a.key_dim))
                for (int t = 0; t < count; t++)
                    for (int r = 0; r < group; r++) s[r * CHUNK + t] = dot(query[r], k[t] + key, a.key_dim);
            soften(a, s, count, group, dim, mixed, maximum + head * group, total + head * group);
            if (fast_mix(mixed, dim, s, group, v, value, more * value_head, count, rounded_p)) continue;
            int r = 0;
            for (; r + 4 <= group; r += 4) mix_all<T, 4>(mixed + r * dim, dim, s + r * CHUNK, v, value, count);
            for (; r + 2 <= group; r += 2) mix_all<T, 2>(mixed + r * dim, dim, s + r * CHUNK, v, value, count);
            for (; r < group; r++) mix_all<T, 1>(mixed + r * dim, dim, s + r * CHUNK, v, value, count);
        }
    }
    for (int r = 0; r < rows; r++) {
        const float* from = acc + r * dim;
        if (task.partial) {
            float* to = task.partial + r * (dim + 2);
            to[0] = maximum[r], to[1] = total[r];
            std::copy(from, from + dim, to + 2);
        } else {
            T* out = (T*)a.out + ((int64_t)task.query * a.heads + task.head * group + r) * dim;
            int d = 0;
            for (; d + 16 <= dim; d += 16) store(out + d, load(from + d) / total[r]);
            for (; d < dim; d++) put(out + d, from[d] / total[r]);
        }
    }
}

// Merge the `parts` splits of one query and KV head.
template <class T>
void merge(const Args& a, const Task& first, int parts) {
    const int group = a.heads / a.kv_heads, dim = a.value_dim, rows = first.heads * group;
    for (int r = 0; r < rows; r++) {
        const float* from = first.partial + r * (dim + 2);
        const int64_t step = (int64_t)rows * (dim + 2);
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

}  // namespace
