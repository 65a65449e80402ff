// The product with an int8 weight and one scale per output: y = (x Q^T) s + b, accumulated in float32, rounded once.
//
// Layout: panels of 32 outputs, in each the pairs (2i, 2i + 1) of the inputs as 64 bytes (`place`): [n / 32][k / 2][64].
// The odd numbers 2q + 1 are exact bfloat16 values, and their magnitudes are 128, as many as one table look-up can tell apart; so
// a byte is a sign and the index of a magnitude, with AVX512-BF16 a panel becomes bfloat16 on its way to the registers by two
// look-ups for 64 weights, and sum(x (2q + 1)) = 2 sum(x q) + sum(x) gives the product back. A panel meets a block of up to 12 rows;
// further blocks of rows read what the first one left in the second-level cache. With a matrix unit all blocks read it from there.
// Elsewhere, and for float32 inputs, the same layout goes through plain vectors.
#include <cfloat>
#include <cmath>
#include <vector>

#include "stage.h"
#include "unit.h"

namespace {

// Of output o (of a panel's 32) and input j (of a pair): its byte of the 64. Quarters of 16 bytes have 4 outputs of each half.
INLINE int place(int o, int j) { return o % 16 / 4 * 16 + o / 16 * 8 + o % 4 * 2 + j; }

// A weight's byte, and the weight of a byte
INLINE int8_t code(int8_t q) { return q ^ ((q >> 7) & 0x7f); }

// 16 weights as floats
typedef int8_t v16b __attribute__((vector_size(16)));
INLINE v16f widen(const int8_t* p) {
    v16b b;
    memcpy(&b, p, 16);
    const v16i c = __builtin_convertvector(b, v16i);
    return __builtin_convertvector(c ^ ((c >> 7) & 0x7f), v16f);
}

// R rows of x (float32) against Q quarters of a panel at once; lanes are (output, input of the pair).
template <int R, int Q, class T>
INLINE void tile_any(T* out, int64_t n, const float* x, int64_t stride, const int8_t* w, const float* scale, const T* bias, int width, int k) {
    for (int quarter = 0; quarter < 4; quarter += Q) {
        v16f sums[R][Q] = {};
        const int8_t* from = w + quarter * 16;
        for (int i = 0; i < k; i += 2, from += 2 * WIDTH) {
            v16f weights[Q];
            for (int q = 0; q < Q; q++) weights[q] = widen(from + q * 16);
            for (int r = 0; r < R; r++) {
                typedef uint64_t v8q __attribute__((vector_size(64)));
                uint64_t pair;
                memcpy(&pair, x + r * stride + i, 8);
                const v16f both = (v16f)(v8q{} + pair);
                for (int q = 0; q < Q; q++) sums[r][q] += weights[q] * both;
            }
        }
        for (int r = 0; r < R; r++)
            for (int q = 0; q < Q; q++)
                for (int i = 0; i < 8; i++) {
                    const int o = i / 4 * 16 + (quarter + q) * 4 + i % 4;
                    if (o >= width) continue;
                    const float sum = sums[r][q][2 * i] + sums[r][q][2 * i + 1];
                    put(out + r * n + o, sum * scale[o] + (bias ? to_float(bias[o]) : 0.0f));
                }
    }
}

// out [rows][n] contiguous, x rows `stride` elements apart, scale [n], bias [n] or null
template <class T>
struct Int8Product {
    T* out;
    const T* x;
    const int8_t* w;
    const float* scale;
    const T* bias;
    int64_t rows, stride, n, k;
    int32_t is_bf16;

    int64_t panels() const { return (n + WIDTH - 1) / WIDTH; }
};

template <class T>
class AnyProduct : public Work {
   public:
    explicit AnyProduct(const Int8Product<T>& product) : p(product), wide(p.rows * p.k) {}

