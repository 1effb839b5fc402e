// The kernels as onnxruntime custom operators: chebface::Encode over cpu.cpp, chebface::Decode over decode.cpp.
//
// OrtCustomOp is a struct that only grows, and says how far it is filled.
// Constants are inputs of the node that must be initializers; they are checked and prepared when a session is made.
// Decode reads the basis where onnxruntime keeps it.
#include "cpu.cpp"
#include "decode.cpp"
#include "onnxruntime_c.h"

#include <dlfcn.h>
#include <map>
#include <memory>
#include <string>

namespace {

using namespace onnxruntime_c;

constexpr uint32_t kVersion = 16;  // of the interface: the first whose operators may return a status
constexpr const char* kRelease = "1.16";

struct CustomOp {
    uint32_t version = kVersion;
    void* (*create_kernel)(const CustomOp*, void* const*, const KernelInfo*) = nullptr;  // before 16
    const char* (*name)(const CustomOp*);
    const char* (*provider)(const CustomOp*);
    int (*input_type)(const CustomOp*, size_t);
    size_t (*input_count)(const CustomOp*);
    int (*output_type)(const CustomOp*, size_t);
    size_t (*output_count)(const CustomOp*);
    void (*compute)(void*, KernelContext*) = nullptr;  // before 16
    void (*destroy)(void* kernel);
    int (*input_is_optional)(const CustomOp*, size_t);    // since 8
    int (*output_is_optional)(const CustomOp*, size_t);   // since 8
    int (*input_memory)(const CustomOp*, size_t);         // since 13
    int (*variadic[4])(const CustomOp*) = {};             // since 14: arity and homogeneity, of inputs and outputs
    Status* (*create_kernel_v2)(const CustomOp*, void* const*, const KernelInfo*, void** kernel);  // since 16
    Status* (*compute_v2)(void* kernel, KernelContext*);                                           // since 16
    void* later[8] = {};  // shape inference, versions, inputs given back as outputs: since 17 and 18
};

// ---- what both operators do -----------------------------------------------------------------------------------------

std::string spell(const Shape& shape) {  // a negative size is any
    std::string text = "(";
    for (size_t i = 0; i < shape.size(); ++i)
        text += (i ? ", " : "") + (shape[i] < 0 ? std::string(i ? "?" : "B") : std::to_string(shape[i]));
    return text + (shape.size() == 1 ? ",)" : ")");
}

struct Tensor : Outline {
    const void* data;
    const float* floats() const { return static_cast<const float*>(data); }
    const int32_t* ints() const { return static_cast<const int32_t*>(data); }
};

Tensor read(const Api& api, const Value* value) {
    TypeAndShape* info;
    check(api, api.type_and_shape(value, &info));
    const auto release = [&](TypeAndShape* it) { api.release(it); };
    const std::unique_ptr<TypeAndShape, decltype(release)> owner(info, release);
    Tensor tensor{outline(api, info), nullptr};
    void* data;
    check(api, api.data(const_cast<Value*>(value), &data));
    tensor.data = data;
    return tensor;
}

void expect(const std::string& name, const Tensor& tensor, const Shape& shape) {
    bool fits = tensor.shape.size() == shape.size();
    for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] < 0 || tensor.shape[i] == shape[i];
    if (!fits) throw Failure{name + ": expected " + spell(shape) + ", got " + spell(tensor.shape)};
}

struct Input {
    const char* name;
    Type type;
};

struct Node {  // what a kernel is made from
    const Api& api;
    const KernelInfo* info;
    const Input* inputs;

