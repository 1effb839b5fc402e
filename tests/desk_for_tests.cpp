// Drives desk.h from many threads, and says "done" where nothing was wrong: as it is, and under a sanitizer.
#include "desk.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>

namespace {

constexpr int64_t kMerged = 8;

int cores = 0;  // that the desk has
std::atomic<int> busy{0}, most{0}, runs{0}, joined{0}, last{-1};
std::atomic<bool> closed[2], at[CPU_SETSIZE];  // runs of this kind stay where they are; a run is on this core
int kinds[2];

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "%s\n", what);
    std::_Exit(1);
}

void await(const char* what, const std::function<bool()>& holds) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (!holds()) {
        require(std::chrono::steady_clock::now() < end, what);
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

int count_own() {
    cpu_set_t own;
    require(!sched_getaffinity(0, sizeof own, &own), "no affinity");
    return CPU_COUNT(&own);
}

struct Given : Desk::Call {
    std::atomic<int>* seen;  // of each item: how often it was in a run
};

void run(const std::vector<Desk::Part>& parts, int core) {
    const int wide = std::min(parts.at(0).call->cores, cores), now = busy += wide, before = count_own();
    require(now <= cores, "more runs than cores");
    for (int seen = most; seen < now && !most.compare_exchange_weak(seen, now);) {
    }
    if (wide > 1) require(core == -1, "a run of several cores is not held on one");
    if (wide == 1) require(core >= 0 && !at[core].exchange(true), "two runs on a core");
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
    const int kind = int(static_cast<const int*>(parts[0].call->kind) - kinds);
    last = kind;
    ++runs;
    {
        const Held held(core);
        if (core >= 0) require(count_own() == 1 && sched_getcpu() == core, "not held on its core");
        while (closed[kind]) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        std::this_thread::sleep_for(std::chrono::microseconds(50 * size));
    }
    require(count_own() == before, "still held");
    if (core >= 0) at[core] = false;
    busy -= wide;
}

Desk* desk;

void serve(int kind, int wide, std::vector<int64_t> sizes) {
    std::vector<std::atomic<int>> seen(sizes.size());
    Given given{{&kinds[kind], wide, std::move(sizes)}, seen.data()};
    desk->serve(given);
    for (const auto& times : seen) require(times == 1, "an item was not in one run");
}

std::thread call(int kind, int wide, size_t count) {
    return std::thread([=] { serve(kind, wide, std::vector<int64_t>(count, 1)); });
}

void open(std::vector<std::thread>& callers) {
    closed[0] = closed[1] = false;
    for (std::thread& caller : callers) caller.join();
    callers.clear();
    require(busy == 0, "a run has not ended");
}

void reset() { most = runs = joined = 0; }

void drive(int allowed) {
    Desk made(kMerged, allowed, run);
    desk = &made;
    const cpu_set_t all = find_cores();
    const int found = CPU_COUNT(&all);
    cores = allowed ? std::min(allowed, found) : found;
    std::vector<std::thread> callers;

    reset();
    callers.push_back(std::thread([] {
        serve(0, 1, {1});
        serve(0, 64, {40});  // more cores than there are, and larger than what is merged
        serve(0, 1, {});
        require(runs == 2 && most == cores, "calls that are alone");
    }));
    open(callers);

    reset();
    closed[0] = true;
    callers.push_back(call(0, 1, 2 * cores));
    await("idle cores did not share one call", [] { return busy == cores; });
    require(runs == cores, "one call was cut into too many runs");
    open(callers);

    if (cores > 1) {
        reset();
        closed[0] = closed[1] = true;
        for (int k = 1; k < cores; ++k) callers.push_back(call(1, 1, 1));
        await("no core for each", [] { return busy == cores - 1; });
        callers.push_back(call(0, 1, kMerged + 2));
        await("no core for the last", [] { return busy == cores; });
        closed[1] = false;
        await("who leaves let a core idle", [] { return runs > cores; });
        open(callers);
    }

    closed[0] = true;
    callers.push_back(call(0, 64, 1));
    await("no run", [] { return busy == cores; });
    for (int k = 0; k < 3; ++k) callers.push_back(call(0, 1, 5 * kMerged * cores));
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    callers.push_back(call(1, 1, 1));
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    open(callers);
    require(last == 0, "a kind waited until all of the other was done");

    closed[0] = true;
    callers.push_back(call(0, 64, 1));
    await("no run", [] { return busy == cores; });
    for (int k = 0; k < 3 * cores; ++k) callers.push_back(call(0, 1, 1));
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    reset();
    open(callers);
    require(joined > 0, "calls that waited did not share a run");

    for (int caller = 0; caller < 12; ++caller)
        callers.emplace_back([caller] {
            for (int turn = 0; turn < 100; ++turn) {
                std::vector<int64_t> sizes;
                for (int k = 0; k <= (caller + turn) % 5; ++k) sizes.push_back(1 + (caller * turn + k) % 11);
                serve(turn % 7 ? 0 : 1, caller % 4 ? 1 : 2, std::move(sizes));
            }
        });
    open(callers);
}

}  // namespace

int main() {
    drive(0);
    drive(1);
    std::puts("done");
}
