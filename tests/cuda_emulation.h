// Just enough of CUDA to compile a .cu file for the CPU, unmodified; cuda_emulation.cpp includes it and runs it.
// Each CUDA thread is a thread of its own: of the system (EMULATE_WITH_THREADS, what a race check needs), else one that
// gives way only at barriers, which is quick on a busy machine.
#pragma once
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#define CHEB_EMULATED
#define __device__
#define __global__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define BLOCK_MEMORY(name) float4* name = (float4*)me->memory

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct Index { int x, y; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned bits) { float value; std::memcpy(&value, &bits, 4); return value; }
inline unsigned __float_as_uint(float value) { unsigned bits; std::memcpy(&bits, &value, 4); return bits; }

#ifdef EMULATE_WITH_THREADS
// Two phases in turn, each with its own lock: who wakes from one barrier must not, by the lock, come after those who
// already stand at the next, or the race check would take that for order. `turn` counts a thread's own passes.
class Barrier {
public:
    explicit Barrier(int count) : count(count) {}
    void wait(long& turn) {
        Phase& phase = phases[turn++ & 1];
        std::unique_lock<std::mutex> lock(phase.mutex);
        const long passed = phase.passed;
        if (++phase.arrived == count) {
            phase.arrived = 0;
            phase.passed++;
            phase.changed.notify_all();
        } else {
            phase.changed.wait(lock, [&] { return phase.passed != passed; });
        }
    }

private:
    struct Phase {
        std::mutex mutex;
        std::condition_variable changed;
        int arrived = 0;
        long passed = 0;
    } phases[2];
    int count;
};
#else
void give_way();
class Barrier {
public:
    explicit Barrier(int count) : count(count) {}
    void wait(long&) {
        const long now = passed;
        if (++arrived == count) {
            arrived = 0;
            passed++;
        }
        while (passed == now) give_way();
    }

private:
    int count, arrived = 0;
    long passed = 0;
};
#endif

struct Warp {
    Barrier barrier{32};
    float values[32];
};
struct Cluster;
struct Block {
    Block(int threads, size_t bytes, int rank, Cluster* cluster);
    Barrier barrier;
    std::vector<std::unique_ptr<Warp>> warps;
    int rank;
    Cluster* cluster;
    char* memory;
    std::vector<float4> storage;
};
struct Cluster {
    Cluster(int threads) : barrier(threads) {}
    Barrier barrier;
    std::vector<std::unique_ptr<Block>> blocks;
};

extern thread_local Block* me;
extern thread_local Index threadIdx, blockIdx, gridDim;
extern thread_local long block_turn, cluster_turn, warp_turn;
// A barrier on this line of the source does nothing: what a race check must notice.
extern int skipped_line;
inline void sync_block(int line) {
    if (line != skipped_line) me->barrier.wait(block_turn);
}
inline void sync_cluster(int line) {
    if (line != skipped_line) me->cluster->barrier.wait(cluster_turn);
}
#define __syncthreads() sync_block(__LINE__)
#define cluster_sync() sync_cluster(__LINE__)
inline int cluster_rank() { return me->rank; }
template <class V> V* remote(V* local, int rank) {
    return (V*)(me->cluster->blocks[rank]->memory + ((char*)local - me->memory));
}
inline void forget(unsigned&) {}
inline float __shfl_down_sync(unsigned, float value, int step) {
    Warp& warp = *me->warps[threadIdx.x / 32];
    const int lane = threadIdx.x % 32;
    warp.values[lane] = value;
    warp.barrier.wait(warp_turn);
    const float result = lane + step < 32 ? warp.values[lane + step] : value;
    warp.barrier.wait(warp_turn);
    return result;
}
