// A mesh as the kernels walk it, and the Chebyshev recursion over rows of 4 or 16 lanes; see the top of cpu.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed only to functions that are inlined
#define INLINE inline __attribute__((always_inline))

namespace {

template <int W> struct Lanes;
template <> struct Lanes<4> {
    typedef float V __attribute__((vector_size(16), may_alias));
    typedef float U __attribute__((vector_size(16), may_alias, aligned(4)));
};
template <> struct Lanes<16> {
    typedef float V __attribute__((vector_size(64), may_alias));
    typedef float U __attribute__((vector_size(64), may_alias, aligned(4)));
};
typedef Lanes<16>::V v16;

template <int W> INLINE typename Lanes<W>::V& row(float* p) { return *reinterpret_cast<typename Lanes<W>::V*>(p); }
template <int W> INLINE const typename Lanes<W>::V& row(const float* p) {
    return *reinterpret_cast<const typename Lanes<W>::V*>(p);
}
template <int W> INLINE typename Lanes<W>::U& row_at(float* p) {  // anywhere in memory
    return *reinterpret_cast<typename Lanes<W>::U*>(p);
}
template <int W> INLINE const typename Lanes<W>::U& row_at(const float* p) {
    return *reinterpret_cast<const typename Lanes<W>::U*>(p);
}
INLINE v16 load(const float* p) { return row_at<16>(p); }
INLINE void store(float* p, const v16& v) { row_at<16>(p) = v; }

constexpr int64_t kBlock = 512;  // rows sorted by degree together

// ---- graph ----------------------------------------------------------------------------------------------------------

struct Run {  // rows of one degree, all kept or none
    int32_t degree, begin, end, slot;  // slot: of the first row among the kept; -1 where not kept
    int64_t near;                      // where its neighbours begin
    float inverse, root, inverse_root;  // of the degree
};

struct Graph {
    int64_t n, kept;
    std::vector<int32_t> row;      // of each vertex
    std::vector<float> root, inverse_root;  // of the degree of each vertex
    std::vector<int32_t> place;    // slot -> row of the output
    std::vector<Run> runs;
    int64_t run_at(int64_t share, int64_t shares) const {  // the first run of a share of about as many rows as the others
        const int32_t begin = int32_t(n * share / shares);
        return std::partition_point(runs.begin(), runs.end(), [&](const Run& r) { return r.begin < begin; }) -
               runs.begin();
    }
    std::vector<uint16_t> near16;  // eight times the row of each neighbour, where that fits
    std::vector<uint32_t> near32;

