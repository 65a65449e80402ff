// Weights into panels and back, the product (linear.h) as a stage, and that of an MLP's gate.
#include "linear.h"
#include "stage.h"

#ifdef __AVX512BF16__
#include "steps.h"

namespace {
#ifdef SWIFT_AMX
// What a block of rows gave with a panel of the gate and its panel of the other half; finished row by row beside the next block's
// products, as the unit leaves the vectors idle.
struct GatedBlock {
    alignas(64) float sums[2][32 * WIDTH];
    Columns gate{nullptr, WIDTH}, other{nullptr, WIDTH};
    bf16* out;
    int64_t width;
    int row = 0, rows = 0;
    INLINE_MEMBER void finish_row() {
        if (row == rows) return;
        const auto at = [this](const float* from) { return (v16f)_mm512_load_ps(from + row * WIDTH); };
        gated(out + row * width, at(sums[0]) + (v16f)gate.low, at(sums[1]) + (v16f)other.low);
        gated(out + row * width + 16, at(sums[0] + 16) + (v16f)gate.high, at(sums[1] + 16) + (v16f)other.high);
        row++;
    }
};

void gate_by_unit(const Product& p, int index, int count) {
    const int64_t width = p.n / 2, panels = width / WIDTH, size = WIDTH * p.k, begin = panels * index / count, end = panels * (index + 1) / count;
    const RowBlocks blocks(p.rows);
    const Tiles tiles = blocks.tiles();
    Fetch next[2] = {{nullptr, 0, 1}, {nullptr, 0, 1}};
    GatedBlock done[2];
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
#endif

// Share `index` of `count` of silu(gate) * up, out [rows][n / 2], for a weight that is the gate's and, behind it, up's; rounded as if each
// were stored. Each panel of the gate goes with its panel of the other half: what both give never goes to memory.
void multiply_gate(const Product& p, int index, int count) {
#ifdef SWIFT_AMX
    if (by_unit(p)) return gate_by_unit(p, index, count);
#endif
    const int64_t width = p.n / 2, panels = width / WIDTH, size = WIDTH * p.k;
    const RowGroups groups(p);
    for (int64_t unit = groups.count * panels * index / count; unit < groups.count * panels * (index + 1) / count; unit++) {
        const int64_t group = unit / panels, panel = unit % panels, begin = groups.first(group), all = groups.first(group + 1) - begin;
        const int64_t blocks = (all + PANEL_ROWS - 1) / PANEL_ROWS;
        const bf16* half[3] = {p.w + panel * size, p.w + (panels + panel) * size, p.w + (panel + 1) * size};  // the last: what comes next
        const bf16* bias = p.bias ? p.bias + panel * WIDTH : nullptr;
        const Columns columns[2] = {{bias, WIDTH}, {bias ? bias + width : nullptr, WIDTH}};
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t row = begin + all * block / blocks, rows = begin + all * (block + 1) / blocks - row;
            bf16 both[2][PANEL_ROWS * WIDTH];
            for (int i = 0; i < 2; i++)
                TILES[rows](both[i], WIDTH, p.x + row * p.stride, p.stride, half[i], columns[i], p.k,
                            (const char*)half[i + 1] + size * 2 * block / blocks, 128 / blocks);
            for (int64_t r = 0; r < rows; r++)
                gate_row(p.out + (row + r) * width + panel * WIDTH, both[0] + r * WIDTH, both[1] + r * WIDTH, WIDTH);
        }
    }
}

}  // namespace

extern "C" {
// Elements of the packed weight; 0 where this build has no such product.
int64_t swift_packed_size(int64_t n, int64_t k) { return k % 2 ? 0 : (n + WIDTH - 1) / WIDTH * WIDTH * k; }

// out: 64-byte aligned, swift_packed_size elements; w [n][k]
void swift_pack(bf16* out, const bf16* w, int64_t n, int64_t k, int threads) {
    const int64_t panels = (n + WIDTH - 1) / WIDTH;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t panel = 0; panel < panels; panel++) {
        const int64_t outputs = n - panel * WIDTH < WIDTH ? n - panel * WIDTH : WIDTH;
        pack_panel(out + panel * WIDTH * k, w + panel * WIDTH * k, k, k, outputs);
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

Work* swift_linear(const Product* product, int) {
    return work([p = *product](const Team& team) { multiply(p, team.index, team.count); });
}

Work* swift_gated(const Product* product, int) {
    return work([p = *product](const Team& team) { multiply_gate(p, team.index, team.count); });
}
}
#else
extern "C" {
int64_t swift_packed_size(int64_t, int64_t) { return 0; }
void swift_pack(bf16*, const bf16*, int64_t, int64_t, int) {}
void swift_unpack(bf16*, const bf16*, int64_t, int64_t, int) {}
Work* swift_linear(const Product*, int) { return nullptr; }
Work* swift_gated(const Product*, int) { return nullptr; }
}
#endif
