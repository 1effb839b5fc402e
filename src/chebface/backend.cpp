// onnxruntime as a backend of Triton Inference Server: what NVIDIA's container has and the pip server lacks, for CPUs.
//
// Triton opens this file as libtriton_onnxruntime.so; onnxruntime is the libonnxruntime.so that lies beside it. A model
// has one session, which its instances share: weights are in memory once. Instances only bring requests: what runs when,
// on which core and with which others, the desk decides. Where a run is one request, its inputs are read where Triton
// holds them. Buffers of answers are asked for when the run is over, and not held while it lasts: a client may vanish
// meanwhile. No header of Triton is needed: what is called of its C interface (1.x, only ever appended to) is declared
// here.
//
// Source: the interface is documented in triton-inference-server/core, include/triton/core/tritonbackend.h.
#include "desk.h"
#include "kernels/onnxruntime_c.h"

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>

// ---- Triton's C interface -------------------------------------------------------------------------------------------

namespace triton {

struct Error;
struct Message;
struct Backend;
struct Model;
struct Instance;
struct Request;
struct Response;
struct Input;
struct Output;

enum ErrorCode { kInternal = 1, kUnavailable = 4 };
enum DataType { kInvalid = 0, kUint8 = 2, kInt32 = 8, kInt64 = 9, kFp16 = 10, kFp32 = 11, kBytes = 13 };
enum MemoryType { kCpu = 0 };
enum { kReleaseAll = 1, kFinal = 1, kInfo = 0, kConfigVersion = 1 };

extern "C" {
Error* TRITONSERVER_ErrorNew(ErrorCode code, const char* text);
const char* TRITONSERVER_ErrorMessage(Error* error);
void TRITONSERVER_ErrorDelete(Error* error);
Error* TRITONSERVER_LogMessage(int level, const char* file, int line, const char* text);
Error* TRITONSERVER_MessageSerializeToJson(Message* message, const char** text, size_t* size);
Error* TRITONSERVER_MessageDelete(Message* message);

Error* TRITONBACKEND_ApiVersion(uint32_t* major, uint32_t* minor);
Error* TRITONBACKEND_BackendArtifacts(Backend* backend, int* kind, const char** folder);
Error* TRITONBACKEND_BackendState(Backend* backend, void** state);
Error* TRITONBACKEND_BackendSetState(Backend* backend, void* state);

Error* TRITONBACKEND_ModelBackend(Model* model, Backend** backend);
Error* TRITONBACKEND_ModelName(Model* model, const char** name);
Error* TRITONBACKEND_ModelVersion(Model* model, uint64_t* version);
Error* TRITONBACKEND_ModelRepository(Model* model, int* kind, const char** folder);
Error* TRITONBACKEND_ModelConfig(Model* model, uint32_t version, Message** config);
Error* TRITONBACKEND_ModelState(Model* model, void** state);
Error* TRITONBACKEND_ModelSetState(Model* model, void* state);

Error* TRITONBACKEND_ModelInstanceModel(Instance* instance, Model** model);
Error* TRITONBACKEND_ModelInstanceReportStatistics(Instance* instance, Request* request, bool success, uint64_t began,
                                                   uint64_t compute_began, uint64_t compute_ended, uint64_t ended);
Error* TRITONBACKEND_ModelInstanceReportBatchStatistics(Instance* instance, uint64_t batch, uint64_t began,
                                                        uint64_t compute_began, uint64_t compute_ended,
                                                        uint64_t ended);

Error* TRITONBACKEND_RequestInputCount(Request* request, uint32_t* count);
Error* TRITONBACKEND_RequestInputByIndex(Request* request, uint32_t index, Input** input);
Error* TRITONBACKEND_RequestInput(Request* request, const char* name, Input** input);
Error* TRITONBACKEND_RequestOutputCount(Request* request, uint32_t* count);
Error* TRITONBACKEND_RequestOutputName(Request* request, uint32_t index, const char** name);
Error* TRITONBACKEND_RequestRelease(Request* request, uint32_t flags);
Error* TRITONBACKEND_InputProperties(Input* input, const char** name, DataType* type, const int64_t** dims,
                                     uint32_t* count, uint64_t* bytes, uint32_t* buffers);
Error* TRITONBACKEND_InputBuffer(Input* input, uint32_t index, const void** data, uint64_t* bytes, MemoryType* memory,
                                 int64_t* device);

Error* TRITONBACKEND_ResponseNew(Response** response, Request* request);
Error* TRITONBACKEND_ResponseOutput(Response* response, Output** output, const char* name, DataType type,
                                    const int64_t* dims, uint32_t count);
Error* TRITONBACKEND_OutputBuffer(Output* output, void** data, uint64_t bytes, MemoryType* memory, int64_t* device);
Error* TRITONBACKEND_ResponseSend(Response* response, uint32_t flags, Error* error);
}

}  // namespace triton

