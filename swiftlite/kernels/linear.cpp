// Weights into panels and back, and their products as stages: y = x W^T + b in float32, rounded once, for any number of rows, and that of
// an MLP's gate.
//
// Both vectors of a pair of inputs (panels.h) meet every row of a block of up to 12 rows, which fills the registers (12 x 2
// accumulators), so few rows run at memory speed and many at the units' speed. While a panel is multiplied, the next one is fetched
// evenly. Where there is a matrix unit, it multiplies from UNIT_ROWS on (linear.h).
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "linear.h"
#include "stage.h"

#ifdef __AVX512BF16__
namespace {

constexpr int64_t RESIDENT = 200 * 1024;  // elements of x that stay in the second-level cache while the panels pass

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

// Rows in even groups that stay in the second-level cache while the panels pass.
struct RowGroups {
    int64_t rows, count;
    explicit RowGroups(const Product& p) : rows(p.rows) {
        const int64_t most = std::max(RESIDENT / p.k / PANEL_ROWS, (int64_t)1) * PANEL_ROWS;
        count = (rows + most - 1) / most;
    }
    int64_t first(int64_t group) const { return rows * group / count; }
};

// A piece is a panel, for a group of rows.
void multiply_by_vectors(const Product& p, Pieces pieces) {
    const RowGroups groups(p);
    const int64_t panels = (p.n + WIDTH - 1) / WIDTH;
    for (int64_t piece = pieces.begin; piece < pieces.end; piece++) {
        const int64_t group = piece / panels, panel = piece % panels, begin = groups.first(group), end = groups.first(group + 1);
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

// act(gate) * up, rounded as if each were stored. Each panel of the gate goes with its panel of the other half: what both give never goes
// to memory.
void gate_by_vectors(const Product& p, Pieces pieces) {
    const int64_t width = p.n / 2, panels = width / WIDTH, size = WIDTH * p.k;
    const RowGroups groups(p);
    for (int64_t piece = pieces.begin; piece < pieces.end; piece++) {
        const int64_t group = piece / panels, panel = piece % panels, begin = groups.first(group), all = groups.first(group + 1) - begin;
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
                gate_row(p.out + (row + r) * width + panel * WIDTH, both[0] + r * WIDTH, both[1] + r * WIDTH, WIDTH, p.activation);
        }
    }
}

constexpr int64_t RELEASED = 2 << 20;  // elements

// The whole pages of a file's memory [begin, end): they come again from the file.
void release(const bf16* begin, const bf16* end) {
#ifdef __linux__
    const uintptr_t page = sysconf(_SC_PAGESIZE), first = ((uintptr_t)begin + page - 1) / page * page, last = (uintptr_t)end / page * page;
    if (first < last) madvise((void*)first, last - first, MADV_DONTNEED);
#endif
}

Work* product_work(const Product& p, bool gate) {
    const int64_t all = count_pieces(p, gate);
    return work([=](const Team& team) { multiply(p, gate, {team.first(all), team.end(all)}); });
}

}  // namespace

int64_t count_pieces(const Product& p, bool gate) {
    const int64_t panels = gate ? p.n / 2 / WIDTH : (p.n + WIDTH - 1) / WIDTH;
#ifdef SWIFT_AMX
    if (by_unit(p)) return panels;
#endif
    return RowGroups(p).count * panels;
}

void multiply(const Product& p, bool gate, Pieces pieces) {
#ifdef SWIFT_AMX
    if (by_unit(p)) return gate ? gate_by_unit(p, pieces) : multiply_by_unit(p, pieces);
#endif
    gate ? gate_by_vectors(p, pieces) : multiply_by_vectors(p, pieces);
}

// A weight [n][k] of a mapped file, n a multiple of 32, and the memory for its panels.
struct Packing {
    bf16* out;
    const bf16* w;
    int64_t n, k;
};

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

// Packs what nobody has begun, one weight after the other; several threads may call it with the same `next`, the first of those. Pages of
// the file go as they are read, so that never much of it is in memory.
void swift_pack_all(const Packing* all, int64_t count, int64_t* next) {
    for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;) {
        const Packing& one = all[i];
        const int64_t size = WIDTH * one.k, panels = one.n / WIDTH, together = std::max(RELEASED / size, (int64_t)1);
        for (int64_t panel = 0; panel < panels; panel += together) {
            const int64_t end = std::min(panel + together, panels);
            for (int64_t j = panel; j < end; j++) pack_panel(one.out + j * size, one.w + j * size, one.k, one.k, WIDTH);
            release(one.w + panel * size, one.w + end * size);
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

Work* swift_linear(const Product* product, int) { return product_work(*product, false); }
Work* swift_gated(const Product* product, int) { return product_work(*product, true); }
}
#else
extern "C" {
int64_t swift_packed_size(int64_t, int64_t) { return 0; }
void swift_pack(bf16*, const bf16*, int64_t, int64_t, int) {}
void swift_unpack(bf16*, const bf16*, int64_t, int64_t, int) {}
void swift_pack_all(const void*, int64_t, int64_t*) {}
Work* swift_linear(const Product*, int) { return nullptr; }
Work* swift_gated(const Product*, int) { return nullptr; }
}
#endif
