// The head layer for the CPU in one pass over its basis; chebface.flame.Flame.decode defines what it computes.
//
//   u = template + sum_k c_k basis_k,   v = R u + s + w_jaw (O u + t),   landmarks from three vertices each
//
// c is shape, expression and R_jaw - I; R, s, O, t are two rotations and shifts of a face. One face is bound by reading
// the basis: it is read once, in order, and vertices are posed while their tile of 32 is at hand. Up to four faces share
// what was loaded; the rest of a batch finds the tile in the second cache. Rows whose coefficients are zero are not read.
//
// The basis is float, (tile, row, xyz, 32), or fixed point: rows of 16 bits, then rows of 8, two rows of a width
// interleaved, (tile, pair, xyz, 32, 2), and a scale for each. A face's coefficients are rounded to 16 bits, of each
// chunk of rows for itself, so that sums of a chunk are whole numbers that 32 bits hold; float from there.
#include "cpu_graph.h"
#include "cpu_threads.h"

#include <cfloat>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

struct DecodeCall {
    int64_t vertices, blend;            // N; directions of shape and expression; the jaw's nine follow
    int64_t rows, fine;                 // of the basis; of 16 bits, the first, or -1 where it is float
    int64_t steps, landmarks;           // of the contour table: degrees of yaw, landmarks in each
    int64_t width;                      // numbers of a face; where those that are needed begin:
    int64_t shape, shapes, expression, head, jaw;
    int64_t batch, threads;
    const float* start;                 // the template, (tiles, 3, 32)
    const void* basis;                  // (tiles, rows, 3, 32) float, or (tiles, 96 (rows + fine)) bytes
    const int32_t* factor_of;           // (rows,) which coefficient
    const float* scale;                 // (rows,) of what is stored
    const float* joints;                // (6,) root, jaw
    const float* joint_dirs;            // (6, blend)
    const float* jaw_weights;           // (tiles * 32,)
    const int32_t* corners;             // (steps, landmarks, 3)
    const float* barycentric;           // (steps, landmarks, 3)
    const float* parameters;            // (batch, width)
    float* out_vertices;                // (batch, N, 3)
    float* out_landmarks;               // (batch, landmarks, 3)
};

namespace {

constexpr int kTile = 32, kNumbers = 3 * kTile;  // vertices; their x, y, z
constexpr int kJaw = 9;                           // entries of its rotation
constexpr int64_t kChunk = 64;                    // rows whose products are summed as whole numbers
#if defined(__AVX512BW__)
constexpr int kFaces = 4, kWords = 16;  // the sums of so many faces fit in the registers; of so many numbers each
#else
constexpr int kFaces = 1, kWords = 8;
#endif
constexpr int kLine = 64, kAhead = 8192;  // bytes; the processor's own prefetching stops at every page
constexpr double kWorthDecoding = 1e6;    // multiply-adds a thread; below, waking it costs more than it does

template <class Number, int N> struct Vector {
    typedef Number Type __attribute__((vector_size(sizeof(Number) * N), may_alias, aligned(1)));
};
typedef Vector<int32_t, kWords>::Type Words;
typedef Vector<int16_t, 2 * kWords>::Type Pairs;  // of each number those of two rows

INLINE Pairs load_pairs(const int16_t* from) { return *reinterpret_cast<const Pairs*>(from); }
INLINE Pairs load_pairs(const int8_t* from) {
#if defined(__AVX512BW__)
    return Pairs(_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__AVX2__)
    return Pairs(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    return __builtin_convertvector(*reinterpret_cast<const Vector<int8_t, 2 * kWords>::Type*>(from), Pairs);
#endif
}

// sum + first row times factor's low half + second row times its high half
INLINE Words add_products(const Words& sum, const Pairs& pairs, int32_t factor) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return Words(_mm512_dpwssd_epi32(__m512i(sum), __m512i(pairs), _mm512_set1_epi32(factor)));
#elif defined(__AVX512BW__)
    return sum + Words(_mm512_madd_epi16(__m512i(pairs), _mm512_set1_epi32(factor)));
#elif defined(__AVX2__)
    return sum + Words(_mm256_madd_epi16(__m256i(pairs), _mm256_set1_epi32(factor)));
#else
    return sum + (Words(pairs) << 16 >> 16) * int32_t(int16_t(factor)) + (Words(pairs) >> 16) * (factor >> 16);
#endif
}

struct Pose {  // of a face: v = turn u + shift + w_jaw (open u + open_shift)
    float turn[3][3], shift[3], open[3][3], open_shift[3];
    int64_t yaw;  // row of the contour table
};

struct Chunk {  // of a fixed basis
    int64_t first, last;  // of a group's pairs
    bool fine;
    float step[kFaces];  // what one of its sums is worth, m
};

struct Group {  // faces that share what is loaded
    int64_t first, count;
    std::vector<int64_t> place;  // of each row, or pair of them, that is not zero: its byte in a tile
    std::vector<float> factor;   // (rows, count), of a float basis
    std::vector<int32_t> pair;   // (pairs, count) two factors each, of a fixed one
    std::vector<Chunk> chunks;
};

// As `rotations` in flame.py: series near zero.
void rotation(const float* r, float (&to)[3][3]) {
    const float square = r[0] * r[0] + r[1] * r[1] + r[2] * r[2];
    float sine = 1 - square / 6 * (1 - square / 20 * (1 - square / 42));
    float versine = 0.5f - square / 24 * (1 - square / 30 * (1 - square / 56));
    if (!(square < 1e-2f)) {
        const float angle = std::sqrt(square), half = std::sin(angle / 2) / angle;
        sine = std::sin(angle) / angle;
        versine = 2 * half * half;
    }
    const float cross[3][3] = {{0, -r[2], r[1]}, {r[2], 0, -r[0]}, {-r[1], r[0], 0}};
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j)
            to[i][j] = (i == j ? 1 - square * versine : 0.0f) + sine * cross[i][j] + versine * r[i] * r[j];
}

