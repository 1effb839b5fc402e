// Chebyshev convolution on meshes for the CPU: the fast half of cpu.py. reference.py defines what it computes.
//
//   y = relu( sum_k T_k x W_k + b ),  T_0 x = x,  T_1 x = L x,  T_k = 2 L T_{k-1} - T_{k-2},  L = -D^-1/2 A D^-1/2
//
// With S_k = D^-1/2 T_k a hop is S_{k+1} = -2/degree * (plain sum over the neighbours of S_k) - S_{k-1}: no edge weight
// is loaded and S_{k+1} overwrites S_{k-1}. L is symmetric, so the gradient to x runs the same hop over g W_k^T
// (Clenshaw). Rows are taken breadth first and sorted by degree in blocks: neighbours are in the first cache, loops
// have fixed lengths, and the factors of a run of rows are constants. The last hop and the product run at kept rows
// only. A row is 16 lanes: 16 channels of a mesh, or as many whole meshes of up to 8 channels as fit (5 of 3); one mesh
// of up to 4 channels has rows of 4 lanes. The backward recomputes its terms: that is cheaper than memory.
#include "cpu_graph.h"
#include "cpu_threads.h"

#include <cstring>
#include <type_traits>

namespace {

// How many 16-lane sums fit in the registers: rows of a product, channels and terms of a weight gradient.
#if defined(__AVX512F__)
constexpr int kRows = 12, kChannels = 16, kTerms = 6;
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int kRows = 6, kChannels = 4, kTerms = 2;
#else
constexpr int kRows = 2, kChannels = 2, kTerms = 1;
#endif
constexpr int kPacked = 8;  // up to so many channels, meshes share a row

// What scratch memory holds: two buffers of rows, planes of a gradient, g, small things; then by layer.
enum Number { kA, kB, kSpread, kGradient, kOut, kUnwanted, kTerms0 = 8, kOut0 = 24, kGrad0 = 40 };

// ---- products -------------------------------------------------------------------------------------------------------

// sums[t] += rows[p][t][c] * weights[p][c] over planes p and lanes c.
template <int W, int M, int LANES = 0>
INLINE void multiply(v16 (&sums)[M], const float* rows, int64_t plane, int64_t planes, int64_t lanes,
                     const float* weights, int64_t weight_row, int64_t weight_plane) {
    for (int64_t p = 0; p < planes; ++p) {
        const float* r = rows + p * plane;
        const float* w = weights + p * weight_plane;
#pragma GCC unroll 4
        for (int64_t c = 0; c < (LANES ? LANES : lanes); ++c, ++r, w += weight_row) {
            const v16 weight = load(w);
#pragma GCC unroll 16
            for (int t = 0; t < M; ++t) sums[t] += weight * r[t * W];
        }
    }
}

// Runs tile(first, std::integral_constant<rows>) over all rows; the last tile may overlap the one before.
template <class Tile> INLINE void for_tiles(int64_t count, const Tile& tile, Share share = {}) {
    int64_t q = share.first(count);
    const int64_t end = share.last(count);
    if (end - q >= kRows) {
        for (; q + kRows < end; q += kRows) tile(q, std::integral_constant<int, kRows>());
        tile(end - kRows, std::integral_constant<int, kRows>());
    } else {
        for (; q < end; ++q) tile(q, std::integral_constant<int, 1>());
    }
}

// sums[kb][c] += planes[kb][q][c] * g[q] over slots q, for C channels and K terms at once.
template <int W, int C, int K>
INLINE void correlate(const float* planes, int64_t plane, const float* g, int64_t slots, float* grad, int64_t grad_row,
                      int64_t grad_plane) {
    v16 sums[K][C];
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) sums[k][c] = load(grad + k * grad_plane + c * grad_row);
    for (int64_t q = 0; q < slots; ++q, planes += W, g += 16) {
        const v16 value = row<16>(g);
#pragma GCC unroll 16
        for (int k = 0; k < K; ++k)
#pragma GCC unroll 16
            for (int c = 0; c < C; ++c) sums[k][c] += value * planes[k * plane + c];
    }
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) store(grad + k * grad_plane + c * grad_row, sums[k][c]);
}

// ---- a layer --------------------------------------------------------------------------------------------------------

struct Layer {
    const Graph* graph;
    int64_t terms, in, out;
    const float* weight;  // (terms, in, out)
    const float* bias;    // (out,) or null
    bool relu;
    std::vector<float> wide_weight, wide_bias;  // rows of whole vectors
    std::vector<float> turned;                  // for the gradient to the input; see `turn`

    int64_t wide() const { return round_up(out, 16); }
    bool packed() const { return in <= kPacked; }
    int64_t blocks() const { return packed() ? 1 : (in + 15) / 16; }
    int64_t meshes() const { return packed() ? 16 / in : 1; }  // in a row
    int64_t parameters() const { return (terms * in + 1) * wide(); }  // of the gradient: weight, then bias
    int64_t planes(int64_t lanes) const { return blocks() * terms * graph->kept * lanes; }  // floats of all terms
    int64_t step() const { return in <= 4 ? 4 : 8; }  // columns of a term in `turned`, where meshes share rows
    int64_t turned_columns() const { return round_up(packed() ? terms * step() : in, 16); }
    Pack pack(int64_t count, int64_t block) const {
        return {count, 16 * block, std::min<int64_t>(16, in - 16 * block)};
    }

