// The product with a packed weight and its adapters', or an MLP's gate of both, on the matrix unit: out = x W^T + (x A^T) B^T, with x A^T
// rounded and everything else summed in float32 and rounded once.
//
// An adapter's part is a few more inputs of the sums that the weight's product is in anyway, so no result is read and written again, and a
// gate stays part of the product. Rows of a block may have several adapters or none: of each adapter the block has a piece, its own x A^T
// in which the other rows are zero.
#include "adapters.h"
#include "linear.h"
#include "stage.h"

struct Adapted {
    Product product;
    Args adding;  // x, y and their strides are the product's
    int32_t gate;
};

#ifdef SWIFT_AMX
namespace {

constexpr int HALF = 16;  // ranks of a tile

int64_t padded(int rank) { return (rank + DEPTH - 1) / DEPTH * DEPTH; }

class AdaptedProduct : public Work {
   public:
    explicit AdaptedProduct(const Adapted& all) : p(all.product), args(all.adding), gate(all.gate), blocks(all.product.rows) {
        int64_t place = 0;
        for (int64_t block = 0, s = 0; block < blocks.count; block++) {
            begins.push_back((int)pieces.size());
            const int64_t row = blocks.first(block), end = row + blocks.size;
            while (s < args.num_segments && last(s) <= row) s++;
            for (int64_t t = s; t < args.num_segments && Segment(args, t).first < end; t++) {
                const Segment segment(args, t);
                pieces.push_back({row, std::max(segment.first - row, (int64_t)0), std::min(last(t), end) - row, t, (bf16*)args.h + place});
                for (int part = 0; part < args.end_part; part++) place += padded(segment.entry.rank(part)) * blocks.size;
            }
        }
        begins.push_back((int)pieces.size());
    }

    void run(const Team& team) override {
        shrink(team);
        team.wait();
        static thread_local std::vector<__m512i> memory;
        const auto add = [&](int64_t row, int64_t column) { expand(blocks.index(row), column, memory); };
        const int64_t all = count_pieces(p, gate);
        const Pieces mine{team.first(all), team.end(all)};
        if (gate)
            gate_by_unit(p, mine, add);
        else
            multiply_by_unit(p, mine, add);
    }

   private:
    // The rows [first, end) of the block that begins at `row`; low: for each part [rows of a block][padded rank].
    struct Piece {
        int64_t row, first, end, segment;
        bf16* low;
    };
    const Product p;
    const Args args;
    const bool gate;
    const RowBlocks blocks;
    std::vector<Piece> pieces;
    std::vector<int> begins;  // the first piece of each block, and the end

    int64_t last(int64_t s) const { return Segment(args, s).first + Segment(args, s).rows; }

    // x A^T of this thread's pieces. A is packed once for those of one adapter.
    void shrink(const Team& team) const {
        static thread_local std::vector<__m512i> memory;
        const Tiles tiles = blocks.tiles();
        const bf16* packed = nullptr;
        int64_t of = -1;
        for (int64_t i = team.first(pieces.size()); i < team.end(pieces.size()); i++) {
            const Piece& piece = pieces[i];
            const Entry entry = Segment(args, piece.segment).entry;
            if (piece.segment != of) packed = pack(entry, memory), of = piece.segment;
            const bf16* a = packed;
            bf16* low = piece.low;
            for (int part = 0; part < args.end_part; part++) {
                const int rank = entry.rank(part);
                for (int64_t r = 0; r < padded(rank); r += HALF) {
                    if (r < rank)
                        shrink_half(low + r, padded(rank), piece, a), a += HALF * p.k;
                    else
                        for (int64_t row = 0; row < blocks.size; row++) _mm256_storeu_si256((__m256i*)(low + row * padded(rank) + r), _mm256_setzero_si256());
                }
                low += padded(rank) * blocks.size;
            }
        }
    }

    // [halves of the ranks of each part][k / 2][16][2]
    const bf16* pack(const Entry& entry, std::vector<__m512i>& memory) const {
        int halves = 0;
        for (int part = 0; part < args.end_part; part++) halves += (entry.rank(part) + HALF - 1) / HALF;
        bf16 *packed = kept<bf16>(memory, halves * HALF * p.k), *to = packed;
        for (int part = 0; part < args.end_part; part++)
            for (int r = 0; r < entry.rank(part); r += HALF) {
                const bf16* from = (const bf16*)entry.a() + (entry.start(part) + r) * p.k;
                for (int64_t i = 0; i < p.k; i += DEPTH, to += DEPTH * HALF) turn_pairs(to, 2 * HALF, from + i, p.k, entry.rank(part) - r, DEPTH);
            }
        return packed;
    }

    // low [rows of a block][16 ranks]
    void shrink_half(bf16* low, int64_t stride, const Piece& piece, const bf16* a) const {
        const bf16 *upper = p.x + piece.row * p.stride, *lower = upper + blocks.top * p.stride;
        alignas(64) float sums[32 * HALF];
        _tile_zero(0);
        if (blocks.bottom) _tile_zero(2);
        for (int64_t i = 0; i < p.k; i += DEPTH) {
            _tile_loadd(4, upper + i, p.stride * 2);
            _tile_loadd(6, a + i * HALF, 64);
            _tile_dpbf16ps(0, 4, 6);
            if (!blocks.bottom) continue;
            _tile_loadd(5, lower + i, p.stride * 2);
            _tile_dpbf16ps(2, 5, 6);
        }
        _tile_stored(0, sums, 64);
        if (blocks.bottom) _tile_stored(2, sums + blocks.top * HALF, 64);
        for (int64_t row = 0; row < blocks.size; row++) {
            const bool own = row >= piece.first && row < piece.end;
            _mm256_storeu_si256((__m256i*)(low + row * stride), own ? (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(sums + row * HALF)) : _mm256_setzero_si256());
        }
    }

    // The adapters' part of a block's sums for the 32 outputs from `column` on.
    void expand(int64_t block, int64_t column, std::vector<__m512i>& memory) const {
        int part = 0;
        while (column >= args.outs[2 * part] + args.outs[2 * part + 1]) part++;
        const int64_t out = args.outs[2 * part + 1];
        for (int i = begins[block]; i < begins[block + 1]; i++) {
            const Entry entry = Segment(args, pieces[i].segment).entry;
            const int rank = entry.rank(part);
            if (!rank) continue;
            const bf16* low = pieces[i].low;
            for (int before = 0; before < part; before++) low += padded(entry.rank(before)) * blocks.size;
            bf16* panel = kept<bf16>(memory, padded(rank) * WIDTH);
            pack_panel_across(panel, (const bf16*)entry.b(part) + column - args.outs[2 * part], out, rank, padded(rank));
            add_products<false>(blocks, low, padded(rank), PanelSteps{panel}, padded(rank), [](int64_t) {});
        }
    }
};

}  // namespace
#endif

extern "C" {
// Whether there is such a product here. Inputs and outputs of all parts are multiples of 32, everything is bfloat16.
int swift_adapted_ready() {
#ifdef SWIFT_AMX
    return amx_ready();
#else
    return 0;
#endif
}

Work* swift_adapted(const Adapted* args, int) {
#ifdef SWIFT_AMX
    return new AdaptedProduct(*args);
#else
    return nullptr;
#endif
}
}
