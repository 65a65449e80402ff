// The product with a packed bfloat16 weight and that of an MLP's gate on the matrix unit: y = x W^T + b in float32, rounded once. Without
// the unit, and for few rows, linear.cpp has them by vectors.
#pragma once
#include "steps.h"
#include "unit.h"

// out [rows][n] contiguous, x rows `stride` elements apart, bias [n] or null
struct Product {
    bf16* out;
    const bf16 *x, *w, *bias;
    int64_t rows, stride, n, k;
    int32_t activation;  // of a gate
};

// A product is made of pieces, which threads share: each does those of [begin, end).
struct Pieces {
    int64_t begin, end;
};

// Of linear.cpp, where there are vectors of bfloat16. `gate`: act(gate) * up, out [rows][n / 2], for a weight that is the gate's and,
// behind it, up's.
int64_t count_pieces(const Product& p, bool gate);
void multiply(const Product& p, bool gate, Pieces pieces);

#ifdef SWIFT_AMX
namespace {

// A piece is a panel, with that of the other half where there is a gate.
inline bool by_unit(const Product& p) { return p.rows >= UNIT_ROWS && p.k % DEPTH == 0 && amx_ready(); }

// What is fetched while the panels [first, last) of `size` elements are multiplied in `steps` steps: those behind them, up to `end`; with
// one block of rows what comes soon.
INLINE Fetch next_panels(const RowBlocks& blocks, const bf16* w, int64_t first, int64_t last, int64_t end, int64_t size, int64_t steps) {
    if (blocks.count == 1) return Fetch(w + first * size + AHEAD * DEPTH * WIDTH, size * 2, steps);
    return Fetch(w + last * size, std::min(last - first, end - last) * size * 2, steps);
}

// What is added to the sums of a block of rows, from `row` on, and the 32 outputs from `column` on: nothing.
struct AddNothing {
    INLINE_MEMBER void operator()(int64_t, int64_t) const {}
};

template <class Add = AddNothing>
void multiply_by_unit(const Product& p, Pieces pieces, Add add = {}) {
    const int64_t size = WIDTH * p.k, begin = pieces.begin, end = pieces.end;
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
        add(row, panel * WIDTH);
        write_sums(out, p.n, blocks, Columns(p.bias ? p.bias + panel * WIDTH : nullptr, p.n - panel * WIDTH));
    });
}

// What a block of rows gave with a panel of the gate and its panel of the other half; finished row by row beside the next block's
// products, as the unit leaves the vectors idle.
struct GatedBlock {
    alignas(64) float sums[2][32 * WIDTH];
    Columns gate{nullptr, WIDTH}, other{nullptr, WIDTH};
    bf16* out;
    int64_t width;
    int row = 0, rows = 0, activation = SILU;
    INLINE_MEMBER void finish_row() {
        if (row == rows) return;
        const auto at = [this](const float* from) { return (v16f)_mm512_load_ps(from + row * WIDTH); };
        gated(out + row * width, at(sums[0]) + (v16f)gate.low, at(sums[1]) + (v16f)other.low, activation);
        gated(out + row * width + 16, at(sums[0] + 16) + (v16f)gate.high, at(sums[1] + 16) + (v16f)other.high, activation);
        row++;
    }
};

// act(gate) * up, out [rows][n / 2], of a weight that is the gate's and, behind it, up's
template <class Add = AddNothing>
void gate_by_unit(const Product& p, Pieces pieces, Add add = {}) {
    const int64_t width = p.n / 2, panels = width / WIDTH, size = WIDTH * p.k, begin = pieces.begin, end = pieces.end;
    const RowBlocks blocks(p.rows);
    const Tiles tiles = blocks.tiles();
    Fetch next[2] = {{nullptr, 0, 1}, {nullptr, 0, 1}};
    GatedBlock done[2];
    done[0].activation = done[1].activation = p.activation;
    int turn = 0;
    const auto group = [&](int64_t first, int64_t last, int64_t steps) {
        for (int half = 0; half < 2; half++)
            next[half] = next_panels(blocks, p.w + half * panels * size, first, last, end, size, steps);
    };
    multiply_panels(blocks, p.x, p.stride, p.k, begin, end, 2 * size, false, group,
                    [&](auto passing, int64_t panel, int64_t row, int64_t before, auto&& ahead) {
        GatedBlock &last = done[turn ^ 1], &now = done[turn];
        bf16* out = p.out + row * width + panel * WIDTH;
        const FetchOut result{out, width, blocks.size};
        for (int half = 0; half < 2; half++) {
            clear_sums(blocks);
            add_products<passing>(blocks, p.x + row * p.stride, p.stride, PanelSteps{p.w + (half * panels + panel) * size}, p.k,
                                  [&](int64_t step) {
                                      next[half](before + step);
                                      if (half == 0) result(step);
                                      ahead();
                                      last.finish_row();
                                  });
            add(row, half * width + panel * WIDTH);
            store_sums(now.sums[half], blocks);
        }
        while (last.row < last.rows) last.finish_row();
        if (p.bias) now.gate = Columns(p.bias + panel * WIDTH, WIDTH), now.other = Columns(p.bias + width + panel * WIDTH, WIDTH);
        now.out = out, now.width = width, now.row = 0, now.rows = blocks.size;
        turn ^= 1;
    });
    GatedBlock& last = done[turn ^ 1];
    while (last.row < last.rows) last.finish_row();
}

}  // namespace
#endif
