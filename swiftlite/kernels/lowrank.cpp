// The product of rows with a frozen weight and its low-rank adapter, on the matrix unit: out = x W + low U (+ bias), summed in float32 and
// rounded once. The weight stays as the checkpoint has it: each group of panels is packed while it waits in the second-level cache for the
// rows to pass (unit.h), which costs some hundredths of the product of many rows; the adapter's part is some more inputs of the same sums.
#include "unit.h"

struct LowRankProduct {
    bf16* out;              // [rows][n]
    const bf16 *x, *w;      // x [rows][k], rows `stride` elements apart; w [n][k], or [k][n] when `across`
    const bf16* bias;       // [n] or null
    const bf16 *low, *up;   // low [rows][rank], up [rank][n]
    int64_t rows, stride, n, k, rank;  // n, k and rank are multiples of 32
    int64_t across;
};

#if defined(SWIFT_AMX) && defined(__AVX512BF16__)
#include <omp.h>

#include <vector>

namespace {

// The panels [first, last), each `size` elements behind the one before, of a weight [n][k], or [k][n] when `across`.
void pack(bf16* to, int64_t size, const bf16* w, int64_t n, int64_t k, bool across, int64_t first, int64_t last) {
    if (!across) {
        for (int64_t panel = first; panel < last; panel++) pack_panel(to + (panel - first) * size, w + panel * WIDTH * k, k, k, WIDTH);
        return;
    }
    for (int64_t i = 0; i < k; i += DEPTH)  // a row's part of all of them at once: the hardware fetches what lies side by side
        for (int64_t panel = first; panel < last; panel++)
            pack_panel_across(to + (panel - first) * size + i * WIDTH, w + i * n + panel * WIDTH, n, DEPTH);
}

void multiply(const LowRankProduct& p, int index, int count) {
    static thread_local std::vector<__m512i> memory;  // kept between calls: fresh memory costs a page fault for every 4 KB
    const int64_t panels = p.n / WIDTH, begin = panels * index / count, end = panels * (index + 1) / count, k = p.k + p.rank, size = WIDTH * k;
    const RowBlocks blocks(p.rows);
    const Tiles tiles = blocks.tiles();
    bf16* packed = nullptr;
    int64_t first_packed = 0;
    const auto group = [&](int64_t first, int64_t last, int64_t) {
        if ((int64_t)memory.size() < (last - first) * size / 32) memory.resize((last - first) * size / 32);
        packed = (bf16*)memory.data(), first_packed = first;
        pack(packed, size, p.w, p.n, p.k, p.across, first, last);
        pack(packed + WIDTH * p.k, size, p.up, p.n, p.rank, true, first, last);
    };
    multiply_panels(blocks, p.x, p.stride, p.k, begin, end, size, group, [&](auto passing, int64_t panel, int64_t row, int64_t, auto&& ahead) {
        const bf16* w = packed + (panel - first_packed) * size;
        bf16* out = p.out + row * p.n + panel * WIDTH;
        const FetchOut result{out, p.n, blocks.size};
        clear_sums(blocks);
        add_products<passing>(blocks, p.x + row * p.stride, p.stride, PanelSteps{w}, p.k, [&](int64_t step) {
            result(step);
            ahead();
        });
        add_products<passing>(blocks, p.low + row * p.rank, p.rank, PanelSteps{w + WIDTH * p.k}, p.rank, [](int64_t) {});
        write_sums(out, p.n, blocks, Columns(p.bias ? p.bias + panel * WIDTH : nullptr, WIDTH));
    });
}

}  // namespace
#endif

extern "C" {
// Whether this build uses the matrix unit and the system lets this process do so.
int swift_unit_ready() {
#if defined(SWIFT_AMX) && defined(__AVX512BF16__)
    return amx_ready();
#else
    return 0;
#endif
}

void swift_low_rank(const LowRankProduct* product, int threads) {
#if defined(SWIFT_AMX) && defined(__AVX512BF16__)
#pragma omp parallel num_threads(threads)
    multiply(*product, omp_get_thread_num(), omp_get_num_threads());
#endif
}
}
