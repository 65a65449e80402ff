// Small steps of a decoder layer in one pass each, and the product with a plain (shared, unpacked) weight for few rows.
// Each repeats the rounding of the eager torch code that it replaces; fused.py checks that at load.
#include <vector>

#include "steps.h"

namespace {

// out[rows][dim] = x / rms(x) * w; x rows are (row / inner) * outer_stride + (row % inner) * inner_stride apart.
template <class T>
void rms_norm(T* out, const T* x, const T* w, int64_t rows, int64_t inner, int64_t outer_stride, int64_t inner_stride, int dim, float eps,
              int kind, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * dim > 32768)
    for (int64_t row = 0; row < rows; row++) {
        norm_row(out + row * dim, x + row / inner * outer_stride + row % inner * inner_stride, w, dim, eps, kind);
    }
}

// total = a + b, rounded; out = norm of total; rows contiguous
template <class T>
void add_norm(T* out, T* total, const T* a, const T* b, const T* w, int64_t rows, int dim, float eps, int kind, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * dim > 32768)
    for (int64_t row = 0; row < rows; row++) {
        const T *x = a + row * dim, *y = b + row * dim;
        T* to = total + row * dim;
        int d = 0;
        for (; d + 16 <= dim; d += 16) store(to + d, load(x + d) + load(y + d));
        for (; d < dim; d++) put(to + d, to_float(x[d]) + to_float(y[d]));
        norm_row(out + row * dim, to, w, dim, eps, kind);
    }
}

// out[rows][dim] = silu(gate) * up, silu rounded first
template <class T>
void silu_mul(T* out, const T* gate, const T* up, int64_t rows, int64_t gate_stride, int64_t up_stride, int dim, int threads) {
    const int64_t pieces = (dim + 1023) / 1024;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * dim > 16384)
    for (int64_t i = 0; i < rows * pieces; i++) {
        const int64_t row = i / pieces;
        int d = i % pieces * 1024;
        const int end = d + 1024 < dim ? d + 1024 : dim;
        const T *g = gate + row * gate_stride, *u = up + row * up_stride;
        T* to = out + row * dim;
        for (; d + 16 <= end; d += 16) {
            v16f x = load(g + d);
            store(to + d, rounded(x / (1.0f + exp16(-x)), to) * load(u + d));
        }
        for (; d < end; d++) {
            float x = to_float(g[d]);
            put(to + d, rounded1(x / (1.0f + std::exp(-x)), to) * to_float(u[d]));
        }
    }
}

// out[T][heads][dim] = x * cos + rotate_half(x) * sin, each product rounded; x by strides, cos and sin [T][dim].
template <class T>
void rope(T* out, const T* x, const T* cos, const T* sin, int64_t tokens, int heads, int dim, int64_t token_stride, int64_t head_stride,
          int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * heads * dim > 32768)
    for (int64_t i = 0; i < tokens * heads; i++) {
        const int64_t token = i / heads;
        const T* from = x + token * token_stride + i % heads * head_stride;
        rope_row(out + i * dim, from, cos + token * dim, sin + token * dim, dim);
    }
}

// ---- out[rows][n] = x[rows][k] w[n][k]^T for few rows, w as it is --------------------------------------------------

template <class T>
struct Step;
template <>
struct Step<float> {
    static constexpr int WIDTH = 16;
    INLINE v16f multiply(v16f acc, const float* x, const float* w) { return acc + load(x) * load(w); }
};
#ifdef __AVX512BF16__
template <>
struct Step<bf16> {
    static constexpr int WIDTH = 32;
    INLINE v16f multiply(v16f acc, const bf16* x, const bf16* w) {
        return (v16f)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(x), (__m512bh)_mm512_loadu_si512(w));
    }
};
#else
template <>
struct Step<bf16> {
    static constexpr int WIDTH = 16;
    INLINE v16f multiply(v16f acc, const bf16* x, const bf16* w) { return acc + load(x) * load(w); }
};
#endif