int64_t contour_row(const float (&head)[3][3], int64_t steps) {
    const int64_t most = steps / 2;
    const float limit = float(std::sin(double(most) * M_PI / 180));
    const float degree = std::nearbyint(std::asin(std::clamp(-head[2][0], -limit, limit)) * float(180 / M_PI));
    if (!(std::abs(degree) <= float(most))) return 0;  // a NaN is no index
    return degree < 0 ? most - int64_t(degree) : int64_t(degree);
}

// The pose of a face, and its coefficients (blend + 9,).
Pose prepare(const DecodeCall& call, const float* parameters, float* factors) {
    Pose pose;
    float jaw[3][3], at[6];
    rotation(parameters + call.head, pose.turn);
    rotation(parameters + call.jaw, jaw);
    std::copy_n(parameters + call.shape, call.shapes, factors);
    std::copy_n(parameters + call.expression, call.blend - call.shapes, factors + call.shapes);
    for (int i = 0; i < 3; ++i) {
        jaw[i][i] -= 1;
        std::copy_n(jaw[i], 3, factors + call.blend + 3 * i);
    }
    for (int j = 0; j < 6; ++j) {
        const float* dirs = call.joint_dirs + j * call.blend;
        v16 sum{};
        int64_t k = 0;
        at[j] = call.joints[j];
        for (; k + 16 <= call.blend; k += 16) sum += load(dirs + k) * load(factors + k);
        for (int i = 0; i < 16; ++i) at[j] += sum[i];
        for (; k < call.blend; ++k) at[j] += dirs[k] * factors[k];
    }
    for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j)
            pose.open[i][j] = pose.turn[i][0] * jaw[0][j] + pose.turn[i][1] * jaw[1][j] + pose.turn[i][2] * jaw[2][j];
        pose.shift[i] = at[i] - (pose.turn[i][0] * at[0] + pose.turn[i][1] * at[1] + pose.turn[i][2] * at[2]);
        pose.open_shift[i] = -(pose.open[i][0] * at[3] + pose.open[i][1] * at[4] + pose.open[i][2] * at[5]);
    }
    pose.yaw = contour_row(pose.turn, call.steps);
    return pose;
}

Group gather(const DecodeCall& call, int64_t first, int64_t count, const float* factors) {
    const int64_t width = call.blend + kJaw;
    Group group{first, count, {}, {}, {}, {}};
    for (int64_t k = 0; k < call.rows; ++k) {
        bool any = false;
        for (int64_t m = 0; m < count; ++m) {
            group.factor.push_back(factors[(first + m) * width + call.factor_of[k]] * call.scale[k]);
            any |= group.factor.back() != 0;  // so is a NaN
        }
        if (any)
            group.place.push_back(k * kNumbers * int64_t(sizeof(float)));
        else
            group.factor.resize(group.factor.size() - count);
    }
    return group;
}

