// Adapters of a batch on a CPU: y[row] += B (A x[row]) with each row's own A and B, all segments in one stage. A is [ranks of all parts, in],
// B is [rank, out] per part; both lie in a slot of a Stack (lora_ops.py). h, the A product, is rounded to the model's dtype; everything else
// is summed in fp32. lora_native.py calls.
#include <atomic>
#include <vector>

#include "adapters.h"
#include "stage.h"
#include "vectors.h"

namespace {

constexpr int ROW_BLOCK = 32;  // rows that share the columns of B in registers
constexpr int COLUMNS = 256;   // columns of a unit of work
constexpr int CHUNK = 16;      // ranks whose columns of B are in registers at once

#ifdef __AVX512BF16__
INLINE v16f dot(v16f sum, const bf16* x, const bf16* a) {
    return (v16f)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(x), (__m512bh)_mm512_loadu_si512(a));
}
INLINE v16f dot(v16f sum, const float* x, const float* a) { return sum + load(x) * load(a) + load(x + 16) * load(a + 16); }
#else
template <class T>
INLINE v16f dot(v16f sum, const T* x, const T* a) {
    return sum + load(x) * load(a) + load(x + 16) * load(a + 16);
}
#endif

// h[M][N] = x[M] . a[N], M rows and N ranks at a time
template <class T, int M, int N>
void shrink_tile(T* h, int64_t h_stride, const T* x, int64_t x_stride, const T* a, int width) {
    v16f sums[M][N] = {};
    int k = 0;
    for (; k + 32 <= width; k += 32)
        for (int n = 0; n < N; n++)
            for (int m = 0; m < M; m++) sums[m][n] = dot(sums[m][n], x + m * x_stride + k, a + (int64_t)n * width + k);
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            float total = sum(sums[m][n]);
            for (int i = k; i < width; i++) total += to_float(x[m * x_stride + i]) * to_float(a[(int64_t)n * width + i]);
            put(h + m * h_stride + n, total);
        }
}

template <class T, int M>
void shrink_rows(T* h, int64_t h_stride, const T* x, int64_t x_stride, const T* a, int width, int ranks) {
    int n = 0;
    for (; n + 4 <= ranks; n += 4) shrink_tile<T, M, 4>(h + n, h_stride, x, x_stride, a + (int64_t)n * width, width);
    for (; n < ranks; n++) shrink_tile<T, M, 1>(h + n, h_stride, x, x_stride, a + (int64_t)n * width, width);
}

template <class T>
void shrink(T* h, int64_t h_stride, const T* x, int64_t x_stride, const T* a, int width, int rows, int ranks) {
    int m = 0;
    for (; m + 4 <= rows; m += 4) shrink_rows<T, 4>(h + m * h_stride, h_stride, x + m * x_stride, x_stride, a, width, ranks);
    for (; m < rows; m++) shrink_rows<T, 1>(h + m * h_stride, h_stride, x + m * x_stride, x_stride, a, width, ranks);
}

// tile[rows][32] += h[rows][ranks] b[ranks][32]; ranks <= CHUNK
template <int PAIRS>
INLINE void expand_tile(float* tile, const float* h, int64_t h_stride, const float* b, int64_t out, int rows, int ranks) {
    v16f low[2 * PAIRS], high[2 * PAIRS];
    for (int r = 0; r < 2 * PAIRS; r++) {
        const bool there = r < ranks;
        low[r] = there ? load(b + r * out) : v16f{}, high[r] = there ? load(b + r * out + 16) : v16f{};
    }
    for (int m = 0; m < rows; m++) {
        v16f first = load(tile + m * 32), second = load(tile + m * 32 + 16);
        for (int r = 0; r < 2 * PAIRS; r++) {
            const float factor = r < ranks ? h[m * h_stride + r] : 0.0f;
            first += low[r] * factor, second += high[r] * factor;
        }
        store(tile + m * 32, first), store(tile + m * 32 + 16, second);
    }
}

