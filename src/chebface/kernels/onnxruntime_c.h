// onnxruntime's C interface, as far as this project calls it. No header of onnxruntime is needed: the interface is a
// table of functions that is only ever appended to, so a function is its place in the table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace onnxruntime_c {

struct Status;
struct Value;
struct TypeAndShape;
struct TypeInfo;
struct KernelInfo;
struct KernelContext;
struct Env;
struct Session;
struct SessionOptions;
struct RunOptions;
struct MemoryInfo;
struct Allocator;
struct Domain;

enum Code { kInvalidArgument = 2, kRuntimeException = 6, kNotImplemented = 9 };
enum Type { kAny = 0, kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7, kString = 8, kHalf = 10 };

struct Api {  // name, the version that appended it, place
    void* const* table = nullptr;
    template <class Function> Function* at(int place) const { return reinterpret_cast<Function*>(table[place]); }

    Status* create_status(Code code, const char* text) const {  // CreateStatus, 1
        return at<Status*(int, const char*)>(0)(code, text);
    }
    const char* message(const Status* s) const { return at<const char*(const Status*)>(2)(s); }  // GetErrorMessage, 1
    void release(Status* s) const { at<void(Status*)>(93)(s); }                                  // ReleaseStatus, 1

    Status* create_env(int severity, const char* name, Env** out) const {  // CreateEnv, 1
        return at<Status*(int, const char*, Env**)>(3)(severity, name, out);
    }
    void release(Env* env) const { at<void(Env*)>(92)(env); }  // ReleaseEnv, 1

    Status* create_options(SessionOptions** out) const {  // CreateSessionOptions, 1
        return at<Status*(SessionOptions**)>(10)(out);
    }
    Status* set_threads(SessionOptions* options, int count) const {  // SetIntraOpNumThreads, 1
        return at<Status*(SessionOptions*, int)>(24)(options, count);
    }
    Status* set_inter_threads(SessionOptions* options, int count) const {  // SetInterOpNumThreads, 1
        return at<Status*(SessionOptions*, int)>(25)(options, count);
    }
    Status* configure(SessionOptions* options, const char* key, const char* value) const {  // AddSessionConfigEntry, 4
        return at<Status*(SessionOptions*, const char*, const char*)>(130)(options, key, value);
    }
    // RegisterCustomOpsLibrary, 1; the library stays open
    Status* register_operators(SessionOptions* options, const char* path, void** library) const {
        return at<Status*(SessionOptions*, const char*, void**)>(29)(options, path, library);
    }
    void release(SessionOptions* options) const { at<void(SessionOptions*)>(100)(options); }  // ReleaseSessionOptions, 1

    // CreateSession, 1
    Status* create_session(const Env* env, const char* path, const SessionOptions* options, Session** out) const {
        return at<Status*(const Env*, const char*, const SessionOptions*, Session**)>(7)(env, path, options, out);
    }
    Status* count_outputs(const Session* session, size_t* out) const {  // SessionGetOutputCount, 1
        return at<Status*(const Session*, size_t*)>(31)(session, out);
    }
    Status* output_type(const Session* session, size_t index, TypeInfo** out) const {  // SessionGetOutputTypeInfo, 1
        return at<Status*(const Session*, size_t, TypeInfo**)>(34)(session, index, out);
    }
    // SessionGetOutputName, 1; the name is the allocator's to free
    Status* output_name(const Session* session, size_t index, Allocator* allocator, char** out) const {
        return at<Status*(const Session*, size_t, Allocator*, char**)>(37)(session, index, allocator, out);
    }
    // Run, 1; an output that is null is made, another is written to
    Status* run(Session* session, const char* const* inputs, const Value* const* values, size_t count,
                const char* const* outputs, size_t out_count, Value** out) const {
        return at<Status*(Session*, const RunOptions*, const char* const*, const Value* const*, size_t,
                          const char* const*, size_t, Value**)>(9)(session, nullptr, inputs, values, count, outputs,
                                                                   out_count, out);
    }
    void release(Session* session) const { at<void(Session*)>(95)(session); }  // ReleaseSession, 1

    Status* allocator(Allocator** out) const { return at<Status*(Allocator**)>(78)(out); }  // the default one, 1
    Status* free(Allocator* allocator, void* it) const {                                    // AllocatorFree, 1
        return at<Status*(Allocator*, void*)>(76)(allocator, it);
    }
    Status* cpu_memory(MemoryInfo** out) const {  // CreateCpuMemoryInfo, 1; memory of its own, of no arena
        return at<Status*(int, int, MemoryInfo**)>(69)(0, 0, out);
    }
    void release(MemoryInfo* info) const { at<void(MemoryInfo*)>(94)(info); }  // ReleaseMemoryInfo, 1

