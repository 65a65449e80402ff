// The product with an int8 weight and one scale per output: y = (x Q^T) s + b, accumulated in float32, rounded once.
//
// Layout: panels of 32 outputs, in each the pairs (2i, 2i + 1) of the inputs as 64 bytes (`place`): [n / 32][k / 2][64].
// The odd numbers 2q + 1 are exact bfloat16 values, and their magnitudes are 128, as many as one table look-up can tell apart; so
// a byte is a sign and the index of a magnitude, with AVX512-BF16 a panel becomes bfloat16 on its way to the registers by two
// look-ups for 64 weights, and sum(x (2q + 1)) = 2 sum(x q) + sum(x) gives the product back. A panel meets a block of up to 12 rows;
// further blocks of rows read what the first one left in the second-level cache.
// Elsewhere, and for float32 inputs, the same layout goes through plain vectors.
#include <cfloat>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace {

constexpr int WIDTH = 32;

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

template <class T>
void linear_any(T* out, const T* x, const int8_t* w, const float* scale, const T* bias, int64_t rows, int64_t stride, int64_t n, int64_t k,
                int threads) {
    std::vector<float> wide(rows * k);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < k; i++) wide[r * k + i] = to_float(x[r * stride + i]);
    const int64_t panels = (n + WIDTH - 1) / WIDTH;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t panel = 0; panel < panels; panel++) {
        const int width = n - panel * WIDTH < WIDTH ? n - panel * WIDTH : WIDTH;
        const int8_t* from = w + panel * WIDTH * k;
        const float* s = scale + panel * WIDTH;
        const T* b = bias ? bias + panel * WIDTH : nullptr;
        T* to = out + panel * WIDTH;
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4) tile_any<4, 1>(to + r * n, n, wide.data() + r * k, k, from, s, b, width, k);
        for (; r < rows; r++) tile_any<1, 4>(to + r * n, n, wide.data() + r * k, k, from, s, b, width, k);
    }
}

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

#ifdef __AVX512BF16__
constexpr int ROWS = 12;
constexpr int64_t RESIDENT = 160 * 1024;  // elements of x that stay in the second-level cache while the panels pass
enum Source { FRESH, FRESH_AND_KEPT, KEPT };

INLINE __m512bh pair_of(const bf16* x) {
    int32_t pair;
    memcpy(&pair, x, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
}

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

// R rows of x, whose sums are `sums`, against one panel, which comes as bytes `w`, or as bfloat16 from `kept`. `ahead` is fetched, `step` bytes for each pair.
template <int R, Source FROM>
void tile(bf16* out, int64_t n, const bf16* x, int64_t stride, const float* sums, const int8_t* w, bf16* kept, const float* scale,
          const bf16* bias, int width, int k, const char* ahead, int step) {
    const __m512i low_bytes = _mm512_load_si512(table.low), more_low_bytes = _mm512_load_si512(table.low + 64);
    const __m512i high_bytes = _mm512_load_si512(table.high), more_high_bytes = _mm512_load_si512(table.high + 64);
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    __m512 low[R], high[R];
    for (int r = 0; r < R; r++) low[r] = high[r] = _mm512_setzero_ps();
    for (int i = 0; i < k; i += 2) {
        __m512bh first, second;
        if (FROM == KEPT) {
            first = (__m512bh)_mm512_loadu_si512(kept + (int64_t)i * WIDTH);
            second = (__m512bh)_mm512_loadu_si512(kept + (int64_t)i * WIDTH + 32);
        } else {
            const __m512i codes = _mm512_loadu_si512(w + (int64_t)i * WIDTH);
            const __m512i lower = _mm512_permutex2var_epi8(low_bytes, codes, more_low_bytes);
            const __m512i upper = _mm512_permutex2var_epi8(high_bytes, codes, more_high_bytes);
            const __m512i with_sign = _mm512_ternarylogic_epi32(upper, codes, sign, 0xf8);  // upper | (codes & sign)
            first = (__m512bh)_mm512_unpacklo_epi8(lower, with_sign);
            second = (__m512bh)_mm512_unpackhi_epi8(lower, with_sign);
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
    __m512 more_low = _mm512_setzero_ps(), more_high = more_low;
    const __mmask32 present = width == WIDTH ? ~0u : (1u << width) - 1;
    if (bias) {
        const __m512i both = _mm512_maskz_loadu_epi16(present, bias);
        more_low = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16));
        more_high = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16));
    }
    const __m512 half = _mm512_set1_ps(0.5f), scale_low = _mm512_mul_ps(half, _mm512_maskz_loadu_ps(present, scale)),
                 scale_high = _mm512_mul_ps(half, _mm512_maskz_loadu_ps(present >> 16, scale + 16));
    for (int r = 0; r < R; r++) {
        const __m512 sum = _mm512_set1_ps(sums[r]);
        low[r] = _mm512_sub_ps(low[r], sum), high[r] = _mm512_sub_ps(high[r], sum);
        const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_fmadd_ps(high[r], scale_high, more_high), _mm512_fmadd_ps(low[r], scale_low, more_low));
        _mm512_mask_storeu_epi16(out + r * n, present, (__m512i)both);
    }
}