namespace {

using namespace onnxruntime_c;
namespace t = triton;

constexpr uint32_t kVersion = 4;  // of onnxruntime's interface: the last that something here wants
constexpr size_t kAligned = 16;   // bytes: tensors elsewhere are copied
constexpr int64_t kMerged = 8;    // faces: more in a run are no faster each, and take more memory
constexpr size_t kKept = size_t(16) << 20;  // bytes that a thread keeps to join inputs in

void check(t::Error* error) {
    if (!error) return;
    const std::string text = t::TRITONSERVER_ErrorMessage(error);
    t::TRITONSERVER_ErrorDelete(error);
    throw Failure{text};
}

void ignore(t::Error* error) {  // where nothing can be done about it
    if (error) t::TRITONSERVER_ErrorDelete(error);
}

template <class Body> t::Error* guard(const std::string& what, const Body& body) {  // nothing is thrown across C
    try {
        body();
        return nullptr;
    } catch (const Failure& failure) {
        return t::TRITONSERVER_ErrorNew(t::kInternal, (what + ": " + failure.text).c_str());
    } catch (const std::bad_alloc&) {
        return t::TRITONSERVER_ErrorNew(t::kInternal, (what + ": no memory is left").c_str());
    } catch (const std::exception& error) {
        return t::TRITONSERVER_ErrorNew(t::kInternal, (what + ": " + error.what()).c_str());
    }
}

uint64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

struct Kind {
    t::DataType triton;
    Type onnx;
    size_t bytes;
};

constexpr Kind kKinds[] = {{t::kUint8, kUint8, 1}, {t::kInt32, kInt32, 4}, {t::kInt64, kInt64, 8},
                           {t::kFp16, kHalf, 2},   {t::kFp32, kFloat, 4},  {t::kBytes, kString, 0}};

template <class Match> const Kind& find_kind(const std::string& name, const Match& match) {
    for (const Kind& kind : kKinds)
        if (match(kind)) return kind;
    throw Failure{name + ": expected UINT8, INT32, INT64, FP16 or FP32, or an output of BYTES"};
}

// A number or a text of the model's configuration as Triton spells it: "key":1, "key":"text" or, of its parameters,
// "key":{"string_value":"1"}.
std::string find_setting(const std::string& json, const std::string& key, const std::string& otherwise) {
    const size_t at = json.find("\"" + key + "\":");
    if (at == std::string::npos) return otherwise;
    size_t from = at + key.size() + 3;
    const std::string nested = "{\"string_value\":";
    if (!json.compare(from, nested.size(), nested)) from += nested.size();
    const bool quoted = json[from] == '"';
    from += quoted;
    return json.substr(from, json.find_first_of(quoted ? "\"" : ",}", from) - from);
}

int to_count(const std::string& key, const std::string& text) {
    char* end;
    const long count = std::strtol(text.c_str(), &end, 10);
    if (text.empty() || *end || count < 0 || count > 4096)
        throw Failure{key + ": expected a number from 0 to 4096, got '" + text + "'"};
    return int(count);
}

int find_count(const std::string& json, const std::string& key, int otherwise) {
    return to_count(key, find_setting(json, key, std::to_string(otherwise)));
}

int read_count(const char* variable) {  // of the environment; 0: not set
    const char* text = std::getenv(variable);
    return text ? to_count(variable, text) : 0;
}

// ---- what lives as long as the backend, and as a model --------------------------------------------------------------

template <class Thing> struct Release {
    Api api;
    void operator()(Thing* it) const { api.release(it); }
};
template <class Thing> using Owned = std::unique_ptr<Thing, Release<Thing>>;

// Where Triton's time to stop is over, it ends the process with runs at work: exit() must not destroy what onnxruntime
// is made of before they are done.
class Gate {
  public:
    bool enter() {
        const std::lock_guard<std::mutex> lock(mutex_);
        inside_ += !closed_;
        return !closed_;
    }
    void leave() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!--inside_) empty_.notify_all();
    }
    void close() {
        std::unique_lock<std::mutex> lock(mutex_);
        closed_ = true;
        empty_.wait_for(lock, std::chrono::seconds(10), [&] { return !inside_; });
    }

  private:
    std::mutex mutex_;
    std::condition_variable empty_;
    int inside_ = 0;
    bool closed_ = false;
};