    // CreateTensorWithDataAsOrtValue, 1; the data stays the caller's
    Status* wrap(const MemoryInfo* memory, void* data, size_t bytes, const int64_t* dims, size_t count, Type type,
                 Value** out) const {
        return at<Status*(const MemoryInfo*, void*, size_t, const int64_t*, size_t, int, Value**)>(49)(
            memory, data, bytes, dims, count, type, out);
    }
    void release(Value* value) const { at<void(Value*)>(96)(value); }  // ReleaseValue, 1

    Status* data(Value* value, void** out) const {  // GetTensorMutableData, 1
        return at<Status*(Value*, void**)>(51)(value, out);
    }
    Status* count_text(const Value* value, size_t* out) const {  // GetStringTensorDataLength, 1
        return at<Status*(const Value*, size_t*)>(53)(value, out);
    }
    // GetStringTensorContent, 1; all strings one behind the other, and where each begins
    Status* text(const Value* value, void* out, size_t bytes, size_t* starts, size_t count) const {
        return at<Status*(const Value*, void*, size_t, size_t*, size_t)>(54)(value, out, bytes, starts, count);
    }

    Status* tensor_info(const TypeInfo* info, const TypeAndShape** out) const {  // CastTypeInfoToTensorInfo, 1
        return at<Status*(const TypeInfo*, const TypeAndShape**)>(55)(info, out);
    }
    void release(TypeInfo* info) const { at<void(TypeInfo*)>(98)(info); }  // ReleaseTypeInfo, 1
    Status* type(const TypeAndShape* info, int* out) const {               // GetTensorElementType, 1
        return at<Status*(const TypeAndShape*, int*)>(60)(info, out);
    }
    Status* count_dims(const TypeAndShape* info, size_t* out) const {  // GetDimensionsCount, 1
        return at<Status*(const TypeAndShape*, size_t*)>(61)(info, out);
    }
    Status* dims(const TypeAndShape* info, int64_t* out, size_t count) const {  // GetDimensions, 1
        return at<Status*(const TypeAndShape*, int64_t*, size_t)>(62)(info, out, count);
    }
    Status* type_and_shape(const Value* value, TypeAndShape** out) const {  // GetTensorTypeAndShape, 1
        return at<Status*(const Value*, TypeAndShape**)>(65)(value, out);
    }
    void release(TypeAndShape* info) const { at<void(TypeAndShape*)>(99)(info); }  // ReleaseTensorTypeAndShapeInfo, 1

    Status* create_domain(const char* name, Domain** out) const {  // CreateCustomOpDomain, 1
        return at<Status*(const char*, Domain**)>(26)(name, out);
    }
    Status* add(Domain* domain, const void* op) const {  // CustomOpDomain_Add, 1
        return at<Status*(Domain*, const void*)>(27)(domain, op);
    }
    Status* add(SessionOptions* options, Domain* domain) const {  // AddCustomOpDomain, 1
        return at<Status*(SessionOptions*, Domain*)>(28)(options, domain);
    }

    // KernelInfoGetAttribute_int64, 1
    Status* attribute(const KernelInfo* info, const char* name, int64_t* out) const {
        return at<Status*(const KernelInfo*, const char*, int64_t*)>(86)(info, name, out);
    }
    // KernelInfoGetAttributeArray_int64, 8; without a place to put them, it gives their count
    Status* attributes(const KernelInfo* info, const char* name, int64_t* out, size_t* count) const {
        return at<Status*(const KernelInfo*, const char*, int64_t*, size_t*)>(163)(info, name, out, count);
    }
    // KernelInfoGetConstantInput_tensor, 15
    Status* constant(const KernelInfo* info, size_t index, int* is_constant, const Value** out) const {
        return at<Status*(const KernelInfo*, size_t, int*, const Value**)>(249)(info, index, is_constant, out);
    }
    Status* input(const KernelContext* context, size_t index, const Value** out) const {  // KernelContext_GetInput, 1
        return at<Status*(const KernelContext*, size_t, const Value**)>(90)(context, index, out);
    }
    // KernelContext_GetOutput, 1
    Status* output(KernelContext* context, size_t index, const int64_t* dims, size_t count, Value** out) const {
        return at<Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)>(91)(context, index, dims, count,
                                                                                        out);
    }
};

struct ApiBase {  // what OrtGetApiBase() gives
    void* const* (*get_api)(uint32_t version);
    const char* (*get_version)();
};

struct Failure {
    std::string text;
};

inline void check(const Api& api, Status* status) {
    if (!status) return;
    const std::string text = api.message(status);
    api.release(status);
    throw Failure{text};
}

typedef std::vector<int64_t> Shape;

inline int64_t product(const Shape& shape) {
    int64_t count = 1;
    for (int64_t size : shape) count *= size;
    return count;
}

struct Outline {  // of a tensor
    int type;
    Shape shape;  // a negative size is any
};

inline Outline outline(const Api& api, const TypeAndShape* info) {
    Outline found;
    size_t count;
    check(api, api.type(info, &found.type));
    check(api, api.count_dims(info, &count));
    found.shape.resize(count);
    check(api, api.dims(info, found.shape.data(), count));
    return found;
}

}  // namespace onnxruntime_c