    void widen() {
        if (out % 16 == 0 && bias) return;
        wide_bias.assign(wide(), 0.0f);
        if (bias) std::copy(bias, bias + out, wide_bias.begin());
        if (out % 16 == 0) return;
        wide_weight.assign(terms * in * wide(), 0.0f);
        for (int64_t i = 0; i < terms * in; ++i)
            std::copy(weight + i * out, weight + (i + 1) * out, wide_weight.begin() + i * wide());
    }
    const float* weights() const { return out % 16 ? wide_weight.data() : weight; }
    const float* biases() const { return wide_bias.empty() ? bias : wide_bias.data(); }

    void turn() {  // (out, terms, step) where meshes share rows, else (terms, out, in); columns filled up with zeros
        const int64_t columns = turned_columns();
        turned.assign((packed() ? 1 : terms) * out * columns, 0.0f);
        for (int64_t k = 0; k < terms; ++k)
            for (int64_t c = 0; c < in; ++c)
                for (int64_t o = 0; o < out; ++o) {
                    const int64_t to = packed() ? o * columns + k * step() + c : (k * out + o) * columns + c;
                    turned[to] = weight[(k * in + c) * out + o];
                }
    }
};

// y (kept, out) of mesh m of a pack from the planes of all blocks.
template <int W, int LANES>
void project_lanes(const Layer& layer, const float* planes, int64_t m, float* y, Share share) {
    const Graph& graph = *layer.graph;
    const int64_t plane = graph.kept * W, wide = layer.wide(), lane = layer.packed() ? m * layer.in : 0;
    for (int64_t o = 0; o < layer.out; o += 16) {
        const int64_t columns = std::min<int64_t>(16, layer.out - o);
        for_tiles(graph.kept, [&](int64_t q, auto rows) __attribute__((always_inline)) {
            constexpr int M = decltype(rows)::value;
            v16 sums[M];
#pragma GCC unroll 16
            for (int t = 0; t < M; ++t) sums[t] = load(layer.biases() + o);
            for (int64_t b = 0; b < layer.blocks(); ++b)
                multiply<W, M, LANES>(sums, planes + b * layer.terms * plane + q * W + lane, plane, layer.terms,
                                      layer.pack(1, b).channels, layer.weights() + 16 * b * wide + o, wide,
                                      layer.in * wide);
#pragma GCC unroll 16
            for (int t = 0; t < M; ++t) {
                float* to = y + int64_t(graph.place[q + t]) * layer.out + o;
                const v16 value = layer.relu ? (sums[t] < 0.0f ? v16{} : sums[t]) : sums[t];  // NaN stays NaN
                if (columns == 16)
                    store(to, value);
                else
                    for (int64_t c = 0; c < columns; ++c) to[c] = value[c];
            }
        }, share);
    }
}

template <int W> void project(const Layer& layer, const float* planes, int64_t m, float* y, Share share = {}) {
    layer.in == 3         ? project_lanes<W, 3>(layer, planes, m, y, share)
    : layer.in % 16 == 0  ? project_lanes<W, 16>(layer, planes, m, y, share)
                          : project_lanes<W, 0>(layer, planes, m, y, share);
}

// g (block of 16 outputs, slot, 16) = the gradient before the ReLU, filled up with zeros; its sum goes to grad_bias.
void gather_gradient(const Layer& layer, const float* grad_y, const float* y, float* g, float* grad_bias) {
    const Graph& graph = *layer.graph;
    for (int64_t o = 0; o < layer.out; o += 16, g += graph.kept * 16) {
        const int64_t columns = std::min<int64_t>(16, layer.out - o);
        v16 sum = load(grad_bias + o);
        for (int64_t q = 0; q < graph.kept; ++q) {
            const int64_t from = int64_t(graph.place[q]) * layer.out + o;
            v16 value{}, active{};
            if (columns == 16) {
                value = load(grad_y + from);
                if (layer.relu) active = load(y + from);
            } else {
                for (int64_t c = 0; c < columns; ++c) value[c] = grad_y[from + c];
                if (layer.relu)
                    for (int64_t c = 0; c < columns; ++c) active[c] = y[from + c];
            }
            if (layer.relu) value = active <= 0.0f ? v16{} : value;
            row<16>(g + q * 16) = value;
            sum += value;
        }
        store(grad_bias + o, sum);
    }
}

