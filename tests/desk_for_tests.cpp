// Drives desk.h from many threads, and says "done" where nothing was wrong: as it is, and under a sanitizer.
#include "desk.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>

namespace {

const int kCores = Cores().count();
constexpr int64_t kMerged = 8;

std::atomic<int> busy{0}, most{0}, runs{0}, joined{0};
std::atomic<bool> closed{false}, at[CPU_SETSIZE];
int kinds[2];

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "%s\n", what);
    std::exit(1);
}

struct Given : Desk::Call {
    std::atomic<int>* seen;  // of each item: how often it was in a run
};

void run(const std::vector<Desk::Part>& parts) {
    const int cores = parts.at(0).call->cores, now = busy += cores;
    require(now <= kCores, "more runs than cores");
    for (int before = most; before < now && !most.compare_exchange_weak(before, now);) {
    }
    cpu_set_t own;
    CPU_ZERO(&own);
    require(!sched_getaffinity(0, sizeof own, &own), "no affinity");
    const int core = sched_getcpu();
    if (cores == 1) require(CPU_COUNT(&own) == 1 && CPU_ISSET(core, &own) && !at[core].exchange(true), "a shared core");
    int64_t size = 0, items = 0;
    for (const Desk::Part& part : parts) {
        require(part.call->kind == parts[0].call->kind, "two kinds in a run");
        require(part.first < part.last, "a part of nothing");
        for (size_t k = part.first; k < part.last; ++k, ++items) {
            size += part.call->sizes[k];
            ++static_cast<Given*>(part.call)->seen[k];
        }
    }
    require(size <= kMerged || items == 1, "too much in a run");
    joined += parts.size() > 1;
    ++runs;
    while (closed) std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::microseconds(50 * size));
    if (cores == 1) at[core] = false;
    busy -= cores;
}

Desk desk(kMerged, run);

void serve(int kind, int cores, std::vector<int64_t> sizes) {
    std::vector<std::atomic<int>> seen(sizes.size());
    Given given{{&kinds[kind], cores, std::move(sizes)}, seen.data()};
    desk.serve(given);
    cpu_set_t own;
    require(!sched_getaffinity(0, sizeof own, &own) && CPU_COUNT(&own) == kCores, "still held on a core");
    for (const auto& times : seen) require(times == 1, "an item was not in one run");
}

}  // namespace

int main() {
    serve(0, 1, {1});
    serve(0, 64, {40});  // more cores than there are, and larger than what is merged
    serve(0, 1, {});
    require(runs == 2 && most == kCores, "one call alone");

    most = runs = 0, closed = true;  // one call, whose items all cores share
    std::thread sharer([] { serve(0, 1, std::vector<int64_t>(2 * kCores, 1)); });
    while (busy < kCores) std::this_thread::yield();
    closed = false;
    sharer.join();
    require(runs == kCores, "idle cores did not share one call");

    joined = 0;
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 12; ++caller)
        callers.emplace_back([caller] {
            for (int turn = 0; turn < 100; ++turn) {
                std::vector<int64_t> sizes;
                for (int k = 0; k <= (caller + turn) % 5; ++k) sizes.push_back(1 + (caller * turn + k) % 11);
                serve(turn % 7 ? 0 : 1, caller % 4 ? 1 : 2, std::move(sizes));
            }
        });
    for (std::thread& caller : callers) caller.join();
    require(busy == 0 && most == kCores && joined > 0, "many callers");
    std::puts("done");
}
