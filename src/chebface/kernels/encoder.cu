// The spectral mesh encoder on a GPU: one launch forward, three backward, no host step in between, no atomics, the same
// bits every time. Compiled at first use for the sizes of one hierarchy (gpu.py gives N0.. and P0.. as macros).
//
// How the work is laid out. A mesh goes through a cluster of BLOCKS = 4 thread blocks (small batches: four SMs a mesh)
// or through one block that takes the four parts in turn (large batches, and chips without clusters). A part is one
// coordinate at the first level and 4 of 16 channels at the others: hops never mix channels, so blocks meet only where
// a level ends, by stores into each other's shared memory and one cluster barrier.
//
// A hop works on S_k = D^-1/2 T_k:  S_{k+1} = -2/deg * (sum over neighbours of S_k) - S_{k-1}. What it costs is the
// gathers from shared memory, so a thread owns PAIRS of adjacent vertices: S_k and S_{k-1} of both and the addresses of
// their neighbours stay in its registers through all hops of a level, a partner costs nothing, and a common neighbour
// is read once for two: 4 reads a vertex instead of 6 neighbours + 2 of its own. Two buffers, one barrier a hop. The
// last hop and the dense product run at kept vertices only.
//
// Places ("slots"): pair p holds slots p and P + p of its level; slot 2P holds zero, which padded addresses point at.
// The rows a level keeps are in the slot order of the next level; a place without a vertex makes a row that is zero.
//
// Backward: with U_k the gradient at S_k (zero but at kept vertices), b_k = U_k/deg - 2/deg * (neighbour sum of
// b_{k+1}) - b_{k+2} is the same hop, and sqrt(deg) * b_0 is the gradient at the level's input. Weight gradients are
// products over vertices and meshes of what forward saved with what backward found: `weight_gradient`.

#ifndef CHEB_EMULATED  // tests compile this file for the CPU and bring their own
#define BLOCK_MEMORY(name) extern __shared__ float4 name[]
__device__ __forceinline__ int cluster_rank() {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return (int)rank;
}
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}
template <class V> __device__ __forceinline__ V* remote(V* local, int rank) {
    unsigned long long there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"((unsigned long long)local), "r"(rank));
    return (V*)there;
}
// What is packed stays packed: without it the compiler keeps every unpacked address across hops, and spills.
__device__ __forceinline__ void forget(unsigned& word) { asm volatile("" : "+r"(word)); }
#endif

#define HERE_AND_THERE __host__ __device__

typedef unsigned short ushort_t;
constexpr int T = CHEB_THREADS, BLOCKS = CHEB_BLOCKS, K = 6, LATENT = 8, GRADIENT_THREADS = CHEB_GRADIENT_THREADS;
constexpr int TILE = 16;  // rows that weight_gradient holds at a time
constexpr int N0 = CHEB_N0, LAST = CHEB_N4;

struct Near {  // byte offsets of 12 neighbours, in the order that spares memory banks
    uint4 a;
    uint2 b;
    unsigned shape;  // bit e: e is a neighbour of the first; bit 12 + e: of the second; entries used << 24; more << 28
    unsigned tail;   // where more are in `tails` << 8 | how many
};
struct Pair {
    Near near;
    float2 inverse;       // 1 / degree of both, 0 where there is no vertex
    unsigned rows, spare;  // kept row of the first | of the second << 16, 0xffff for none
};
struct Kept {
    Near near;
    unsigned at;                // byte offset of the vertex
    float inverse, root, next;  // 1 / degree, sqrt(degree), 1 / sqrt(degree) at the next level; 0 where no vertex
};
struct Level {
    const Pair* pairs;
    const Kept* kept;
    const unsigned* tails;  // byte offset | 1 << 16 for the first | 2 << 16 for the second
    const float *weight, *bias;
};
struct Call {
    Level level[4];
    const ushort_t* slot;   // slot of each vertex, then the slots that hold none
    const float2* scale;    // 1 / sqrt(degree), sqrt(degree)
    const float *full_weight, *full_bias;
    const void* x;          // (B, N0, 3)
    float* code;            // (B, LATENT)
    float* saved;           // (B, SAVED) or null
    const float* grad_code;
    float* grads;           // (B, GRADS)
    float* grad_x;          // (B, N0, 3) or null
    float* partial;         // (chunks, WEIGHTS)
    int kind, batch;        // kind: 0 float32, 1 float16, 2 bfloat16
};