Group gather_fixed(const DecodeCall& call, int64_t first, int64_t count, const float* factors) {
    const int64_t width = call.blend + kJaw;
    Group group{first, count, {}, {}, {}, {}};
    for (int64_t begin = 0, end; begin < call.rows; begin = end) {
        const bool fine = begin < call.fine;
        end = std::min(begin + kChunk, fine ? call.fine : call.rows);
        // Rounding adds a half at most to each factor: no sum reaches 2^31.
        const double most = fine ? INT16_MAX : INT8_MAX, room = INT32_MAX / most - kChunk;
        Chunk chunk{int64_t(group.place.size()), 0, fine, {}};
        int16_t rounded[kFaces][kChunk];
        for (int64_t m = 0; m < count; ++m) {
            float factor[kChunk], largest = 0, sum = 0;
            for (int64_t k = begin; k < end; ++k) {
                const float it = factors[(first + m) * width + call.factor_of[k]] * call.scale[k];
                factor[k - begin] = it;
                largest = std::max(largest, std::abs(it));
                sum += std::abs(it);  // NaN where one is
            }
            const bool finite = std::isfinite(sum);
            const float step = finite ? std::max(largest / (INT16_MAX - 1), float(sum / room)) : NAN;
            const float steps = step >= FLT_MIN ? 1 / step : 0;  // in one
            for (int64_t k = 0; k < end - begin; ++k)
                rounded[m][k] = finite ? int16_t(std::lrint(factor[k] * steps)) : 0;
            chunk.step[m] = step;
        }
        for (int64_t k = 0; k < end - begin; k += 2) {
            bool any = false;
            for (int64_t m = 0; m < count; ++m) {
                const uint32_t low = uint16_t(rounded[m][k]), high = uint16_t(rounded[m][k + 1]);
                group.pair.push_back(int32_t(low | high << 16));
                any |= group.pair.back() != 0;
            }
            if (any)
                group.place.push_back((begin + k + (fine ? begin + k : call.fine)) * kNumbers);
            else
                group.pair.resize(group.pair.size() - count);
        }
        chunk.last = int64_t(group.place.size());
        group.chunks.push_back(chunk);
    }
    return group;
}

// Sums of 16 vertices to their places in (N, 3).
INLINE void place(const Pose& pose, const v16& x, const v16& y, const v16& z, const v16& jaw, int64_t count,
                  float* to) {
    alignas(64) float lanes[3][16];
    for (int c = 0; c < 3; ++c) {
        const v16 turned = pose.turn[c][0] * x + pose.turn[c][1] * y + pose.turn[c][2] * z + pose.shift[c];
        const v16 opening = pose.open[c][0] * x + pose.open[c][1] * y + pose.open[c][2] * z + pose.open_shift[c];
        row<16>(lanes[c]) = turned + jaw * opening;
    }
    if (count >= 16)
        for (int i = 0; i < 16; ++i)
            for (int c = 0; c < 3; ++c) to[3 * i + c] = lanes[c][i];
    else
        for (int64_t i = 0; i < count; ++i)
            for (int c = 0; c < 3; ++c) to[3 * i + c] = lanes[c][i];
}

template <int M> INLINE void add_rows(const Group& group, const char* tile, float (&sums)[M][kNumbers]) {
    constexpr int kVectors = kNumbers / 16;
    v16 sum[M][kVectors];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) sum[m][j] = row<16>(sums[m] + 16 * j);
    const float* factor = group.factor.data();
    for (const int64_t place : group.place) {
        const float* from = reinterpret_cast<const float*>(tile + place);
        v16 weight[kVectors];
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
            weight[j] = load(from + 16 * j);
            __builtin_prefetch(tile + place + kLine * j + kAhead);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) sum[m][j] += weight[j] * factor[m];
        factor += M;
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) row<16>(sums[m] + 16 * j) = sum[m][j];
}

template <int M, class Number>
INLINE void add_chunk(const Group& group, const Chunk& chunk, const char* tile, float (&sums)[M][kNumbers]) {
    constexpr int kVectors = kNumbers / kWords;
    Words sum[M][kVectors] = {};
    const int32_t* factor = group.pair.data() + chunk.first * M;
    for (int64_t p = chunk.first; p < chunk.last; ++p, factor += M) {
        const Number* from = reinterpret_cast<const Number*>(tile + group.place[p]);
        Pairs pairs[kVectors];
#pragma GCC unroll 16
        for (int j = 0; j < kVectors; ++j) pairs[j] = load_pairs(from + 2 * kWords * j);
#pragma GCC unroll 8
        for (size_t line = 0; line < 2 * kNumbers * sizeof(Number); line += kLine)
            __builtin_prefetch(reinterpret_cast<const char*>(from) + line + kAhead);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
            for (int j = 0; j < kVectors; ++j) sum[m][j] = add_products(sum[m][j], pairs[j], factor[m]);
    }
    typedef Vector<float, kWords>::Type Floats;
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int j = 0; j < kVectors; ++j)
            *reinterpret_cast<Floats*>(sums[m] + kWords * j) +=
                __builtin_convertvector(sum[m][j], Floats) * chunk.step[m];
}

