// Paged attention of one query and some KV heads, all query heads of each together (decode): each K and V row is read once.
//
// Decode waits for memory, so a chunk of tokens is read through all heads of a task before the next chunk: a block's heads lie side by
// side, and memory reads such a run faster than the same head of block after block. While a head is computed, the rows that come next
// are fetched: those of the next head, the next chunk, or the task that is to be taken next.
#pragma once
#include "attention.h"
#include "attention_unit.h"

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
// Scores of R query heads (1, 2 or 4) against count keys (up to 15 rows beyond are readable); 32 | dim. Rows `next` are fetched.
template <int R>
void scores_of(const bf16* const* q, Rows<bf16> k, Rows<bf16> next, int count, float* s, int dim) {
    constexpr int TOKENS = 16 / R;
    for (int t = 0; t < count; t += TOKENS) {
        v16f acc[16] = {};
        for (int i = 0; i < dim; i += 32) {
            __m512bh rows[R];
            for (int r = 0; r < R; r++) rows[r] = (__m512bh)_mm512_loadu_si512(q[r] + i);
            for (int j = 0; j < TOKENS; j++) {
                const __m512bh key = (__m512bh)_mm512_loadu_si512(k[t + j] + i);
                __builtin_prefetch(next[t + j] + i, 0, 2);
                for (int r = 0; r < R; r++) acc[r * TOKENS + j] = (v16f)_mm512_dpbf16_ps((__m512)acc[r * TOKENS + j], rows[r], key);
            }
        }
        float all[16];
        store(all, sums(acc));
        for (int r = 0; r < R; r++) memcpy(s + r * CHUNK + t, all + r * TOKENS, TOKENS * sizeof(float));
    }
}