    void run(const Team& team) override {
        for (int64_t r = team.first(p.rows); r < team.end(p.rows); r++)
            for (int64_t i = 0; i < p.k; i++) wide[r * p.k + i] = to_float(p.x[r * p.stride + i]);
        team.wait();
        for (int64_t panel = team.first(p.panels()); panel < team.end(p.panels()); panel++) {
            const int64_t width = std::min(p.n - panel * WIDTH, (int64_t)WIDTH);
            const int8_t* from = p.w + panel * WIDTH * p.k;
            const float* s = p.scale + panel * WIDTH;
            const T* b = p.bias ? p.bias + panel * WIDTH : nullptr;
            T* to = p.out + panel * WIDTH;
            int64_t r = 0;
            for (; r + 4 <= p.rows; r += 4) tile_any<4, 1>(to + r * p.n, p.n, wide.data() + r * p.k, p.k, from, s, b, width, p.k);
            for (; r < p.rows; r++) tile_any<1, 4>(to + r * p.n, p.n, wide.data() + r * p.k, p.k, from, s, b, width, p.k);
        }
    }

   private:
    const Int8Product<T> p;
    std::vector<float> wide;
};

// One row, rounded to nearest: its bytes, in order; the scale is of type T, as in rounding.py.
template <class T>
float quantize_row(int8_t* to, const T* from, int64_t k) {
    v16f largest = {};
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) {
        const v16f x = load(from + i), size = x < 0 ? -x : x;
        largest = size > largest ? size : largest;
    }
    float most = highest(largest);
    for (; i < k; i++) most = std::fmax(most, std::fabs(to_float(from[i])));
    T stored;
    put(&stored, std::fmax(most / 127.5f, FLT_MIN));
    const float scale = to_float(stored);
    for (i = 0; i < k; i++) {
        float q = to_float(from[i]) / scale;
        q = (q + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: rounds to even
        q = q < -128.0f ? -128.0f : q > 127.0f ? 127.0f : q;
        to[i] = code((int8_t)(int)q);
    }
    return scale;
}

template <class T>
void quantize(int8_t* out, float* scale, const T* w, int64_t n, int64_t k, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<int8_t> row(k);
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < (n + WIDTH - 1) / WIDTH; panel++) {
            int8_t* to = out + panel * WIDTH * k;
            if ((panel + 1) * WIDTH > n) memset(to, 0, WIDTH * k);
            for (int64_t o = 0; o < WIDTH && panel * WIDTH + o < n; o++) {
                scale[panel * WIDTH + o] = quantize_row(row.data(), w + (panel * WIDTH + o) * k, k);
                for (int64_t i = 0; i < k; i += 2) memcpy(to + i * WIDTH + place(o, 0), row.data() + i, 2);
            }
        }
    }
}

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)  // Cooper Lake has the first alone
constexpr int64_t INT8_RESIDENT = 160 * 1024;  // elements of x that stay in the second-level cache while the panels pass
constexpr int64_t EARLY = 4;  // steps of the matrix unit that widening is ahead
enum Source { FRESH, FRESH_AND_KEPT, KEPT };

// The bytes of the bfloat16 values 1, 3, 5 ... 255
struct Table {
    alignas(64) uint8_t low[128], high[128];
    Table() {
        for (int i = 0; i < 128; i++) {
            bf16 value;
            put(&value, 2 * i + 1);
            low[i] = value.bits & 0xff, high[i] = value.bits >> 8;
        }
    }
};
const Table table;

// 64 bytes -> the two vectors of pairs that they stand for
struct Widening {
    const __m512i low = _mm512_load_si512(table.low), more_low = _mm512_load_si512(table.low + 64);
    const __m512i high = _mm512_load_si512(table.high), more_high = _mm512_load_si512(table.high + 64), sign = _mm512_set1_epi8((char)0x80);
    INLINE_MEMBER void operator()(const int8_t* w, __m512bh& first, __m512bh& second) const {
        const __m512i codes = _mm512_loadu_si512(w);
        const __m512i lower = _mm512_permutex2var_epi8(low, codes, more_low), upper = _mm512_permutex2var_epi8(high, codes, more_high);
        const __m512i with_sign = _mm512_ternarylogic_epi32(upper, codes, sign, 0xf8);  // upper | (codes & sign)
        first = (__m512bh)_mm512_unpacklo_epi8(lower, with_sign);
        second = (__m512bh)_mm512_unpackhi_epi8(lower, with_sign);
    }
};