using Tile = void (*)(bf16*, int64_t, const bf16*, int64_t, const float*, const int8_t*, bf16*, const float*, const bf16*, int, int,
                      const char*, int);
#define TILES_FROM(s) \
    {nullptr, tile<1, s>, tile<2, s>, tile<3, s>, tile<4, s>, tile<5, s>, tile<6, s>, tile<7, s>, tile<8, s>, tile<9, s>, tile<10, s>, tile<11, s>, tile<12, s>}
const Tile TILES[3][ROWS + 1] = {TILES_FROM(FRESH), TILES_FROM(FRESH_AND_KEPT), TILES_FROM(KEPT)};

void linear_bf16(bf16* out, const bf16* x, const int8_t* w, const float* scale, const bf16* bias, int64_t rows, int64_t stride, int64_t n,
                 int64_t k, int threads) {
    int64_t most = RESIDENT / k / ROWS * ROWS;
    if (most < ROWS * 4) most = ROWS * 4;  // each group of rows converts the panels anew
    const int64_t panels = (n + WIDTH - 1) / WIDTH, groups = (rows + most - 1) / most;
    std::vector<float> sums(rows);
    sum_rows(sums.data(), x, rows, stride, k);
#pragma omp parallel num_threads(threads)
    {
        static thread_local std::vector<__m512i> panel_memory;  // kept between calls: fresh memory costs a page fault for every 4 KB
        if (rows > ROWS && (int64_t)panel_memory.size() < k) panel_memory.resize(k);
        bf16* kept = (bf16*)panel_memory.data();
#pragma omp for schedule(static) collapse(2)
        for (int64_t group = 0; group < groups; group++)
            for (int64_t panel = 0; panel < panels; panel++) {
                const int64_t begin = rows * group / groups, end = rows * (group + 1) / groups;
                const int64_t blocks = (end - begin + ROWS - 1) / ROWS;
                const int8_t* from = w + panel * WIDTH * k;
                const char* ahead = (const char*)(panel + 1 < panels ? from + WIDTH * k : from);
                const int width = n - panel * WIDTH < WIDTH ? n - panel * WIDTH : WIDTH;
                for (int64_t block = 0; block < blocks; block++) {
                    const int64_t first = begin + (end - begin) * block / blocks, last = begin + (end - begin) * (block + 1) / blocks;
                    const Source source = blocks == 1 ? FRESH : block == 0 ? FRESH_AND_KEPT : KEPT;
                    TILES[source][last - first](out + first * n + panel * WIDTH, n, x + first * stride, stride, sums.data() + first, from,
                                                kept, scale + panel * WIDTH, bias ? bias + panel * WIDTH : nullptr, width, k,
                                                ahead + WIDTH * k * block / blocks, 64 / blocks);
                }
            }
    }
}
#endif

}  // namespace

extern "C" {
// Whether any number of rows runs at the units' speed here; else the kernel is for few rows.
int swift_int8_many(int is_bf16) {
#ifdef __AVX512BF16__
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

// out [rows][n] contiguous, x rows `stride` elements apart, scale [n], bias [n] or null
void swift_int8_linear(int is_bf16, void* out, const void* x, const int8_t* w, const float* scale, const void* bias, int64_t rows,
                       int64_t stride, int64_t n, int64_t k, int threads) {
    if (!is_bf16)
        return linear_any((float*)out, (const float*)x, w, scale, (const float*)bias, rows, stride, n, k, threads);
#ifdef __AVX512BF16__
    linear_bf16((bf16*)out, (const bf16*)x, w, scale, (const bf16*)bias, rows, stride, n, k, threads);
#else
    linear_any((bf16*)out, (const bf16*)x, w, scale, (const bf16*)bias, rows, stride, n, k, threads);
#endif
}
}