template <int L> struct Size;
template <> struct Size<0> { static constexpr int P = CHEB_P0, C = 1, PARTS = 3, OUT = 16, ROWS = 2 * CHEB_P1; };
template <> struct Size<1> { static constexpr int P = CHEB_P1, C = 4, PARTS = 4, OUT = 16, ROWS = 2 * CHEB_P2; };
template <> struct Size<2> { static constexpr int P = CHEB_P2, C = 4, PARTS = 4, OUT = 16, ROWS = 2 * CHEB_P3; };
template <> struct Size<3> { static constexpr int P = CHEB_P3, C = 4, PARTS = 4, OUT = 32, ROWS = LAST; };
template <int C> struct Value { typedef float4 type; };
template <> struct Value<1> { typedef float type; };

HERE_AND_THERE constexpr int larger(int a, int b) { return a > b ? a : b; }
HERE_AND_THERE constexpr int rounds(int items) { return (items + T - 1) / T; }
HERE_AND_THERE constexpr int quads(int floats) { return (floats + 3) / 4; }  // in float4

template <int L> HERE_AND_THERE constexpr int basis_floats() { return K * Size<L>::PARTS * Size<L>::C * Size<L>::ROWS; }
template <int L> HERE_AND_THERE constexpr int output_floats() { return Size<L>::OUT * Size<L>::ROWS; }
template <int L> HERE_AND_THERE constexpr int saved_at() {
    return saved_at<L - 1>() + basis_floats<L - 1>() + output_floats<L - 1>();
}
template <> HERE_AND_THERE constexpr int saved_at<0>() { return 0; }
template <int L> HERE_AND_THERE constexpr int grads_at() { return grads_at<L - 1>() + output_floats<L - 1>(); }
template <> HERE_AND_THERE constexpr int grads_at<0>() { return 0; }
template <int L> HERE_AND_THERE constexpr int weight_floats() {  // and the bias behind it
    return (K * Size<L>::PARTS * Size<L>::C + 1) * Size<L>::OUT;
}
template <int L> HERE_AND_THERE constexpr int weights_at() { return weights_at<L - 1>() + weight_floats<L - 1>(); }
template <> HERE_AND_THERE constexpr int weights_at<0>() { return 0; }
constexpr int SAVED = saved_at<3>() + basis_floats<3>() + output_floats<3>();
constexpr int GRADS = grads_at<3>() + output_floats<3>();
constexpr int FULL_AT = weights_at<3>() + weight_floats<3>();
constexpr int WEIGHTS = FULL_AT + (LAST * 32 + 1) * LATENT;

// Shared memory, in float4. Forward: regions that levels of even and odd number use in turn, a second buffer, weights.
constexpr int SLOTS0 = 2 * CHEB_P0 + 1, SLOTS1 = 2 * CHEB_P1 + 1, SLOTS2 = 2 * CHEB_P2 + 1, SLOTS3 = 2 * CHEB_P3 + 1;
constexpr int BUFFER = larger(larger(quads(SLOTS0), SLOTS1), larger(SLOTS2, SLOTS3));
constexpr int EVEN = larger(quads(SLOTS0), larger(4 * SLOTS2, 4 * LAST * 8));
constexpr int ODD = 4 * larger(SLOTS1, SLOTS3);
constexpr int SLICE = K * 4 * 32 / 4;
constexpr int FORWARD_MEMORY = 16 * (EVEN + ODD + BUFFER + SLICE);
constexpr int HELD_EVEN = larger(output_floats<0>(), output_floats<2>()) / 4;
constexpr int HELD_ODD = larger(output_floats<1>(), output_floats<3>()) / 4;
constexpr int SOURCES = larger(larger(quads(K * Size<0>::ROWS), K * Size<1>::ROWS), K * larger(Size<2>::ROWS, LAST));
constexpr int BACKWARD_MEMORY = 16 * (HELD_EVEN + HELD_ODD + 2 * BUFFER + SOURCES + SLICE);
constexpr int GRADIENT_MEMORY = 4 * TILE * (LAST * 32 + 1 + LATENT);

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ __forceinline__ float4 operator-(float4 a, float4 b) {
    return make_float4(a.x - b.x, a.y - b.y, a.z - b.z, a.w - b.w);
}
__device__ __forceinline__ float4 operator*(float s, float4 a) {
    return make_float4(s * a.x, s * a.y, s * a.z, s * a.w);
}
__device__ __forceinline__ float dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }
__device__ __forceinline__ float4 relu(float4 a) {  // what is no number stays so
    return make_float4(a.x < 0 ? 0 : a.x, a.y < 0 ? 0 : a.y, a.z < 0 ? 0 : a.z, a.w < 0 ? 0 : a.w);
}
__device__ __forceinline__ float4 where_positive(float4 y, float4 a) {
    return make_float4(y.x > 0 ? a.x : 0, y.y > 0 ? a.y : 0, y.z > 0 ? a.z : 0, y.w > 0 ? a.w : 0);
}
__device__ __forceinline__ void clear(float& a) { a = 0; }
__device__ __forceinline__ void clear(float4& a) { a = make_float4(0, 0, 0, 0); }
template <class V> __device__ __forceinline__ V at(const V* buffer, unsigned offset) {
    return *(const V*)((const char*)buffer + offset);
}

