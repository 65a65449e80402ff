// A bfloat16 weight in panels: 32 outputs, in each the pairs (2i, 2i + 1) of the inputs, 32 outputs side by side:
// [n / 32][k / 2][32][2]. A panel is read as one stream, and its pairs are what both the vectors' and the matrix unit's product of
// bfloat16 take.
#pragma once
#include <vector>

#include "vectors.h"

namespace {
constexpr int WIDTH = 32;  // outputs of a panel
constexpr int PANEL_ROWS = 12;  // rows whose sums with a panel fill the vectors' registers
}

#ifdef __AVX512BF16__
namespace {

inline __m512bh pair_of(const bf16* x) {
    int32_t pair;
    memcpy(&pair, x, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
}

// `count` numbers in a thread's memory, which is kept between calls: fresh memory costs a page fault for every 4 KB.
template <class T>
T* kept(std::vector<__m512i>& memory, int64_t count) {
    const int64_t lines = (count * (int64_t)sizeof(T) + 63) / 64;
    if ((int64_t)memory.size() < lines) {
        memory.clear();  // nothing is copied
        memory.resize(lines);
    }
    return (T*)memory.data();
}

// [16 rows][16 pairs] -> [16 pairs][16 rows]. `from` rows lie `stride` elements apart, `to` rows `to_stride`.
// `rows` there are, and `inputs` of each: the rest is zero. Pairs beyond the inputs are not written.
INLINE void turn_pairs(bf16* to, int64_t to_stride, const bf16* from, int64_t stride, int rows, int inputs) {
    const __mmask32 kept = inputs >= 32 ? ~0u : (1u << inputs) - 1;
    __m512i a[16], b[16];
    for (int r = 0; r < 16; r++) a[r] = r < rows ? _mm512_maskz_loadu_epi16(kept, from + r * stride) : _mm512_setzero_si512();
    for (int i = 0; i < 8; i++) {
        b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // in lane l of a[i + j]: pair 4 l + j of rows i to i + 3
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int j = 0; j < 4; j++) {
        const __m512i even = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), odd = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        const __m512i even2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88), odd2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        const __m512i pairs[4] = {_mm512_shuffle_i32x4(even, even2, 0x88), _mm512_shuffle_i32x4(odd, odd2, 0x88),
                                  _mm512_shuffle_i32x4(even, even2, 0xdd), _mm512_shuffle_i32x4(odd, odd2, 0xdd)};
        for (int l = 0; l < 4; l++)
            if (2 * (4 * l + j) < inputs) _mm512_storeu_si512(to + (4 * l + j) * to_stride, pairs[l]);
    }
}

// One panel of k inputs (even) of a weight whose rows, `stride` elements apart, are outputs; `outputs` of them are there.
inline void pack_panel(bf16* to, const bf16* w, int64_t stride, int64_t k, int64_t outputs) {
    for (int64_t i = 0; i < k; i += 32)
        for (int half = 0; half < 2; half++)
            turn_pairs(to + i * WIDTH + half * 32, 2 * WIDTH, w + half * 16 * stride + i, stride, outputs - half * 16, k - i);
}

// The same of a weight whose rows are inputs: 32 outputs of `rows` inputs, filled up with zeros to `all` (even).
inline void pack_panel_across(bf16* to, const bf16* w, int64_t stride, int64_t rows, int64_t all) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2,
                                         33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t i = 0; i < rows; i += 2) {
        const __m512i first = _mm512_loadu_si512(w + i * stride);
        const __m512i second = i + 1 < rows ? _mm512_loadu_si512(w + (i + 1) * stride) : _mm512_setzero_si512();
        _mm512_storeu_si512(to + i * WIDTH, _mm512_permutex2var_epi16(first, low, second));
        _mm512_storeu_si512(to + i * WIDTH + 32, _mm512_permutex2var_epi16(first, high, second));
    }
    const int64_t filled = (rows + 1) / 2 * 2;
    if (filled < all) memset((void*)(to + filled * WIDTH), 0, (all - filled) * WIDTH * sizeof(bf16));
}

// A panel's columns of a result: the bias is added, and those beyond the last output are not written.
struct Columns {
    __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
    __mmask32 kept;
    Columns(const bf16* bias, int64_t width) : kept(width >= WIDTH ? ~0u : (1u << width) - 1) {
        if (!bias) return;
        const __m512i both = _mm512_maskz_loadu_epi16(kept, bias);
        low = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16));
        high = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16));
    }
    void write(bf16* out, __m512 first, __m512 second) const {
        _mm512_mask_storeu_epi16(out, kept, (__m512i)_mm512_cvtne2ps_pbh(_mm512_add_ps(second, high), _mm512_add_ps(first, low)));
    }
};

}  // namespace
#endif
