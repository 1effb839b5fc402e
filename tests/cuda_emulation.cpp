// Runs the kernels of a .cu file on the CPU. Shared memory starts as NaN, so that what nobody wrote shows.
#include "cuda_emulation.h"

#include <cstddef>
#include <functional>
#ifdef EMULATE_WITH_THREADS
#include <thread>
#else
#include <ucontext.h>
#endif

int skipped_line = 0;
thread_local Block* me;
thread_local Index threadIdx, blockIdx, gridDim;
thread_local long block_turn, cluster_turn, warp_turn;

Block::Block(int threads, size_t bytes, int rank, Cluster* cluster)
    : barrier(threads), rank(rank), cluster(cluster), storage(bytes / 16 + 1) {
    for (int w = 0; w < threads / 32; w++) warps.push_back(std::make_unique<Warp>());
    memory = (char*)storage.data();
    std::memset(memory, 0xff, bytes);
}

#ifdef EMULATE_WITH_THREADS
static void run_all(int count, const std::function<void(int)>& body) {
    std::vector<std::thread> all;
    for (int i = 0; i < count; i++) all.emplace_back(body, i);
    for (std::thread& thread : all) thread.join();
}
#else
constexpr size_t STACK = 128 << 10;
static ucontext_t scheduler;
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    Block* block;
    Index thread, at;
    bool done;
};
static std::vector<Fiber> fibers;
static int running;
static const std::function<void(int)>* to_run;

void give_way() {
    const int own = running;
    fibers[own].block = me, fibers[own].thread = threadIdx, fibers[own].at = blockIdx;
    swapcontext(&fibers[own].context, &scheduler);
    me = fibers[own].block, threadIdx = fibers[own].thread, blockIdx = fibers[own].at;
}

static void start() {
    const int own = running;
    (*to_run)(own);
    fibers[own].done = true;
}

static void run_all(int count, const std::function<void(int)>& body) {
    if ((int)fibers.size() < count) fibers = std::vector<Fiber>(count);
    to_run = &body;
    for (int i = 0; i < count; i++) {
        Fiber& fiber = fibers[i];
        fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, start, 0);
    }
    for (int left = count, round = 0; left; round++)  // forth and back: no order is to be relied on
        for (int i = 0; i < count; i++) {
            running = round & 1 ? count - 1 - i : i;
            if (fibers[running].done) continue;
            swapcontext(&scheduler, &fibers[running].context);
            left -= fibers[running].done;
        }
}
#endif

#include CUDA_SOURCE

extern "C" void launch(int which, int columns, int rows, const Call* call) {
    void (*const kernel)(Call) = which == 0 ? encode : which == 1 ? backward : which == 2 ? weight_gradient : tell;
    const int bytes = which == 0 ? FORWARD_MEMORY : which == 1 ? BACKWARD_MEMORY : which == 2 ? GRADIENT_MEMORY : 0;
    const int threads = which < 2 ? T : which == 2 ? GRADIENT_THREADS : 1, size = which < 2 ? BLOCKS : 1;
    for (int y = 0; y < rows; y++)
        for (int first = 0; first < columns; first += size) {
            Cluster cluster(threads * size);
            for (int rank = 0; rank < size; rank++)
                cluster.blocks.push_back(std::make_unique<Block>(threads, bytes, rank, &cluster));
            run_all(threads * size, [&](int i) {
                me = cluster.blocks[i / threads].get();
                threadIdx = {i % threads, 0};
                blockIdx = {first + i / threads, y};
                gridDim = {columns, rows};
                kernel(*call);
            });
        }
}

#ifdef EMULATE_WITH_THREADS
#include <cstdio>
#include <cstdlib>

// emulation                    prints the figures
// emulation FILE CHUNKS LINE   runs all kernels without the barrier on a line (0: with all); FILE holds the number of
//                              buffers, their sizes and contents, then a Call with numbers of buffers as pointers
int main(int count, char** words) {
    if (count < 4) {
        int figures[6];
        Call call{};
        call.partial = (float*)figures;
        launch(3, 1, 1, &call);
        for (int figure : figures) std::printf("%d ", figure);
        return 0;
    }
    FILE* file = std::fopen(words[1], "rb");
    int64_t buffers = 0;
    if (!file || std::fread(&buffers, 8, 1, file) != 1) return 2;
    std::vector<int64_t> sizes(buffers);
    std::vector<std::vector<float4>> contents;
    if (std::fread(sizes.data(), 8, buffers, file) != (size_t)buffers) return 2;
    for (int64_t size : sizes) {
        contents.emplace_back(size / 16 + 1);
        if (std::fread(contents.back().data(), 1, size, file) != (size_t)size) return 2;
    }
    Call call;
    if (std::fread((void*)&call, 1, sizeof call, file) != sizeof call) return 2;
    uint64_t* pointers = (uint64_t*)&call;
    for (size_t i = 0; i < offsetof(Call, kind) / 8; i++)
        pointers[i] = pointers[i] ? (uint64_t)contents[pointers[i] - 1].data() : 0;
    skipped_line = std::atoi(words[3]);
    launch(0, call.batch * BLOCKS, 1, &call);
    launch(1, call.batch * BLOCKS, 1, &call);
    launch(2, std::atoi(words[2]), 5, &call);
    std::fwrite(call.code, 4, call.batch * LATENT, stdout);
    return 0;
}
#endif