Gate& gate() {
    static Gate* const made = new Gate;  // for good: runs ask it until the end
    return *made;
}

struct Runtime {
    Api api;
    Owned<Env> env;
    Owned<MemoryInfo> memory;
    std::string version;

    explicit Runtime(const std::string& folder) {
        const std::string path = folder + "/libonnxruntime.so";
        void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);  // stays open: its threads may outlive us
        if (!library) throw Failure{dlerror()};
        const auto get = reinterpret_cast<const ApiBase* (*)()>(dlsym(library, "OrtGetApiBase"));
        if (!get) throw Failure{path + ": is no onnxruntime"};
        version = get()->get_version();
        api.table = get()->get_api(kVersion);
        if (!api.table) throw Failure{path + ": expected onnxruntime 1.4 or later, got " + version};
        Env* made;
        ::onnxruntime_c::check(api, api.create_env(3, "chebface", &made));  // errors and worse
        env = {made, {api}};
        MemoryInfo* info;
        ::onnxruntime_c::check(api, api.cpu_memory(&info));
        memory = {info, {api}};
    }
};

struct Result {  // an output of the model
    std::string name;
    const Kind* kind;
};

struct Served {
    const Runtime& runtime;
    Owned<Session> session;
    std::vector<Result> results;
    int threads;  // of a run; 0: one a core
    bool batched;
    mutable std::once_flag ran;

    Served(const Runtime& given, const std::string& folder, const std::string& config) : runtime(given) {
        const Api& api = runtime.api;
        const auto ort = [&](Status* status) { ::onnxruntime_c::check(api, status); };
        batched = find_count(config, "max_batch_size", 0) > 0;
        SessionOptions* made;
        ort(api.create_options(&made));
        const Owned<SessionOptions> options(made, {api});
        threads = find_count(config, "intra_op_thread_count", 1);
        ort(api.set_threads(made, threads));
        ort(api.set_inter_threads(made, find_count(config, "inter_op_thread_count", 1)));
        ort(api.configure(made, "session.intra_op.allow_spinning", "0"));  // the cores are shared
        const std::string operators = folder + "/operators.so";
        void* library;
        if (FILE* file = std::fopen(operators.c_str(), "rb")) {  // our own kernels, which the model names
            std::fclose(file);
            ort(api.register_operators(made, operators.c_str(), &library));
            if (threads) threads = std::max(threads, read_count("CHEBFACE_THREADS"));  // theirs, at least
        }
        const std::string path = folder + "/" + find_setting(config, "default_model_filename", "model.onnx");
        Session* opened;
        ort(api.create_session(runtime.env.get(), path.c_str(), made, &opened));
        session = {opened, {api}};
        size_t count;
        ort(api.count_outputs(opened, &count));
        for (size_t i = 0; i < count; ++i) results.push_back(describe(i));
    }

  private:
    Result describe(size_t index) const {
        const Api& api = runtime.api;
        const auto ort = [&](Status* status) { ::onnxruntime_c::check(api, status); };
        Allocator* allocator;
        ort(api.allocator(&allocator));
        char* name;
        ort(api.output_name(session.get(), index, allocator, &name));
        Result result{name, nullptr};
        ort(api.free(allocator, name));
        TypeInfo* made;
        ort(api.output_type(session.get(), index, &made));
        const Owned<TypeInfo> owner(made, {api});
        const TypeAndShape* info;
        ort(api.tensor_info(made, &info));
        if (!info) throw Failure{result.name + ": expected a tensor"};
        const int type = outline(api, info).type;
        result.kind = &find_kind(result.name, [&](const Kind& kind) { return kind.onnx == type; });
        return result;
    }
};