// What turns a row's sums of x (2q + 1) into its outputs.
struct Outputs {
    Columns columns;
    __m512 low, high;
    Outputs(const float* scale, const bf16* bias, int64_t width) : columns(bias, width) {
        const __m512 half = _mm512_set1_ps(0.5f);
        low = _mm512_mul_ps(half, _mm512_maskz_loadu_ps(columns.kept, scale));
        high = _mm512_mul_ps(half, _mm512_maskz_loadu_ps(columns.kept >> 16, scale + 16));
    }
    INLINE_MEMBER void write(bf16* out, __m512 first, __m512 second, float sum_of_x) const {
        const __m512 sum = _mm512_set1_ps(sum_of_x);
        columns.write(out, _mm512_mul_ps(_mm512_sub_ps(first, sum), low), _mm512_mul_ps(_mm512_sub_ps(second, sum), high));
    }
};

// sum(x) of each row
void sum_rows(float* sums, const bf16* x, int64_t rows, int64_t stride, int k) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    for (int64_t r = 0; r < rows; r++) {
        __m512 sum = _mm512_setzero_ps();
        for (int i = 0; i < k; i += 32) {
            const __mmask32 present = k - i < 32 ? (1u << (k - i)) - 1 : ~0u;
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi16(present, x + r * stride + i), ones);
        }
        sums[r] = _mm512_reduce_add_ps(sum);
    }
}

// R rows of x, whose sums are `sums`, against one panel, which comes as bytes `w`, or as bfloat16 from `kept`. `ahead` is fetched, `step`
// bytes for each pair.
template <int R, Source FROM>
void tile(bf16* out, int64_t n, const bf16* x, int64_t stride, const float* sums, const int8_t* w, bf16* kept, const Outputs& outputs, int k,
          const char* ahead, int step) {
    const Widening widened;
    __m512 low[R], high[R];
    for (int r = 0; r < R; r++) low[r] = high[r] = _mm512_setzero_ps();
    for (int i = 0; i < k; i += 2) {
        __m512bh first, second;
        if (FROM == KEPT) {
            first = (__m512bh)_mm512_loadu_si512(kept + (int64_t)i * WIDTH);
            second = (__m512bh)_mm512_loadu_si512(kept + (int64_t)i * WIDTH + 32);
        } else {
            widened(w + (int64_t)i * WIDTH, first, second);
        }
        if (FROM == FRESH_AND_KEPT) {
            _mm512_storeu_si512(kept + (int64_t)i * WIDTH, (__m512i)first);
            _mm512_storeu_si512(kept + (int64_t)i * WIDTH + 32, (__m512i)second);
        }
        _mm_prefetch(ahead, _MM_HINT_T1);
        ahead += step;
        for (int r = 0; r < R; r++) {
            const __m512bh value = pair_of(x + r * stride + i);
            low[r] = _mm512_dpbf16_ps(low[r], value, first);
            high[r] = _mm512_dpbf16_ps(high[r], value, second);
        }
    }
    for (int r = 0; r < R; r++) outputs.write(out + r * n, low[r], high[r], sums[r]);
}

using Int8Tile = void (*)(bf16*, int64_t, const bf16*, int64_t, const float*, const int8_t*, bf16*, const Outputs&, int, const char*, int);
#define TILES_FROM(s) \
    {nullptr, tile<1, s>, tile<2, s>, tile<3, s>, tile<4, s>, tile<5, s>, tile<6, s>, tile<7, s>, tile<8, s>, tile<9, s>, tile<10, s>, tile<11, s>, tile<12, s>}
const Int8Tile INT8_TILES[3][PANEL_ROWS + 1] = {TILES_FROM(FRESH), TILES_FROM(FRESH_AND_KEPT), TILES_FROM(KEPT)};

struct NarrowProduct : Int8Product<bf16> {
    const float* sums;  // of each row of x

    Outputs outputs(int64_t panel) const { return Outputs(scale + panel * WIDTH, bias ? bias + panel * WIDTH : nullptr, n - panel * WIDTH); }
};