    Tensor constant(size_t index, const Shape& shape) const {
        int is_constant = 0;
        const Value* value = nullptr;
        check(api, api.constant(info, index, &is_constant, &value));
        if (!is_constant)
            throw Failure{std::string(inputs[index].name) +
                          ": expected an initializer of the graph, got a value that may change"};
        const Tensor tensor = read(api, value);
        expect(inputs[index].name, tensor, shape);
        return tensor;
    }
    std::vector<float> floats(size_t index, const Shape& shape) const {
        const Tensor tensor = constant(index, shape);
        return {tensor.floats(), tensor.floats() + product(tensor.shape)};
    }
    std::vector<int32_t> ints(size_t index, const Shape& shape, int64_t limit) const {  // each in 0..limit - 1
        const Tensor tensor = constant(index, shape);
        std::vector<int32_t> values(tensor.ints(), tensor.ints() + product(tensor.shape));
        for (int32_t value : values)
            if (value < 0 || value >= limit)
                throw Failure{std::string(inputs[index].name) + ": expected 0.." + std::to_string(limit - 1) +
                              ", got " + std::to_string(value)};
        return values;
    }
    Shape attributes(const char* name, size_t least) const {
        size_t count = 0;
        if (Status* status = api.attributes(info, name, nullptr, &count)) api.release(status), count = 0;
        Shape values(count);
        if (count) check(api, api.attributes(info, name, values.data(), &count));
        bool fits = count >= least;
        for (int64_t value : values) fits = fits && value >= 0 && value <= INT32_MAX;
        if (!fits) throw Failure{std::string(name) + ": expected at least " + std::to_string(least) + " sizes"};
        return values;
    }
    int64_t threads() const {
        int64_t count = 0;
        if (Status* status = api.attribute(info, "threads", &count)) api.release(status), count = 0;
        const char* wanted = std::getenv("CHEBFACE_THREADS");
        if (count == 0 && wanted) {
            char* end;
            count = std::strtol(wanted, &end, 10);
            if (*end || count < 1)
                throw Failure{std::string("CHEBFACE_THREADS: expected a number from 1, got '") + wanted + "'"};
        }
        if (count < 0) throw Failure{"threads: expected 0 or more, got " + std::to_string(count)};
        return std::max<int64_t>(1, count);
    }
};

struct Call {  // of a kernel
    const Api& api;
    KernelContext* context;
    const Input* inputs;

    Tensor input(size_t index, const Shape& shape) const {
        const Value* value = nullptr;
        check(api, api.input(context, index, &value));
        const Tensor tensor = read(api, value);
        expect(inputs[index].name, tensor, shape);
        return tensor;
    }
    float* output(size_t index, const Shape& shape) const {
        Value* value = nullptr;
        void* data;
        check(api, api.output(context, index, shape.data(), shape.size(), &value));
        check(api, api.data(value, &data));
        return static_cast<float*>(data);
    }
};

// ---- Encode ---------------------------------------------------------------------------------------------------------

class Encode {  // what lies between layers is concatenated: rows of all graphs, vertices kept, weights
  public:
    static constexpr const char* kName = "Encode";
    static constexpr int kOutputs = 1;
    static constexpr Input kInputs[] = {
        {"vertices", kFloat}, {"mean", kFloat},   {"std", kFloat},  {"indptr", kInt32},        {"indices", kInt32},
        {"keep", kInt32},     {"weight", kFloat}, {"bias", kFloat}, {"linear_weight", kFloat}, {"linear_bias", kFloat},
    };

