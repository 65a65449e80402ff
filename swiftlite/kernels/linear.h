// The product with a packed bfloat16 weight, for any number of rows: y = x W^T + b in float32, rounded once.
//
// Both vectors of a pair of inputs (panels.h) meet every row of a block of up to 12 rows, which fills the registers (12 x 2
// accumulators), so few rows run at memory speed and many at the units' speed. While a panel is multiplied, the next one is fetched
// evenly. Where there is a matrix unit, it multiplies from UNIT_ROWS on (unit.h).
#pragma once
#include "unit.h"

// out [rows][n] contiguous, x rows `stride` elements apart, bias [n] or null
struct Product {
    bf16* out;
    const bf16 *x, *w, *bias;
    int64_t rows, stride, n, k;
};

#ifdef __AVX512BF16__
namespace {

constexpr int PANEL_ROWS = 12;
constexpr int64_t RESIDENT = 200 * 1024;  // elements of x that stay in the second-level cache while the panels pass

inline __m512bh pair_of(const bf16* x) {
    int32_t pair;
    memcpy(&pair, x, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
}

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
inline bool by_unit(const Product& p) { return p.rows >= UNIT_ROWS && p.k % DEPTH == 0 && amx_ready(); }

// What is fetched while the panels [first, last) of `size` elements are multiplied in `steps` steps: those behind them, up to `end`; with
// one block of rows what comes soon.
INLINE Fetch next_panels(const RowBlocks& blocks, const bf16* w, int64_t first, int64_t last, int64_t end, int64_t size, int64_t steps) {
    if (blocks.count == 1) return Fetch(w + first * size + AHEAD * DEPTH * WIDTH, size * 2, steps);
    return Fetch(w + last * size, std::min(last - first, end - last) * size * 2, steps);
}

inline void multiply_by_unit(const Product& p, int index, int count) {
    const int64_t panels = (p.n + WIDTH - 1) / WIDTH, size = WIDTH * p.k, begin = panels * index / count, end = panels * (index + 1) / count;
    const RowBlocks blocks(p.rows);
    const Tiles tiles = blocks.tiles();
    Fetch next(nullptr, 0, 1);
    const auto group = [&](int64_t first, int64_t last, int64_t steps) {
        next = next_panels(blocks, p.w, first, last, end, size, steps);
    };
    multiply_panels(blocks, p.x, p.stride, p.k, begin, end, size, false, group, [&](auto passing, int64_t panel, int64_t row, int64_t before, auto&& ahead) {
        bf16* out = p.out + row * p.n + panel * WIDTH;
        const FetchOut result{out, p.n, blocks.size};
        clear_sums(blocks);
        add_products<passing>(blocks, p.x + row * p.stride, p.stride, PanelSteps{p.w + panel * size}, p.k, [&](int64_t step) {
            next(before + step);
            result(step);
            ahead();
        });
        write_sums(out, p.n, blocks, Columns(p.bias ? p.bias + panel * WIDTH : nullptr, p.n - panel * WIDTH));
    });
}
#endif

// Rows in even groups that stay in the second-level cache while the panels pass.
struct RowGroups {
    int64_t rows, count;
    explicit RowGroups(const Product& p) : rows(p.rows) {
        const int64_t most = std::max(RESIDENT / p.k / PANEL_ROWS, (int64_t)1) * PANEL_ROWS;
        count = (rows + most - 1) / most;
    }
    int64_t first(int64_t group) const { return rows * group / count; }
};

// Share `index` of `count` of a product: whole panels for a group of rows.
inline void multiply(const Product& p, int index, int count) {
#ifdef SWIFT_AMX
    if (by_unit(p)) return multiply_by_unit(p, index, count);
#endif
    const RowGroups groups(p);
    const int64_t panels = (p.n + WIDTH - 1) / WIDTH, total = groups.count * panels;
    for (int64_t unit = total * index / count; unit < total * (index + 1) / count; unit++) {
        const int64_t group = unit / panels, panel = unit % panels, begin = groups.first(group), end = groups.first(group + 1);
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
#endif
