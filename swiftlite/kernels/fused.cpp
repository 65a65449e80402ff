// Small steps of a decoder layer, and of greedy sampling, in one pass each.
// Each repeats the rounding of the eager torch code that it replaces; models/fused.py checks that at load.
#include <cmath>

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

// total = a + factor * (norm `of` b), out = norm `then` of total; rows contiguous
template <class T>
void add_norm(T* out, T* total, const T* a, const T* b, const RowNorm& of, const RowNorm& then, float factor, int64_t rows, int dim, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * dim > 32768)
    for (int64_t row = 0; row < rows; row++)
        add_norm_row(out ? out + row * dim : out, total + row * dim, a + row * dim, b + row * dim, of, then, factor, dim);
}

// out[rows][dim] = act(gate) * up, act(gate) rounded first
template <class T>
void gate(T* out, const T* gate, const T* up, int64_t rows, int64_t gate_stride, int64_t up_stride, int dim, int activation, int threads) {
    const int64_t pieces = (dim + 1023) / 1024;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * dim > 16384)
    for (int64_t i = 0; i < rows * pieces; i++) {
        const int64_t row = i / pieces, from = i % pieces * 1024;
        gate_row(out + row * dim + from, gate + row * gate_stride + from, up + row * up_stride + from, (int)(dim - from < 1024 ? dim - from : 1024), activation);
    }
}

// out[T][heads][dim] = x rotated; x by strides, cos and sin [T][rotation.dims].
template <class T>
void rope(T* out, const T* x, const void* cos, const void* sin, int64_t tokens, int heads, int dim, const Rotation& rotation, int64_t token_stride,
          int64_t head_stride, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * heads * dim > 32768)
    for (int64_t i = 0; i < tokens * heads; i++) {
        const int64_t token = i / heads;
        const T* from = x + token * token_stride + i % heads * head_stride;
        rope_row(out + i * dim, from, cos, sin, token, dim, rotation);
    }
}

// The largest of each row of x[rows][dim] and the first place where it is; a row with NaN gives NaN.
template <class T>
void best_of_rows(float* best, int64_t* place, const T* x, int64_t rows, int64_t stride, int64_t dim, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        const T* from = x + row * stride;
        constexpr int64_t BLOCK = 1024;
        float highest_yet = -INFINITY;
        int64_t block = 0;
        v16i odd = {};
        for (int64_t start = 0; start < dim; start += BLOCK) {
            const int64_t end = start + BLOCK < dim ? start + BLOCK : dim;
            v16f top = splat(-INFINITY);
            int64_t i = start;
            for (; i + 16 <= end; i += 16) {
                const v16f v = load(from + i);
                odd |= v != v;
                top = v > top ? v : top;
            }
            float here = highest(top);
            for (; i < end; i++) {
                const float v = to_float(from[i]);
                odd[0] |= v != v;
                here = v > here ? v : here;
            }
            if (here > highest_yet) highest_yet = here, block = start;
        }
        bool bad = false;
        for (int i = 0; i < 16; i++) bad |= odd[i] != 0;
        int64_t at = block;
        while (!bad && at + 1 < dim && to_float(from[at]) != highest_yet) at++;
        best[row] = bad ? NAN : highest_yet, place[row] = at;
    }
}

}  // namespace

extern "C" {
void swift_rms_norm(int is_bf16, void* out, const void* x, const void* w, int64_t rows, int64_t inner, int64_t outer_stride,
                    int64_t inner_stride, int dim, float eps, int kind, int threads) {
    TYPED(rms_norm, (T*)out, (const T*)x, (const T*)w, rows, inner, outer_stride, inner_stride, dim, eps, kind, threads)
}
void swift_add_norm(int is_bf16, void* out, void* total, const void* a, const void* b, RowNorm of, RowNorm then, float factor, int64_t rows,
                    int dim, int threads) {
    TYPED(add_norm, (T*)out, (T*)total, (const T*)a, (const T*)b, of, then, factor, rows, dim, threads)
}
void swift_gate(int is_bf16, void* out, const void* gated, const void* up, int64_t rows, int64_t gate_stride, int64_t up_stride, int dim,
                int activation, int threads) {
    TYPED(gate, (T*)out, (const T*)gated, (const T*)up, rows, gate_stride, up_stride, dim, activation, threads)
}
void swift_rope(int is_bf16, void* out, const void* x, const void* cos, const void* sin, int64_t tokens, int heads, int dim,
                Rotation rotation, int64_t token_stride, int64_t head_stride, int threads) {
    TYPED(rope, (T*)out, (const T*)x, cos, sin, tokens, heads, dim, rotation, token_stride, head_stride, threads)
}
void swift_best_of_rows(int is_bf16, float* best, int64_t* place, const void* x, int64_t rows, int64_t stride, int64_t dim, int threads) {
    TYPED(best_of_rows, best, place, (const T*)x, rows, stride, dim, threads)
}
}
