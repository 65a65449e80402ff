// Weights into panels and back, and the product alone (linear.h).
#include "linear.h"

#ifdef __AVX512BF16__
#include <omp.h>

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
}
#else
extern "C" {
int64_t swift_packed_size(int64_t, int64_t) { return 0; }
void swift_pack(bf16*, const bf16*, int64_t, int64_t, int) {}
void swift_unpack(bf16*, const bf16*, int64_t, int64_t, int) {}
void swift_linear(const Product*, int) {}
}
#endif