// float16 by its bits: shifted into a float the exponent is 112 too small, and multiplying also makes subnormals right.
__device__ __forceinline__ float read(const void* x, int kind, long long i) {
    if (kind == 0) return ((const float*)x)[i];
    unsigned bits = ((const ushort_t*)x)[i];
    if (kind == 2) return __uint_as_float(bits << 16);
    unsigned size = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
    float value = __uint_as_float(size) * 5.192296858534828e33f;
    if (size >= 0x0f800000) value = __uint_as_float(size + 0x70000000);  // infinity, or no number
    return __uint_as_float(__float_as_uint(value) | sign);
}

__device__ __forceinline__ unsigned entry(const Near& near, int e) {
    const uint4& a = near.a;
    unsigned two = e < 2 ? a.x : e < 4 ? a.y : e < 6 ? a.z : e < 8 ? a.w : e < 10 ? near.b.x : near.b.y;
    return e & 1 ? two >> 16 : two & 0xffff;
}

template <class V>
__device__ __forceinline__ void add(V& first, V& second, V value, bool to_first, bool to_second) {
    if (to_first) first = first + value;
    if (to_second) second = second + value;
}

// Neighbour sums of a pair, without the partners themselves.
template <class V>
__device__ __forceinline__ void gather(const V* in, const Near& near, const unsigned& tail, const unsigned* tails,
                                       V& first, V& second) {
    const unsigned shape = near.shape, used = shape >> 24 & 15;
    clear(first), clear(second);
#pragma unroll
    for (int e = 0; e < 8; e++) add(first, second, at(in, entry(near, e)), shape >> e & 1, shape >> (12 + e) & 1);
#pragma unroll
    for (int e = 8; e < 12; e += 2)
        if (used > e) {
            V one = at(in, entry(near, e)), two = at(in, entry(near, e + 1));
            add(first, second, one, shape >> e & 1, shape >> (12 + e) & 1);
            add(first, second, two, shape >> (e + 1) & 1, shape >> (13 + e) & 1);
        }
    if (shape >> 28) {
        const unsigned start = tail >> 8, count = tail & 255;
        for (unsigned t = start; t < start + count; t++)
            add(first, second, at(in, tails[t] & 0xffff), tails[t] >> 16 & 1, tails[t] >> 17);
    }
}

// What a thread owns of a level: R pairs.
template <class V, int R> struct Owned {
    Near near[R];
    float2 inverse[R];
    unsigned rows[R];
    V now[R][2], before[R][2];
};

template <int P, class V, int R> __device__ __forceinline__ void own(Owned<V, R>& owned, const Pair* pairs) {
#pragma unroll
    for (int j = 0; j < R; j++) {
        int p = threadIdx.x + T * j;
        if (p < P) {
            owned.near[j] = pairs[p].near;
            owned.inverse[j] = pairs[p].inverse;
            owned.rows[j] = pairs[p].rows;
        }
    }
}

// One hop, from `in` (S_k) to `out` (S_{k+1}); factor is 1 for the first, else 2. `sources`, where there are any, are
// added at kept rows: then it is a step of the backward recursion.
template <int P, class V, int R>
__device__ __forceinline__ void hop(Owned<V, R>& owned, const V* in, V* out, float factor, const Pair* pairs,
                                    const unsigned* tails, const V* sources) {
#pragma unroll
    for (int j = 0; j < R; j++) {
        int p = threadIdx.x + T * j;
        if (p < P) {
            V sum[2];
            forget(owned.near[j].a.x), forget(owned.near[j].a.y), forget(owned.near[j].a.z), forget(owned.near[j].a.w);
            forget(owned.near[j].b.x), forget(owned.near[j].b.y), forget(owned.near[j].shape);
            forget(owned.rows[j]);
            gather(in, owned.near[j], pairs[p].near.tail, tails, sum[0], sum[1]);
            sum[0] = factor * (sum[0] + owned.now[j][1]);
            sum[1] = factor * (sum[1] + owned.now[j][0]);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float inverse = i ? owned.inverse[j].y : owned.inverse[j].x;
                unsigned row = owned.rows[j] >> 16 * i & 0xffff;
                if (sources && row != 0xffff) sum[i] = sum[i] - sources[row];
                V next = -inverse * sum[i] - owned.before[j][i];
                owned.before[j][i] = owned.now[j][i];
                owned.now[j][i] = next;
                out[P * i + p] = next;
            }
        }
    }
}