// ---- one run --------------------------------------------------------------------------------------------------------

struct Tensor {  // what a request brings
    const char* name;
    const Kind* kind;
    Shape shape;
    std::vector<std::pair<const void*, uint64_t>> pieces;
    uint64_t bytes;
};

Tensor read(t::Input* input) {
    Tensor tensor{};
    t::DataType type;
    const int64_t* dims;
    uint32_t count, buffers;
    check(t::TRITONBACKEND_InputProperties(input, &tensor.name, &type, &dims, &count, &tensor.bytes, &buffers));
    tensor.kind = &find_kind(tensor.name, [&](const Kind& kind) { return kind.triton == type && kind.bytes; });
    tensor.shape.assign(dims, dims + count);
    for (uint32_t i = 0; i < buffers; ++i) {
        const void* data;
        uint64_t bytes;
        t::MemoryType memory = t::kCpu;
        int64_t device = 0;
        check(t::TRITONBACKEND_InputBuffer(input, i, &data, &bytes, &memory, &device));
        if (memory > 1) throw Failure{std::string(tensor.name) + ": is in a GPU's memory, and this backend has none"};
        tensor.pieces.emplace_back(data, bytes);
    }
    return tensor;
}

struct Account {  // of a run, for Triton's statistics
    int64_t batch = 0;
    uint64_t began = 0, ended = 0;
};

class Run {
  public:
    Run(const Served& served, t::Request** requests, uint32_t count, std::vector<std::vector<char>>& scratch)
        : served_(served), api_(served.runtime.api), requests_(requests), count_(count), scratch_(scratch) {}

    void compute(int core, Account& account) {
        gather();
        choose();
        account.began = now_ns();
        std::vector<const Value*> inputs;
        std::vector<Value*> outputs(outputs_.size());  // null: onnxruntime makes them
        for (const auto& value : inputs_) inputs.push_back(value.get());
        Status* status;
        {
            const Held held(core);  // no longer: sending answers may start threads
            status = api_.run(served_.session.get(), names_.data(), inputs.data(), inputs.size(), wanted_.data(),
                              wanted_.size(), outputs.data());
        }
        for (size_t i = 0; i < outputs.size(); ++i) outputs_[i] = {outputs[i], {api_}};
        account.ended = now_ns();
        account.batch = batch_;
        ort(status);
    }

    // Each request's outputs into its response. Where one has no room for them, its error says so: others get theirs.
    void hand_out(const std::vector<t::Response*>& responses, std::vector<std::string>& errors) const {
        for (size_t i = 0; i < results_.size(); ++i) {
            const Result& result = *results_[i];
            TypeAndShape* info;
            ort(api_.type_and_shape(outputs_[i].get(), &info));
            Shape shape;
            {
                const Owned<TypeAndShape> owner(info, {api_});
                shape = outline(api_, info).shape;
            }
            if (served_.batched && (shape.empty() || shape[0] != batch_))
                throw Failure{result.name + ": expected " + std::to_string(batch_) + " in its first dimension"};
            const std::vector<char> texts = result.kind->bytes ? std::vector<char>() : spell(i, product(shape));
            const char* from = texts.data();
            if (result.kind->bytes) {
                void* data;
                ort(api_.data(outputs_[i].get(), &data));
                from = static_cast<const char*>(data);
            }
            const bool whole = !served_.batched || count_ == 1;
            if (!whole && !result.kind->bytes) throw Failure{result.name + ": texts cannot be shared out over a batch"};
            size_t bytes = result.kind->bytes ? product(shape) * result.kind->bytes : texts.size();
            const size_t each = bytes / std::max<int64_t>(batch_, 1);
            for (uint32_t r = 0; r < count_; from += bytes, ++r) {
                if (!whole) bytes = sizes_[r] * each, shape[0] = sizes_[r];
                if (std::find(asked_[r].begin(), asked_[r].end(), result.name) == asked_[r].end()) continue;
                try {
                    std::memcpy(buffer(responses[r], result, shape, bytes), from, bytes);
                } catch (const Failure& failure) {
                    errors[r] = failure.text;
                }
            }
        }
    }

  private:
    void ort(Status* status) const { ::onnxruntime_c::check(api_, status); }

