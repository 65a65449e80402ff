// What the two ways of paged attention share: the call's arguments, a task, and how rows are found in the pools.
#pragma once
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
    const void *cos, *sin;  // [T, rotation.dims]
    const void *q_norm, *k_norm;  // [Dk], or nullptr: no norm
    void* rotated;
    int64_t q_token, q_head, k_token, k_head, v_token, v_head;
    int32_t tokens, num_sequences, heads, kv_heads, key_dim, value_dim, block_size, window, is_bf16;  // window 0: none
    int32_t norm_kind;
    Rotation rotation;
    float scale, softcap, eps;  // softcap 0: none
};

struct Task {
    int32_t query, count;  // rows of the batch: first query and how many (rows: 1)
    int32_t head, heads;  // first KV head and how many (tiles: 1)
    int32_t position;  // of the first query
    int32_t begin, end;  // keys
    const int32_t* table;
    float* partial;  // rows: where max, sum and accumulator of a split go; nullptr: write the result
    int64_t cost;
};

constexpr int CHUNK = 256, SHORT_CHUNK = 64;
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

// Rows of tokens for one head: pointers to those of a first head, and how far this one's lie from them.
template <class T>
struct Rows {
    const T* const* first;
    int64_t shift;
    INLINE_MEMBER const T* operator[](int token) const { return first[token] + shift; }
};

INLINE v16f finish_scores(v16f s, const Args& a) {
    s *= a.scale;
    return a.softcap > 0 ? a.softcap * tanh16(s / a.softcap) : s;
}

}  // namespace