// The part of a level's weights that multiplies channels [part * C, part * C + C), as [k][c][o].
template <int L> __device__ __forceinline__ void fetch_weights(float4* slice, const float* weight, int part) {
    constexpr int C = Size<L>::C, CIN = C * Size<L>::PARTS, OUT4 = Size<L>::OUT / 4;
    for (int i = threadIdx.x; i < K * C * OUT4; i += T) {
        int k = i / (C * OUT4), rest = i % (C * OUT4);
        slice[i] = ((const float4*)weight)[(k * CIN + part * C) * OUT4 + rest];
    }
}

__device__ __forceinline__ void level_done() {
#if CHEB_BLOCKS > 1
    cluster_sync();
#else
    __syncthreads();
#endif
}

struct Memory { float4 *even, *odd, *buffer, *slice; };

// The first level: a thread keeps S_0..S_5 of its kept rows in registers and multiplies at the end.
__device__ __forceinline__ void forward_first(const Call& call, const Memory& memory, int rank, int mesh) {
    typedef Size<0> Z;
    constexpr int P = Z::P, R = rounds(P), ROWS = Z::ROWS, RK = rounds(ROWS);
    const Level& level = call.level[0];
    float *A = (float*)memory.even, *B = (float*)memory.buffer, *saved = call.saved;
    const float4* weights = memory.slice;
    Owned<float, R> owned;
    own<P>(owned, level.pairs);
    unsigned where[RK];
#pragma unroll
    for (int j = 0; j < RK; j++)
        if (threadIdx.x + T * j < ROWS) where[j] = level.kept[threadIdx.x + T * j].at;
    for (int part = rank; part < Z::PARTS; part += BLOCKS) {
        fetch_weights<0>(memory.slice, level.weight, part);
        const long long start = (long long)mesh * N0 * 3;
        for (int i = threadIdx.x; i < SLOTS0; i += T)
            A[call.slot[i]] = i < N0 ? read(call.x, call.kind, start + 3 * i + part) * call.scale[i].x : 0.f;
        if (threadIdx.x == 0) B[2 * P] = 0;
        __syncthreads();
#pragma unroll
        for (int j = 0; j < R; j++) {
            int p = threadIdx.x + T * j;
            if (p < P) {
                owned.now[j][0] = A[p], owned.now[j][1] = A[P + p];
                owned.before[j][0] = owned.before[j][1] = 0;
            }
        }
        float basis[RK][K] = {};
#pragma unroll 1  // unrolled, the code outgrows the instruction cache
        for (int k = 0; k < K - 1; k++) {
            const float* in = k & 1 ? B : A;
#pragma unroll
            for (int j = 0; j < RK; j++)
                if (threadIdx.x + T * j < ROWS) {
                    const float value = at(in, where[j]);
#pragma unroll
                    for (int i = 0; i < K - 1; i++) basis[j][i] = i == k ? value : basis[j][i];
                }
            if (k < K - 2) {
                hop<P>(owned, in, k & 1 ? A : B, k ? 2.f : 1.f, level.pairs, level.tails, (const float*)nullptr);
                __syncthreads();
            }
        }
        const float *in = K & 1 ? B : A, *old = K & 1 ? A : B;  // S_{K-2}, S_{K-3}
#pragma unroll
        for (int j = 0; j < RK; j++) {
            int row = threadIdx.x + T * j;
            if (row >= ROWS) continue;
            const Kept& kept = level.kept[row];
            const float root = kept.root;
            float first, second;
            gather(in, kept.near, kept.near.tail, level.tails, first, second);
            basis[j][K - 1] = -2 * kept.inverse * (first + second) - at(old, where[j]);
            float4 sum[4];
#pragma unroll
            for (int q = 0; q < 4; q++) clear(sum[q]);
#pragma unroll
            for (int k = 0; k < K; k++) {
#pragma unroll
                for (int q = 0; q < 4; q++) sum[q] = sum[q] + basis[j][k] * weights[k * 4 + q];
                if (saved) saved[(long long)mesh * SAVED + (k * 3 + part) * ROWS + row] = root * basis[j][k];
            }
#pragma unroll
            for (int q = 0; q < 4; q++) {
#if CHEB_BLOCKS > 1
                *remote(memory.odd + rank * SLOTS1 + row, q) = sum[q];
#else
                float4* sink = memory.odd + q * SLOTS1 + row;
                *sink = part ? *sink + sum[q] : sum[q];
#endif
            }
        }
        __syncthreads();
    }
}

