// Paged attention on the CPU: store new K and V by slot, then attend through block tables. One stage of a layer.
//
// Pools are [blocks, G, S, D] (see kv.py). A call takes any mix of sequences; work is cut into tasks that threads take in turn:
//   rows    one query of one sequence and some KV heads, all query heads of each together: each K and V is read once (decode).
//           Long contexts are split, and the parts are merged by their softmax weights.
//   tiles   64 rows or more (queries x heads of one KV head) against 64 keys or more at a time, with a running softmax (prefill). With
//           AVX512-BF16 both products are pairs-of-bfloat16 dot products on repacked K and V, in the matrix unit where there is
//           one; else fp32.
// The softmax is fp32 throughout. Nothing outside a sequence's own tokens reaches a result.
#include <atomic>

#include "attention_rows.h"
#include "attention_tiles.h"
#include "stage.h"

namespace {

template <class T>
INLINE void prepare_row(const Args& a, T* to, const T* from, const void* norm, int64_t token) {
    if (norm) {
        norm_row(to, from, (const T*)norm, a.key_dim, a.eps, a.norm_kind);
        from = to;
    }
    rope_row(to, from, a.cos, a.sin, token, a.key_dim, a.rotation);
}

template <class T>
class Attention : public Work {
   public:
    Attention(const Args& args, int threads);
    void run(const Team& team) override;

   private:
    struct Merge {
        size_t task;
        int parts;
    };
    Args a;  // its q is what attention reads: the rotated one, where there is a rotation
    const T* raw_q;
    int64_t raw_token, raw_head;
    Way way;
    std::vector<Task> tasks;
    std::vector<Merge> merges;
    std::vector<float> workspace;
    std::vector<uint32_t> order;  // of the tasks: the longest first
    std::atomic<int64_t> taken{0};
    void store_row(int64_t token, int64_t head) const;
};

template <class T>
Attention<T>::Attention(const Args& args, int threads)
    : a(args), raw_q((const T*)args.q), raw_token(args.q_token), raw_head(args.q_head), way(way_of(args, T())) {
    if (a.cos) a.q = a.rotated, a.q_token = (int64_t)a.heads * a.key_dim, a.q_head = a.key_dim;
    const int group = a.heads / a.kv_heads, few = 8, per_tile = std::max(1, rows_of(way) / group);
    int64_t cached = 0, queries = 0;
    for (int i = 0; i < a.num_sequences; i++) {
        const int32_t* s = a.sequences + 4 * i;
        if (s[1] < few) cached += (int64_t)s[1] * (s[2] + s[1]), queries += s[1];
    }
    // Four tasks for each thread: all heads of a query together where there are enough queries, else fewer heads, then fewer keys.
    const int wanted = 4 * threads;
    int heads = a.kv_heads;
    while (heads > 1 && heads % 2 == 0 && queries * (a.kv_heads / heads) < wanted) heads /= 2;
    const int split = (int)std::max<int64_t>(256, (cached * (a.kv_heads / heads) / wanted + 15) & ~(int64_t)15);
    size_t partials = 0;
    for (int i = 0; i < a.num_sequences; i++) {
        const int32_t* s = a.sequences + 4 * i;
        const int32_t* table = a.tables + s[3];
        const int step = s[1] < few ? 1 : per_tile;
        for (int first = 0; first < s[1]; first += step) {
            const int count = std::min(step, s[1] - first), position = s[2] + first, end = position + count;
            const int begin = a.window ? std::max(0, position + 1 - a.window) : 0;
            const int together = s[1] < few ? heads : 1;
            for (int head = 0; head < a.kv_heads; head += together) {
                const int parts = s[1] < few ? (end - begin + split - 1) / split : 1;
                if (parts > 1) merges.push_back({tasks.size(), parts});
                for (int part = 0; part < parts; part++) {
                    const int from = parts > 1 ? begin + part * split : begin, to = parts > 1 ? std::min(end, from + split) : end;
                    tasks.push_back({s[0] + first, s[1] < few ? 0 : count, head, together, position, from, to, table, nullptr,
                                     (int64_t)count * together * (to - from)});
                    if (parts > 1) partials += (size_t)together * group * (a.value_dim + 2);
                }
            }
        }
    }
    workspace.resize(partials);
    float* next = workspace.data();
    for (const Merge& m : merges)
        for (int part = 0; part < m.parts; part++, next += (size_t)tasks[m.task].heads * group * (a.value_dim + 2))
            tasks[m.task + part].partial = next;
    order.resize(tasks.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](uint32_t x, uint32_t y) { return tasks[x].cost > tasks[y].cost; });
}

template <class T>
void Attention<T>::store_row(int64_t token, int64_t head) const {
    const int64_t slot = a.slots[token];
    if (slot < 0) return;
    const int64_t row = (slot / a.block_size * a.kv_heads + head) * a.block_size + slot % a.block_size;
    const T* k = (const T*)a.k + token * a.k_token + head * a.k_head;
    if (a.cos)
        prepare_row(a, (T*)a.keys + row * a.key_dim, k, a.k_norm, token);
    else
        memcpy((T*)a.keys + row * a.key_dim, k, a.key_dim * sizeof(T));
    memcpy((T*)a.values + row * a.value_dim, (const T*)a.v + token * a.v_token + head * a.v_head, a.value_dim * sizeof(T));
}

template <class T>
void Attention<T>::run(const Team& team) {
    const int64_t rows = (int64_t)a.tokens * a.heads, pairs = (int64_t)a.tokens * a.kv_heads, total = tasks.size(), joined = merges.size();
    if (a.cos)
        for (int64_t i = team.first(rows); i < team.end(rows); i++) {
            const int64_t token = i / a.heads, head = i % a.heads;
            prepare_row(a, (T*)a.rotated + i * a.key_dim, raw_q + token * raw_token + head * raw_head, a.q_norm, token);
        }
    for (int64_t i = team.first(pairs); i < team.end(pairs); i++) store_row(i / a.kv_heads, i % a.kv_heads);
    team.wait();
    static thread_local std::vector<float> scratch;
    for (int64_t i; (i = taken.fetch_add(1)) < total;) {
        const Task& task = tasks[order[i]];
        if (task.count) {
            tile_of(way, a, task, scratch, T());
        } else {
            const int64_t then = taken.load();  // unless another thread takes it before
            row_of(a, task, then < total && !tasks[order[then]].count ? &tasks[order[then]] : nullptr, scratch, T());
        }
    }
    if (!joined) return;
    team.wait();
    for (int64_t i = team.first(joined); i < team.end(joined); i++) merge<T>(a, tasks[merges[i].task], merges[i].parts);
}

}  // namespace

extern "C" Work* swift_paged_attention(const Args* args, int threads) {
    if (args->is_bf16) return new Attention<bf16>(*args, threads);
    return new Attention<float>(*args, threads);
}