    // The inputs of all requests, one behind the other.
    void gather() {
        uint32_t inputs;
        check(t::TRITONBACKEND_RequestInputCount(requests_[0], &inputs));
        scratch_.resize(std::max<size_t>(scratch_.size(), inputs));
        for (uint32_t i = 0; i < inputs; ++i) {
            t::Input* input;
            check(t::TRITONBACKEND_RequestInputByIndex(requests_[0], i, &input));
            std::vector<Tensor> parts{read(input)};
            for (uint32_t r = 1; r < count_; ++r) {
                check(t::TRITONBACKEND_RequestInput(requests_[r], parts[0].name, &input));
                parts.push_back(read(input));
            }
            take(parts, scratch_[i], i == 0);
        }
    }

    void take(const std::vector<Tensor>& parts, std::vector<char>& joined, bool first) {
        const Tensor& model = parts[0];
        Shape shape = model.shape;
        uint64_t bytes = 0;
        if (served_.batched) shape.at(0) = 0;
        for (const Tensor& part : parts) {
            const size_t lead = served_.batched;
            if (part.kind != model.kind || part.shape.size() != shape.size() ||
                !std::equal(part.shape.begin() + lead, part.shape.end(), shape.begin() + lead) ||
                part.bytes != uint64_t(product(part.shape)) * part.kind->bytes)
                throw Failure{std::string(model.name) + ": requests of one batch differ in shape, type or size"};
            if (served_.batched) {
                shape[0] += part.shape[0];
                if (first) sizes_.push_back(part.shape[0]);
            }
            bytes += part.bytes;
        }
        if (first) batch_ = served_.batched ? shape[0] : 1;
        const void* data = parts.size() == 1 && model.pieces.size() == 1 ? model.pieces[0].first : nullptr;
        if (!data || reinterpret_cast<uintptr_t>(data) % kAligned) {
            if (joined.size() > kKept && bytes <= kKept) std::vector<char>().swap(joined);
            if (joined.size() < bytes) joined.resize(bytes);
            char* to = joined.data();
            for (const Tensor& part : parts)
                for (const auto& [from, size] : part.pieces) {
                    if (size > size_t(joined.data() + bytes - to)) throw Failure{"an input is longer than it says"};
                    std::memcpy(to, from, size);
                    to += size;
                }
            data = joined.data();
        }
        Value* value;
        ort(api_.wrap(served_.runtime.memory.get(), const_cast<void*>(data), bytes, shape.data(), shape.size(),
                      model.kind->onnx, &value));
        inputs_.emplace_back(value, Release<Value>{api_});
        names_.push_back(model.name);
    }

    // The outputs that somebody asked for.
    void choose() {
        asked_.resize(count_);
        for (uint32_t r = 0; r < count_; ++r) {
            uint32_t outputs;
            check(t::TRITONBACKEND_RequestOutputCount(requests_[r], &outputs));
            for (uint32_t i = 0; i < outputs; ++i) {
                const char* name;
                check(t::TRITONBACKEND_RequestOutputName(requests_[r], i, &name));
                asked_[r].emplace_back(name);
            }
        }
        for (const Result& result : served_.results) {
            const auto asks = [&](const auto& names) {
                return std::find(names.begin(), names.end(), result.name) != names.end();
            };
            if (!std::any_of(asked_.begin(), asked_.end(), asks)) continue;
            results_.push_back(&result);
            wanted_.push_back(result.name.c_str());
        }
        outputs_.resize(results_.size());
    }

    void* buffer(t::Response* response, const Result& result, const Shape& shape, size_t bytes) const {
        t::Output* output;
        check(t::TRITONBACKEND_ResponseOutput(response, &output, result.name.c_str(), result.kind->triton,
                                              shape.data(), uint32_t(shape.size())));
        void* data;
        t::MemoryType memory = t::kCpu;
        int64_t device = 0;
        check(t::TRITONBACKEND_OutputBuffer(output, &data, bytes, &memory, &device));
        if (memory > 1) throw Failure{result.name + ": is wanted in a GPU's memory, and this backend has none"};
        return data;
    }

