// The head layer for the CPU in one pass over its basis; chebface.flame.Flame.decode defines what it computes.
//
//   u = template + sum_k c_k basis_k,   v = R u + s + w_jaw (O u + t),   landmarks from three vertices each
//
// c is shape, expression and R_jaw - I; R, s, O, t are two rotations and shifts of a face. One face is bound by reading
// the basis: it is read once, in order, as float or in half precision (sums are float either way), and vertices are
// posed while they are still in registers. The basis comes in tiles of 32 vertices, (tile, row, xyz, 32); two rows may
// share a coefficient. Up to four faces share what was loaded; the rest of a batch finds the tile in the second cache.
// Rows whose coefficients are zero are not read.
#include "cpu_graph.h"
#include "cpu_threads.h"

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

struct DecodeCall {
    int64_t vertices, blend;            // N; directions of shape and expression; the jaw's nine follow
    int64_t rows;                       // of the basis
    int64_t steps, landmarks;           // of the contour table: degrees of yaw, landmarks in each
    int64_t width;                      // numbers of a face; where those that are needed begin:
    int64_t shape, shapes, expression, head, jaw;
    int64_t half, batch, threads;
    const float* start;                 // the template, (tiles, 3, 32)
    const void* basis;                  // (tiles, rows, 3, 32), float or half
    const int32_t* factor_of;           // (rows,) which coefficient: a row may be a sum of two halves
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

constexpr int kTile = 32, kVectors = 3 * kTile / 16;  // vertices; vectors of their x, y, z
constexpr int kJaw = 9;                                // entries of its rotation
#if defined(__AVX512F__)
constexpr int kFaces = 4;  // the sums of so many faces fit in the registers
#else
constexpr int kFaces = 1;
#endif
constexpr int kAhead = 8192;  // bytes; the processor's own prefetching stops at every page
constexpr double kWorthDecoding = 1e6;  // multiply-adds a thread; below, waking it costs more than it does

INLINE v16 load(const uint16_t* half) {  // finite numbers
#if defined(__AVX512F__)
    return v16(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half))));
#elif defined(__F16C__)
    alignas(64) float wide[16];
    for (int i = 0; i < 16; i += 8)
        _mm256_store_ps(wide + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i))));
    return row<16>(wide);
#else
    typedef uint32_t w16 __attribute__((vector_size(64)));
    w16 bits;
    for (int i = 0; i < 16; ++i) bits[i] = half[i];
    // The product moves the exponent's bias from 15 to 127; it is exact, for subnormal numbers too.
    return v16(w16(v16((bits & 0x7fff) << 13) * 0x1p112f) | (bits & 0x8000) << 16);
#endif
}

struct Pose {  // of a face: v = turn u + shift + w_jaw (open u + open_shift)
    float turn[3][3], shift[3], open[3][3], open_shift[3];
    int64_t yaw;  // row of the contour table
};

struct Group {  // faces that share what is loaded
    int64_t first, count, rows;
    std::vector<int64_t> row;   // those that are not zero, as offsets in a tile
    std::vector<float> factor;  // (rows, count)
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
    Group group{first, count, 0, std::vector<int64_t>(call.rows), std::vector<float>(call.rows * count)};
    factors += first * width;
    for (int64_t k = 0; k < call.rows; ++k) {
        float* to = group.factor.data() + group.rows * count;
        bool any = false;
        for (int64_t m = 0; m < count; ++m) {
            to[m] = factors[m * width + call.factor_of[k]];
            any |= to[m] != 0;  // so is a NaN
        }
        group.row[group.rows] = 3 * kTile * k;
        group.rows += any;
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

template <int M, class Number>
void decode_tile(const DecodeCall& call, const Group& group, const Pose* poses, int64_t tile) {
    const Number* basis = static_cast<const Number*>(call.basis) + tile * call.rows * 3 * kTile;
    const float* factor = group.factor.data();
    v16 sums[M][kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
        const v16 start = load(call.start + (tile * kVectors + j) * 16);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sums[m][j] = start;
    }
    for (int64_t r = 0; r < group.rows; ++r, factor += M) {
        const Number* from = basis + group.row[r];
        v16 weight[kVectors];
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
            weight[j] = load(from + 16 * j);
            __builtin_prefetch(reinterpret_cast<const char*>(from + 16 * j) + kAhead);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) sums[m][j] += weight[j] * factor[m];
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int j = 0; j < kTile / 16; ++j) {
            const int64_t vertex = tile * kTile + 16 * j;
            place(poses[group.first + m], sums[m][j], sums[m][j + kTile / 16], sums[m][j + 2 * kTile / 16],
                  load(call.jaw_weights + vertex), call.vertices - vertex,
                  call.out_vertices + ((group.first + m) * call.vertices + vertex) * 3);
        }
}

template <class Number>
void decode_tiles(const DecodeCall& call, const std::vector<Group>& groups, const Pose* poses, int64_t first,
                  int64_t last) {
    for (int64_t tile = first; tile < last; ++tile)
        for (const Group& group : groups) switch (kFaces == 1 ? 1 : group.count) {
                case 1: decode_tile<1, Number>(call, group, poses, tile); break;
                case 2: decode_tile<kFaces == 1 ? 1 : 2, Number>(call, group, poses, tile); break;
                case 3: decode_tile<kFaces == 1 ? 1 : 3, Number>(call, group, poses, tile); break;
                default: decode_tile<kFaces, Number>(call, group, poses, tile);
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
        for (int64_t b = 0; b < call.batch; b += kFaces)
            groups.push_back(gather(call, b, std::min<int64_t>(kFaces, call.batch - b), factors.data()));
        const int64_t tiles = (call.vertices + kTile - 1) / kTile;
        const double work = double(call.batch) * call.rows * tiles * 3 * kTile;
        const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(call.threads, work / kWorthDecoding));
        const int64_t parts = threads == 1 ? 1 : std::min(tiles, 4 * threads);
        const auto body = call.half ? decode_tiles<uint16_t> : decode_tiles<float>;
        run(parts, threads, [&](int64_t part) {
            body(call, groups, poses.data(), tiles * part / parts, tiles * (part + 1) / parts);
        });
        for (int64_t b = 0; b < call.batch; ++b) find_landmarks(call, poses[b], b);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