// grad (terms, in, wide) += the terms' planes of one block, transposed, times g.
template <int W>
void add_weight_gradient(const Layer& layer, const float* planes, const float* g, int64_t m, int64_t block,
                         float* grad) {
    const int64_t slots = layer.graph->kept, plane = slots * W, wide = layer.wide(), terms = layer.terms;
    const Pack pack = layer.pack(1, block);
    const int64_t lane = layer.packed() ? m * layer.in : 0, grad_plane = layer.in * wide;
    for (int64_t o = 0; o < layer.out; o += 16, g += slots * 16)
        for (int64_t k = 0, step; k < terms; k += step) {
            const float* from = planes + k * plane + lane;
            float* to = grad + (k * layer.in + pack.first) * wide + o;
            step = pack.channels == 3 && terms - k >= kTerms ? kTerms : 1;
            if (step > 1) {
                correlate<W, 3, kTerms>(from, plane, g, slots, to, wide, grad_plane);
                continue;
            }
            int64_t c = 0;
            for (; W == 16 && c + kChannels <= pack.channels; c += kChannels)
                correlate<W, kChannels, 1>(from + c, plane, g, slots, to + c * wide, wide, grad_plane);
            for (; c + 3 <= pack.channels; c += 3)
                correlate<W, 3, 1>(from + c, plane, g, slots, to + c * wide, wide, grad_plane);
            for (; c < pack.channels; ++c)
                correlate<W, 1, 1>(from + c, plane, g, slots, to + c * wide, wide, grad_plane);
        }
}

// planes[k] (slot, lane) = g W_k^T for one block of the inputs, in the lanes of mesh m. Meshes come in rising order.
template <int W> void spread(const Layer& layer, const float* g, int64_t m, int64_t block, float* planes) {
    const int64_t slots = layer.graph->kept, plane = slots * W, columns = layer.turned_columns();
    const int64_t full = layer.out / 16, rest = layer.out % 16, c = layer.in;
    const auto product = [&](auto& sums, int64_t q, const float* weights) __attribute__((always_inline)) {
        constexpr int M = sizeof(sums) / sizeof(v16);
        multiply<16, M>(sums, g + q * 16, slots * 16, full, 16, weights, columns, 16 * columns);
        if (rest)
            multiply<16, M>(sums, g + (full * slots + q) * 16, 0, 1, rest, weights + full * 16 * columns, columns, 0);
    };
    if (!layer.packed()) {
        if (W == 16)
            for (int64_t k = 0; k < layer.terms; ++k)
                for_tiles(slots, [&](int64_t q, auto rows) __attribute__((always_inline)) {
                    v16 sums[decltype(rows)::value] = {};
                    product(sums, q, layer.turned.data() + k * layer.out * columns + 16 * block);
#pragma GCC unroll 16
                    for (int t = 0; t < decltype(rows)::value; ++t)
                        row<16>(planes + k * plane + (q + t) * 16) = sums[t];
                });
        return;
    }
    for (int64_t column = 0; column < columns; column += 16)
        for_tiles(slots, [&](int64_t q, auto rows) __attribute__((always_inline)) {
            constexpr int M = decltype(rows)::value;
            v16 sums[M] = {};
            product(sums, q, layer.turned.data() + column);
            alignas(64) float lanes[M][16];
#pragma GCC unroll 16
            for (int t = 0; t < M; ++t) row<16>(lanes[t]) = sums[t];
            const int64_t step = layer.step(), first = column / step, last = std::min(layer.terms, first + 16 / step);
            for (int64_t k = first; k < last; ++k) {
                const float* from = lanes[0] + (k - first) * step;
                float* to = planes + k * plane + q * W + m * c;
                if (c == 3)  // the fourth lane belongs to the next mesh, which comes after
                    for (int t = 0; t < M; ++t) row_at<4>(to + t * W) = row<4>(from + t * 16);
                else
                    for (int t = 0; t < M; ++t)
                        for (int64_t j = 0; j < c; ++j) to[t * W + j] = from[t * 16 + j];
            }
        });
}

// ---- parts of a batch -----------------------------------------------------------------------------------------------

// Below so many fused multiply-adds a thread, waking it costs more than it does.
constexpr double kWorth = 2e6;
constexpr double kTogether = 1e6;  // the same for a layer of one mesh, whose threads meet at every step

int64_t useful(int64_t threads, double work) { return std::max<int64_t>(1, std::min<int64_t>(threads, work / kWorth)); }

double work_of(const Layer& layer) {
    const Graph& graph = *layer.graph;
    return double(layer.terms) * layer.in * (8.0 * graph.n + double(graph.kept) * layer.out);
}

// Partial gradients, one a part, are added up in order: the sum does not depend on who was faster.
void add_up(const std::vector<float>& partial, int64_t parts, int64_t size, float* total) {
    std::copy(partial.begin(), partial.begin() + size, total);
    for (int64_t p = 1; p < parts; ++p)
        for (int64_t i = 0; i < size; ++i) total[i] += partial[p * size + i];
}

