// Runs for many callers: as many at once as there are cores, what waits meanwhile merged, first come, first served.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <mutex>
#include <sched.h>
#include <thread>
#include <unistd.h>
#include <vector>

// The cores that this process may use now: its first thread's, whom nobody here holds on one. Empty: cannot be told.
inline cpu_set_t find_cores() {
    cpu_set_t found;
    if (sched_getaffinity(getpid(), sizeof found, &found)) CPU_ZERO(&found);
    return found;
}

// Keeps the calling thread on one core for its own life. Left to itself, Linux lets two runs share a core while another
// idles, for as long as a run takes: threads that carry answers wake there, and move them about.
class Held {
  public:
    explicit Held(int core) : core_(core) {  // -1: anywhere
        if (core_ < 0) return;
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(core_, &one);
        sched_setaffinity(0, sizeof one, &one);  // where that is refused, the run is slower, no worse
    }
    ~Held() {
        if (core_ < 0) return;
        const cpu_set_t all = find_cores();
        sched_setaffinity(0, sizeof all, &all);
    }
    Held(const Held&) = delete;

  private:
    const int core_;
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

    // Told which core has no run of ours; -1: none of them, or the run takes several. Throws nothing.
    using Run = void (*)(const std::vector<Part>& parts, int core);

    // merged: the largest size of a run of several items. most: cores that runs may take; 0: all.
    Desk(int64_t merged, int most, Run run) : run_(run), merged_(merged), most_(most) { look(); }

    // Returns when every item was in a run, of this thread or of another.
    void serve(Call& call) noexcept {
        if (call.sizes.empty()) return;
        Lock lock(mutex_);
        look();
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
        leave(lock);
        lock.unlock();
        for (std::thread& helper : helpers) helper.join();
    }

  private:
    using Lock = std::unique_lock<std::mutex>;

    void look() {  // again and again: they may be changed under a running process
        all_ = find_cores();
        const int found = CPU_COUNT(&all_), count = found ? found : std::max(1, int(std::thread::hardware_concurrency()));
        count_ = most_ > 0 ? std::min(most_, count) : count;
    }

    int width(const Call& call) const { return std::clamp(call.cores, 1, count_); }

    bool may_run() const { return !line_.empty() && (!busy_ || busy_ + width(*line_.front()) <= count_); }

    // Threads for cores that the caller's own run, and those who wait here anyway, would leave idle.
    std::vector<std::thread> find_help(Call& call) {
        std::vector<std::thread> helpers;
        const size_t runs = std::min(call.sizes.size(), size_t(std::max(0, count_ - busy_) / width(call)));
        try {
            while (1 + waiting_.size() + helpers.size() < runs)
                helpers.emplace_back([this, &call]() noexcept {
                    Lock lock(mutex_);
                    while (call.taken < call.sizes.size() && may_run()) work(lock);
                    leave(lock);
                });
        } catch (const std::exception&) {  // no thread to be had
        }
        return helpers;
    }

    void leave(Lock& lock) {  // no core may idle while something is in the line
        while (may_run() && waiting_.empty()) work(lock);
        pass_on();
    }

    void pass_on() {  // who waits can go on
        if (!may_run() || waiting_.empty()) return;
        waiting_.front()->changed.notify_one();
        waiting_.pop_front();
    }

    void work(Lock& lock) noexcept {
        const int cores = width(*line_.front());
        const std::vector<Part> parts = take(cores);
        const int core = cores == 1 ? choose() : -1;  // a thread that a run makes would be held there, too
        busy_ += cores;
        if (core >= 0) CPU_SET(core, &taken_);
        pass_on();
        lock.unlock();
        run_(parts, core);
        lock.lock();
        busy_ -= cores;
        if (core >= 0) CPU_CLR(core, &taken_);
        for (const Part& part : parts) {
            part.call->done += part.last - part.first;
            if (part.call->done == part.call->sizes.size()) part.call->changed.notify_one();
        }
    }

    // The next run: the first in the line, and what else fits of its kind. Idle cores get the same share of it each.
    std::vector<Part> take(int cores) {
        const void* kind = line_.front()->kind;
        int64_t waiting = 0;
        for (const Call* call : line_)
            for (size_t k = call->taken; call->kind == kind && k < call->sizes.size(); ++k) waiting += call->sizes[k];
        const int64_t runs = std::max(1, (count_ - busy_) / cores), most = std::min(merged_, (waiting + runs - 1) / runs);
        std::vector<Part> parts;
        int64_t size = 0;
        for (Call* call : line_) {
            if (call->kind != kind) continue;
            const size_t first = call->taken;
            while (call->taken < call->sizes.size() && (!size || size + call->sizes[call->taken] <= most))
                size += call->sizes[call->taken++];
            if (call->taken > first) parts.push_back({call, first, call->taken});
            if (call->taken < call->sizes.size()) break;
        }
        const auto is_over = [](const Call* call) { return call->taken == call->sizes.size(); };
        line_.erase(std::remove_if(line_.begin(), line_.end(), is_over), line_.end());
        std::stable_partition(line_.begin(), line_.end(), [&](const Call* call) { return call->kind != kind; });  // in turn
        return parts;
    }

    int choose() const {  // where the thread is, if it can be: the kernel knows what else is at work
        const auto is_free = [&](int core) { return CPU_ISSET(core, &all_) && !CPU_ISSET(core, &taken_); };
        if (const int here = sched_getcpu(); here >= 0 && is_free(here)) return here;
        for (int core = 0; core < CPU_SETSIZE; ++core)
            if (is_free(core)) return core;
        return -1;
    }

    const Run run_;
    const int64_t merged_;
    const int most_;
    std::mutex mutex_;
    std::deque<Call*> line_;     // calls with items that no run has taken
    std::deque<Call*> waiting_;  // calls whose threads wait, and were not woken
    cpu_set_t all_{}, taken_{};
    int count_ = 1, busy_ = 0;  // cores
};