#ifdef __AVX512BF16__
INLINE __m512i interleave(__m512i a, __m512i b, bool high) {
    alignas(64) static const uint16_t order[2][32] = {
        {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
    return _mm512_permutex2var_epi16(a, _mm512_load_si512(order[high]), b);
}
template <int PAIRS>
INLINE void expand_tile(float* tile, const bf16* h, int64_t h_stride, const bf16* b, int64_t out, int rows, int ranks) {
    __m512bh low[PAIRS], high[PAIRS];
    for (int p = 0; p < PAIRS; p++) {
        const __m512i even = _mm512_loadu_si512(b + 2 * p * out);
        const __m512i odd = 2 * p + 1 < ranks ? _mm512_loadu_si512(b + (2 * p + 1) * out) : _mm512_setzero_si512();
        low[p] = (__m512bh)interleave(even, odd, false), high[p] = (__m512bh)interleave(even, odd, true);
    }
    const bool ragged = ranks % 2;
    for (int m = 0; m < rows; m++) {
        __m512 first = _mm512_loadu_ps(tile + m * 32), second = _mm512_loadu_ps(tile + m * 32 + 16);
        for (int p = 0; p < PAIRS; p++) {
            int32_t pair;
            memcpy(&pair, h + m * h_stride + 2 * p, 4);
            if (ragged && p == PAIRS - 1) pair &= 0xffff;  // the next column belongs to another part
            const __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
            first = _mm512_dpbf16_ps(first, factor, low[p]), second = _mm512_dpbf16_ps(second, factor, high[p]);
        }
        _mm512_storeu_ps(tile + m * 32, first), _mm512_storeu_ps(tile + m * 32 + 16, second);
    }
}
#else
template <int PAIRS>
INLINE void expand_tile(float* tile, const bf16* h, int64_t h_stride, const bf16* b, int64_t out, int rows, int ranks) {
    for (int r = 0; r < ranks; r++) {
        const v16f low = load(b + r * out), high = load(b + r * out + 16);
        for (int m = 0; m < rows; m++) {
            const float factor = to_float(h[m * h_stride + r]);
            store(tile + m * 32, load(tile + m * 32) + low * factor);
            store(tile + m * 32 + 16, load(tile + m * 32 + 16) + high * factor);
        }
    }
}
#endif

#ifdef __AVX512BF16__
// y[rows][32] += h[rows][ranks] b[ranks][32] without a tile between; ranks <= CHUNK
template <int PAIRS>
INLINE void expand_rows(bf16* y, int64_t y_stride, const bf16* h, int64_t h_stride, const bf16* b, int64_t out, int rows, int ranks) {
    __m512bh low[PAIRS], high[PAIRS];
    for (int p = 0; p < PAIRS; p++) {
        const __m512i even = _mm512_loadu_si512(b + 2 * p * out);
        const __m512i odd = 2 * p + 1 < ranks ? _mm512_loadu_si512(b + (2 * p + 1) * out) : _mm512_setzero_si512();
        low[p] = (__m512bh)interleave(even, odd, false), high[p] = (__m512bh)interleave(even, odd, true);
    }
    const int32_t last = ranks % 2 ? 0xffff : -1;  // the next column of h belongs to another part
    for (int m = 0; m < rows; m++) {
        __builtin_prefetch(y + m * y_stride + 64, 1);  // two tiles on: rows lie too far apart for the hardware to see
        __m512 first = (__m512)load(y + m * y_stride), second = (__m512)load(y + m * y_stride + 16);
        for (int p = 0; p < PAIRS; p++) {
            int32_t pair;
            memcpy(&pair, h + m * h_stride + 2 * p, 4);
            if (p == PAIRS - 1) pair &= last;
            const __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
            first = _mm512_dpbf16_ps(first, factor, low[p]), second = _mm512_dpbf16_ps(second, factor, high[p]);
        }
        const __m512bh rounded = _mm512_cvtne2ps_pbh(second, first);
        memcpy(y + m * y_stride, &rounded, 64);
    }
}

bool expand_at_once(bf16* y, int64_t y_stride, const bf16* h, int64_t h_stride, const bf16* b, int64_t out, int rows, int ranks) {
    switch (ranks) {
        case 1: case 2: expand_rows<1>(y, y_stride, h, h_stride, b, out, rows, ranks); return true;
        case 3: case 4: expand_rows<2>(y, y_stride, h, h_stride, b, out, rows, ranks); return true;
        case 7: case 8: expand_rows<4>(y, y_stride, h, h_stride, b, out, rows, ranks); return true;
        case 15: case 16: expand_rows<8>(y, y_stride, h, h_stride, b, out, rows, ranks); return true;
        default: return false;
    }
}
#else
bool expand_at_once(bf16*, int64_t, const bf16*, int64_t, const bf16*, int64_t, int, int) { return false; }
#endif
bool expand_at_once(float*, int64_t, const float*, int64_t, const float*, int64_t, int, int) { return false; }

template <class T>
void expand_chunk(float* tile, const T* h, int64_t h_stride, const T* b, int64_t out, int rows, int ranks) {
    switch ((ranks + 1) / 2) {
        case 1: return expand_tile<1>(tile, h, h_stride, b, out, rows, ranks);
        case 2: return expand_tile<2>(tile, h, h_stride, b, out, rows, ranks);
        case 3: return expand_tile<3>(tile, h, h_stride, b, out, rows, ranks);
        case 4: return expand_tile<4>(tile, h, h_stride, b, out, rows, ranks);
        case 5: return expand_tile<5>(tile, h, h_stride, b, out, rows, ranks);
        case 6: return expand_tile<6>(tile, h, h_stride, b, out, rows, ranks);
        case 7: return expand_tile<7>(tile, h, h_stride, b, out, rows, ranks);
        default: return expand_tile<8>(tile, h, h_stride, b, out, rows, ranks);
    }
}

// y[rows][columns] += h[rows][rank] b[rank][columns of out]
template <class T>
void expand(T* y, int64_t y_stride, const T* h, int64_t h_stride, const T* b, int64_t out, int rows, int columns, int rank) {
    alignas(64) float tile[ROW_BLOCK * 32];
    int c = 0;
    for (; c + 32 <= columns; c += 32) {
        if (expand_at_once(y + c, y_stride, h, h_stride, b + c, out, rows, rank)) continue;
        for (int m = 0; m < rows; m++) {
            store(tile + m * 32, load(y + m * y_stride + c));
            store(tile + m * 32 + 16, load(y + m * y_stride + c + 16));
        }
        for (int r = 0; r < rank; r += CHUNK)
            expand_chunk(tile, h + r, h_stride, b + r * out + c, out, rows, rank - r < CHUNK ? rank - r : CHUNK);
        for (int m = 0; m < rows; m++) {
            store(y + m * y_stride + c, load(tile + m * 32));
            store(y + m * y_stride + c + 16, load(tile + m * 32 + 16));
        }
    }
    for (; c < columns; c++)
        for (int m = 0; m < rows; m++) {
            float total = to_float(y[m * y_stride + c]);
            for (int r = 0; r < rank; r++) total += to_float(h[m * h_stride + r]) * to_float(b[r * out + c]);
            put(y + m * y_stride + c, total);
        }
}

// Units of work, taken in pieces by whoever is free: a thread that comes late or is interrupted does not keep the others waiting.
struct Units {
    std::atomic<int64_t> next{0};
    int64_t units = 0, piece = 1;
    void set(int64_t count, int threads) { units = count, piece = count / (4 * threads) > 1 ? count / (4 * threads) : 1; }
    template <class Do>
    void run(Do&& one) {
        for (int64_t from; (from = next.fetch_add(piece)) < units;) {
            const int64_t to = from + piece < units ? from + piece : units;
            for (int64_t unit = from; unit < to; unit++) one(unit);
        }
    }
};

INLINE int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

template <class T>
class Adapters : public Work {
   public:
    Adapters(const Args& all, int threads) : args(all), row_block(args.wide ? ROW_BLOCK : 4) {
        const int n = args.num_segments;
        shrinks.resize(n + 1), expands.resize(n + 1), pieces.resize(n);
        for (int s = 0; s < n; s++) {
            const Segment segment(args, s);
            shrinks[s + 1] = shrinks[s] + (args.shrink ? blocks(segment.rows, row_block) * rank_pieces(segment) : 0);
            for (int p = args.first_part; p < args.end_part; p++)
                if (segment.entry.rank(p)) pieces[s] += (int)blocks(args.outs[2 * p + 1], COLUMNS);
            expands[s + 1] = expands[s] + blocks(segment.rows, ROW_BLOCK) * pieces[s];
        }
        first.set(shrinks[n], threads), second.set(expands[n], threads);
    }

    void run(const Team& team) override {
        int s = 0;
        first.run([&](int64_t unit) {
            while (unit >= shrinks[s + 1]) s++;
            shrink_unit(Segment(args, s), unit - shrinks[s]);
        });
        team.wait();
        s = 0;
        second.run([&](int64_t unit) {
            while (unit >= expands[s + 1]) s++;
            expand_unit(Segment(args, s), unit - expands[s], pieces[s]);
        });
    }

   private:
    static bool wide(const Segment& segment) { return segment.rows > 4; }
    static int64_t rank_pieces(const Segment& segment) { return wide(segment) ? 1 : blocks(segment.entry.total(), 4); }
    const Args args;
    const int row_block;  // of a shrink: few rows a unit when there are few rows
    std::vector<int64_t> shrinks, expands;
    std::vector<int> pieces;  // of an expand's columns
    Units first, second;

    void shrink_unit(const Segment& segment, int64_t unit) const {
        const int64_t ranks = rank_pieces(segment), row = segment.first + unit / ranks * row_block, end = segment.first + segment.rows;
        const int rank = (int)(unit % ranks) * 4, left = segment.entry.total() - rank;
        const int rows = (int)(end - row < row_block ? end - row : row_block);
        shrink((T*)args.h + row * args.h_stride + rank, args.h_stride, (const T*)args.x + row * args.x_stride, args.x_stride,
               (const T*)segment.entry.a() + (int64_t)rank * args.width, args.width, rows, wide(segment) || left < 4 ? left : 4);
    }

    void expand_unit(const Segment& segment, int64_t unit, int of) const {
        const int64_t row = segment.first + unit / of * ROW_BLOCK, end = segment.first + segment.rows;
        int64_t piece = unit % of;
        int part = args.first_part;
        for (;; part++) {
            const int64_t count = segment.entry.rank(part) ? blocks(args.outs[2 * part + 1], COLUMNS) : 0;
            if (piece < count) break;
            piece -= count;
        }
        const int64_t out = args.outs[2 * part + 1], column = piece * COLUMNS;
        expand((T*)args.y + row * args.y_stride + args.outs[2 * part] + column, args.y_stride,
               (const T*)args.h + row * args.h_stride + segment.entry.start(part), args.h_stride, (const T*)segment.entry.b(part) + column, out,
               (int)(end - row < ROW_BLOCK ? end - row : ROW_BLOCK), (int)(out - column < COLUMNS ? out - column : COLUMNS),
               segment.entry.rank(part));
    }
};

}  // namespace

extern "C" Work* swift_lora(const Args* args, int threads) {
    if (args->is_bf16) return new Adapters<bf16>(*args, threads);
    return new Adapters<float>(*args, threads);
}
