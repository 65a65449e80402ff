// Weights into panels and back, and the product alone (linear.h).
#include "linear.h"

#ifdef __AVX512BF16__
#include <omp.h>

#include "steps.h"

#ifdef SWIFT_AMX
namespace {
// As multiply_by_unit, each panel of the gate with its panel of the other half: what both give never goes to memory.
void gate_by_unit(const Product& p, int index, int count) {
    const int64_t width = p.n / 2, panels = width / WIDTH, size = WIDTH * p.k, groups = (p.rows * p.k + UNIT_RESIDENT - 1) / UNIT_RESIDENT;
    for (int64_t group = 0; group < groups; group++) {
        const int64_t begin = p.rows * group / groups, end = p.rows * (group + 1) / groups;
        const RowBlocks blocks(end - begin);
        const Tiles tiles = blocks.tiles();
        for (int64_t panel = panels * index / count; panel < panels * (index + 1) / count; panel++) {
            const Columns gate(p.bias ? p.bias + panel * WIDTH : nullptr, WIDTH), other(p.bias ? p.bias + width + panel * WIDTH : nullptr, WIDTH);
            for (int64_t block = 0; block < blocks.count; block++) {
                const int64_t first = begin + blocks.first(block);
                alignas(64) float sums[2][32 * WIDTH];
                bf16* out = p.out + first * width + panel * WIDTH;
                for (int half = 0; half < 2; half++) {
                    const bf16* w = p.w + (panel + half * panels) * size;
                    const Fetch next(w + size, panel + 1 < panels ? size * 2 : 0, blocks.count * p.k / DEPTH);
                    unit_block(sums[half], blocks, p.x + first * p.stride, p.stride, [w](int step) { return w + step * DEPTH * WIDTH; }, p.k,
                               out, half ? 0 : width, [&](int step) { next(block * (p.k / DEPTH) + step); });
                }
                for (int r = 0; r < blocks.size; r++) {
                    const auto row = [r](const float* from) { return (v16f)_mm512_load_ps(from + r * WIDTH); };
                    gated(out + r * width, row(sums[0]) + (v16f)gate.low, row(sums[1]) + (v16f)other.low);
                    gated(out + r * width + 16, row(sums[0] + 16) + (v16f)gate.high, row(sums[1] + 16) + (v16f)other.high);
                }
            }
        }
    }
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