void multiply_int8(const NarrowProduct& p, bf16* kept, int index, int count) {
    int64_t most = INT8_RESIDENT / p.k / PANEL_ROWS * PANEL_ROWS;
    if (most < PANEL_ROWS * 4) most = PANEL_ROWS * 4;  // each group of rows converts the panels anew
    const int64_t panels = p.panels(), groups = (p.rows + most - 1) / most, total = groups * panels;
    for (int64_t unit = total * index / count; unit < total * (index + 1) / count; unit++) {
        const int64_t group = unit / panels, panel = unit % panels;
        const int64_t begin = p.rows * group / groups, end = p.rows * (group + 1) / groups;
        const int64_t blocks = (end - begin + PANEL_ROWS - 1) / PANEL_ROWS;
        const int8_t* from = p.w + panel * WIDTH * p.k;
        const char* ahead = (const char*)(panel + 1 < panels ? from + WIDTH * p.k : from);
        const Outputs outputs = p.outputs(panel);
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t first = begin + (end - begin) * block / blocks, last = begin + (end - begin) * (block + 1) / blocks;
            const Source source = blocks == 1 ? FRESH : block == 0 ? FRESH_AND_KEPT : KEPT;
            INT8_TILES[source][last - first](p.out + first * p.n + panel * WIDTH, p.n, p.x + first * p.stride, p.stride, p.sums + first, from,
                                           kept, outputs, p.k, ahead + WIDTH * p.k * block / blocks, 64 / blocks);
        }
    }
}

#ifdef SWIFT_AMX
// Panels that meet all rows together, see unit.h: one of them while few rows stay in the second-level cache; else two at least, or as many
// as fill half of what stays there, as the next ones are widened into the other half.
int64_t panels_together(int64_t rows, int64_t k) {
    return rows <= 32 || rows * k <= UNIT_RESIDENT ? 1 : std::max((int64_t)2, UNIT_RESIDENT / 2 / (WIDTH * k));
}

// While some inputs are multiplied, those to come are widened beside them into the ring `kept`: a few steps' for one block of rows, so
// that they never leave the first-level cache, twice the panels that are together for more blocks, which all read them.
void multiply_int8_by_unit(const NarrowProduct& p, bf16* kept, int index, int count) {
    const RowBlocks blocks(p.rows);
    const Tiles tiles = blocks.tiles();
    const Widening widened;
    const int64_t panels = p.panels(), begin = panels * index / count, end = panels * (index + 1) / count;
    const int64_t size = WIDTH * p.k, piece = WIDTH * DEPTH, steps = p.k / DEPTH, all = (end - begin) * steps;  // a panel, a step's part
    const int64_t together = panels_together(p.rows, p.k), early = blocks.count == 1 ? EARLY : together * steps, ring = 2 * early;
    const int8_t* w = p.w + begin * size;
    const auto widen = [&](int64_t step) {  // counted through all panels
        if (step >= all) return;
        const int8_t* from = w + step * piece;
        bf16* to = kept + step % ring * piece;
        for (int i = 0; i < piece; i += 64) {
            __m512bh first, second;
            widened(from + i, first, second);
            _mm512_store_si512(to + i, (__m512i)first);
            _mm512_store_si512(to + i + 32, (__m512i)second);
        }
    };
    // One block with one panel; `along(step)` is done beside each step.
    const auto multiply = [&](auto passing, int64_t row, int64_t panel, auto along) {
        alignas(64) float sums[32 * WIDTH];
        const int64_t before = (panel - begin) * steps;
        const Outputs outputs = p.outputs(panel);
        bf16* out = p.out + row * p.n + panel * WIDTH;
        const FetchOut result{out, p.n, blocks.size};
        clear_sums(blocks);
        add_products<passing>(blocks, p.x + row * p.stride, p.stride, [&](int64_t step) { return kept + (before + step) % ring * piece; }, p.k,
                              [&](int64_t step) {
                                  along(step);
                                  result(step);
                              });
        store_sums(sums, blocks);
        each_row(sums, blocks, [&](int r, __m512 low, __m512 high) { outputs.write(out + r * p.n, low, high, p.sums[row + r]); });
    };
    for (int64_t step = 0; step < early; step++) widen(step);
    for (int64_t first = begin; first < end; first += together) {
        const int64_t last = std::min(first + together, end), before = (first - begin) * steps;
        const Fetch next(p.w + last * size + early * piece, last < end ? (last - first) * size : 0, (last - first) * steps * blocks.count);
        for (int64_t block = 0; block < blocks.count; block++) {
            const int64_t row = blocks.first(block), then = blocks.first((block + 1) % blocks.count);
            FetchRows ahead{p.x + then * p.stride, p.stride, p.k, blocks.size};
            for (int64_t panel = first; panel < last; panel++) {
                const int64_t done = (block * (last - first) + panel - first) * steps;
                const auto along = [&](int64_t step) {
                    next(done + step);
                    if ((done + step) % blocks.count == 0) widen(before + early + (done + step) / blocks.count);
                };
                if (together == 1)
                    multiply(std::false_type(), row, panel, along);
                else
                    multiply(std::true_type(), row, panel, [&](int64_t step) {
                        along(step);
                        ahead();
                    });
            }
        }
    }
}
#endif

