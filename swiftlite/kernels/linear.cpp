// Weights into panels and back, and the product alone (linear.h).
#include "linear.h"

#ifdef __AVX512BF16__
#include <omp.h>

#include "steps.h"

#ifdef SWIFT_AMX
namespace {
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

// As multiply_by_unit, each panel of the gate with its panel of the other half: what both give never goes to memory.
void gate_by_unit(const Product& p, int index, int count) {
    const int64_t width = p.n / 2, panels = width / WIDTH, size = WIDTH * p.k, begin = panels * index / count, end = panels * (index + 1) / count;
    const RowBlocks blocks(p.rows);
    const Tiles tiles = blocks.tiles();
    Fetch next[2] = {{nullptr, 0, 1}, {nullptr, 0, 1}};
    GatedBlock done[2];
    int turn = 0;
    const auto group = [&](int64_t first, int64_t last, int64_t steps) {
        for (int half = 0; half < 2; half++)
            next[half] = Fetch(p.w + (half * panels + last) * size, std::min(last - first, end - last) * size * 2, steps);
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
}  // namespace
#endif

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

void swift_linear(const Product* product, int threads) {
#pragma omp parallel num_threads(threads)
    multiply(*product, omp_get_thread_num(), omp_get_num_threads());
}

// The first half of the product's columns is a gate, out [rows][n / 2] = silu(gate) * the other half, rounded as if each were stored.
void swift_gated(const Product* product, int threads) {
#ifdef SWIFT_AMX
#pragma omp parallel num_threads(threads)
    gate_by_unit(*product, omp_get_thread_num(), omp_get_num_threads());
#endif
}

// Rows from which on a weight [n][k] has that product; 0: it has none here.
int64_t swift_gate_rows(int64_t n, int64_t k) {
#ifdef SWIFT_AMX
    if (k % DEPTH == 0 && n % (2 * WIDTH) == 0 && amx_ready()) return UNIT_ROWS;
#endif
    return 0;
}
}
#else
extern "C" {
int64_t swift_packed_size(int64_t, int64_t) { return 0; }
void swift_pack(bf16*, const bf16*, int64_t, int64_t, int) {}
void swift_unpack(bf16*, const bf16*, int64_t, int64_t, int) {}
void swift_linear(const Product*, int) {}
void swift_gated(const Product*, int) {}
int64_t swift_gate_rows(int64_t, int64_t) { return 0; }
}
#endif