void narrow(const Layer& layer, const float* wide_grad, float* grad_weight, float* grad_bias) {
    for (int64_t i = 0; i < layer.terms * layer.in; ++i)
        std::copy(wide_grad + i * layer.wide(), wide_grad + i * layer.wide() + layer.out, grad_weight + i * layer.out);
    wide_grad += layer.terms * layer.in * layer.wide();
    if (grad_bias) std::copy(wide_grad, wide_grad + layer.out, grad_bias);
}

bool narrow_rows(const Layer& layer, int64_t count) { return layer.packed() && count * layer.in <= 4; }

// The terms of all blocks for `count` meshes, into planes.
template <int W>
void fill_terms(const Layer& layer, const float* x, int64_t stride, int64_t count, float* planes) {
    const Graph& graph = *layer.graph;
    float* a = scratch.get(kA, graph.n * W);
    float* b = scratch.get(kB, graph.n * W);
    const int64_t size = layer.terms * graph.kept * W;
    for (int64_t block = 0; block < layer.blocks(); ++block)
        make_terms<W>(graph, layer.pack(count, block), layer.terms, x, stride, layer.in, a, b, planes + block * size);
}

template <int W>
void layer_forward(const Layer& layer, const float* x, int64_t stride, int64_t count, float* y, int64_t y_stride,
                   float* planes) {
    fill_terms<W>(layer, x, stride, count, planes);
    for (int64_t m = 0; m < count; ++m) project<W>(layer, planes, m, y + m * y_stride);
}

// Runs body(step, share) for every share of every step, each step after the one before. Shares are begun in order, so
// whoever waits for the step before waits for work that is being done: no thread is waited for that never came.
template <class Body> void run_together(int64_t steps, int64_t team, const Body& body) {
    const int64_t shares = 2 * team;
    std::atomic<int64_t> done{0};
    run(steps * shares, team, [&](int64_t item) {
        wait_for([&] { return done.load(std::memory_order_acquire) >= item / shares * shares; });
        body(item / shares, Share{item % shares, shares});
        done.fetch_add(1, std::memory_order_release);
    });
}

// `layer_forward` for one mesh by a team of threads.
template <int W>
void layer_together(const Layer& layer, const float* x, float* y, float* planes, int64_t team) {
    const Graph& graph = *layer.graph;
    float* rows[2] = {scratch.get(kA, graph.n * W), scratch.get(kB, graph.n * W)};
    const Pack pack = layer.pack(1, 0);
    run_together(layer.terms + 1, team, [&](int64_t step, Share share) {
        if (step == 0) {
            read_rows<W>(graph, pack, x, 0, layer.in, rows[0], share);
        } else if (step < layer.terms) {
            if (step == 1) copy_kept<W>(graph, rows[0], planes, share);
            make_term<W>(graph, step, layer.terms, rows[(step + 1) % 2], rows[step % 2], planes, share);
        } else {
            project<W>(layer, planes, 0, y, share);
        }
    });
}

// From the gradient of mesh m's output: adds to grad and fills the planes of the input gradient, each where wanted.
template <int W>
void mesh_backward(const Layer& layer, const float* planes, const float* grad_y, const float* y, int64_t m, float* grad,
                   float* input_planes) {
    const Graph& graph = *layer.graph;
    const int64_t size = layer.terms * graph.kept * W;
    float* g = scratch.get(kGradient, graph.kept * layer.wide());
    float* grad_bias = grad ? grad + layer.terms * layer.in * layer.wide() : scratch.get(kUnwanted, layer.wide());
    gather_gradient(layer, grad_y, y, g, grad_bias);
    for (int64_t block = 0; block < layer.blocks(); ++block) {
        if (grad) add_weight_gradient<W>(layer, planes + block * size, g, m, block, grad);
        if (input_planes) spread<W>(layer, g, m, block, input_planes + block * size);
    }
}

template <int W>
void input_gradient(const Layer& layer, float* input_planes, int64_t count, float* grad_x, int64_t stride) {
    const Graph& graph = *layer.graph;
    float* a = scratch.get(kA, graph.n * W);
    float* b = scratch.get(kB, graph.n * W);
    for (int64_t block = 0; block < layer.blocks(); ++block) {
        Pack pack = layer.pack(count, block);
        const float* rows = sum_terms<W>(graph, layer.terms, input_planes + block * layer.terms * graph.kept * W, a, b);
        write_rows<W>(graph, pack, rows, grad_x, stride, layer.in);
    }
}

// The same for one mesh by a team of threads.
template <int W>
void input_gradient_together(const Layer& layer, float* input_planes, float* grad_x, int64_t team) {
    const Graph& graph = *layer.graph;
    float* rows[2] = {scratch.get(kA, graph.n * W), scratch.get(kB, graph.n * W)};
    const int64_t terms = layer.terms;
    run_together(terms + 1, team, [&](int64_t step, Share share) {
        if (step == 0)
            spread_kept<W>(graph, input_planes + (terms - 1) * graph.kept * W, rows[0], share);
        else if (step < terms)
            add_term<W>(graph, terms - 1 - step, terms, rows[(step + 1) % 2], rows[step % 2], input_planes, share);
        else
            write_rows<W>(graph, layer.pack(1, 0), rows[(terms + 1) % 2], grad_x, 0, layer.in, share);
    });
}