    explicit Encode(const Node& node) {
        const Shape rows = node.attributes("vertices", 1), kept = node.attributes("kept", 1);
        const Shape terms = node.attributes("terms", 1);
        channels_ = node.attributes("channels", 2);
        const size_t layers = rows.size();
        if (kept.size() != layers || channels_.size() != layers + 1 || terms.size() != 1 || layers >= kOut0 - kTerms0 ||
            terms[0] < 1 || rows[0] > INT32_MAX / 64 || *std::min_element(channels_.begin(), channels_.end()) < 1)
            throw Failure{"vertices, kept, channels, terms: expected sizes of the same 1 to 15 layers"};
        mean_ = node.floats(1, {rows[0], channels_[0]});
        std_ = node.floats(2, {rows[0], channels_[0]});
        int64_t starts = 0, vertices = 0, biases = 0, weights = 0;
        for (size_t l = 0; l < layers; ++l) {
            if (rows[l] < 1 || kept[l] < 1 || kept[l] > rows[l] || (l && rows[l] != kept[l - 1]))
                throw Failure{"vertices, kept: expected as many vertices as were kept before, and some kept"};
            starts += rows[l] + 1;
            vertices += kept[l];
            biases += channels_[l + 1];
            weights += terms[0] * channels_[l] * channels_[l + 1];
        }
        const std::vector<int32_t> indptr = node.ints(3, {starts}, INT32_MAX), indices = node.ints(4, {-1}, rows[0]);
        const std::vector<int32_t> keep = node.ints(5, {vertices}, rows[0]);
        weight_ = node.floats(6, {weights});
        bias_ = node.floats(7, {biases});
        linear_weight_ = node.floats(8, {-1, kept.back() * channels_.back()});
        linear_bias_ = node.floats(9, {-1});
        const int64_t codes = int64_t(linear_bias_.size());
        if (codes < 1 || codes * kept.back() * channels_.back() != int64_t(linear_weight_.size()))
            throw Failure{"linear_weight, linear_bias: expected as many rows as numbers"};
        const int32_t *start = indptr.data(), *near = indices.data(), *chosen = keep.data();
        const float *weight = weight_.data(), *bias = bias_.data();
        for (size_t l = 0; l < layers; ++l) {
            near += check_graph(rows[l], start, near, indices.data() + indices.size(), kept[l], chosen);
            graphs_.push_back(std::make_unique<Graph>(rows[l], start, near - start[rows[l]], kept[l], chosen));
            places_.push_back(graphs_.back().get());
            weights_.push_back(weight);
            biases_.push_back(bias);
            weight += terms[0] * channels_[l] * channels_[l + 1];
            bias += channels_[l + 1];
            start += rows[l] + 1;
            chosen += kept[l];
        }
        call_ = {};
        call_.count = int64_t(layers);
        call_.terms = terms[0];
        call_.codes = codes;
        call_.threads = node.threads();
        call_.channels = channels_.data();
        call_.graphs = places_.data();
        call_.weights = weights_.data();
        call_.biases = biases_.data();
        call_.linear_weight = linear_weight_.data();
        call_.linear_bias = linear_bias_.data();
    }

    void compute(const Call& given) const {
        const int64_t size = int64_t(mean_.size()), channels = channels_[0];
        const Tensor vertices = given.input(0, {-1, size / channels, channels});
        EncoderCall call = call_;
        call.batch = vertices.shape[0];
        float* out = given.output(0, {call.batch, call.codes});
        if (!call.batch) return;
        static thread_local std::vector<float> normalized;
        normalized.resize(call.batch * size);
        for (int64_t b = 0; b < call.batch; ++b) {
            const float* from = vertices.floats() + b * size;
            float* to = normalized.data() + b * size;
            for (int64_t i = 0; i < size; ++i) to[i] = (from[i] - mean_[i]) / std_[i];
        }
        call.x = normalized.data();
        const int32_t failed = cheb_encode(&call, out, nullptr);
        if (normalized.size() > size_t(4) << 20) std::vector<float>().swap(normalized);
        if (failed) throw std::bad_alloc();
    }

  private:
    // What the kernels rely on; how many neighbours there are.
    static int64_t check_graph(int64_t rows, const int32_t* start, const int32_t* near, const int32_t* end,
                               int64_t kept, const int32_t* keep) {
        bool fits = start[0] == 0;
        for (int64_t v = 0; fits && v < rows; ++v) fits = start[v] < start[v + 1];
        fits = fits && end - near >= start[rows] &&
               std::all_of(near, near + start[rows], [&](int32_t v) { return v < rows; });
        if (!fits) throw Failure{"indptr, indices: expected compressed rows in which every vertex has a neighbor"};
        for (int64_t i = 0; fits && i < kept; ++i) fits = keep[i] < rows && (i == 0 || keep[i - 1] < keep[i]);
        if (!fits) throw Failure{"keep: expected rising vertices of each level"};
        return start[rows];
    }