    // Texts as they travel: each behind its length, 4 bytes, little endian.
    std::vector<char> spell(size_t index, int64_t count) const {
        const Value* value = outputs_[index].get();
        size_t bytes;
        ort(api_.count_text(value, &bytes));
        std::vector<char> text(bytes);
        std::vector<size_t> starts(count);
        ort(api_.text(value, text.data(), bytes, starts.data(), starts.size()));
        std::vector<char> found;
        for (int64_t i = 0; i < count; ++i) {
            const size_t last = i + 1 < count ? starts[i + 1] : bytes;
            const uint32_t size = uint32_t(last - starts[i]);
            const char* length = reinterpret_cast<const char*>(&size);
            found.insert(found.end(), length, length + sizeof size);
            found.insert(found.end(), text.data() + starts[i], text.data() + last);
        }
        return found;
    }

    const Served& served_;
    const Api& api_;
    t::Request** requests_;
    uint32_t count_;
    std::vector<std::vector<char>>& scratch_;
    int64_t batch_ = 0;
    std::vector<int64_t> sizes_;                   // faces of each request
    std::vector<std::vector<std::string>> asked_;  // outputs of each request
    std::vector<const char*> names_, wanted_;
    std::vector<Owned<Value>> inputs_, outputs_;
    std::vector<const Result*> results_;
};

void execute(t::Instance* instance, const Served& served, t::Request** requests, uint32_t count, int core) {
    static thread_local std::vector<std::vector<char>> scratch;
    const uint64_t began = now_ns();
    std::vector<t::Response*> responses(count, nullptr);
    std::vector<std::string> errors(count);
    Account account;
    Run run(served, requests, count, scratch);
    const bool open = gate().enter();
    t::Error* error = guard("onnxruntime", [&] {
        if (!open) throw Failure{"the server is stopping"};
        run.compute(core, account);
    });
    if (error && open && count > 1) {  // nobody shall fail for another's sake
        gate().leave();
        ignore(error);
        for (uint32_t r = 0; r < count; ++r) execute(instance, served, requests + r, 1, core);
        return;
    }
    if (!error)
        error = guard("onnxruntime", [&] {
            for (uint32_t r = 0; r < count; ++r) check(t::TRITONBACKEND_ResponseNew(&responses[r], requests[r]));
            run.hand_out(responses, errors);
        });
    const bool failed = error;
    if (failed) std::fill(errors.begin(), errors.end(), t::TRITONSERVER_ErrorMessage(error));
    ignore(error);
    const t::ErrorCode code = open ? t::kInternal : t::kUnavailable;
    for (uint32_t r = 0; r < count; ++r) {
        if (!responses[r]) ignore(t::TRITONBACKEND_ResponseNew(&responses[r], requests[r]));
        t::Error* told = errors[r].empty() ? nullptr : t::TRITONSERVER_ErrorNew(code, errors[r].c_str());
        if (responses[r]) ignore(t::TRITONBACKEND_ResponseSend(responses[r], t::kFinal, told));
    }
    if (open) gate().leave();
    // What a first run made is destroyed before what was there: the handler must be younger than all of it.
    std::call_once(served.ran, [] { std::atexit([] { gate().close(); }); });
    const uint64_t ended = now_ns();
    const uint64_t compute_began = account.began ? account.began : ended;
    const uint64_t compute_ended = account.ended ? account.ended : ended;
    for (uint32_t r = 0; r < count; ++r)
        ignore(t::TRITONBACKEND_ModelInstanceReportStatistics(instance, requests[r], errors[r].empty(), began,
                                                              compute_began, compute_ended, ended));
    if (!failed && account.batch)
        ignore(t::TRITONBACKEND_ModelInstanceReportBatchStatistics(instance, uint64_t(account.batch), began,
                                                                   compute_began, compute_ended, ended));
    for (uint32_t r = 0; r < count; ++r) ignore(t::TRITONBACKEND_RequestRelease(requests[r], t::kReleaseAll));
}

// ---- who runs when --------------------------------------------------------------------------------------------------

struct Given : Desk::Call {
    t::Instance* instance;
    const Served& served;
    t::Request** requests;
};

int64_t count_faces(t::Request* request) {
    int64_t faces = 1;
    ignore(guard("", [&] {
        t::Input* input;
        check(t::TRITONBACKEND_RequestInputByIndex(request, 0, &input));
        faces = std::max<int64_t>(1, read(input).shape.at(0));
    }));
    return faces;
}