// A further level: 4 channels a part. A thread sums, as hops go, 4 outputs of its (row, quarter of the outputs) items.
template <int L>
__device__ __forceinline__ void forward_next(const Call& call, const Memory& memory, int rank, int mesh) {
    typedef Size<L> Z;
    constexpr int P = Z::P, R = rounds(P), ROWS = Z::ROWS, RK = rounds(ROWS), SLOTS = 2 * P + 1;
    constexpr int OUT4 = Z::OUT / 4, RI = rounds(ROWS * OUT4), SOURCES_IN = BLOCKS == 1 ? 1 : Size<L - 1>::PARTS;
    const Level &level = call.level[L], &previous = call.level[L - 1];
    float4 *input = L & 1 ? memory.odd : memory.even, *output = L & 1 ? memory.even : memory.odd, *B = memory.buffer;
    const float4* weights = memory.slice;
    float4* saved = call.saved ? (float4*)(call.saved + (long long)mesh * SAVED) : nullptr;
    Owned<float4, R> owned;
    own<P>(owned, level.pairs);
    unsigned where[RI];
    float4 sum[RI];
#pragma unroll
    for (int j = 0; j < RI; j++) {
        int item = threadIdx.x + T * j;
        if (item < ROWS * OUT4) where[j] = level.kept[item / OUT4].at;
        clear(sum[j]);
    }
    float root[R][2], next[R][2];
#pragma unroll
    for (int j = 0; j < R; j++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (threadIdx.x + T * j < P) {
                const Kept& kept = previous.kept[P * i + threadIdx.x + T * j];
                root[j][i] = kept.root, next[j][i] = kept.next;
            }
    level_done();  // while the tables are on their way
    for (int part = rank; part < Z::PARTS; part += BLOCKS) {
        float4* A = BLOCKS == 1 ? input + part * SLOTS : input;
        fetch_weights<L>(memory.slice, level.weight, part);
        const float4 bias = ((const float4*)previous.bias)[part];
#pragma unroll
        for (int j = 0; j < R; j++) {
            int p = threadIdx.x + T * j;
            if (p < P) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int row = P * i + p;
                    float4 total = A[row];
#pragma unroll
                    for (int s = 1; s < SOURCES_IN; s++) total = total + A[s * SLOTS + row];
                    float4 y = relu(root[j][i] * total + bias);
                    if (saved) saved[(saved_at<L - 1>() + basis_floats<L - 1>()) / 4 + part * 2 * P + row] = y;
                    A[row] = owned.now[j][i] = next[j][i] * y;
                    clear(owned.before[j][i]);
                }
            }
        }
        if (threadIdx.x == 0) clear(A[2 * P]), clear(B[2 * P]);
        __syncthreads();
#pragma unroll 1
        for (int k = 0; k < K; k++) {
            const float4* in = k & 1 ? B : A;
#pragma unroll
            for (int j = 0; j < RI; j++) {
                int item = threadIdx.x + T * j, row = item / OUT4, q = item % OUT4;
                if (item < ROWS * OUT4) {
                    float4 value = at(in, where[j]);
                    const float4* w = weights + k * 4 * OUT4 + q;
                    sum[j] = sum[j] + value.x * w[0] + value.y * w[OUT4];
                    sum[j] = sum[j] + value.z * w[2 * OUT4] + value.w * w[3 * OUT4];
                    if (saved && q == 0)
                        saved[saved_at<L>() / 4 + (k * 4 + part) * ROWS + row] = level.kept[row].root * value;
                }
            }
            if (k < K - 2) {
                hop<P>(owned, in, k & 1 ? A : B, k ? 2.f : 1.f, level.pairs, level.tails, (const float4*)nullptr);
            } else if (k == K - 2) {  // the last hop, at kept rows, in place of S_{K-3}
                float4* old = k & 1 ? A : B;
#pragma unroll
                for (int j = 0; j < RK; j++) {
                    int row = threadIdx.x + T * j;
                    if (row < ROWS) {
                        const Kept& kept = level.kept[row];
                        float4 first, second, *place = (float4*)((char*)old + kept.at);
                        gather(in, kept.near, kept.near.tail, level.tails, first, second);
                        if (kept.root > 0) *place = -2 * kept.inverse * (first + second) - *place;
                    }
                }
            }
            __syncthreads();
        }
    }