    Shape channels_;
    std::vector<float> mean_, std_, weight_, bias_, linear_weight_, linear_bias_;
    std::vector<std::unique_ptr<Graph>> graphs_;
    std::vector<const void*> places_;
    std::vector<const float*> weights_, biases_;
    EncoderCall call_;
};

// ---- Decode ---------------------------------------------------------------------------------------------------------

class Decode {
  public:
    static constexpr const char* kName = "Decode";
    static constexpr int kOutputs = 2;
    static constexpr Input kInputs[] = {
        {"parameters", kFloat}, {"template", kFloat},    {"basis", kAny},
        {"factor_of", kInt32},  {"scale", kFloat},       {"joints", kFloat},
        {"joint_dirs", kFloat}, {"jaw_weights", kFloat}, {"landmark_vertices", kInt32},
        {"landmark_weights", kFloat},
    };

    explicit Decode(const Node& node) {
        const Shape parts = node.attributes("parts", 6);  // width, then where shape, its size, expression, poses
        joints_ = node.floats(5, {6});
        joint_dirs_ = node.floats(6, {6, -1});
        jaw_weights_ = node.floats(7, {-1});
        call_ = {};
        call_.vertices = int64_t(jaw_weights_.size());
        call_.blend = int64_t(joint_dirs_.size()) / 6;
        call_.width = parts[0], call_.shape = parts[1], call_.shapes = parts[2], call_.expression = parts[3];
        call_.head = parts[4], call_.jaw = parts[5];
        if (call_.vertices < 1 || call_.shapes > call_.blend || call_.shape + call_.shapes > call_.width ||
            call_.expression + call_.blend - call_.shapes > call_.width ||
            std::max(call_.head, call_.jaw) + 3 > call_.width)
            throw Failure{"parts: expected shape, expression, head and jaw within " + std::to_string(call_.width)};
        const int64_t tiles = (call_.vertices + kTile - 1) / kTile;
        jaw_weights_.resize(tiles * kTile);
        start_ = node.floats(1, {tiles, 3, kTile});
        factor_of_ = node.ints(3, {-1}, call_.blend + kJaw);
        call_.rows = int64_t(factor_of_.size());
        scale_ = node.floats(4, {call_.rows});
        const Shape fine = node.attributes("fine", 0);  // none: a float basis
        call_.fine = fine.empty() ? -1 : fine[0];
        if (call_.fine > call_.rows || (call_.fine >= 0 && (call_.rows | call_.fine) % 2))
            throw Failure{"fine: expected pairs of the " + std::to_string(call_.rows) + " rows"};
        basis_shape_ = {tiles, call_.rows, 3, kTile};
        if (call_.fine >= 0) basis_shape_ = {tiles, (call_.rows + call_.fine) * kNumbers};
        const char* const spelled = call_.fine < 0 ? "float32" : "int8";
        if (node.constant(2, basis_shape_).type != (call_.fine < 0 ? kFloat : kInt8))
            throw Failure{std::string("basis: expected ") + spelled};
        corners_ = node.ints(8, {-1, -1, 3}, call_.vertices);
        const Shape table = node.constant(8, {-1, -1, 3}).shape;
        barycentric_ = node.floats(9, table);
        if (table[0] % 2 == 0) throw Failure{"landmark_vertices: expected rows for 0, 1.. and -1.. degrees"};
        call_.steps = table[0];
        call_.landmarks = table[1];
        call_.threads = node.threads();
        call_.start = start_.data(), call_.factor_of = factor_of_.data(), call_.scale = scale_.data();
        call_.joints = joints_.data(), call_.joint_dirs = joint_dirs_.data(), call_.jaw_weights = jaw_weights_.data();
        call_.corners = corners_.data(), call_.barycentric = barycentric_.data();
    }

    void compute(const Call& given) const {
        const Tensor parameters = given.input(0, {-1, call_.width});
        const int64_t batch = parameters.shape[0];
        DecodeCall call = call_;
        call.batch = batch;
        call.parameters = parameters.floats();
        call.basis = given.input(2, basis_shape_).data;
        call.out_vertices = given.output(0, {batch, call.vertices, 3});
        call.out_landmarks = given.output(1, {batch, call.landmarks, 3});
        if (batch && flame_decode(&call)) throw std::bad_alloc();
    }