template <int W>
void layer_backward(const Layer& layer, const float* x, int64_t count, const float* grad_y, const float* y,
                    float* grad_x, float* grad) {
    const Graph& graph = *layer.graph;
    const int64_t stride = graph.n * layer.in, out = graph.kept * layer.out;
    float* planes = scratch.get(kTerms0, layer.planes(W));
    fill_terms<W>(layer, x, stride, count, planes);
    float* input_planes = grad_x ? scratch.get(kSpread, layer.planes(W)) : nullptr;
    for (int64_t m = 0; m < count; ++m)
        mesh_backward<W>(layer, planes, grad_y + m * out, y ? y + m * out : nullptr, m, grad, input_planes);
    if (grad_x) input_gradient<W>(layer, input_planes, count, grad_x, stride);
}

// Where every vertex is kept and few channels come out, hops over the output are cheaper than over the input, and
// L being symmetric, y = sum_k T_k (x W_k): the layer is run as the gradient of the layer that has W_k^T.
bool is_flipped(const Graph& graph, int64_t in, int64_t out) {
    return graph.kept == graph.n && out < in && out <= kPacked;
}

std::vector<float> transpose(const float* weight, int64_t terms, int64_t in, int64_t out) {  // to (terms, out, in)
    std::vector<float> turned(terms * in * out);
    for (int64_t k = 0; k < terms; ++k)
        for (int64_t c = 0; c < in; ++c)
            for (int64_t o = 0; o < out; ++o) turned[(k * out + o) * in + c] = weight[(k * in + c) * out + o];
    return turned;
}

// g of a mesh, as `gather_gradient` gives it for x in the place of a gradient.
float* gather_input(const Layer& flipped, const float* x) {
    float* g = scratch.get(kGradient, flipped.graph->n * flipped.wide());
    float* sums = scratch.get(kOut, flipped.wide());
    std::fill(sums, sums + flipped.wide(), 0.0f);
    gather_gradient(flipped, x, nullptr, g, sums);
    return g;
}

template <int W>
void flipped_forward(const Layer& flipped, const float* x, int64_t count, const float* bias, bool relu, float* y) {
    const int64_t n = flipped.graph->n, out = flipped.in;
    float* planes = scratch.get(kSpread, flipped.terms * n * W);
    for (int64_t m = 0; m < count; ++m)
        spread<W>(flipped, gather_input(flipped, x + m * n * flipped.out), m, 0, planes);
    input_gradient<W>(flipped, planes, count, y, n * out);
    for (int64_t i = 0; i < count * n; ++i, y += out)
        for (int64_t o = 0; o < out; ++o) {
            const float value = bias ? y[o] + bias[o] : y[o];
            y[o] = relu && value < 0.0f ? 0.0f : value;
        }
}

// y is null without relu. grad: (terms, out, in) in rows of whole vectors, then the bias.
template <int W>
void flipped_backward(const Layer& flipped, const float* x, int64_t count, const float* grad_y, const float* y,
                      float* grad_x, float* grad) {
    const int64_t n = flipped.graph->n, out = flipped.in, in = flipped.out;
    float* grad_bias = grad + flipped.terms * out * flipped.wide();
    float* masked = scratch.get(kOut0, count * n * out);
    for (int64_t i = 0; i < count * n * out; i += out)
        for (int64_t o = 0; o < out; ++o) {
            masked[i + o] = y && y[i + o] <= 0.0f ? 0.0f : grad_y[i + o];
            grad_bias[o] += masked[i + o];
        }
    float* planes = scratch.get(kTerms0, flipped.planes(W));
    fill_terms<W>(flipped, masked, n * out, count, planes);
    for (int64_t m = 0; m < count; ++m) {
        if (grad_x) project<W>(flipped, planes, m, grad_x + m * n * in);
        add_weight_gradient<W>(flipped, planes, gather_input(flipped, x + m * n * in), m, 0, grad);
    }
}

// ---- an encoder -----------------------------------------------------------------------------------------------------

struct Encoder {
    std::vector<Layer> layers;
    int64_t codes, features;
    const float* weight;  // (codes, features)
    const float* bias;    // (codes,)

    int64_t size(int64_t l) const { return layers[l].graph->kept * layers[l].out; }
    int64_t room(int64_t l) const { return round_up(size(l), 16); }  // what follows stays aligned
    int64_t parameters() const {
        int64_t total = codes * (features + 1);
        for (const Layer& layer : layers) total += layer.parameters();
        return total;
    }
};

// What the backward wants of a forward: every layer's terms and outputs, kept for it or else in scratch, mesh by mesh.
struct Tape {
    const Encoder& e;
    int64_t count;  // of meshes
    float* kept;    // of this part, or null
    int64_t team = 1;  // threads for one mesh

