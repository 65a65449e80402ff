// A stage is work that a team of threads does together. A run is some stages in order by one team: its threads start once, for the
// products, norms and attention of a whole layer, and meet between two stages.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <utility>
#ifdef __x86_64__
#include <immintrin.h>
#endif

// Where a team's threads wait for each other. In decoding stages take microseconds, so they do not sleep; one whose partner has lost
// its core gives its own away.
class Barrier {
   public:
    void wait(int count) {
        const int64_t round = finished.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
            arrived.store(0, std::memory_order_relaxed);
            finished.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; finished.load(std::memory_order_acquire) == round; spins++) {
            if (spins > 2000) std::this_thread::yield();
#ifdef __x86_64__
            _mm_pause();
#endif
        }
    }

   private:
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int64_t> finished{0};
};

struct Team {
    int index, count;  // this thread's place
    Barrier* barrier;
    void wait() const {
        if (count > 1) barrier->wait(count);
    }
    // This thread's share of `all` pieces
    int64_t first(int64_t all) const { return all * index / count; }
    int64_t end(int64_t all) const { return all * (index + 1) / count; }
};

class Work {
   public:
    virtual ~Work() = default;
    virtual void run(const Team& team) = 0;  // by each thread
};

template <class Do>
class Doing : public Work {
   public:
    explicit Doing(Do what) : what(std::move(what)) {}
    void run(const Team& team) override { what(team); }

   private:
    Do what;
};

// Work that needs no preparation: `what(team)`
template <class Do>
Work* work(Do what) {
    return new Doing<Do>(std::move(what));
}

// What Python hands over: a kernel's function that prepares its work for so many threads, before any stage runs, and its arguments.
struct Stage {
    Work* (*prepare)(const void* args, int threads);
    const void* args;
};
