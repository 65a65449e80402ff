// A batch's adapters as the kernels see them: y[row] += B (A x[row]) with each row's own A and B. A is [ranks of all parts, in], B is
// [rank, out] per part; both lie in a slot of a Stack (lora_ops.py). lora_native.py fills these in.
#pragma once
#include <cstdint>

namespace {

struct Args {
    const int64_t* segments;  // [n][3]: table of the slot, first row, rows
    const int64_t* outs;      // [parts][2]: first column in y, columns
    const void* x;
    void* y;
    void* h;
    int64_t x_stride, y_stride, h_stride, entry;  // entry: offset of the group in a table
    int32_t num_segments, width, first_part, end_part, shrink, is_bf16, wide;
};

// A slot's table holds for each group: A, the sum of ranks, then for each part B, its rank, its first column in h.
struct Entry {
    const int64_t* at;
    const void* a() const { return (const void*)at[0]; }
    int total() const { return (int)at[1]; }
    const void* b(int part) const { return (const void*)at[2 + 3 * part]; }
    int rank(int part) const { return (int)at[3 + 3 * part]; }
    int start(int part) const { return (int)at[4 + 3 * part]; }
};

// Consecutive rows with one adapter.
struct Segment {
    Entry entry;
    int64_t first, rows;
    Segment(const Args& args, int s)
        : entry{(const int64_t*)args.segments[3 * s] + args.entry}, first(args.segments[3 * s + 1]), rows(args.segments[3 * s + 2]) {}
};

}  // namespace
