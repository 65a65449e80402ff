// Products of rows and panels (panels.h) on the matrix unit (amx.h): blocks of up to 32 rows meet a panel as 2 x 2 tiles.
//
// The unit takes four tiles' products in the time of reading two kilobytes, so one side must come from the first-level cache and the
// other from the second. Few rows stay there while the panels pass (one panel at a time meets all blocks of rows); of many rows, a group
// of panels stays while the rows pass. What passes is fetched from memory ahead of its use.
#pragma once
#include <algorithm>
#include <type_traits>

#include "amx.h"
#include "panels.h"

#ifdef SWIFT_AMX
namespace {

constexpr int UNIT_ROWS = 4;  // from here on the unit is faster than the vectors
constexpr int DEPTH = 32;     // inputs of a step
constexpr int64_t UNIT_RESIDENT = 256 * 1024;  // elements that stay in the second-level cache; twice as many lose where a neighbour uses it too

// Rows in blocks of one size, up to 32 and so evenly that one set of tile shapes serves all: the last block may hold some rows of the
// one before again. A block is two tiles of rows, or one when `bottom` is 0.
struct RowBlocks {
    int64_t rows, count;
    int size, top, bottom;
    explicit RowBlocks(int64_t all)
        : rows(all), count((all + 31) / 32), size((all + count - 1) / count), top(size > 16 ? (size + 1) / 2 : size), bottom(size - top) {}
    int64_t first(int64_t block) const { return block + 1 < count ? block * size : rows - size; }
    int64_t index(int64_t row) const { return (row + size - 1) / size; }  // of the block that begins there
    // Tiles 0 to 3 are sums, 4 and 5 rows (top | bottom), 6 and 7 outputs (16 | 16).
    Tiles tiles() const { return Tiles({top, top, bottom, bottom, top, bottom, 16, 16}, {64, 64, 64, 64, 64, 64, 64, 64}); }
};

INLINE void clear_sums(const RowBlocks& blocks) {
    _tile_zero(0);
    _tile_zero(1);
    if (!blocks.bottom) return;  // those tiles have no shape
    _tile_zero(2);
    _tile_zero(3);
}

// The sums of a block of rows += x times k inputs of one panel, of which `weights(step)` are DEPTH. `along(step)` is done beside each
// step. Weights that are PASSING are kept out of the first-level cache.
template <bool TWO, bool PASSING, class Weights, class Along>
INLINE void add_products(const bf16* x, int64_t stride, int top, Weights weights, int64_t k, Along along) {
    const bf16* lower = x + top * stride;
    for (int64_t i = 0, step = 0; i < k; i += DEPTH, step++) {
        const bf16* w = weights(step);
        _tile_loadd(4, x + i, stride * 2);
        if (PASSING) {
            _tile_stream_loadd(6, w, 128);
            _tile_stream_loadd(7, w + 32, 128);
        } else {
            _tile_loadd(6, w, 128);
            _tile_loadd(7, w + 32, 128);
        }
        along(step);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (TWO) {
            _tile_loadd(5, lower + i, stride * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
}

template <bool PASSING, class Weights, class Along>
INLINE void add_products(const RowBlocks& blocks, const bf16* x, int64_t stride, Weights weights, int64_t k, Along along) {
    if (blocks.bottom)
        add_products<true, PASSING>(x, stride, blocks.top, weights, k, along);
    else
        add_products<false, PASSING>(x, stride, blocks.top, weights, k, along);
}

// sums[rows of a block][WIDTH]
INLINE void store_sums(float* sums, const RowBlocks& blocks) {
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    if (!blocks.bottom) return;
    _tile_stored(2, sums + blocks.top * WIDTH, 128);
    _tile_stored(3, sums + blocks.top * WIDTH + 16, 128);
}

INLINE void load_sums(const float* sums, const RowBlocks& blocks) {
    _tile_loadd(0, sums, 128);
    _tile_loadd(1, sums + 16, 128);
    if (!blocks.bottom) return;
    _tile_loadd(2, sums + blocks.top * WIDTH, 128);
    _tile_loadd(3, sums + blocks.top * WIDTH + 16, 128);
}

// `finish(row, low, high)` for each row of a block
template <class Finish>
INLINE void each_row(const float* sums, const RowBlocks& blocks, Finish finish) {
    for (int r = 0; r < blocks.size; r++) finish(r, _mm512_load_ps(sums + r * WIDTH), _mm512_load_ps(sums + r * WIDTH + 16));
}

// out [rows of a block][n]: the sums with a panel's bias, rounded.
INLINE void write_sums(bf16* out, int64_t n, const RowBlocks& blocks, const Columns& columns) {
    alignas(64) float sums[32 * WIDTH];
    store_sums(sums, blocks);
    each_row(sums, blocks, [&](int r, __m512 low, __m512 high) { columns.write(out + r * n, low, high); });
}

// The inputs of each step in a packed panel.
struct PanelSteps {
    const bf16* w;
    INLINE_MEMBER const bf16* operator()(int64_t step) const { return w + step * DEPTH * WIDTH; }
};

constexpr int64_t AHEAD = 3;  // steps: one block of rows is so soon done with a panel that what is fetched earlier only takes room

// Memory that is fetched evenly over a number of steps.
struct Fetch {
    const char* from;
    int64_t bytes, lines;  // lines: in each step
    Fetch(const void* memory, int64_t size, int64_t steps) : from((const char*)memory), bytes(size), lines((size / 64 + steps - 1) / steps) {}
    INLINE_MEMBER void operator()(int64_t step) const {
        const char* at = from + std::min(step * lines * 64, bytes - lines * 64);
        for (int64_t line = 0; line < lines; line++) _mm_prefetch(at + line * 64, _MM_HINT_T1);
    }
};

// Lines of a result that are fetched one row a step: they lie too far apart for the hardware to see.
struct FetchOut {
    const bf16* out;
    int64_t n;
    int rows;
    INLINE_MEMBER void operator()(int64_t step) const {
        if (step < rows) __builtin_prefetch(out + step * n, 1);
    }
};

// Rows of x that are fetched some lines a step, until they all are.
struct FetchRows {
    const bf16* x;
    int64_t stride, k, rows, row = 0, at = 0;
    INLINE_MEMBER void operator()() {
        if (row == rows) return;
        for (int line = 0; line < 4; line++) _mm_prefetch((const char*)(x + row * stride + at + line * 32), _MM_HINT_T1);
        if ((at += 4 * 32) >= k) at = 0, row++;
    }
};

// All rows with the panels [begin, end), in the order that this file's head tells. `group(first, last, steps)` begins panels whose
// products take `steps` steps in all; `each(passing, panel, row, before, ahead)` is one block's product with one of them, from `row` on,
// after `before` of those steps; it calls `ahead()` in each of its own. `passing` is a constant: true where the panels stay and are read
// past the first-level cache, which holds the block. `size` is what counts as one panel, in elements. `stay`: they do even for few rows.
template <class Group, class Each>
INLINE void multiply_panels(const RowBlocks& blocks, const bf16* x, int64_t stride, int64_t k, int64_t begin, int64_t end, int64_t size, bool stay,
                            Group group, Each each) {
    const int64_t together = !stay && blocks.rows * k <= UNIT_RESIDENT ? 1 : std::max((int64_t)1, UNIT_RESIDENT / size);
    const int64_t groups = (end - begin + together - 1) / together, steps = k / DEPTH;
    for (int64_t g = 0; g < groups; g++) {
        const int64_t first = begin + (end - begin) * g / groups, last = begin + (end - begin) * (g + 1) / groups;
        group(first, last, blocks.count * (last - first) * steps);
        for (int64_t block = 0; block < blocks.count; block++) {
            const int64_t row = blocks.first(block), next = blocks.first((block + 1) % blocks.count);
            FetchRows ahead{x + next * stride, stride, k, blocks.size};
            for (int64_t panel = first; panel < last; panel++) {
                const int64_t before = (block * (last - first) + panel - first) * steps;
                if (together == 1)
                    each(std::false_type(), panel, row, before, [] {});
                else
                    each(std::true_type(), panel, row, before, ahead);
            }
        }
    }
}

}  // namespace
#endif