// acc[R][32 * N columns from d] += p[R][count] * v[count], p rounded to bfloat16; 2 | count; `next` as above
template <int N, int R>
INLINE void mix_pairs(float* acc, int stride, const bf16* p, Rows<bf16> v, Rows<bf16> next, int d, int count,
                      __m512i first, __m512i second) {
    __m512 sums[R][2 * N];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < 2 * N; n++) sums[r][n] = _mm512_loadu_ps(acc + r * stride + d + 16 * n);
    for (int t = 0; t < count; t += 2) {
        __m512bh values[2 * N];
        for (int n = 0; n < N; n++) {
            const __m512i x = _mm512_loadu_si512(v[t] + d + 32 * n), y = _mm512_loadu_si512(v[t + 1] + d + 32 * n);
            __builtin_prefetch(next[t] + d + 32 * n, 0, 2);
            __builtin_prefetch(next[t + 1] + d + 32 * n, 0, 2);
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
INLINE void mix_pairs_all(float* acc, int dim, const bf16* p, Rows<bf16> v, Rows<bf16> next, int count) {
    const __m512i first = _mm512_load_si512(INTERLEAVE), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    int d = 0;
    if (R <= 2)
        for (; d + 128 <= dim; d += 128) mix_pairs<4, R>(acc, dim, p, v, next, d, count, first, second);
    for (; d + 64 <= dim; d += 64) mix_pairs<2, R>(acc, dim, p, v, next, d, count, first, second);
    for (; d + 32 <= dim; d += 32) mix_pairs<1, R>(acc, dim, p, v, next, d, count, first, second);
}

// The two products by dot products of bfloat16 pairs; dims are multiples of 32.
class PairRows {
   public:
    PairRows(const Args& a, const bf16* const* q, int heads, float* place)
        : group(a.heads / a.kv_heads), key_dim(a.key_dim), dim(a.value_dim), queries(q), weights((bf16*)place) {}
    static size_t room(const Args& a, int heads) { return (size_t)a.heads / a.kv_heads * CHUNK / 2; }
    static bool takes(const Args& a, const Task&) { return a.key_dim % 32 == 0 && a.value_dim % 32 == 0; }

    INLINE_MEMBER void scores(int head, Rows<bf16> k, Rows<bf16> next, int count, float* s) {
        const bf16* const* q = queries + head * group;
        int r = 0;
        for (; r + 4 <= group; r += 4) scores_of<4>(q + r, k, next, count, s + r * CHUNK, key_dim);
        for (; r + 2 <= group; r += 2) scores_of<2>(q + r, k, next, count, s + r * CHUNK, key_dim);
        for (; r < group; r++) scores_of<1>(q + r, k, next, count, s + r * CHUNK, key_dim);
    }

    INLINE_MEMBER void mix(float* acc, const float* p, Rows<bf16> v, Rows<bf16> next, int count) {
        const int even = (count + 1) & ~1;  // the row beyond is readable and its weight is zero
        for (int i = 0; i < group * CHUNK; i += CHUNK)
            for (int t = 0; t < even; t += 16) store(weights + i + t, load(p + i + t));
        int r = 0;
        for (; r + 4 <= group; r += 4) mix_pairs_all<4>(acc + r * dim, dim, weights + r * CHUNK, v, next, even);
        for (; r + 2 <= group; r += 2) mix_pairs_all<2>(acc + r * dim, dim, weights + r * CHUNK, v, next, even);
        for (; r < group; r++) mix_pairs_all<1>(acc + r * dim, dim, weights + r * CHUNK, v, next, even);
    }

   private:
    const int group, key_dim, dim;
    const bf16* const* queries;
    bf16* weights;
};
#endif

// acc[R][16 * N columns from d] += p[R][count] * v[count]
template <class T, int N, int R>
INLINE void mix(float* acc, int acc_stride, const float* p, Rows<T> v, int d, int count) {
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
INLINE void mix_all(float* acc, int dim, const float* p, Rows<T> v, int count) {
    int d = 0;
    for (; d + 64 <= dim; d += 64) mix<T, 4, R>(acc, dim, p, v, d, count);
    for (; d + 16 <= dim; d += 16) mix<T, 1, R>(acc, dim, p, v, d, count);
    for (; d < dim; d++)
        for (int r = 0; r < R; r++)
            for (int t = 0; t < count; t++) acc[r * dim + d] += p[r * CHUNK + t] * to_float(v[t][d]);
}

// The two products in fp32, for any dims.
template <class T>
class PlainRows {
   public:
    PlainRows(const Args& a, const T* const* q, int heads, float* place)
        : group(a.heads / a.kv_heads), key_dim(a.key_dim), dim(a.value_dim), queries(q) {}
    static size_t room(const Args&, int heads) { return 0; }

    INLINE_MEMBER void scores(int head, Rows<T> k, Rows<T> next, int count, float* s) {
        for (int t = 0; t < count; t++)
            for (int r = 0; r < group; r++) s[r * CHUNK + t] = dot(queries[head * group + r], k[t], key_dim);
    }

    INLINE_MEMBER void mix(float* acc, const float* p, Rows<T> v, Rows<T> next, int count) {
        int r = 0;
        for (; r + 4 <= group; r += 4) mix_all<T, 4>(acc + r * dim, dim, p + r * CHUNK, v, count);
        for (; r + 2 <= group; r += 2) mix_all<T, 2>(acc + r * dim, dim, p + r * CHUNK, v, count);
        for (; r < group; r++) mix_all<T, 1>(acc + r * dim, dim, p + r * CHUNK, v, count);
    }

   private:
    const int group, key_dim, dim;
    const T* const* queries;
};

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

// K and V rows of a chunk's tokens for the first head of its task; 32 more are readable, for steps of 32 (they weigh zero).
template <class T>
struct Chunk {
    const T *k[CHUNK + 32], *v[CHUNK + 32];
    int begin, count;
    void fill(const Args& a, const Task& task, int from) {
        begin = from;
        count = std::min(task.heads > 1 ? SHORT_CHUNK : CHUNK, task.end - begin);  // one head alone runs along its own rows
        fill_rows(a, task, begin, count, k, v);
        std::fill(k + count, k + count + 32, k[count - 1]);
        std::fill(v + count, v + count + 32, v[count - 1]);
    }
};

// `then`: the task that this thread will probably take next, or nullptr.
template <class T, class Products>
void run_rows(const Args& a, const Task& task, const Task* then, std::vector<float>& scratch) {
    const int group = a.heads / a.kv_heads, dim = a.value_dim, rows = task.heads * group;
    const int64_t key_head = (int64_t)a.block_size * a.key_dim, value_head = (int64_t)a.block_size * dim;  // from head to head
    scratch.resize((size_t)group * CHUNK + (size_t)rows * (dim + 2) + Products::room(a, task.heads) + 16);
    float* place = (float*)(((uintptr_t)scratch.data() + 63) & ~(uintptr_t)63);
    float *s = place + Products::room(a, task.heads), *acc = s + group * CHUNK, *maximum = acc + rows * dim, *total = maximum + rows;
    std::fill(acc, acc + rows * dim, 0.f);
    std::fill(maximum, maximum + rows, NEVER);
    std::fill(total, total + rows, 0.f);
    std::vector<const T*> q(rows);
    for (int r = 0; r < rows; r++) q[r] = (const T*)a.q + task.query * a.q_token + (task.head * group + r) * a.q_head;
    Products products(a, q.data(), task.heads, place);
    Chunk<T> chunks[2], *now = chunks, *next = chunks + 1;
    now->fill(a, task, task.begin);
    for (bool last = false; !last; std::swap(now, next)) {
        last = now->begin + now->count == task.end;
        if (!last)
            next->fill(a, task, now->begin + now->count);
        else if (then)
            next->fill(a, *then, then->begin);
        const int count = now->count, fetched = last && !then ? 0 : next->count;
        // What is fetched beside the last head; where there are fewer rows, these again.
        if (fetched < count) {
            std::copy(now->k + fetched, now->k + count + 32, next->k + fetched);
            std::copy(now->v + fetched, now->v + count + 32, next->v + fetched);
        }
        for (int head = 0; head < task.heads; head++) {
            const bool more = head + 1 < task.heads;
            float* mixed = acc + head * group * dim;
            const Rows<T> k{now->k, head * key_head}, v{now->v, head * value_head};
            const Rows<T> next_k = more ? Rows<T>{now->k, k.shift + key_head} : Rows<T>{next->k, 0};
            const Rows<T> next_v = more ? Rows<T>{now->v, v.shift + value_head} : Rows<T>{next->v, 0};
            products.scores(head, k, next_k, count, s);
            soften(a, s, count, group, dim, mixed, maximum + head * group, total + head * group);
            products.mix(mixed, s, v, next_v, count);
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

INLINE void row_of(const Args& a, const Task& task, const Task* then, std::vector<float>& scratch, float) {
    run_rows<float, PlainRows<float>>(a, task, then, scratch);
}
INLINE void row_of(const Args& a, const Task& task, const Task* then, std::vector<float>& scratch, bf16) {
#ifdef SWIFT_AMX
    if (UnitRows::takes(a, task)) return run_rows<bf16, UnitRows>(a, task, then, scratch);
#endif
#ifdef __AVX512BF16__
    if (PairRows::takes(a, task)) return run_rows<bf16, PairRows>(a, task, then, scratch);
#endif
    run_rows<bf16, PlainRows<bf16>>(a, task, then, scratch);
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