  private:
    std::vector<float> start_, scale_, joints_, joint_dirs_, jaw_weights_, barycentric_;
    std::vector<int32_t> factor_of_, corners_;
    Shape basis_shape_;
    DecodeCall call_;
};

// ---- registration ---------------------------------------------------------------------------------------------------

template <class Body> Status* guard(const Api& api, const char* op, const Body& body) {  // nothing is thrown across C
    const std::string name = std::string("chebface::") + op + ": ";
    try {
        body();
        return nullptr;
    } catch (const Failure& failure) {
        return api.create_status(kInvalidArgument, (name + failure.text).c_str());
    } catch (const std::bad_alloc&) {
        return api.create_status(kRuntimeException, (name + "no memory is left; use a smaller batch").c_str());
    } catch (const std::exception& error) {
        return api.create_status(kRuntimeException, (name + error.what()).c_str());
    }
}

template <class Kernel> struct Held {
    Api api;
    Kernel kernel;
};

template <class Kernel> const CustomOp* make_op() {
    static const CustomOp op = [] {
        CustomOp made;
        made.name = [](const CustomOp*) { return Kernel::kName; };
        made.provider = [](const CustomOp*) -> const char* { return nullptr; };  // the CPU
        made.input_type = [](const CustomOp*, size_t i) -> int { return Kernel::kInputs[i].type; };
        made.input_count = [](const CustomOp*) { return std::size(Kernel::kInputs); };
        made.output_type = [](const CustomOp*, size_t) -> int { return kFloat; };
        made.output_count = [](const CustomOp*) -> size_t { return Kernel::kOutputs; };
        made.destroy = [](void* kernel) { delete static_cast<Held<Kernel>*>(kernel); };
        made.input_is_optional = made.output_is_optional = [](const CustomOp*, size_t) { return 0; };
        made.input_memory = [](const CustomOp*, size_t) { return 0; };
        made.create_kernel_v2 = [](const CustomOp*, void* const* table, const KernelInfo* info, void** kernel) {
            const Api api{table};
            return guard(api, Kernel::kName, [&] {
                *kernel = new Held<Kernel>{api, Kernel(Node{api, info, Kernel::kInputs})};
            });
        };
        made.compute_v2 = [](void* kernel, KernelContext* context) {
            const auto* held = static_cast<const Held<Kernel>*>(kernel);
            return guard(held->api, Kernel::kName,
                         [&] { held->kernel.compute(Call{held->api, context, Kernel::kInputs}); });
        };
        return made;
    }();
    return &op;
}

// Sleeping threads and sessions point into this library, so it stays where it is whoever closes it.
void stay() {
    Dl_info info;
    if (dladdr(reinterpret_cast<void*>(&stay), &info)) dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);
}

}  // namespace

extern "C" Status* RegisterCustomOps(SessionOptions* options, const ApiBase* base) {
    void* const* table = base->get_api(kVersion);
    if (!table) {
        const std::string text = std::string("chebface: expected onnxruntime ") + kRelease + " or later, got " +
                                 base->get_version() + "; pip install -U onnxruntime";
        return Api{base->get_api(1)}.create_status(kNotImplemented, text.c_str());
    }
    const Api api{table};
    return guard(api, "RegisterCustomOps", [&] {
        static std::mutex mutex;
        static std::map<void* const*, Domain*> domains;  // sessions hold on to it: one for each onnxruntime, for good
        const std::lock_guard<std::mutex> lock(mutex);
        Domain*& domain = domains[table];
        if (!domain) {
            stay();
            Domain* made;
            check(api, api.create_domain("chebface", &made));
            check(api, api.add(made, make_op<Encode>()));
            check(api, api.add(made, make_op<Decode>()));
            domain = made;
        }
        check(api, api.add(options, domain));
    });
}
