// Stages, one after the other (stage.h), and those that do a decoder layer's small steps row by row.
#include <omp.h>

#include <memory>
#include <vector>

#include "stage.h"
#include "steps.h"

namespace {

// total = a + b, rounded, and out = its norm; without `b` the norm of a, without `w` the sum alone. Rows lie `*_stride` elements apart.
struct Norming {
    void *out, *total;
    const void *a, *b, *w;
    int64_t rows, out_stride, a_stride;
    int32_t is_bf16, dim, kind;
    float eps;
};

template <class T>
void norm_rows(const Norming& n, const Team& team) {
    for (int64_t row = team.first(n.rows); row < team.end(n.rows); row++) {
        const T* from = (const T*)n.a + row * n.a_stride;
        if (n.b) {
            T* total = (T*)n.total + row * n.dim;
            add_row(total, from, (const T*)n.b + row * n.dim, n.dim);
            from = total;
        }
        if (n.w) norm_row((T*)n.out + row * n.out_stride, from, (const T*)n.w, n.dim, n.eps, n.kind);
    }
}

// out = silu(gate) * up of rows [gate | up]
struct Gating {
    void* out;
    const void* both;
    int64_t rows, out_stride;
    int32_t is_bf16, dim;
};

template <class T>
void gate_rows(const Gating& g, const Team& team) {
    constexpr int PIECE = 512;
    const int64_t pieces = (g.dim + PIECE - 1) / PIECE;
    for (int64_t i = team.first(g.rows * pieces); i < team.end(g.rows * pieces); i++) {
        const int64_t row = i / pieces, from = i % pieces * PIECE;
        const T* gate = (const T*)g.both + row * 2 * g.dim + from;
        gate_row((T*)g.out + row * g.out_stride + from, gate, gate + g.dim, (int)(g.dim - from < PIECE ? g.dim - from : PIECE));
    }
}

}  // namespace

extern "C" {
Work* swift_norming(const Norming* args, int) {
    return work([n = *args](const Team& team) { n.is_bf16 ? norm_rows<bf16>(n, team) : norm_rows<float>(n, team); });
}

Work* swift_gating(const Gating* args, int) {
    return work([g = *args](const Team& team) { g.is_bf16 ? gate_rows<bf16>(g, team) : gate_rows<float>(g, team); });
}

void swift_run(const Stage* stages, int count, int threads) {
    std::vector<std::unique_ptr<Work>> all;
    for (int i = 0; i < count; i++) all.emplace_back(stages[i].prepare(stages[i].args, threads));
    Barrier barrier;
#pragma omp parallel num_threads(threads)
    {
        const Team team{omp_get_thread_num(), omp_get_num_threads(), &barrier};
        for (const auto& one : all) {
            if (&one != &all.front()) team.wait();
            one->run(team);
        }
    }
}
}
