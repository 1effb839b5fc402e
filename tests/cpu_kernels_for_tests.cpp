// Runs every path of cpu.cpp on tensors that end where they must, for the sanitizers to watch. Built by
// test_kernels_cpu.py with -DSOURCE="path of cpu.cpp".
#include SOURCE

#include <cstdio>
#include <memory>

namespace {

uint32_t seed = 1;

struct Tensors {  // each in its own allocation, so that reading past its end is seen
    std::vector<std::unique_ptr<float[]>> all;
    float* make(int64_t size) {
        all.emplace_back(new float[size]);
        for (int64_t i = 0; i < size; ++i) {
            seed = seed * 1664525u + 1013904223u;
            all.back()[i] = float(seed >> 8) / float(1 << 24) - 0.5f;
        }
        return all.back().get();
    }
};

struct Rows {
    std::vector<int32_t> indptr{0}, indices;
    explicit Rows(int32_t n) {  // a ring with chords and a hub
        for (int32_t v = 0; v < n; ++v) {
            std::vector<int32_t> near;
            for (int32_t step : {1, 2, n / 3})
                for (int32_t u : {(v + step) % n, (v + n - step) % n})
                    if (u != v) near.push_back(u);
            if (v == 0)
                for (int32_t u = 1; u < n; u += 3) near.push_back(u);
            if (v % 3 == 1) near.push_back(0);
            std::sort(near.begin(), near.end());
            near.erase(std::unique(near.begin(), near.end()), near.end());
            indices.insert(indices.end(), near.begin(), near.end());
            indptr.push_back(int32_t(indices.size()));
        }
    }
};

int layers(const void* graph, int64_t n, int64_t kept) {
    static const int64_t shapes[][3] = {{3, 16, 6}, {1, 1, 1}, {2, 5, 2}, {5, 3, 4}, {16, 3, 6}, {33, 20, 2}, {8, 17, 6}};
    int failed = 0;
    for (const auto& shape : shapes)
        for (int64_t batch : {1, 2, 7})
            for (int relu : {0, 1}) {
                if (n > 1000 && (batch > 2 || shape[0] > 16)) continue;
                const int64_t in = shape[0], out = shape[1], terms = shape[2];
                Tensors t;
                float *x = t.make(batch * n * in), *w = t.make(terms * in * out), *b = t.make(out);
                float *y = t.make(batch * kept * out), *gy = t.make(batch * kept * out);
                float *gx = t.make(batch * n * in), *gw = t.make(terms * in * out), *gb = t.make(out);
                failed += cheb_forward(graph, batch, terms, in, out, relu, 2, x, w, b, y);
                const float* seen = relu ? y : nullptr;
                failed += cheb_backward(graph, batch, terms, in, out, relu, 2, x, w, seen, gy, gx, gw, gb);
                failed += cheb_backward(graph, batch, terms, in, out, relu, 2, x, w, seen, gy, nullptr, gw, nullptr);
            }
    return failed;
}

int encoders(const Rows& fine, int32_t n) {
    std::vector<int32_t> keep, last{0, 2};
    for (int32_t v = 0; v < n; v += 3) keep.push_back(v);
    const int32_t kept = int32_t(keep.size());
    const Rows coarse(kept);
    void* graphs[] = {cheb_graph_new(n, fine.indptr.data(), fine.indices.data(), kept, keep.data()),
                      cheb_graph_new(kept, coarse.indptr.data(), coarse.indices.data(), 2, last.data())};
    const int64_t channels[] = {3, 16, 5}, terms = 4;
    int failed = 0;
    for (int64_t batch : {1, 2, 9}) {
        Tensors t;
        const float* weights[] = {t.make(terms * 48), t.make(terms * 80)};
        const float* biases[] = {t.make(16), t.make(5)};
        const EncoderCall call{2,       terms,  8,           batch,     2, channels, graphs, weights,
                               biases, t.make(80), t.make(8), t.make(batch * n * 3)};
        float *z = t.make(batch * 8), *gz = t.make(batch * 8), *gx = t.make(batch * n * 3);
        float* grads[] = {t.make(terms * 48), t.make(16), t.make(terms * 80), t.make(5), t.make(80), t.make(8)};
        std::vector<float> room(cheb_encode_saved(&call) + 16);
        float* saved = reinterpret_cast<float*>(round_up(int64_t(room.data()), 64));
        for (float* kept : {saved, static_cast<float*>(nullptr)}) {
            failed += cheb_encode(&call, z, kept) + cheb_encode_backward(&call, gz, kept, gx, grads);
            failed += cheb_encode_backward(&call, gz, kept, nullptr, grads);
            failed += cheb_encode_backward(&call, gz, kept, gx, nullptr);
        }
    }
    for (void* graph : graphs) cheb_graph_free(graph);
    return failed;
}

}  // namespace

int main() {
    int failed = 0;
    for (int32_t n : {9, 23, 300, 8000, 9000}) {
        const Rows rows(n);
        std::vector<int32_t> keep;
        for (int32_t v = 0; v < n; v += 3) keep.push_back(v);
        const int64_t sizes[] = {n, int64_t(keep.size()), 0};
        for (int64_t kept : sizes) {
            void* graph = cheb_graph_new(n, rows.indptr.data(), rows.indices.data(), kept,
                                         kept == n ? nullptr : keep.data());
            failed += layers(graph, n, kept);
            cheb_graph_free(graph);
        }
        failed += encoders(rows, n);
    }
    std::puts(failed ? "failed" : "done");
    return failed;
}