    static int64_t per_mesh(const Encoder& e) {
        int64_t floats = e.room(0);
        for (size_t l = 1; l < e.layers.size(); ++l) floats += e.room(l) + e.layers[l].planes(16);
        return floats;
    }
    static int64_t before(const Encoder& e, int64_t part, int64_t meshes) {  // floats of parts and meshes before
        return part * e.layers[0].planes(16) + meshes * per_mesh(e);
    }
    template <int W> float* first_terms() const { return kept ? kept : scratch.get(kTerms0, e.layers[0].planes(W)); }
    float* first_out(int64_t m) const {
        return (kept ? kept + e.layers[0].planes(16) : scratch.get(kOut0, count * e.room(0))) + m * e.room(0);
    }
    float* out(size_t l, int64_t m) const {
        if (l == 0) return first_out(m);
        return kept ? place(l, m) : scratch.get(kOut0 + l, e.size(l));
    }
    float* terms(size_t l, int64_t m) const {  // of a layer after the first
        return kept ? place(l, m) + e.room(l) : scratch.get(kTerms0 + l, e.layers[l].planes(16));
    }

    bool worth(const Layer& layer) const {  // whether a team is sooner done
        return team > 1 && count == 1 && layer.terms > 1 && layer.blocks() == 1 && work_of(layer) > kTogether;
    }

  private:
    float* place(size_t layer, int64_t m) const {
        float* to = first_out(count) + m * (per_mesh(e) - e.room(0));
        for (size_t l = 1; l < layer; ++l) to += e.room(l) + e.layers[l].planes(16);
        return to;
    }
};

template <int W> void first_layer(const Tape& tape, const float* x) {
    const Layer& layer = tape.e.layers[0];
    const int64_t stride = layer.graph->n * layer.in;
    if (tape.worth(layer)) return layer_together<W>(layer, x, tape.first_out(0), tape.first_terms<W>(), tape.team);
    layer_forward<W>(layer, x, stride, tape.count, tape.first_out(0), tape.e.room(0), tape.first_terms<W>());
}

void other_layers(const Tape& tape, int64_t m) {
    for (size_t l = 1; l < tape.e.layers.size(); ++l) {
        const Layer& layer = tape.e.layers[l];
        if (tape.worth(layer))
            layer_together<16>(layer, tape.out(l - 1, m), tape.out(l, m), tape.terms(l, m), tape.team);
        else
            layer_forward<16>(layer, tape.out(l - 1, m), 0, 1, tape.out(l, m), 0, tape.terms(l, m));
    }
}

void encode_part(const Tape& tape, const float* x, float* z) {
    const Encoder& e = tape.e;
    narrow_rows(e.layers[0], tape.count) ? first_layer<4>(tape, x) : first_layer<16>(tape, x);
    for (int64_t m = 0; m < tape.count; ++m, z += e.codes) {
        other_layers(tape, m);
        const float* y = tape.out(e.layers.size() - 1, m);
        for (int64_t r = 0; r < e.codes; ++r) {
            const float* w = e.weight + r * e.features;
            v16 sum{};
            int64_t c = 0;
            for (; c + 16 <= e.features; c += 16) sum += load(w + c) * load(y + c);
            float total = e.bias[r];
            for (int i = 0; i < 16; ++i) total += sum[i];
            for (; c < e.features; ++c) total += w[c] * y[c];
            z[r] = total;
        }
    }
}

// grad, where wanted: the parameters of each layer (weight, bias), then of the linear map.
template <int W>
void encode_backward_part(const Tape& tape, const float* x, const float* grad_z, float* grad_x, float* grad) {
    const Encoder& e = tape.e;
    const Layer& base = e.layers[0];
    const int64_t last = int64_t(e.layers.size()) - 1, stride = base.graph->n * base.in;
    if (!tape.kept) first_layer<W>(tape, x);
    std::vector<float*> grads;
    for (const Layer& layer : e.layers) {
        grads.push_back(grad);
        if (grad) grad += layer.parameters();
    }
    float* first_spread = grad_x ? scratch.get(kGrad0, base.planes(W)) : nullptr;
    for (int64_t m = 0; m < tape.count; ++m, grad_z += e.codes) {
        if (!tape.kept) other_layers(tape, m);
        float* g = scratch.get(kGrad0 + last + 1, e.features);
        std::fill(g, g + e.features, 0.0f);
        const float* code = tape.out(last, m);
        for (int64_t r = 0; r < e.codes; ++r) {
            const float* w = e.weight + r * e.features;
            const float value = grad_z[r];
            for (int64_t c = 0; c < e.features; ++c) g[c] += value * w[c];
            if (!grad) continue;
            float* to = grad + r * e.features;
            for (int64_t c = 0; c < e.features; ++c) to[c] += value * code[c];
            grad[e.codes * e.features + r] += value;
        }
        for (int64_t l = last; l > 0; --l) {
            const Layer& layer = e.layers[l];
            float* planes = scratch.get(kSpread, layer.planes(16));
            mesh_backward<16>(layer, tape.terms(l, m), g, tape.out(l, m), 0, grads[l], planes);
            g = scratch.get(kGrad0 + l, layer.graph->n * layer.in);
            tape.worth(layer) ? input_gradient_together<16>(layer, planes, g, tape.team)
                              : input_gradient<16>(layer, planes, 1, g, 0);
        }
        mesh_backward<W>(base, tape.first_terms<W>(), g, tape.first_out(m), m, grads[0], first_spread);
    }
    if (!grad_x) return;
    tape.worth(base) ? input_gradient_together<W>(base, first_spread, grad_x, tape.team)
                     : input_gradient<W>(base, first_spread, tape.count, grad_x, stride);
}

}  // namespace

