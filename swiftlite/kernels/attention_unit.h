// The two products of a query and one KV head (decode) in the matrix unit.
//
// K rows go into tiles as they lie in their block: 16 tokens are the rows of a product whose columns are the query heads. V rows are
// paired on their way, as the sum over tokens runs along a tile's pairs. With more query heads the work of vectors grows, while this
// stays the same: level at 4 heads, 1.3 to 1.6 times as fast at 7 or 8.
#pragma once
#include "amx.h"
#include "attention.h"

#ifdef SWIFT_AMX
namespace {

constexpr int FEWEST_HEADS = 5, MOST_HEADS = 16;  // query heads of a KV head; a tile has no more rows
constexpr int PIECE = 64;  // tokens whose V is paired at a time: they stay in the first-level cache

class UnitRows {
   public:
    // `place` floats: see room()
    UnitRows(const Args& a, const bf16* const* q, int heads, float* place)
        : group(a.heads / a.kv_heads), key_dim(a.key_dim), dim(a.value_dim),
          tiles({16, 16, 16, 16, group, group, 0, group}, {4 * group, 4 * group, 4 * group, 64, 64, 64, 0, 64}),
          queries((bf16*)place), weights(queries + heads * group * key_dim), pairs((uint32_t*)(weights + group * CHUNK)) {
        bf16* to = queries;  // [head][dim / 2][group] pairs
        for (int head = 0; head < heads; head++, q += group)
            for (int i = 0; i < key_dim; i += 2)
                for (int r = 0; r < group; r++, to += 2) memcpy(to, q[r] + i, 4);
    }

    static size_t room(const Args& a, int heads) {
        const size_t group = a.heads / a.kv_heads;
        return (heads * group * a.key_dim + group * CHUNK) / 2 + (size_t)PIECE / 2 * a.value_dim;
    }

    // Whether a task is one for the unit: enough heads, and its tokens lie 16 side by side (behind a window they do in one step of 16).
    static bool takes(const Args& a, const Task& task) {
        const int group = a.heads / a.kv_heads;
        return group >= FEWEST_HEADS && group <= MOST_HEADS && a.key_dim % 32 == 0 && a.value_dim % 32 == 0 && a.block_size % 16 == 0 &&
               task.begin % 16 == 0 && amx_ready();
    }

    // s[group][CHUNK] = scores of a head's queries against count keys, and what the rest of the last 16 rows gives. Rows `next` are fetched.
    INLINE_MEMBER void scores(int head, Rows<bf16> k, Rows<bf16> next, int count, float* s) {
        alignas(64) float found[2 * 16 * MOST_HEADS];
        const bf16* q = queries + head * group * key_dim;
        const __m512i places = (__m512i)(LANES * group);
        for (int t = 0; t < count; t += 32) {
            const bool more = t + 16 < count;
            const bf16 *first = k[t], *second = more ? k[t + 16] : first;
            const char *ahead = (const char*)next[t], *then = more ? (const char*)next[t + 16] : ahead;
            _tile_zero(0);
            _tile_zero(1);
            for (int i = 0; i < key_dim; i += 32) {
                _tile_loadd(2, q + i * group, group * 4);
                _tile_loadd(3, first + i, key_dim * 2);
                _tile_dpbf16ps(0, 3, 2);
                _tile_loadd(3, second + i, key_dim * 2);
                _tile_dpbf16ps(1, 3, 2);
                for (int line = 0; line < 16; line++) {  // 16 rows have as many lines as steps times 16
                    _mm_prefetch(ahead + i * 32 + line * 64, _MM_HINT_T1);
                    _mm_prefetch(then + i * 32 + line * 64, _MM_HINT_T1);
                }
            }
            _tile_stored(0, found, group * 4);
            _tile_stored(1, found + 16 * group, group * 4);
            for (int part = 0; part <= more; part++)
                for (int r = 0; r < group; r++)
                    _mm512_storeu_ps(s + r * CHUNK + t + 16 * part, _mm512_i32gather_ps(places, found + part * 16 * group + r, 4));
        }
    }

    // acc[group][dim] += p[group][CHUNK] * v[count], p rounded to bfloat16; up to 31 more rows of v are readable.
    INLINE_MEMBER void mix(float* acc, const float* p, Rows<bf16> v, Rows<bf16> next, int count) {
        const __m512i low = _mm512_load_si512(INTERLEAVE), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        const int even = (count + 31) & ~31;
        for (int r = 0; r < group; r++)
            for (int t = 0; t < even; t += 16) store(weights + r * CHUNK + t, t < count ? load(p + r * CHUNK + t) : v16f{});
        for (int begin = 0; begin < even; begin += PIECE) {
            const int end = std::min(even, begin + PIECE);
            uint32_t* to = pairs;
            for (int t = begin; t < end; t += 2, to += dim) {
                const bf16 *first = v[t], *second = v[t + 1], *ahead = next[t], *then = next[t + 1];
                for (int d = 0; d < dim; d += 32) {
                    const __m512i x = _mm512_loadu_si512(first + d), y = _mm512_loadu_si512(second + d);
                    __builtin_prefetch(ahead + d, 0, 2);
                    __builtin_prefetch(then + d, 0, 2);
                    _mm512_storeu_si512(to + d, _mm512_permutex2var_epi16(x, low, y));
                    _mm512_storeu_si512(to + d + 16, _mm512_permutex2var_epi16(x, high, y));
                }
            }
            for (int d = 0; d < dim; d += 32) {
                _tile_loadd(4, acc + d, dim * 4);
                _tile_loadd(5, acc + d + 16, dim * 4);
                for (int t = begin; t < end; t += 32) {
                    const uint32_t* from = pairs + (t - begin) / 2 * dim + d;
                    _tile_loadd(7, weights + t, CHUNK * 2);
                    _tile_loadd(3, from, dim * 4);
                    _tile_dpbf16ps(4, 7, 3);
                    _tile_loadd(3, from + 16, dim * 4);
                    _tile_dpbf16ps(5, 7, 3);
                }
                _tile_stored(4, acc + d, dim * 4);
                _tile_stored(5, acc + d + 16, dim * 4);
            }
        }
    }

   private:
    const int group, key_dim, dim;
    // Their shapes: 0 and 1 scores, 2 queries, 3 K or V, 4 and 5 results, 7 weights.
    const Tiles tiles;
    bf16 *queries, *weights;
    uint32_t* pairs;
};

}  // namespace
#endif