#pragma unroll
    for (int j = 0; j < RI; j++) {
        int item = threadIdx.x + T * j, row = item / OUT4, q = item % OUT4;
        if (item >= ROWS * OUT4) continue;
#if CHEB_BLOCKS > 1
        if (L < 3)
            *remote(output + rank * (ROWS + 1) + row, q) = sum[j];
        else
            *remote(output + (rank * ROWS + row) * OUT4 + q, 0) = sum[j];
#else
        output[L < 3 ? q * (ROWS + 1) + row : row * OUT4 + q] = sum[j];
#endif
    }
}

extern "C" __global__ void
#if CHEB_BLOCKS > 1
__cluster_dims__(CHEB_BLOCKS, 1, 1)
#endif
__launch_bounds__(T, 1) encode(const Call call) {
    BLOCK_MEMORY(block);
    const Memory memory = {block, block + EVEN, block + EVEN + ODD, block + EVEN + ODD + BUFFER};
    const int mesh = blockIdx.x / BLOCKS;
#if CHEB_BLOCKS > 1
    const int rank = cluster_rank();
    cluster_sync();  // nobody writes into a block that has not started
#else
    const int rank = 0;
#endif
    forward_first(call, memory, rank, mesh);
    forward_next<1>(call, memory, rank, mesh);
    forward_next<2>(call, memory, rank, mesh);
    forward_next<3>(call, memory, rank, mesh);
    level_done();
    if (rank) return;
    // The code: a full product over LAST x 32 values.
    constexpr int ITEMS = LAST * 8, Y_AT = saved_at<3>() + basis_floats<3>();
    float4* y = memory.even;
    for (int i = threadIdx.x; i < ITEMS; i += T) {
        float4 total = y[i];
        for (int s = 1; s < (BLOCKS == 1 ? 1 : 4); s++) total = total + y[s * ITEMS + i];
        const int row = i / 8, q = i % 8;
        total = relu(call.level[3].kept[row].root * total + ((const float4*)call.level[3].bias)[q]);
        y[i] = total;
        if (call.saved)
            ((float4*)(call.saved + (long long)mesh * SAVED + Y_AT))[q * LAST + row] = total;
    }
    __syncthreads();
    const int lane = threadIdx.x % 32;
    for (int j = threadIdx.x / 32; j < LATENT; j += T / 32) {
        float sum = 0;
        for (int i = lane; i < ITEMS; i += 32) sum += dot(y[i], ((const float4*)call.full_weight)[j * ITEMS + i]);
        for (int step = 16; step; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
        if (lane == 0) call.code[(long long)mesh * LATENT + j] = sum + call.full_bias[j];
    }
}

struct Held { float4 *here, *there, *A, *B, *sources, *slice; };  // here: this level's output gradients, [quad][row]

// From the gradient of a level's rows (times sqrt(degree), in every block) to that of its input, part by part.
template <int L>
__device__ __forceinline__ void backward_level(const Call& call, const Held& held, int rank, int mesh) {
    typedef Size<L> Z;
    typedef typename Value<Z::C>::type V;
    constexpr int P = Z::P, R = rounds(P), ROWS = Z::ROWS, C = Z::C, OUT4 = Z::OUT / 4;
    const Level& level = call.level[L];
    V *A = (V*)held.A, *B = (V*)held.B, *sources = (V*)held.sources;
    const float4* weights = held.slice;
    Owned<V, R> owned;
    own<P>(owned, level.pairs);
    level_done();
    for (int part = rank; part < Z::PARTS; part += BLOCKS) {
        fetch_weights<L>(held.slice, level.weight, part);
        if (threadIdx.x == 0) clear(A[2 * P]), clear(B[2 * P]);
        __syncthreads();
#pragma unroll 1
        for (int item = threadIdx.x; item < K * ROWS; item += T) {
            const int k = item / ROWS, row = item % ROWS;
            float value[C];
#pragma unroll
            for (int c = 0; c < C; c++) value[c] = 0;
#pragma unroll
            for (int q = 0; q < OUT4; q++) {
                float4 grad = held.here[q * ROWS + row];
#pragma unroll
                for (int c = 0; c < C; c++) value[c] += dot(grad, weights[(k * C + c) * OUT4 + q]);
            }
#pragma unroll
            for (int c = 0; c < C; c++) ((float*)sources)[item * C + c] = value[c];
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < R; j++) {
            int p = threadIdx.x + T * j;
            if (p < P) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    unsigned row = owned.rows[j] >> 16 * i & 0xffff;
                    clear(owned.now[j][i]), clear(owned.before[j][i]);
                    if (row != 0xffff)
                        owned.now[j][i] = (i ? owned.inverse[j].y : owned.inverse[j].x) * sources[(K - 1) * ROWS + row];
                    (K & 1 ? A : B)[P * i + p] = owned.now[j][i];
                }
            }
        }
        __syncthreads();
#pragma unroll 1
        for (int k = K - 2; k >= 0; k--) {
            hop<P>(owned, k & 1 ? A : B, k & 1 ? B : A, k ? 2.f : 1.f, level.pairs, level.tails,
                   (const V*)(sources + k * ROWS));
            __syncthreads();
        }
        if constexpr (L > 0) {
            constexpr int Y_AT = saved_at<L - 1>() + basis_floats<L - 1>();
            const float4* y = (const float4*)(call.saved + (long long)mesh * SAVED + Y_AT) + part * 2 * P;
            float4* grads = (float4*)(call.grads + (long long)mesh * GRADS + grads_at<L - 1>()) + part * 2 * P;
#pragma unroll
            for (int j = 0; j < R; j++) {
                int p = threadIdx.x + T * j;
                if (p < P) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float inverse = i ? owned.inverse[j].y : owned.inverse[j].x;
                        float root = inverse > 0 ? 1 / sqrtf(inverse) : 0.f;
                        float4 grad = where_positive(y[P * i + p], root * owned.now[j][i]);
                        grads[P * i + p] = grad;
                        grad = call.level[L - 1].kept[P * i + p].root * grad;
                        float4* sink = held.there + part * 2 * P + P * i + p;
#if CHEB_BLOCKS > 1
                        for (int block = 0; block < BLOCKS; block++) *remote(sink, block) = grad;
#else
                        *sink = grad;
#endif
                    }
                }
            }
        } else {  // from shared memory, so that neighbouring threads write neighbouring vertices
            for (int i = threadIdx.x; i < N0; i += T)
                call.grad_x[((long long)mesh * N0 + i) * 3 + part] = A[call.slot[i]] * call.scale[i].y;
        }
    }
}