void run(const std::vector<Desk::Part>& parts, int core) {
    std::vector<t::Request*> requests;
    for (const Desk::Part& part : parts) {
        t::Request** const given = static_cast<const Given*>(part.call)->requests;
        requests.insert(requests.end(), given + part.first, given + part.last);
    }
    const Given& first = *static_cast<const Given*>(parts[0].call);
    execute(first.instance, first.served, requests.data(), uint32_t(requests.size()), core);
}

Desk& desk() {
    static Desk* const made = new Desk(kMerged, read_count("CHEBFACE_CORES"), run);  // for good, too
    return *made;
}

}  // namespace

// ---- what Triton calls ----------------------------------------------------------------------------------------------

extern "C" {

t::Error* TRITONBACKEND_Initialize(t::Backend* backend) {
    return guard("onnxruntime backend", [&] {
        uint32_t major, minor;
        check(t::TRITONBACKEND_ApiVersion(&major, &minor));
        if (major != 1) throw Failure{"expected Triton's backend interface 1.x, got " + std::to_string(major)};
        desk();
        int kind;
        const char* folder;
        check(t::TRITONBACKEND_BackendArtifacts(backend, &kind, &folder));
        auto runtime = std::make_unique<Runtime>(folder);
        const std::string text = "chebface's onnxruntime backend, onnxruntime " + runtime->version;
        ignore(t::TRITONSERVER_LogMessage(t::kInfo, "backend.cpp", __LINE__, text.c_str()));
        check(t::TRITONBACKEND_BackendSetState(backend, runtime.get()));
        runtime.release();
    });
}

t::Error* TRITONBACKEND_Finalize(t::Backend* backend) {
    void* state = nullptr;
    t::Error* error = t::TRITONBACKEND_BackendState(backend, &state);
    delete static_cast<Runtime*>(state);
    return error;
}

t::Error* TRITONBACKEND_ModelInitialize(t::Model* model) {
    const char* name = "";
    ignore(t::TRITONBACKEND_ModelName(model, &name));
    return guard(name, [&] {
        t::Backend* backend;
        void* runtime;
        int kind;
        const char* folder;
        uint64_t version;
        check(t::TRITONBACKEND_ModelBackend(model, &backend));
        check(t::TRITONBACKEND_BackendState(backend, &runtime));
        check(t::TRITONBACKEND_ModelRepository(model, &kind, &folder));
        check(t::TRITONBACKEND_ModelVersion(model, &version));
        t::Message* message;
        check(t::TRITONBACKEND_ModelConfig(model, t::kConfigVersion, &message));
        const char* text;
        size_t size;
        t::Error* error = t::TRITONSERVER_MessageSerializeToJson(message, &text, &size);
        const std::string config = error ? "" : std::string(text, size);
        ignore(t::TRITONSERVER_MessageDelete(message));
        check(error);
        auto served = std::make_unique<Served>(*static_cast<Runtime*>(runtime),
                                               folder + ("/" + std::to_string(version)), config);
        check(t::TRITONBACKEND_ModelSetState(model, served.get()));
        served.release();
    });
}

t::Error* TRITONBACKEND_ModelFinalize(t::Model* model) {
    void* state = nullptr;
    t::Error* error = t::TRITONBACKEND_ModelState(model, &state);
    delete static_cast<Served*>(state);
    return error;
}

t::Error* TRITONBACKEND_ModelInstanceExecute(t::Instance* instance, t::Request** requests, const uint32_t count) {
    t::Model* model;
    void* served;
    if (t::Error* error = t::TRITONBACKEND_ModelInstanceModel(instance, &model)) return error;
    if (t::Error* error = t::TRITONBACKEND_ModelState(model, &served)) return error;
    const Served& known = *static_cast<const Served*>(served);
    if (!known.batched) {
        for (uint32_t r = 0; r < count; ++r) execute(instance, known, requests + r, 1, -1);
        return nullptr;
    }
    return guard("onnxruntime backend", [&] {
        Given given{{&known, known.threads ? known.threads : INT_MAX, {}}, instance, known, requests};
        for (uint32_t r = 0; r < count; ++r) given.sizes.push_back(count_faces(requests[r]));
        desk().serve(given);
    });
}

}