    Graph(int64_t count, const int32_t* indptr, const int32_t* indices, int64_t keep_count, const int32_t* keep);
};

void walk(int32_t from, const int32_t* indptr, const int32_t* indices, std::vector<int32_t>& seen, int32_t mark,
          std::vector<int32_t>& order) {  // appends what can be reached, nearest first
    size_t next = order.size();
    order.push_back(from);
    seen[from] = mark;
    for (; next < order.size(); ++next)
        for (int32_t j = indptr[order[next]]; j < indptr[order[next] + 1]; ++j)
            if (seen[indices[j]] != mark) seen[indices[j]] = mark, order.push_back(indices[j]);
}

Graph::Graph(int64_t count, const int32_t* indptr, const int32_t* indices, int64_t keep_count, const int32_t* keep)
    : n(count), kept(keep ? keep_count : count), row(count), root(count), inverse_root(count) {
    std::vector<int32_t> seen(n, 0), far, vertex;
    vertex.reserve(n);
    for (int32_t v = 0; v < n; ++v) {
        if (seen[v] == 2) continue;
        far.clear();
        walk(v, indptr, indices, seen, 1, far);
        walk(far.back(), indptr, indices, seen, 2, vertex);  // from an end: narrow fronts
    }
    std::vector<int32_t> output(n, keep ? -1 : 0);
    if (keep)
        for (int64_t i = 0; i < kept; ++i) output[keep[i]] = int32_t(i);
    else
        std::iota(output.begin(), output.end(), 0);
    const auto degree = [&](int32_t v) { return indptr[v + 1] - indptr[v]; };
    for (int64_t b = 0; b < n; b += kBlock)
        std::stable_sort(vertex.begin() + b, vertex.begin() + std::min(n, b + kBlock), [&](int32_t p, int32_t q) {
            const bool kp = output[p] >= 0, kq = output[q] >= 0;
            return kp != kq ? kp : degree(p) < degree(q);
        });
    for (int32_t i = 0; i < n; ++i) {
        row[vertex[i]] = i;
        root[vertex[i]] = std::sqrt(float(degree(vertex[i])));
        inverse_root[vertex[i]] = 1.0f / root[vertex[i]];
    }
    place.reserve(kept);
    near32.reserve(indptr[n]);
    for (int32_t i = 0; i < n; ++i) {
        const int32_t v = vertex[i], d = degree(v);
        const bool is_kept = output[v] >= 0;
        if (runs.empty() || runs.back().degree != d || (runs.back().slot >= 0) != is_kept) {
            const int32_t slot = is_kept ? int32_t(place.size()) : -1;
            runs.push_back({d, i, i, slot, int64_t(near32.size()), 1.0f / float(d), root[v], 1.0f / root[v]});
        }
        runs.back().end = i + 1;
        if (is_kept) place.push_back(output[v]);
        for (int32_t j = indptr[v]; j < indptr[v + 1]; ++j) near32.push_back(uint32_t(row[indices[j]]) * 8);
    }
    if (n <= 8192) {
        near16.assign(near32.begin(), near32.end());
        near16.resize(near16.size() + 8);  // what the last row's words may reach
        near32.clear();
    }
}

// ---- hops -----------------------------------------------------------------------------------------------------------

enum Mode {
    kPlain,  // out = factor * sum - out
    kCopy,   // and the kept rows, as T_k, into a plane (slot, lane)
    kOnly,   // into the plane only, kept rows only
    kAdd,    // out = factor * sum - out + the plane's rows, scaled
};

// The neighbours of a row of known degree: two words hold eight indices, which saves loads where a hop is made of them.
template <class Index, bool PACKED> struct Near {
    const Index* index;
    INLINE explicit Near(const Index* near, int) : index(near) {}
    INLINE size_t operator[](int j) const { return index[j]; }
};
template <> struct Near<uint16_t, true> {
    uint64_t low, high = 0;
    INLINE explicit Near(const uint16_t* near, int degree) {
        std::memcpy(&low, near, 8);
        if (degree > 4) std::memcpy(&high, near + 4, 8);
    }
    INLINE size_t operator[](int j) const { return uint16_t((j < 4 ? low : high) >> (16 * (j % 4))); }
};

template <int W, class Index, int D, bool FIRST, Mode MODE>
INLINE void hop_rows(const Run& run, const Index* near, const float* in, float* out, float* plane, float times) {
    typedef typename Lanes<W>::V V;
    const float factor = -times * run.inverse;
    const int degree = D ? D : run.degree;
    const char* base = reinterpret_cast<const char*>(in);
    near += run.near;
    float* io = out + int64_t(run.begin) * W;
    float* kept = MODE == kPlain ? nullptr : plane + int64_t(run.slot) * W;
    for (int32_t i = run.begin; i < run.end; ++i, near += degree, io += W, kept += MODE == kPlain ? 0 : W) {
        const Near<Index, (D > 0)> around(near, D);
        const auto at = [&](int j) -> const V& { return *reinterpret_cast<const V*>(base + around[j] * (W / 2)); };
        V a = at(0);
        if (D) {
            if (D > 1) {
                V b = at(1);
#pragma GCC unroll 16
                for (int j = 2; j < D; ++j) (j & 1 ? b : a) += at(j);
                a += b;
            }
        } else {
            for (int j = 1; j < degree; ++j) a += at(j);
        }
        V value = FIRST ? factor * a : factor * a - row<W>(io);
        if (MODE == kAdd) value += run.inverse_root * row<W>(kept);
        if (MODE != kOnly) row<W>(io) = value;
        if (MODE == kCopy || MODE == kOnly) row<W>(kept) = run.root * value;
    }
}

template <int W, class Index, bool FIRST, Mode MODE>
void hop_run(const Run& run, const Index* near, const float* in, float* out, float* plane, float times) {
    switch (sizeof(Index) == 2 ? run.degree : 0) {
        case 3: return hop_rows<W, Index, 3, FIRST, MODE>(run, near, in, out, plane, times);
        case 4: return hop_rows<W, Index, 4, FIRST, MODE>(run, near, in, out, plane, times);
        case 5: return hop_rows<W, Index, 5, FIRST, MODE>(run, near, in, out, plane, times);
        case 6: return hop_rows<W, Index, 6, FIRST, MODE>(run, near, in, out, plane, times);
        case 7: return hop_rows<W, Index, 7, FIRST, MODE>(run, near, in, out, plane, times);
        case 8: return hop_rows<W, Index, 8, FIRST, MODE>(run, near, in, out, plane, times);
        default: return hop_rows<W, Index, 0, FIRST, MODE>(run, near, in, out, plane, times);
    }
}

struct Share {  // one of some, of a whole that is worked on together
    int64_t number = 0, of = 1;
    int64_t first(int64_t count) const { return count * number / of; }
    int64_t last(int64_t count) const { return count * (number + 1) / of; }
};

template <int W, class Index, bool FIRST, Mode MODE>
void hop_graph(const Graph& graph, const Index* near, const float* in, float* out, float* plane, float times,
               Share share) {
    const int64_t last = graph.run_at(share.number + 1, share.of);
    for (int64_t r = graph.run_at(share.number, share.of); r < last; ++r) {
        const Run& run = graph.runs[r];
        if (run.slot < 0) {
            if (MODE != kOnly) hop_run<W, Index, FIRST, kPlain>(run, near, in, out, plane, times);
        } else {
            hop_run<W, Index, FIRST, MODE>(run, near, in, out, plane, times);
        }
    }
}

template <int W, Mode MODE>
void hop(const Graph& graph, bool first, const float* in, float* out, float* plane, float times, Share share = {}) {
    const uint16_t* near16 = graph.near16.data();
    const uint32_t* near32 = graph.near32.data();
    if (graph.near32.empty())
        first ? hop_graph<W, uint16_t, true, MODE>(graph, near16, in, out, plane, times, share)
              : hop_graph<W, uint16_t, false, MODE>(graph, near16, in, out, plane, times, share);
    else
        first ? hop_graph<W, uint32_t, true, MODE>(graph, near32, in, out, plane, times, share)
              : hop_graph<W, uint32_t, false, MODE>(graph, near32, in, out, plane, times, share);
}

// ---- rows in and out ------------------------------------------------------------------------------------------------

struct Pack {  // what the lanes of a row are: channels first..first+channels of `meshes` meshes, one after another
    int64_t meshes, first, channels;
};

// rows = D^-1/2 x; x is (meshes, n, all) with `stride` floats between meshes.
template <int W>
void read_rows(const Graph& graph, const Pack& pack, const float* x, int64_t stride, int64_t all, float* rows,
               Share share = {}) {
    const int64_t c = pack.channels, begin = share.first(graph.n), end = share.last(graph.n);
    const int64_t full = c == 3 ? std::min(end, graph.n - 1) : begin;
    x += pack.first;
    if (c == W) {
        for (int64_t v = begin; v < end; ++v)
            row<W>(rows + int64_t(graph.row[v]) * W) = row_at<W>(x + v * all) * graph.inverse_root[v];
        return;
    }
    // Three channels go four at a time: the fourth lane is overwritten by the next mesh, or of no account.
    for (int64_t v = begin; v < full; ++v) {
        float* to = rows + int64_t(graph.row[v]) * W;
        const float factor = graph.inverse_root[v];
        if (W > 4 && pack.meshes < 5) row<W>(to) = typename Lanes<W>::V{};
        for (int64_t m = 0; m < pack.meshes; ++m) row_at<4>(to + 3 * m) = row_at<4>(x + m * stride + v * 3) * factor;
    }
    for (int64_t v = full; v < end; ++v) {
        float* to = rows + int64_t(graph.row[v]) * W;
        row<W>(to) = typename Lanes<W>::V{};
        for (int64_t m = 0; m < pack.meshes; ++m)
            for (int64_t j = 0; j < c; ++j) to[m * c + j] = x[m * stride + v * all + j] * graph.inverse_root[v];
    }
}

// x = D^1/2 rows: the way back.
template <int W>
void write_rows(const Graph& graph, const Pack& pack, const float* rows, float* x, int64_t stride, int64_t all,
                Share share = {}) {
    const int64_t c = pack.channels, begin = share.first(graph.n), end = share.last(graph.n);
    const int64_t full = c == 3 ? std::max(begin, end - 1) : begin;
    x += pack.first;
    if (c == W) {
        for (int64_t v = begin; v < end; ++v)
            row_at<W>(x + v * all) = row<W>(rows + int64_t(graph.row[v]) * W) * graph.root[v];
        return;
    }
    for (int64_t v = begin; v < full; ++v) {  // the fourth lane falls on the next vertex, which comes after
        const float* from = rows + int64_t(graph.row[v]) * W;
        for (int64_t m = 0; m < pack.meshes; ++m)
            row_at<4>(x + m * stride + v * 3) = row_at<4>(from + 3 * m) * graph.root[v];
    }
    for (int64_t v = full; v < end; ++v) {
        const float* from = rows + int64_t(graph.row[v]) * W;
        for (int64_t m = 0; m < pack.meshes; ++m)
            for (int64_t j = 0; j < c; ++j) x[m * stride + v * all + j] = from[m * c + j] * graph.root[v];
    }
}

// plane (slot, lane) = T_0 x at kept vertices, from the rows.
template <int W> void copy_kept(const Graph& graph, const float* rows, float* plane, Share share = {}) {
    const int64_t last = graph.run_at(share.number + 1, share.of);
    for (int64_t r = graph.run_at(share.number, share.of); r < last; ++r) {
        const Run& run = graph.runs[r];
        if (run.slot >= 0)
            for (int32_t i = run.begin; i < run.end; ++i)
                row<W>(plane + (int64_t(run.slot) + i - run.begin) * W) = row<W>(rows + int64_t(i) * W) * run.root;
    }
}

// plane k of planes, from S_{k-1} in `in`; S_k overwrites S_{k-2} in `out`.
template <int W>
void make_term(const Graph& graph, int64_t k, int64_t terms, const float* in, float* out, float* planes,
               Share share = {}) {
    float* plane = planes + k * graph.kept * W;
    const float times = k == 1 ? 1.0f : 2.0f;
    k + 1 < terms ? hop<W, kCopy>(graph, k == 1, in, out, plane, times, share)
                  : hop<W, kOnly>(graph, k == 1, in, out, plane, times, share);
}

// planes[k] (slot, lane) = T_k x at kept vertices; a and b are two buffers of n rows.
template <int W>
void make_terms(const Graph& graph, const Pack& pack, int64_t terms, const float* x, int64_t stride, int64_t all,
                float* a, float* b, float* planes) {
    read_rows<W>(graph, pack, x, stride, all, a);
    copy_kept<W>(graph, a, planes);
    for (int64_t k = 1; k < terms; ++k, std::swap(a, b)) make_term<W>(graph, k, terms, a, b, planes);
}

// rows = D^-1/2 times the last plane, where kept, and zero elsewhere.
template <int W> void spread_kept(const Graph& graph, const float* last, float* rows, Share share = {}) {
    const int64_t end = graph.run_at(share.number + 1, share.of);
    for (int64_t r = graph.run_at(share.number, share.of); r < end; ++r) {
        const Run& run = graph.runs[r];
        for (int32_t i = run.begin; i < run.end; ++i)
            row<W>(rows + int64_t(i) * W) =
                run.slot < 0 ? typename Lanes<W>::V{}
                             : row<W>(last + (int64_t(run.slot) + i - run.begin) * W) * run.inverse_root;
    }
}

// One step of Clenshaw's sum, from plane terms - 2 down to plane 0.
template <int W>
void add_term(const Graph& graph, int64_t k, int64_t terms, const float* in, float* out, float* planes,
              Share share = {}) {
    hop<W, kAdd>(graph, k == terms - 2, in, out, planes + k * graph.kept * W, k == 0 ? 1.0f : 2.0f, share);
}

// sum_k T_k planes[k], planes being zero where nothing is kept; the answer, times D^-1/2, is in the buffer returned.
template <int W>
float* sum_terms(const Graph& graph, int64_t terms, float* planes, float* a, float* b) {
    spread_kept<W>(graph, planes + (terms - 1) * graph.kept * W, a);
    for (int64_t k = terms - 2; k >= 0; --k, std::swap(a, b)) add_term<W>(graph, k, terms, a, b, planes);
    return a;
}

}  // namespace
