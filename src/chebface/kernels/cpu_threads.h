// Scratch memory of a thread, threads that sleep between jobs, and how a batch is divided among them.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#ifdef __linux__
#include <sched.h>
#endif
#include <system_error>
#include <thread>
#include <unistd.h>
#include <vector>

namespace {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Scratch {  // of one thread: buffers that are kept, each under a number
    struct Buffer {
        float* data = nullptr;
        int64_t size = 0;
    };
    std::vector<Buffer> buffers;
    float* get(size_t number, int64_t floats) {
        if (buffers.size() <= number) buffers.resize(number + 1);
        Buffer& buffer = buffers[number];
        if (buffer.size < floats) {
            std::free(buffer.data);
            buffer = {};
            buffer.data = static_cast<float*>(std::aligned_alloc(64, round_up(floats, 16) * sizeof(float)));
            if (!buffer.data) throw std::bad_alloc();
            buffer.size = floats;
        }
        return buffer.data;
    }
    void trim() {  // what one large call needed is not held for ever
        for (Buffer& buffer : buffers)
            if (buffer.size > int64_t(4) << 20) std::free(buffer.data), buffer = {};
    }
    ~Scratch() {
        for (Buffer& buffer : buffers) std::free(buffer.data);
    }
};
thread_local Scratch scratch;

struct Job {
    void (*call)(void* body, int64_t item);
    void* body;
    int64_t items;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};

    void work() {
        for (int64_t item; (item = next.fetch_add(1)) < items;) {
            try {
                call(body, item);
            } catch (const std::bad_alloc&) {
                failed = true;
            }
        }
        scratch.trim();
    }
};

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Looks a while before it sleeps: waking takes longer than a small job. Not long: a neighbour may want the core.
template <class Ready> bool look_for(const Ready& ready) {
    for (int i = 0; i < 3000; ++i, relax())
        if (ready()) return true;
    return false;
}

// For what others are about to finish.
template <class Ready> void wait_for(const Ready& ready) {
    while (!look_for(ready)) std::this_thread::yield();
}

class Pool {  // threads that sleep between jobs; one job at a time, others run where they were called
  public:
    static Pool& get() {
        static std::mutex guard;
        static Pool* pool = nullptr;
        const std::lock_guard<std::mutex> lock(guard);
        if (!pool || pool->process_ != getpid()) pool = new Pool;  // threads do not survive a fork; never destroyed
        return *pool;
    }
    void run(Job& job, int64_t threads) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (turn.owns_lock()) {
            {
                const std::lock_guard<std::mutex> lock(mutex_);
                try {
                    for (; started_ + 1 < threads; ++started_) std::thread([this] { serve(); }).detach();
                } catch (const std::system_error&) {  // the system gives no more: those that are there do it
                }
                job_ = &job;
                seats_ = threads - 1;
            }
            for (int64_t i = 1; i < threads; ++i) wake_.notify_one();
        }
        job.work();
        if (turn.owns_lock()) {
            {
                const std::lock_guard<std::mutex> lock(mutex_);
                job_ = nullptr;  // who wakes only now finds nothing and is not waited for
                seats_ = 0;
            }
            look_for([this] { return busy_ == 0; });
            std::unique_lock<std::mutex> lock(mutex_);
            done_.wait(lock, [this] { return busy_ == 0; });
        }
    }

  private:
    void serve() {
#ifdef __linux__
        cpu_set_t all;  // who made this thread may be held on a core: the process's first thread is not
        if (!sched_getaffinity(getpid(), sizeof all, &all)) sched_setaffinity(0, sizeof all, &all);
#endif
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            lock.unlock();
            look_for([this] { return seats_ > 0; });
            lock.lock();
            wake_.wait(lock, [this] { return seats_ > 0; });
            Job* job = job_;
            --seats_;
            ++busy_;
            lock.unlock();
            job->work();
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }
    const pid_t process_ = getpid();
    std::mutex turn_, mutex_;
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    int64_t started_ = 0;
    std::atomic<int64_t> seats_{0}, busy_{0};  // changed under the mutex; looked at without
};

// Runs body(item) for every item; false when memory ran out.
template <class Body> bool run(int64_t items, int64_t threads, Body body) {
    Job job;
    job.call = [](void* f, int64_t item) { (*static_cast<Body*>(f))(item); };
    job.body = &body;
    job.items = items;
    threads = std::min(threads, items);
    if (threads > 1)
        Pool::get().run(job, threads);
    else
        job.work();
    return !job.failed;
}

struct Split {  // a batch in parts that share rows, as even as can be, as many for each thread as for the next
    int64_t batch, parts;
    Split(int64_t b, int64_t per_row, int64_t threads) : batch(b), parts((b + per_row - 1) / per_row) {
        parts = std::min(batch, round_up(parts, std::max<int64_t>(1, threads)));
    }
    int64_t first(int64_t part) const { return batch * part / parts; }
    int64_t count(int64_t part) const { return first(part + 1) - first(part); }
};

}  // namespace
