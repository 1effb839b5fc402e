// Runs for many callers: as many at once as there are cores, each on its own, what waits meanwhile merged, first come,
// first served.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <sched.h>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

// The cores that this process may use, and which of them have a run of ours. Left to itself, Linux lets two runs share
// one while another idles, for as long as a run takes: threads that carry answers wake there, and move them about.
class Cores {
  public:
    Cores() {
        CPU_ZERO(&all_);
        if (sched_getaffinity(0, sizeof all_, &all_) || !CPU_COUNT(&all_)) CPU_SET(0, &all_);
        CPU_ZERO(&taken_);
    }

    int count() const { return CPU_COUNT(&all_); }

    // One without a run, if there is one: that of the calling thread, where it can be. -1: none.
    int take() {
        const int here = sched_getcpu();
        if (here >= 0 && is_free(here)) return CPU_SET(here, &taken_), here;
        for (int core = 0; core < CPU_SETSIZE; ++core)
            if (is_free(core)) return CPU_SET(core, &taken_), core;
        return -1;
    }

    void give_back(int core) {
        if (core >= 0) CPU_CLR(core, &taken_);
    }

    // The calling thread stays there; -1: may go anywhere again.
    void hold(int core) const {
        cpu_set_t one;
        CPU_ZERO(&one);
        if (core >= 0) CPU_SET(core, &one);
        sched_setaffinity(0, sizeof one, core >= 0 ? &one : &all_);  // where it may not, the run is slower, no worse
    }

  private:
    bool is_free(int core) const { return CPU_ISSET(core, &all_) && !CPU_ISSET(core, &taken_); }

    cpu_set_t all_, taken_;
};

class Desk {
  public:
    // What one caller brings, and waits for. It is the desk's until `serve` returns.
    struct Call {
        const void* kind;            // calls of one kind may share a run
        int cores;                   // of a run
        std::vector<int64_t> sizes;  // of its items, each at least 1
        size_t taken = 0, done = 0;
        std::condition_variable changed{};
    };

    struct Part {  // the items of one call in a run
        Call* call;
        size_t first, last;
    };

    using Run = void (*)(const std::vector<Part>& parts);  // throws nothing

    // merged: the largest size of a run of several items.
    Desk(int64_t merged, Run run) : run_(run), merged_(merged), idle_(cores_.count()) {}

    // Returns when every item was in a run, of this thread or of another.
    void serve(Call& call) {
        if (call.sizes.empty()) return;
        Lock lock(mutex_);
        call.cores = std::clamp(call.cores, 1, idle_ + busy_);
        line_.push_back(&call);
        std::vector<std::thread> helpers = find_help(call);
        while (call.done < call.sizes.size()) {
            if (may_run()) {
                work(lock);
            } else {
                waiting_.push_back(&call);
                call.changed.wait(lock);
                if (auto at = std::find(waiting_.begin(), waiting_.end(), &call); at != waiting_.end())
                    waiting_.erase(at);
            }
        }
        pass_on();
        lock.unlock();
        for (std::thread& helper : helpers) helper.join();
    }

  private:
    using Lock = std::unique_lock<std::mutex>;

    bool may_run() const { return !line_.empty() && line_.front()->cores <= idle_; }

    // Threads for cores that the caller's own run, and those who wait here anyway, would leave idle.
    std::vector<std::thread> find_help(Call& call) {
        std::vector<std::thread> helpers;
        const size_t runs = std::min(call.sizes.size(), size_t(idle_ / call.cores));
        try {
            while (1 + waiting_.size() + helpers.size() < runs)
                helpers.emplace_back([this, &call] {
                    Lock lock(mutex_);
                    while (call.taken < call.sizes.size() && may_run()) work(lock);
                    pass_on();
                });
        } catch (const std::system_error&) {  // no thread to be had
        }
        return helpers;
    }

    void pass_on() {  // somebody else can go on
        if (!may_run() || waiting_.empty()) return;
        waiting_.front()->changed.notify_one();
        waiting_.pop_front();
    }

    void work(Lock& lock) {
        const std::vector<Part> parts = take();
        const int cores = parts[0].call->cores;
        idle_ -= cores, busy_ += cores;
        const int core = cores == 1 ? cores_.take() : -1;  // a thread that a run makes would be held there, too
        pass_on();
        lock.unlock();
        if (core >= 0) cores_.hold(core);
        run_(parts);
        if (core >= 0) cores_.hold(-1);
        lock.lock();
        cores_.give_back(core);
        idle_ += cores, busy_ -= cores;
        for (const Part& part : parts) {
            part.call->done += part.last - part.first;
            if (part.call->done == part.call->sizes.size()) part.call->changed.notify_one();
        }
    }

    // The next run: the first in the line, and what else fits of its kind. Idle cores get the same share of it each.
    std::vector<Part> take() {
        const void* kind = line_.front()->kind;
        int64_t waiting = 0;
        for (const Call* call : line_)
            for (size_t k = call->taken; call->kind == kind && k < call->sizes.size(); ++k) waiting += call->sizes[k];
        const int64_t runs = idle_ / line_.front()->cores, most = std::min(merged_, (waiting + runs - 1) / runs);
        std::vector<Part> parts;
        int64_t size = 0;
        for (auto at = line_.begin(); at != line_.end();) {
            Call& call = **at;
            if (call.kind != kind) {
                ++at;
                continue;
            }
            const size_t first = call.taken;
            while (call.taken < call.sizes.size() && (!size || size + call.sizes[call.taken] <= most))
                size += call.sizes[call.taken++];
            if (call.taken > first) parts.push_back({&call, first, call.taken});
            if (call.taken < call.sizes.size()) break;
            at = line_.erase(at);
        }
        return parts;
    }

    const Run run_;
    const int64_t merged_;
    std::mutex mutex_;
    Cores cores_;
    std::deque<Call*> line_;     // calls with items that no run has taken
    std::deque<Call*> waiting_;  // calls whose threads wait, and were not woken
    int idle_, busy_ = 0;        // cores
};