// XR rows of x against WR rows of w, XR * WR <= 16
template <class T, int XR, int WR>
INLINE void block(T* out, int64_t out_stride, const T* x, const T* w, int k, const T* next = nullptr) {
    v16f acc[16] = {};
    for (int i = 0; i < k; i += Step<T>::WIDTH) {
        if (next)
            for (int c = 0; c < WR; c++) __builtin_prefetch(next + (int64_t)c * k + i, 0, 2);
        for (int r = 0; r < XR; r++)
            for (int c = 0; c < WR; c++) acc[r * WR + c] = Step<T>::multiply(acc[r * WR + c], x + (int64_t)r * k + i, w + (int64_t)c * k + i);
    }
    T all[16];
    store(all, sums(acc));
    for (int r = 0; r < XR; r++) memcpy(out + r * out_stride, all + r * WR, WR * sizeof(T));
}

#ifdef __AVX512BF16__
// The rows of x in the lanes: x packed as [k / 2][16 * NV rows] pairs, WR rows of w at a time, no sums across lanes.
template <int NV, int WR>
INLINE void lanes_block(bf16* out, int64_t n, int rows, const uint32_t* packed, const bf16* w, int k) {
    __m512 acc[WR][NV];
    for (int c = 0; c < WR; c++)
        for (int v = 0; v < NV; v++) acc[c][v] = _mm512_setzero_ps();
    for (int i = 0; i < k / 2; i++) {
        if (i % 16 == 0)  // the same columns of the next rows, so that memory works while the products run
            for (int c = 0; c < WR; c++) __builtin_prefetch(w + (int64_t)(WR + c) * k + 2 * i, 0, 2);
        __m512bh x[NV];
        for (int v = 0; v < NV; v++) x[v] = (__m512bh)_mm512_loadu_si512(packed + (i * NV + v) * 16);
        for (int c = 0; c < WR; c++) {
            int32_t pair;
            memcpy(&pair, w + (int64_t)c * k + 2 * i, 4);
            const __m512bh weight = (__m512bh)_mm512_set1_epi32(pair);
            for (int v = 0; v < NV; v++) acc[c][v] = _mm512_dpbf16_ps(acc[c][v], weight, x[v]);
        }
    }
    bf16 tile[WR][16 * NV];
    for (int c = 0; c < WR; c++)
        for (int v = 0; v < NV; v++) store(tile[c] + 16 * v, (v16f)acc[c][v]);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < WR; c++) out[r * n + c] = tile[c][r];
}

template <int NV, int WR>
void lanes(bf16* out, const bf16* x, const bf16* w, int rows, int64_t n, int k, int threads) {
    std::vector<uint32_t> packed((size_t)k / 2 * NV * 16);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < k / 2; i++) memcpy(&packed[(size_t)i * NV * 16 + r], x + (int64_t)r * k + 2 * i, 4);
    const int64_t pieces = n / WR;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t piece = 0; piece < pieces; piece++) lanes_block<NV, WR>(out + piece * WR, n, rows, packed.data(), w + piece * WR * k, k);
    for (int64_t c = pieces * WR; c < n; c++) lanes_block<NV, 1>(out + c, n, rows, packed.data(), w + c * k, k);
}

bool many_rows(bf16* out, const bf16* x, const bf16* w, int rows, int64_t n, int k, int threads) {
    if (rows <= 12) return false;  // most lanes would be empty
    for (int first = 0; first < rows; first += 64) {
        const int count = rows - first < 64 ? rows - first : 64;
        bf16* to = out + (int64_t)first * n;
        const bf16* from = x + (int64_t)first * k;
        if (count <= 16)
            lanes<1, 16>(to, from, w, count, n, k, threads);
        else if (count <= 32)
            lanes<2, 12>(to, from, w, count, n, k, threads);
        else
            lanes<4, 6>(to, from, w, count, n, k, threads);
    }
    return true;
}
#else
bool many_rows(bf16*, const bf16*, const bf16*, int, int64_t, int, int) { return false; }
#endif
bool many_rows(float*, const float*, const float*, int, int64_t, int, int) { return false; }