extern "C" __global__ void
#if CHEB_BLOCKS > 1
__cluster_dims__(CHEB_BLOCKS, 1, 1)
#endif
__launch_bounds__(T, 1) backward(const Call call) {
    BLOCK_MEMORY(block);
    float4 *even = block, *odd = even + HELD_EVEN, *A = odd + HELD_ODD, *B = A + BUFFER, *sources = B + BUFFER;
    float4* slice = sources + SOURCES;
    const int mesh = blockIdx.x / BLOCKS;
#if CHEB_BLOCKS > 1
    const int rank = cluster_rank();
#else
    const int rank = 0;
#endif
    constexpr int Y_AT = saved_at<3>() + basis_floats<3>();
    const float4* y = (const float4*)(call.saved + (long long)mesh * SAVED + Y_AT);
    float4* grads = (float4*)(call.grads + (long long)mesh * GRADS + grads_at<3>());
    for (int i = threadIdx.x; i < LAST * 8; i += T) {  // every block for itself
        const int q = i / LAST, row = i % LAST;
        float4 grad = make_float4(0, 0, 0, 0);
        for (int j = 0; j < LATENT; j++)
            grad = grad + call.grad_code[(long long)mesh * LATENT + j] *
                              ((const float4*)call.full_weight)[(j * LAST + row) * 8 + q];
        grad = where_positive(y[i], grad);
        if (rank == 0) grads[i] = grad;
        odd[i] = call.level[3].kept[row].root * grad;
    }
    backward_level<3>(call, {odd, even, A, B, sources, slice}, rank, mesh);
    backward_level<2>(call, {even, odd, A, B, sources, slice}, rank, mesh);
    backward_level<1>(call, {odd, even, A, B, sources, slice}, rank, mesh);
    if (call.grad_x) backward_level<0>(call, {even, nullptr, A, B, sources, slice}, rank, mesh);
}

