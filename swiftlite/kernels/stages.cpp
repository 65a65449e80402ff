// Stages, one after the other (stage.h), and those that do a decoder layer's small steps row by row.
#include <omp.h>

#include <memory>
#include <vector>

#include "stage.h"
#include "steps.h"

namespace {

// add_norm_row for rows of which those of `a` and of out lie `stride` and `out_stride` elements apart
struct Norming {
    bf16 *out, *total;
    const bf16 *a, *b;
    RowNorm of, then;
    int64_t rows, stride, out_stride;
    int32_t dim;
    float factor;
};

void norm_rows(const Norming& n, const Team& team) {
    for (int64_t row = team.first(n.rows); row < team.end(n.rows); row++) {
        const int64_t at = row * n.dim;
        add_norm_row(n.out ? n.out + row * n.out_stride : n.out, n.b ? n.total + at : n.total, n.a + row * n.stride, n.b ? n.b + at : n.b, n.of, n.then,
                     n.factor, n.dim);
    }
}

// out [rows][dim] = act(gate) * up of rows [gate | up]
struct Gating {
    bf16* out;
    const bf16* both;
    int64_t rows;
    int32_t dim, activation;
};

void gate_rows(const Gating& g, const Team& team) {
    constexpr int PIECE = 512;
    const int64_t pieces = (g.dim + PIECE - 1) / PIECE;
    for (int64_t i = team.first(g.rows * pieces); i < team.end(g.rows * pieces); i++) {
        const int64_t row = i / pieces, from = i % pieces * PIECE;
        const bf16* gate = g.both + row * 2 * g.dim + from;
        gate_row(g.out + row * g.dim + from, gate, gate + g.dim, (int)(g.dim - from < PIECE ? g.dim - from : PIECE), g.activation);
    }
}

}  // namespace

extern "C" {
Work* swift_norming(const Norming* args, int) {
    return work([n = *args](const Team& team) { norm_rows(n, team); });
}

Work* swift_gating(const Gating* args, int) {
    return work([g = *args](const Team& team) { gate_rows(g, team); });
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
