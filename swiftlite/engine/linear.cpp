// The product with a packed bfloat16 weight, for any number of rows: y = x W^T + b in float32, rounded once.
//
// Layout: panels of 32 outputs, in each the pairs (2i, 2i + 1) of the inputs, 32 outputs side by side: [n / 32][k / 2][32][2].
// A panel is read as one stream, which memory likes, and both vectors of a pair meet every row of a block of up to 12 rows, which
// fills the registers (12 x 2 accumulators), so few rows run at memory speed and many at the units' speed. While a panel is
// multiplied, the next one is fetched evenly.
#include "vectors.h"

#ifdef __AVX512BF16__
namespace {

constexpr int WIDTH = 32, ROWS = 12;
constexpr int64_t RESIDENT = 200 * 1024;  // elements of x that stay in the second-level cache while the panels pass

inline __m512bh pair_of(const bf16* x) {
    int32_t pair;
    memcpy(&pair, x, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
}

// R rows of x against one panel. `ahead` is fetched, `step` bytes for each pair.
template <int R>
INLINE void tile(bf16* out, int64_t n, const bf16* x, int64_t stride, const bf16* w, const bf16* bias, int width, int k, const char* ahead,
                 int step) {
    __m512 low[R], high[R];
    for (int r = 0; r < R; r++) low[r] = high[r] = _mm512_setzero_ps();
    for (int i = 0; i < k; i += 2) {
        const __m512bh first = (__m512bh)_mm512_loadu_si512(w + (int64_t)i * WIDTH);
        const __m512bh second = (__m512bh)_mm512_loadu_si512(w + (int64_t)i * WIDTH + 32);
        _mm_prefetch(ahead, _MM_HINT_T1);
        if (step == 128) _mm_prefetch(ahead + 64, _MM_HINT_T1);
        ahead += step;
        for (int r = 0; r < R; r++) {
            const __m512bh value = pair_of(x + r * stride + i);
            low[r] = _mm512_dpbf16_ps(low[r], value, first);
            high[r] = _mm512_dpbf16_ps(high[r], value, second);
        }
    }
    __m512 more_low = _mm512_setzero_ps(), more_high = more_low;
    const __mmask32 kept = width == WIDTH ? ~0u : (1u << width) - 1;
    if (bias) {
        const __m512i both = _mm512_maskz_loadu_epi16(kept, bias);
        more_low = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16));
        more_high = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16));
    }
    for (int r = 0; r < R; r++) {
        const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_add_ps(high[r], more_high), _mm512_add_ps(low[r], more_low));
        _mm512_mask_storeu_epi16(out + r * n, kept, (__m512i)both);
    }
}

using Tile = void (*)(bf16*, int64_t, const bf16*, int64_t, const bf16*, const bf16*, int, int, const char*, int);
template <int R>
void tile_of(bf16* out, int64_t n, const bf16* x, int64_t stride, const bf16* w, const bf16* bias, int width, int k, const char* ahead,
             int step) {
    tile<R>(out, n, x, stride, w, bias, width, k, ahead, step);
}
const Tile TILES[ROWS + 1] = {nullptr,    tile_of<1>, tile_of<2>, tile_of<3>,  tile_of<4>,  tile_of<5>, tile_of<6>,
                              tile_of<7>, tile_of<8>, tile_of<9>, tile_of<10>, tile_of<11>, tile_of<12>};

}  // namespace

extern "C" {
// Elements of the packed weight; 0 where this build has no such product.
int64_t swift_packed_size(int64_t n, int64_t k) { return k % 2 ? 0 : (n + WIDTH - 1) / WIDTH * WIDTH * k; }

// out: 64-byte aligned, swift_packed_size elements; w [n][k]
void swift_pack(bf16* out, const bf16* w, int64_t n, int64_t k, int threads) {
    const int64_t panels = (n + WIDTH - 1) / WIDTH;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t panel = 0; panel < panels; panel++) {
        bf16* to = out + panel * WIDTH * k;
        const int count = n - panel * WIDTH < WIDTH ? n - panel * WIDTH : WIDTH;
        const __mmask16 low = count >= 16 ? 0xffff : (1u << count) - 1, high = count <= 16 ? 0 : count == WIDTH ? 0xffff : (1u << (count - 16)) - 1;
        const __m512i rows = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32((int)k * 2));
        const bf16* from = w + panel * WIDTH * k;
        for (int64_t i = 0; i < k; i += 2) {
            const __m512i zero = _mm512_setzero_si512();
            _mm512_storeu_si512(to + i * WIDTH, _mm512_mask_i32gather_epi32(zero, low, rows, from + i, 1));
            _mm512_storeu_si512(to + i * WIDTH + 32, _mm512_mask_i32gather_epi32(zero, high, rows, from + 16 * k + i, 1));
        }
    }
}

// The way back: out [n][k]
void swift_unpack(bf16* out, const bf16* w, int64_t n, int64_t k, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < n; row++) {
        const bf16* from = w + row / WIDTH * WIDTH * k + row % WIDTH * 2;
        for (int64_t i = 0; i < k; i += 2) memcpy(out + row * k + i, from + i * WIDTH, 4);
    }
}

// out [rows][n] contiguous, x rows `stride` elements apart, bias [n] or null
void swift_linear(bf16* out, const bf16* x, const bf16* w, const bf16* bias, int64_t rows, int64_t stride, int64_t n, int64_t k, int threads) {
    int64_t most = RESIDENT / k / ROWS * ROWS;
    if (most < ROWS) most = ROWS;
    const int64_t panels = (n + WIDTH - 1) / WIDTH, groups = (rows + most - 1) / most;
#pragma omp parallel for schedule(static) num_threads(threads) collapse(2)
    for (int64_t group = 0; group < groups; group++)
        for (int64_t panel = 0; panel < panels; panel++) {
            const int64_t begin = rows * group / groups, end = rows * (group + 1) / groups;
            const int64_t blocks = (end - begin + ROWS - 1) / ROWS;
            const bf16* from = w + panel * WIDTH * k;
            const char* ahead = (const char*)(panel + 1 < panels ? from + WIDTH * k : from);
            const int width = n - panel * WIDTH < WIDTH ? n - panel * WIDTH : WIDTH;
            for (int64_t block = 0; block < blocks; block++) {
                const int64_t first = begin + (end - begin) * block / blocks, last = begin + (end - begin) * (block + 1) / blocks;
                TILES[last - first](out + first * n + panel * WIDTH, n, x + first * stride, stride, from, bias ? bias + panel * WIDTH : nullptr,
                                    width, k, ahead + WIDTH * 2 * k * block / blocks, 128 / blocks);
            }
        }
}
}
#else
extern "C" {
int64_t swift_packed_size(int64_t, int64_t) { return 0; }
void swift_pack(bf16*, const bf16*, int64_t, int64_t, int) {}
void swift_unpack(bf16*, const bf16*, int64_t, int64_t, int) {}
void swift_linear(bf16*, const bf16*, const bf16*, const bf16*, int64_t, int64_t, int64_t, int64_t, int) {}
}
#endif