template <int M> void decode_tile(const DecodeCall& call, const Group& group, const Pose* poses, int64_t tile) {
    alignas(64) float sums[M][kNumbers];
    for (int m = 0; m < M; ++m) std::copy_n(call.start + tile * kNumbers, kNumbers, sums[m]);
    const char* basis = static_cast<const char*>(call.basis);
    if (call.fine < 0) {
        add_rows<M>(group, basis + tile * call.rows * kNumbers * int64_t(sizeof(float)), sums);
    } else {
        basis += tile * (call.rows + call.fine) * kNumbers;
        for (const Chunk& chunk : group.chunks)
            chunk.fine ? add_chunk<M, int16_t>(group, chunk, basis, sums)
                       : add_chunk<M, int8_t>(group, chunk, basis, sums);
    }
    for (int m = 0; m < M; ++m)
        for (int j = 0; j < kTile; j += 16) {
            const int64_t vertex = tile * kTile + j;
            place(poses[group.first + m], row<16>(sums[m] + j), row<16>(sums[m] + kTile + j),
                  row<16>(sums[m] + 2 * kTile + j), load(call.jaw_weights + vertex), call.vertices - vertex,
                  call.out_vertices + ((group.first + m) * call.vertices + vertex) * 3);
        }
}

void decode_tiles(const DecodeCall& call, const std::vector<Group>& groups, const Pose* poses, int64_t first,
                  int64_t last) {
    for (int64_t tile = first; tile < last; ++tile)
        for (const Group& group : groups) switch (kFaces == 1 ? 1 : group.count) {
                case 1: decode_tile<1>(call, group, poses, tile); break;
                case 2: decode_tile<kFaces == 1 ? 1 : 2>(call, group, poses, tile); break;
                case 3: decode_tile<kFaces == 1 ? 1 : 3>(call, group, poses, tile); break;
                default: decode_tile<kFaces>(call, group, poses, tile);
            }
}

void find_landmarks(const DecodeCall& call, const Pose& pose, int64_t face) {
    const int64_t table = pose.yaw * call.landmarks * 3;
    const float* vertices = call.out_vertices + face * call.vertices * 3;
    float* to = call.out_landmarks + face * call.landmarks * 3;
    std::fill_n(to, call.landmarks * 3, 0.0f);
    for (int64_t p = 0; p < call.landmarks * 3; ++p)
        for (int c = 0; c < 3; ++c)
            to[p / 3 * 3 + c] += call.barycentric[table + p] * vertices[int64_t(call.corners[table + p]) * 3 + c];
}

}  // namespace

// 1 where memory ran out, else 0.
extern "C" int32_t flame_decode(const DecodeCall* given) {
    const DecodeCall& call = *given;
    try {
        std::vector<Pose> poses(call.batch);
        std::vector<float> factors(call.batch * (call.blend + kJaw));
        std::vector<Group> groups;
        for (int64_t b = 0; b < call.batch; ++b)
            poses[b] = prepare(call, call.parameters + b * call.width, factors.data() + b * (call.blend + kJaw));
        const auto collect = call.fine < 0 ? gather : gather_fixed;
        for (int64_t b = 0; b < call.batch; b += kFaces)
            groups.push_back(collect(call, b, std::min<int64_t>(kFaces, call.batch - b), factors.data()));
        const int64_t tiles = (call.vertices + kTile - 1) / kTile;
        const double work = double(call.batch) * call.rows * tiles * kNumbers;
        const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(call.threads, work / kWorthDecoding));
        const int64_t parts = threads == 1 ? 1 : std::min(tiles, 4 * threads);
        run(parts, threads, [&](int64_t part) {
            decode_tiles(call, groups, poses.data(), tiles * part / parts, tiles * (part + 1) / parts);
        });
        for (int64_t b = 0; b < call.batch; ++b) find_landmarks(call, poses[b], b);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