// ---- the interface --------------------------------------------------------------------------------------------------
// Tensors are contiguous float32. Functions give 0, or 1 when memory ran out.

extern "C" {

// indptr (n + 1), indices: compressed rows of a symmetric graph; keep (kept,) rising, or null for all.
void* cheb_graph_new(int64_t n, const int32_t* indptr, const int32_t* indices, int64_t kept, const int32_t* keep) {
    try {
        return new Graph(n, indptr, indices, kept, keep);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

void cheb_graph_free(void* graph) { delete static_cast<Graph*>(graph); }

// x (batch, n, in), weight (terms, in, out), bias (out) or null -> y (batch, kept, out)
int32_t cheb_forward(const void* graph, int64_t batch, int64_t terms, int64_t in, int64_t out, int32_t relu,
                     int64_t threads, const float* x, const float* weight, const float* bias, float* y) {
    try {
        Layer layer{static_cast<const Graph*>(graph), terms, in, out, weight, bias, relu != 0, {}, {}, {}};
        threads = useful(threads, work_of(layer) * double(batch));
        const int64_t x_stride = layer.graph->n * in, y_stride = layer.graph->kept * out;
        if (is_flipped(*layer.graph, in, out)) {
            const std::vector<float> turned = transpose(weight, terms, in, out);
            Layer flipped{layer.graph, terms, out, in, turned.data(), nullptr, false, {}, {}, {}};
            flipped.turn();
            const Split split(batch, flipped.meshes(), threads);
            return !run(split.parts, threads, [&](int64_t part) {
                const int64_t first = split.first(part), count = split.count(part);
                const auto forward = narrow_rows(flipped, count) ? flipped_forward<4> : flipped_forward<16>;
                forward(flipped, x + first * x_stride, count, bias, relu != 0, y + first * y_stride);
            });
        }
        layer.widen();
        const Split split(batch, layer.meshes(), threads);
        return !run(split.parts, threads, [&](int64_t part) {
            const int64_t first = split.first(part), count = split.count(part);
            const auto forward = narrow_rows(layer, count) ? layer_forward<4> : layer_forward<16>;
            float* planes = scratch.get(kTerms0, layer.planes(16));
            forward(layer, x + first * x_stride, x_stride, count, y + first * y_stride, y_stride, planes);
        });
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// grad_y (batch, kept, out), y as forward gave it (null without relu) -> grad_x (null where not wanted), grad_weight,
// grad_bias (or null)
int32_t cheb_backward(const void* graph, int64_t batch, int64_t terms, int64_t in, int64_t out, int32_t relu,
                      int64_t threads, const float* x, const float* weight, const float* y, const float* grad_y,
                      float* grad_x, float* grad_weight, float* grad_bias) {
    try {
        Layer layer{static_cast<const Graph*>(graph), terms, in, out, weight, nullptr, relu != 0, {}, {}, {}};
        const bool flip = is_flipped(*layer.graph, in, out);
        const std::vector<float> turned = flip ? transpose(weight, terms, in, out) : std::vector<float>();
        if (flip) {
            layer = {layer.graph, terms, out, in, turned.data(), nullptr, false, {}, {}, {}};
            layer.widen();
        } else if (grad_x) {
            layer.turn();
        }
        threads = useful(threads, 3 * work_of(layer) * double(batch));
        const Split split(batch, layer.meshes(), threads);
        const int64_t x_stride = layer.graph->n * in, y_stride = layer.graph->kept * out, size = layer.parameters();
        // As many sums as parts, but not without end: a part adds to those of its share.
        const int64_t most = std::max<int64_t>(threads, (int64_t(8) << 20) / size);
        const int64_t shares = std::max<int64_t>(1, std::min(split.parts, most));
        std::vector<float> partial(shares * size);
        const bool done = run(shares, threads, [&](int64_t share) {
            for (int64_t p = split.parts * share / shares; p < split.parts * (share + 1) / shares; ++p) {
                const int64_t first = split.first(p), count = split.count(p);
                const bool four = narrow_rows(layer, count);
                const auto backward = flip ? (four ? flipped_backward<4> : flipped_backward<16>)
                                           : (four ? layer_backward<4> : layer_backward<16>);
                backward(layer, x + first * x_stride, count, grad_y + first * y_stride,
                         relu ? y + first * y_stride : nullptr, grad_x ? grad_x + first * x_stride : nullptr,
                         partial.data() + share * size);
            }
        });
        std::vector<float> total(size);
        add_up(partial, shares, size, total.data());
        if (flip) {
            std::vector<float> turned_grad(terms * in * out);
            narrow(layer, total.data(), turned_grad.data(), nullptr);
            const std::vector<float> back = transpose(turned_grad.data(), terms, out, in);
            std::copy(back.begin(), back.end(), grad_weight);
            if (grad_bias) std::copy_n(total.data() + terms * out * layer.wide(), out, grad_bias);
        } else {
            narrow(layer, total.data(), grad_weight, grad_bias);
        }
        return !done;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// An encoder: `count` layers, each with ReLU, channels (count + 1), then a linear map to `codes` numbers.
struct EncoderCall {
    int64_t count, terms, codes, batch, threads;
    const int64_t* channels;
    const void* const* graphs;
    const float* const* weights;  // (terms, in, out) of each layer
    const float* const* biases;   // (out,)
    const float* linear_weight;   // (codes, features)
    const float* linear_bias;     // (codes,)
    const float* x;               // (batch, n, channels[0])
};
}

namespace {

Encoder encoder_of(const EncoderCall& call, bool backward) {
    Encoder e{{}, call.codes, 0, call.linear_weight, call.linear_bias};
    e.layers.reserve(call.count);
    for (int64_t l = 0; l < call.count; ++l) {
        e.layers.push_back({static_cast<const Graph*>(call.graphs[l]), call.terms, call.channels[l],
                            call.channels[l + 1], call.weights[l], call.biases[l], true, {}, {}, {}});
        e.layers.back().widen();
        if (backward) e.layers.back().turn();
    }
    e.features = e.size(call.count - 1);
    return e;
}

int64_t team_of(const EncoderCall& call) { return call.batch == 1 ? call.threads : 1; }

struct Division {
    Split split;
    int64_t threads;
};

// Forward and backward divide a batch alike: what one saves is where the other looks for it.
Division division_of(const EncoderCall& call, const Encoder& e) {
    double work = 0;
    for (const Layer& layer : e.layers) work += work_of(layer);
    const int64_t threads = useful(call.threads, work * double(call.batch));
    return {Split(call.batch, e.layers[0].meshes(), threads), threads};
}

}  // namespace

extern "C" {

// How many floats `saved` has; it begins at a multiple of 64 bytes.
int64_t cheb_encode_saved(const EncoderCall* call) {
    const Encoder e = encoder_of(*call, false);
    return Tape::before(e, division_of(*call, e).split.parts, call->batch);
}

// -> z (batch, codes), and for the backward, where not null, saved
int32_t cheb_encode(const EncoderCall* call, float* z, float* saved) {
    try {
        const Encoder e = encoder_of(*call, false);
        const auto [split, threads] = division_of(*call, e);
        const int64_t stride = e.layers[0].graph->n * e.layers[0].in;
        return !run(split.parts, threads, [&, split = split](int64_t part) {
            const int64_t first = split.first(part);
            const Tape tape{e, split.count(part), saved ? saved + Tape::before(e, part, first) : nullptr, team_of(*call)};
            encode_part(tape, call->x + first * stride, z + first * e.codes);
        });
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// grad_z (batch, codes), saved (null: made anew) -> grad_x (null where not wanted), and into grads (null where not
// wanted): weight and bias of each layer, then of the linear map
int32_t cheb_encode_backward(const EncoderCall* call, const float* grad_z, float* saved, float* grad_x,
                             float* const* grads) {
    try {
        const Encoder e = encoder_of(*call, true);
        const auto [split, threads] = division_of(*call, e);
        const int64_t stride = e.layers[0].graph->n * e.layers[0].in, size = grads ? e.parameters() : 0;
        std::vector<float> partial(std::max<int64_t>(1, split.parts) * size);
        const bool done = run(split.parts, threads, [&, split = split](int64_t part) {
            const int64_t first = split.first(part), count = split.count(part);
            const Tape tape{e, count, saved ? saved + Tape::before(e, part, first) : nullptr, team_of(*call)};
            const auto backward =
                narrow_rows(e.layers[0], count) ? encode_backward_part<4> : encode_backward_part<16>;
            backward(tape, call->x + first * stride, grad_z + first * e.codes,
                     grad_x ? grad_x + first * stride : nullptr, grads ? partial.data() + part * size : nullptr);
        });
        if (!grads) return !done;
        std::vector<float> total(size);
        add_up(partial, split.parts, size, total.data());
        const float* from = total.data();
        for (const Layer& layer : e.layers) {
            narrow(layer, from, grads[0], grads[1]);
            grads += 2;
            from += layer.parameters();
        }
        std::copy(from, from + e.codes * e.features, grads[0]);
        std::copy(from + e.codes * e.features, from + e.codes * (e.features + 1), grads[1]);
        return !done;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
}
