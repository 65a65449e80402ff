// A block of experts as a stage: out[token] = the sum over its chosen experts e of weight * down_e(silu(gate_e x) * up_e x), rounded where
// the eager torch code stores.
//
// The (token, expert) pairs are sorted by expert, so an expert reads its weights once for all of its rows, and one that nobody chose reads
// nothing. Threads share the panels of all active experts, weighed by their rows: four experts with a row each keep any number of threads
// busy, and so does one that got most of the rows.
#include <vector>

#include "linear.h"
#include "stage.h"

struct Experts {
    bf16* out;              // [tokens][width]
    const bf16* x;          // [tokens][width]
    const int64_t* chosen;  // [tokens][top]; what is not in [0, experts) adds nothing
    const void* weights;    // [tokens][top], float32 or bfloat16
    const bf16 *gate_up, *down;  // each expert's panels behind those of the one before
    bf16* rows;             // [tokens * top][width + pad]: inputs, and later results, sorted by expert
    bf16* act;              // [tokens * top][inner]
    int64_t tokens, top, experts, width, inner, pad;
    int32_t weights_are_bf16;
};

#ifdef __AVX512BF16__
namespace {

constexpr int64_t COLUMNS = 512;  // of a token's sum that are a thread's piece
// Rows whose products with a panel take as long as its reading from memory
constexpr int64_t UNIT_READ = 64, VECTORS_READ = 8;
constexpr int SHARES = 8;  // of the work that one thread's is in

class ExpertsWork : public Work {
   public:
    explicit ExpertsWork(const Experts& all) : e(all), place(e.tokens * e.top), token(e.tokens * e.top) {
        std::vector<int64_t> next(e.experts + 1);
        for (size_t pair = 0; pair < place.size(); pair++)
            if (known(e.chosen[pair])) next[e.chosen[pair] + 1]++;
        for (int64_t expert = 0; expert < e.experts; expert++) {
            const int64_t rows = next[expert + 1], first = next[expert];
            next[expert + 1] += first;
            if (rows) active.push_back({expert, first, rows});
            gathering |= rows > 1;
        }
        for (size_t pair = 0; pair < place.size(); pair++) {
            place[pair] = known(e.chosen[pair]) ? next[e.chosen[pair]]++ : -1;
            if (place[pair] >= 0) token[place[pair]] = pair / e.top;
        }
    }

    void run(const Team& team) override {
        if (gathering) {
            gather(team);
            team.wait();
        }
        share(team, true, shared[0]);
        team.wait();
        share(team, false, shared[1]);
        team.wait();
        if (e.weights_are_bf16)
            combine(team, (const bf16*)e.weights);
        else
            combine(team, (const float*)e.weights);
    }

   private:
    struct Active {
        int64_t expert, first, rows;  // place of its first row
    };
    const Experts e;
    std::vector<Active> active;
    std::vector<int64_t> place, token;  // of a pair where its row is, of a row whose it is
    bool gathering = false;
    std::atomic<int64_t> shared[2] = {0, 0};  // of the gates and of what follows, how much threads have taken

    bool known(int64_t expert) const { return expert >= 0 && expert < e.experts; }

    // A row alone is read where it is.
    void gather(const Team& team) const {
        const int64_t stride = e.width + e.pad, last = active.back().first + active.back().rows;
        for (int64_t row = team.first(last); row < team.end(last); row++)
            memcpy((void*)(e.rows + row * stride), e.x + token[row] * e.width, e.width * sizeof(bf16));
    }

    Product product(const Active& one, bool gate) const {
        Product p{};
        p.rows = one.rows;
        if (gate) {
            p.n = 2 * e.inner, p.k = e.width, p.out = e.act + one.first * e.inner;
            p.x = one.rows > 1 ? e.rows + one.first * (e.width + e.pad) : e.x + token[one.first] * e.width;
            p.stride = e.width + e.pad;
        } else {
            p.n = e.width, p.k = e.inner, p.out = e.rows + one.first * e.width, p.x = e.act + one.first * e.inner, p.stride = e.inner;
        }
        p.w = (gate ? e.gate_up : e.down) + one.expert * ((p.n + WIDTH - 1) / WIDTH * WIDTH) * p.k;
        return p;
    }

    // Of a piece, in what a row takes
    static int64_t length(const Product& p) {
#ifdef SWIFT_AMX
        if (by_unit(p)) return p.rows + UNIT_READ;
#endif
        return p.rows + VECTORS_READ;
    }

    // All pieces of the active experts' products lie on one line, on which each is as long as it takes. Threads take shares of the line as
    // they get done: one whose core is slower, as virtual ones often are, does less of it.
    void share(const Team& team, bool gate, std::atomic<int64_t>& next) const {
        int64_t all = 0;
        for (const Active& one : active) {
            const Product p = product(one, gate);
            all += count_pieces(p, gate) * length(p);
        }
        const int64_t shares = team.count > 1 ? team.count * SHARES : 1;
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < shares;) {
            const int64_t from = all * i / shares, to = all * (i + 1) / shares;
            int64_t at = 0;
            for (const Active& one : active) {
                const Product p = product(one, gate);
                const int64_t pieces = count_pieces(p, gate);
                const auto before = [&](int64_t point) { return std::clamp((point - at + length(p) - 1) / length(p), (int64_t)0, pieces); };
                const Pieces mine{before(from), before(to)};
                if (mine.begin < mine.end) multiply(p, gate, mine);
                at += pieces * length(p);
            }
        }
    }

    template <class T>
    void combine(const Team& team, const T* weights) const {
        const int64_t parts = (e.width + COLUMNS - 1) / COLUMNS;
        for (int64_t i = team.first(e.tokens * parts); i < team.end(e.tokens * parts); i++) {
            const int64_t row = i / parts, first = i % parts * COLUMNS, last = std::min(first + COLUMNS, e.width);
            for (int64_t d = first; d < last; d += 16) {
                const __mmask16 kept = last - d >= 16 ? 0xffff : (1 << (last - d)) - 1;
                v16f sum = {};
                for (int64_t pair = row * e.top; pair < (row + 1) * e.top; pair++) {
                    if (place[pair] < 0) continue;
                    const __m256i y = _mm256_maskz_loadu_epi16(kept, e.rows + place[pair] * e.width + d);
                    sum += rounded((v16f)_mm512_slli_epi32(_mm512_cvtepu16_epi32(y), 16) * to_float(weights[pair]), weights);
                }
                _mm256_mask_storeu_epi16(e.out + row * e.width + d, kept, (__m256i)_mm512_cvtneps_pbh((__m512)sum));
            }
        }
    }
};

}  // namespace
#endif

extern "C" {
// inner is a multiple of 32, width of 2
Work* swift_experts(const Experts* args, int) {
#ifdef __AVX512BF16__
    return new ExpertsWork(*args);
#else
    return nullptr;
#endif
}
}
