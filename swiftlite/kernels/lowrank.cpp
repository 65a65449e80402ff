// The product of rows with a frozen weight and its low-rank adapter, on the matrix unit: out = x W + low U (+ bias), summed in float32 and
// rounded once. The weight stays as the checkpoint has it: each group of panels is packed while it waits in the second-level cache for the
// rows to pass (unit.h), which costs some hundredths of the product of many rows; the adapter's part is some more inputs of the same sums.
// The adapter's own products are of this kind too, with A or B as a weight of one panel, or with the activations as a weight for one block
// of rows.
#include "unit.h"

struct LowRankProduct {
    bf16* out;              // [rows][n]
    const bf16 *x, *w;      // x [rows][k], rows `stride` elements apart; w [n][k], or [inputs][n] when `across`
    const bf16* bias;       // [n] or null
    const bf16 *low, *up;   // low [rows][rank], up [rank][n]; rank 0: none
    int64_t rows, stride, n, k, rank;  // n, k and rank are multiples of 32
    int64_t across, inputs;  // inputs: k less what fills it up, where x has zeros
};

#ifdef SWIFT_AMX
#include <omp.h>

namespace {

constexpr int64_t PIECE = 4096;  // inputs at a time: of more, the second-level cache holds too few panels

// `k` inputs of the panels [first, last), each `size` elements behind the one before, of a weight whose rows, `stride` elements apart, are
// outputs, or inputs when `across`: of those only `inputs` are there.
void pack(bf16* to, int64_t size, const bf16* w, int64_t stride, int64_t k, int64_t inputs, bool across, int64_t first, int64_t last) {
    if (!across) {
        for (int64_t panel = first; panel < last; panel++) pack_panel(to + (panel - first) * size, w + panel * WIDTH * stride, stride, k, WIDTH);
        return;
    }
    for (int64_t i = 0; i < k; i += DEPTH)  // a row's part of all of them at once: the hardware fetches what lies side by side
        for (int64_t panel = first; panel < last; panel++) {
            const int64_t rows = std::max((int64_t)0, std::min(inputs - i, (int64_t)DEPTH));
            pack_panel_across(to + (panel - first) * size + i * WIDTH, w + i * stride + panel * WIDTH, stride, rows, DEPTH);
        }
}

// One thread's share of a product.
void multiply(LowRankProduct p, int index, int count) {
    static thread_local std::vector<__m512i> panel_memory, sum_memory;
    const int64_t panels = p.n / WIDTH;
    if (panels < count) {  // all panels for a share of the rows
        const int64_t first = p.rows * index / count;
        p.rows = p.rows * (index + 1) / count - first;
        p.out += first * p.n, p.x += first * p.stride, p.low += first * p.rank;
        index = 0, count = 1;
    }
    if (!p.rows) return;
    const int64_t begin = panels * index / count, end = panels * (index + 1) / count, pieces = (p.k + PIECE - 1) / PIECE;
    const RowBlocks blocks(p.rows);
    const Tiles tiles = blocks.tiles();
    // between pieces: [panel][block][32][32]
    float* sums = pieces > 1 ? kept<float>(sum_memory, (end - begin) * blocks.count * 32 * WIDTH) : nullptr;
    for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t from = p.k / DEPTH * piece / pieces * DEPTH, k = p.k / DEPTH * (piece + 1) / pieces * DEPTH - from;
        const bool first_piece = piece == 0, last_piece = piece + 1 == pieces;
        const int64_t rank = last_piece ? p.rank : 0, size = WIDTH * (k + rank);
        bf16* packed = nullptr;
        int64_t first_packed = 0;
        const auto group = [&](int64_t first, int64_t last, int64_t) {
            packed = kept<bf16>(panel_memory, (last - first) * size), first_packed = first;
            pack(packed, size, p.w + from * (p.across ? p.n : 1), p.across ? p.n : p.k, k, p.inputs - from, p.across, first, last);
            pack(packed + WIDTH * k, size, p.up, p.n, rank, rank, true, first, last);
        };
        const bf16* x = p.x + from;
        // of a weight whose rows are inputs always many at once, see `pack`
        multiply_panels(blocks, x, p.stride, k, begin, end, size, p.across, group, [&](auto passing, int64_t panel, int64_t row, int64_t, auto&& ahead) {
            const bf16* w = packed + (panel - first_packed) * size;
            bf16* out = p.out + row * p.n + panel * WIDTH;
            const FetchOut result{out, p.n, last_piece ? blocks.size : 0};
            float* between = sums ? sums + ((panel - begin) * blocks.count + blocks.index(row)) * 32 * WIDTH : nullptr;
            if (first_piece)
                clear_sums(blocks);
            else
                load_sums(between, blocks);
            add_products<passing>(blocks, x + row * p.stride, p.stride, PanelSteps{w}, k, [&](int64_t step) {
                result(step);
                ahead();
            });
            if (!last_piece) return store_sums(between, blocks);
            add_products<passing>(blocks, p.low + row * rank, rank, PanelSteps{w + WIDTH * k}, rank, [](int64_t) {});
            write_sums(out, p.n, blocks, Columns(p.bias ? p.bias + panel * WIDTH : nullptr, WIDTH));
        });
    }
}

}  // namespace
#endif

extern "C" {
// Whether this build uses the matrix unit and the system lets this process do so.
int swift_unit_ready() {
#ifdef SWIFT_AMX
    return amx_ready();
#else
    return 0;
#endif
}

void swift_low_rank(const LowRankProduct* product, int threads) {
#ifdef SWIFT_AMX
#pragma omp parallel num_threads(threads)
    multiply(*product, omp_get_thread_num(), omp_get_num_threads());
#endif
}
}