class Narrow : public Work {
   public:
    explicit Narrow(const Int8Product<bf16>& p) : sums(p.rows), product{p, sums.data()} {}

    void run(const Team& team) override {
        const int64_t first = team.first(product.rows);
        sum_rows(sums.data() + first, product.x + first * product.stride, team.end(product.rows) - first, product.stride, product.k);
        team.wait();
        static thread_local std::vector<__m512i> memory;
#ifdef SWIFT_AMX
        if (product.rows >= UNIT_ROWS && product.k % DEPTH == 0 && amx_ready())
            return multiply_int8_by_unit(
                product, kept<bf16>(memory, 2 * WIDTH * std::max(panels_together(product.rows, product.k) * product.k, EARLY * DEPTH)), team.index,
                team.count);
#endif
        multiply_int8(product, kept<bf16>(memory, product.rows > PANEL_ROWS ? WIDTH * product.k : 0), team.index, team.count);
    }

   private:
    std::vector<float> sums;
    const NarrowProduct product;
};
#endif

}  // namespace

extern "C" {
// Whether any number of rows runs at the units' speed here; else the kernel is for few rows.
int swift_int8_many(int is_bf16) {
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)  // Cooper Lake has the first alone
    return is_bf16;
#else
    return 0;
#endif
}

// w [n][k] in float32 or bfloat16 -> panels and scale [n]
void swift_int8_quantize(int is_bf16, int8_t* out, float* scale, const void* w, int64_t n, int64_t k, int threads) {
    if (is_bf16)
        quantize(out, scale, (const bf16*)w, n, k, threads);
    else
        quantize(out, scale, (const float*)w, n, k, threads);
}

// w [n][k] row by row -> panels, out [(n + 31) / 32 * 32 * k]; k even
void swift_int8_pack(int8_t* out, const int8_t* w, int64_t n, int64_t k, int threads) {
    const int64_t panels = (n + WIDTH - 1) / WIDTH;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t panel = 0; panel < panels; panel++) {
        int8_t* to = out + panel * WIDTH * k;
        if ((panel + 1) * WIDTH > n) memset(to, 0, WIDTH * k);
        for (int64_t o = 0; o < WIDTH && panel * WIDTH + o < n; o++) {
            const int8_t* from = w + (panel * WIDTH + o) * k;
            for (int64_t i = 0; i < k; i++) to[i / 2 * 64 + place(o, i % 2)] = code(from[i]);
        }
    }
}

// The way back for the rows first..end: out [end - first][k]
void swift_int8_unpack(int8_t* out, const int8_t* w, int64_t first, int64_t end, int64_t k, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = first; row < end; row++) {
        const int8_t* from = w + row / WIDTH * WIDTH * k;
        for (int64_t i = 0; i < k; i++) out[(row - first) * k + i] = code(from[i / 2 * 64 + place(row % WIDTH, i % 2)]);
    }
}

Work* swift_int8_linear(const Int8Product<bf16>* product, int) {
    if (!product->is_bf16) return new AnyProduct<float>(*(const Int8Product<float>*)product);  // of one layout
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)  // Cooper Lake has the first alone
    return new Narrow(*product);
#else
    return new AnyProduct<bf16>(*product);
#endif
}
}
