// The product with a packed bfloat16 weight, for any number of rows: y = x W^T + b in float32, rounded once.
//
// Layout: panels of 32 outputs, in each the pairs (2i, 2i + 1) of the inputs, 32 outputs side by side: [n / 32][k / 2][32][2].
// A panel is read as one stream, which memory likes, and both vectors of a pair meet every row of a block of up to 12 rows, which
// fills the registers (12 x 2 accumulators), so few rows run at memory speed and many at the units' speed. While a panel is
// multiplied, the next one is fetched evenly. The same layout is what a matrix unit's tiles are read from (amx.h): with one, blocks of
// up to 32 rows meet a panel as 2 x 2 tiles.
#pragma once
#include <algorithm>

#include "amx.h"

// out [rows][n] contiguous, x rows `stride` elements apart, bias [n] or null
struct Product {
    bf16* out;
    const bf16 *x, *w, *bias;
    int64_t rows, stride, n, k;
};

namespace {
constexpr int WIDTH = 32;  // outputs of a panel
}

#ifdef __AVX512BF16__
namespace {

constexpr int PANEL_ROWS = 12;
constexpr int64_t RESIDENT = 200 * 1024;  // elements of x that stay in the second-level cache while the panels pass

inline __m512bh pair_of(const bf16* x) {
    int32_t pair;
    memcpy(&pair, x, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
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

// R rows of x against one panel. `ahead` is fetched, `step` bytes for each pair.
template <int R>
INLINE void tile(bf16* out, int64_t n, const bf16* x, int64_t stride, const bf16* w, const Columns& columns, int k, const char* ahead,
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
    for (int r = 0; r < R; r++) columns.write(out + r * n, low[r], high[r]);
}

using Tile = void (*)(bf16*, int64_t, const bf16*, int64_t, const bf16*, const Columns&, int, const char*, int);
template <int R>
void tile_of(bf16* out, int64_t n, const bf16* x, int64_t stride, const bf16* w, const Columns& columns, int k, const char* ahead, int step) {
    tile<R>(out, n, x, stride, w, columns, k, ahead, step);
}
const Tile TILES[PANEL_ROWS + 1] = {nullptr,    tile_of<1>, tile_of<2>, tile_of<3>,  tile_of<4>,  tile_of<5>, tile_of<6>,
                              tile_of<7>, tile_of<8>, tile_of<9>, tile_of<10>, tile_of<11>, tile_of<12>};

#ifdef SWIFT_AMX
constexpr int UNIT_ROWS = 4;  // from here on the unit is faster than the vectors
constexpr int DEPTH = 32;     // inputs of a step
constexpr int64_t UNIT_RESIDENT = 640 * 1024;  // elements of x that stay in the second-level cache while the panels pass

// Rows in blocks of one size, up to 32 and so evenly that one set of tile shapes serves all: the last block may hold some rows of the
// one before again. A block is two tiles of rows, or one when `bottom` is 0.
struct RowBlocks {
    int64_t rows, count;
    int size, top, bottom;
    explicit RowBlocks(int64_t all)
        : rows(all), count((all + 31) / 32), size((all + count - 1) / count), top(size > 16 ? (size + 1) / 2 : size), bottom(size - top) {}
    int64_t first(int64_t block) const { return block + 1 < count ? block * size : rows - size; }
    // Tiles 0 to 3 are sums, 4 and 5 rows (top | bottom), 6 and 7 outputs (16 | 16).
    Tiles tiles() const { return Tiles({top, top, bottom, bottom, top, bottom, 16, 16}, {64, 64, 64, 64, 64, 64, 64, 64}); }
};

// sums[rows of a block][WIDTH] = x times one panel, of which `weights(step)` are DEPTH inputs. `along(step)` is done beside each step; out
// is fetched row by row, as its rows lie too far apart for the hardware to see.
template <bool TWO, class Weights, class Along>
INLINE void unit_sums(float* sums, const bf16* x, int64_t stride, const RowBlocks& block, Weights weights, int k, const bf16* out, int64_t n,
                      Along along) {
    _tile_zero(0);
    _tile_zero(1);
    if (TWO) {
        _tile_zero(2);
        _tile_zero(3);
    }
    const bf16* lower = x + block.top * stride;
    for (int i = 0, step = 0; i < k; i += DEPTH, step++) {
        _tile_loadd(4, x + i, stride * 2);
        const bf16* w = weights(step);
        _tile_loadd(6, w, 128);
        _tile_loadd(7, w + 32, 128);
        along(step);
        if (step < block.size) __builtin_prefetch(out + step * n, 1);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (TWO) {
            _tile_loadd(5, lower + i, stride * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    if (TWO) {
        _tile_stored(2, sums + block.top * WIDTH, 128);
        _tile_stored(3, sums + block.top * WIDTH + 16, 128);
    }
}

template <class Weights, class Along>
INLINE void unit_block(float* sums, const RowBlocks& blocks, const bf16* x, int64_t stride, Weights weights, int k, const bf16* out, int64_t n,
                       Along along) {
    if (blocks.bottom)
        unit_sums<true>(sums, x, stride, blocks, weights, k, out, n, along);
    else
        unit_sums<false>(sums, x, stride, blocks, weights, k, out, n, along);
}

// Memory that is fetched evenly while a panel is multiplied.
struct Fetch {
    const char* from;
    int64_t bytes, lines;  // lines: in each step
    Fetch(const void* memory, int64_t size, int64_t steps) : from((const char*)memory), bytes(size), lines((size / 64 + steps - 1) / steps) {}
    INLINE_MEMBER void operator()(int64_t step) const {
        const char* at = from + std::min(step * lines * 64, bytes - lines * 64);
        for (int64_t line = 0; line < lines; line++) _mm_prefetch(at + line * 64, _MM_HINT_T1);
    }
};

// x times one panel, whose columns of the result begin at out: `along(step)` is done beside each step (count * k / DEPTH in all) and
// `finish(out, sums, row)` for each row.
template <class Weights, class Along, class Finish>
INLINE void unit_panel(const RowBlocks& blocks, const bf16* x, int64_t stride, Weights weights, int k, bf16* out, int64_t n, Along along,
                       Finish finish) {
    for (int64_t block = 0; block < blocks.count; block++) {
        const int64_t first = blocks.first(block), steps = block * (k / DEPTH);
        alignas(64) float sums[32 * WIDTH];
        unit_block(sums, blocks, x + first * stride, stride, weights, k, out + first * n, n, [&](int step) { along(steps + step); });
        for (int r = 0; r < blocks.size; r++)
            finish(out + (first + r) * n, _mm512_load_ps(sums + r * WIDTH), _mm512_load_ps(sums + r * WIDTH + 16), first + r);
    }
}

inline void multiply_by_unit(const Product& p, int index, int count) {
    const int64_t panels = (p.n + WIDTH - 1) / WIDTH, size = WIDTH * p.k, groups = (p.rows * p.k + UNIT_RESIDENT - 1) / UNIT_RESIDENT;
    for (int64_t group = 0; group < groups; group++) {
        const int64_t begin = p.rows * group / groups, end = p.rows * (group + 1) / groups;
        const RowBlocks blocks(end - begin);
        const Tiles tiles = blocks.tiles();
        for (int64_t panel = panels * index / count; panel < panels * (index + 1) / count; panel++) {
            const bf16* w = p.w + panel * size;
            const Columns columns(p.bias ? p.bias + panel * WIDTH : nullptr, p.n - panel * WIDTH);
            const Fetch next(w + size, panel + 1 < panels ? size * 2 : 0, blocks.count * p.k / DEPTH);
            unit_panel(blocks, p.x + begin * p.stride, p.stride, [w](int step) { return w + step * DEPTH * WIDTH; }, p.k,
                       p.out + begin * p.n + panel * WIDTH, p.n, next,
                       [&](bf16* out, __m512 low, __m512 high, int64_t) { columns.write(out, low, high); });
        }
    }
}
#endif

// Share `index` of `count` of a product: whole panels for a group of rows.
inline void multiply(const Product& p, int index, int count) {
#ifdef SWIFT_AMX
    if (p.rows >= UNIT_ROWS && p.k % DEPTH == 0 && amx_ready()) return multiply_by_unit(p, index, count);
#endif
    int64_t most = RESIDENT / p.k / PANEL_ROWS * PANEL_ROWS;
    if (most < PANEL_ROWS) most = PANEL_ROWS;
    const int64_t panels = (p.n + WIDTH - 1) / WIDTH, groups = (p.rows + most - 1) / most, total = groups * panels;
    for (int64_t unit = total * index / count; unit < total * (index + 1) / count; unit++) {
        const int64_t group = unit / panels, panel = unit % panels;
        const int64_t begin = p.rows * group / groups, end = p.rows * (group + 1) / groups;
        const int64_t blocks = (end - begin + PANEL_ROWS - 1) / PANEL_ROWS;
        const bf16* from = p.w + panel * WIDTH * p.k;
        const char* ahead = (const char*)(panel + 1 < panels ? from + WIDTH * p.k : from);
        const Columns columns(p.bias ? p.bias + panel * WIDTH : nullptr, p.n - panel * WIDTH);
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t first = begin + (end - begin) * block / blocks, last = begin + (end - begin) * (block + 1) / blocks;
            TILES[last - first](p.out + first * p.n + panel * WIDTH, p.n, p.x + first * p.stride, p.stride, from,
                                columns, p.k, ahead + WIDTH * 2 * p.k * block / blocks, 128 / blocks);
        }
    }
}

}  // namespace
#else
namespace {
inline void multiply(const Product&, int, int) {}  // such a build packs nothing
}
#endif