// Weight gradients of a level from one chunk of all (mesh, row): sums over rows of input i (and 1, for the bias) times
// output gradient o, in registers; a thread holds 4 outputs of an input. Chunks are added up by the caller.
template <int INPUTS, int OUT, class Read, class Grad>
__device__ __forceinline__ void accumulate(float* sink, float* tile, int rows, Read read_input, Grad read_grad) {
    constexpr int OUT4 = OUT / 4, ITEMS = (INPUTS + 1) * OUT4, RI = (ITEMS + GRADIENT_THREADS - 1) / GRADIENT_THREADS;
    const int chunk = (rows + gridDim.x - 1) / gridDim.x;
    const int begin = chunk * blockIdx.x, end = begin + chunk < rows ? begin + chunk : rows;
    float4* grads = (float4*)tile;
    float* inputs = tile + TILE * OUT;
    float4 sum[RI];
#pragma unroll
    for (int j = 0; j < RI; j++) clear(sum[j]);
    for (int start = begin; start < end; start += TILE) {
        const int count = end - start < TILE ? end - start : TILE;
        for (int i = threadIdx.x; i < TILE * (INPUTS + 1); i += GRADIENT_THREADS) {
            const int r = i % TILE, input = i / TILE;
            inputs[r * (INPUTS + 1) + input] = r >= count ? 0.f : input < INPUTS ? read_input(start + r, input) : 1.f;
        }
        for (int i = threadIdx.x; i < TILE * OUT4; i += GRADIENT_THREADS) {
            const int r = i % TILE, q = i / TILE;
            clear(grads[r * OUT4 + q]);
            if (r < count) grads[r * OUT4 + q] = read_grad(start + r, q);
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < RI; j++) {
            const int item = threadIdx.x + GRADIENT_THREADS * j, input = item / OUT4, q = item % OUT4;
            if (item < ITEMS)
                for (int r = 0; r < TILE; r++)
                    sum[j] = sum[j] + inputs[r * (INPUTS + 1) + input] * grads[r * OUT4 + q];
        }
        __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < RI; j++) {
        const int item = threadIdx.x + GRADIENT_THREADS * j;
        if (item < ITEMS) ((float4*)sink)[item] = sum[j];
    }
}

template <int L> __device__ __forceinline__ void accumulate_level(const Call& call, float* tile) {
    typedef Size<L> Z;
    constexpr int C = Z::C, ROWS = Z::ROWS, INPUTS = K * C * Z::PARTS;
    accumulate<INPUTS, Z::OUT>(
        call.partial + (long long)blockIdx.x * WEIGHTS + weights_at<L>(), tile, call.batch * ROWS,
        [&](int r, int input) {
            const float* basis = call.saved + (long long)(r / ROWS) * SAVED + saved_at<L>();
            return basis[(input / C * ROWS + r % ROWS) * C + input % C];
        },
        [&](int r, int q) {
            return ((const float4*)(call.grads + (long long)(r / ROWS) * GRADS + grads_at<L>()))[q * ROWS + r % ROWS];
        });
}

extern "C" __global__ void __launch_bounds__(GRADIENT_THREADS) weight_gradient(const Call call) {
    BLOCK_MEMORY(block);
    float* tile = (float*)block;
    switch (blockIdx.y) {
        case 0: accumulate_level<0>(call, tile); break;
        case 1: accumulate_level<1>(call, tile); break;
        case 2: accumulate_level<2>(call, tile); break;
        case 3: accumulate_level<3>(call, tile); break;
        default:  // the full product; its gradient comes out transposed, as [input][output]
            accumulate<LAST * 32, LATENT>(
                call.partial + (long long)blockIdx.x * WEIGHTS + FULL_AT, tile, call.batch,
                [&](int r, int input) {
                    const float* y = call.saved + (long long)r * SAVED + saved_at<3>() + basis_floats<3>();
                    return y[((input % 32 / 4) * LAST + input / 32) * 4 + input % 4];
                },
                [&](int r, int q) { return ((const float4*)call.grad_code)[r * (LATENT / 4) + q]; });
    }
}

// What the caller must allocate: bytes of shared memory of the three kernels, then floats of saved (a mesh), grads (a
// mesh) and partial (a chunk).
extern "C" __global__ void tell(const Call call) {
    int* figures = (int*)call.partial;
    figures[0] = FORWARD_MEMORY, figures[1] = BACKWARD_MEMORY, figures[2] = GRADIENT_MEMORY;
    figures[3] = SAVED, figures[4] = GRADS, figures[5] = WEIGHTS;
}