template <class T>
void few_rows(T* out, const T* x, const T* w, int rows, int64_t n, int k, int threads) {
    if (many_rows(out, x, w, rows, n, k, threads)) return;
    const int64_t pieces = n / 4;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t piece = 0; piece < pieces; piece++) {
        const T* from = w + piece * 4 * k;
        T* to = out + piece * 4;
        int r = 0;
        // Later row blocks read this piece from the cache, so memory would idle: the first one fetches what comes soon.
        const T* next = w + (piece + 4 < pieces ? piece + 4 : piece) * 4 * k;
        for (; r + 4 <= rows; r += 4) block<T, 4, 4>(to + r * n, n, x + (int64_t)r * k, from, k, r ? nullptr : next);
        for (; r + 2 <= rows; r += 2) block<T, 2, 4>(to + r * n, n, x + (int64_t)r * k, from, k, r ? nullptr : next);
        for (; r < rows; r++) block<T, 1, 4>(to + r * n, n, x + (int64_t)r * k, from, k, r ? nullptr : next);
    }
    for (int64_t c = pieces * 4; c < n; c++)
        for (int r = 0; r < rows; r++) block<T, 1, 1>(out + r * n + c, n, x + (int64_t)r * k, w + c * k, k);
}

}  // namespace

extern "C" {
#define BOTH(call_bf16, call_float) \
    if (is_bf16)                    \
        call_bf16;                  \
    else                            \
        call_float;

void swift_rms_norm(int is_bf16, void* out, const void* x, const void* w, int64_t rows, int64_t inner, int64_t outer_stride,
                    int64_t inner_stride, int dim, float eps, int kind, int threads) {
    BOTH(rms_norm((bf16*)out, (const bf16*)x, (const bf16*)w, rows, inner, outer_stride, inner_stride, dim, eps, kind, threads),
         rms_norm((float*)out, (const float*)x, (const float*)w, rows, inner, outer_stride, inner_stride, dim, eps, kind, threads))
}
void swift_add_norm(int is_bf16, void* out, void* total, const void* a, const void* b, const void* w, int64_t rows, int dim, float eps,
                    int kind, int threads) {
    BOTH(add_norm((bf16*)out, (bf16*)total, (const bf16*)a, (const bf16*)b, (const bf16*)w, rows, dim, eps, kind, threads),
         add_norm((float*)out, (float*)total, (const float*)a, (const float*)b, (const float*)w, rows, dim, eps, kind, threads))
}
void swift_silu_mul(int is_bf16, void* out, const void* gate, const void* up, int64_t rows, int64_t gate_stride, int64_t up_stride, int dim,
                    int threads) {
    BOTH(silu_mul((bf16*)out, (const bf16*)gate, (const bf16*)up, rows, gate_stride, up_stride, dim, threads),
         silu_mul((float*)out, (const float*)gate, (const float*)up, rows, gate_stride, up_stride, dim, threads))
}
void swift_rope(int is_bf16, void* out, const void* x, const void* cos, const void* sin, int64_t tokens, int heads, int dim,
                int64_t token_stride, int64_t head_stride, int threads) {
    BOTH(rope((bf16*)out, (const bf16*)x, (const bf16*)cos, (const bf16*)sin, tokens, heads, dim, token_stride, head_stride, threads),
         rope((float*)out, (const float*)x, (const float*)cos, (const float*)sin, tokens, heads, dim, token_stride, head_stride, threads))
}
// k must be a multiple of 32
void swift_few_rows(int is_bf16, void* out, const void* x, const void* w, int rows, int64_t n, int k, int threads) {
    BOTH(few_rows((bf16*)out, (const bf16*)x, (const bf16*)w, rows, n, k, threads),
         few_rows((float*)out, (const float*)x, (const float*)w, rows, n, k, threads))
}
}
