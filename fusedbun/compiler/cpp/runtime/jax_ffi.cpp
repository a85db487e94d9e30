// Steps leaves that XLA hands over, in place: one call of XLA's foreign function interface, for every chain.
//
// The operands are lists of numbers, and the arrays of parameters, gradients and state; the results are what is written,
// most of it in the memory of operands. A leaf is a parameter, or a slice of one that is a stack. The attributes are
//   kernels   the names of kernels, with a space behind each; a compiled program may outlive their addresses
//   kinds     for every leaf, which of them steps it
//   buffers   for every array of every leaf, which operand it lies in, or ~n where it lies in result n alone
//   written   for every result, likewise, whose memory it is
//   lists     how many lists of numbers there are
//   records   for every leaf a `Leaf`, with places among the words (the numbers) instead of addresses
//   words     what the leaves point to; where an array's address stands, how many bytes behind its buffer's it begins
#include <algorithm>
#include <atomic>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <unordered_map>
#include <vector>

#include "kernel.h"
#include "xla/ffi/api/c_api.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr Index RECORD = sizeof(Leaf) / sizeof(Index);
constexpr Index THREAD_ELEMENTS = 1 << 14;  // worth a thread of their own

// What Python hands over: the driver's functions (driver.cpp), and kernels by name.
void* (*start_job)(const Leaf*, const Kernel* const*, Index);
void (*work_at)(void*);
void (*end_job)(void*);
std::mutex guard;
auto& kernels = *new std::unordered_map<std::string, const Kernel*>;  // never deleted, for threads may outlive `main`

// A job and those who may work at it. A task that the pool starts late finds nothing left to do; the last to let go of
// the job ends it, so nobody waits for a task that has not begun.
struct Crew {
  void* job;
  std::atomic<int> holders;
  std::atomic<int> working{0};  // tasks that have begun and not ended

  Crew(void* job, int holders) : job(job), holders(holders) {}
  void release() {
    if (holders.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    end_job(job);
    delete this;
  }
};

void help(void* data) {
  Crew* const crew = (Crew*)data;
  crew->working.fetch_add(1, std::memory_order_relaxed);
  // With the fence in `work`: whoever finds all items taken also sees those at work that took one.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  work_at(crew->job);
  crew->working.fetch_sub(1, std::memory_order_release);
  crew->release();
}

struct Call {
  const XLA_FFI_CallFrame& frame;
  const XLA_FFI_Api& api;

  explicit Call(const XLA_FFI_CallFrame& f) : frame(f), api(*f.api) {}

  XLA_FFI_Error* error(const std::string& message, XLA_FFI_Error_Code code) const {
    XLA_FFI_Error_Create_Args args{XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, message.c_str(), code};
    return api.XLA_FFI_Error_Create(&args);
  }

  XLA_FFI_Error* malformed(const char* what) const {
    return error(std::string("fusedbun: a step that does not fit its arrays: ") + what, XLA_FFI_Error_Code_INTERNAL);
  }

  bool failed(XLA_FFI_Error* e) const {  // whether it is an error, which is destroyed
    if (!e) return false;
    XLA_FFI_Error_Destroy_Args args{XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, e};
    api.XLA_FFI_Error_Destroy(&args);
    return true;
  }

  const void* attribute(const char* name, XLA_FFI_AttrType type) const {
    for (int64_t i = 0; i < frame.attrs.size; i++) {
      const XLA_FFI_ByteSpan& found = *frame.attrs.names[i];
      if (frame.attrs.types[i] == type && std::string_view(found.ptr, found.len) == name) return frame.attrs.attrs[i];
    }
    return nullptr;
  }

  const XLA_FFI_Array* integers(const char* name) const {
    const auto* a = (const XLA_FFI_Array*)attribute(name, XLA_FFI_AttrType_ARRAY);
    return a && a->dtype == XLA_FFI_DataType_S64 ? a : nullptr;
  }

  const XLA_FFI_Buffer& operand(int64_t i) const { return *(const XLA_FFI_Buffer*)frame.args.args[i]; }
  const XLA_FFI_Buffer& result(int64_t i) const { return *(const XLA_FFI_Buffer*)frame.rets.rets[i]; }

  const void* buffer(int64_t i) const {  // operand i, or result ~i; null where there is none
    const bool is_operand = i >= 0;
    const int64_t at = is_operand ? i : ~i;
    if (at >= (is_operand ? frame.args.size : frame.rets.size)) return nullptr;
    return is_operand ? operand(at).data : result(at).data;
  }

  int threads() const {  // of XLA's pool; 1 where there is none
    int64_t n = 1;
    XLA_FFI_ThreadPool_NumThreads_Args args{XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, nullptr, frame.ctx, &n};
    return failed(api.XLA_FFI_ThreadPool_NumThreads(&args)) ? 1 : (int)n;
  }

  bool schedule(XLA_FFI_Task* task, void* data) const {
    XLA_FFI_ThreadPool_Schedule_Args args{XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, nullptr, frame.ctx, task, data};
    return !failed(api.XLA_FFI_ThreadPool_Schedule(&args));
  }

  void work(const std::vector<Leaf>& leaves, const std::vector<const Kernel*>& kinds) const {
    Index elements = 0;
    for (const Leaf& leaf : leaves) elements += leaf.rows * leaf.columns;
    const int useful = (int)std::min<Index>(threads(), 1 + elements / THREAD_ELEMENTS);
    Crew* const crew = new Crew(start_job(leaves.data(), kinds.data(), (Index)leaves.size()), useful);
    for (int t = 1; t < useful; t++)
      if (!schedule(help, crew)) crew->release();
    work_at(crew->job);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    while (crew->working.load(std::memory_order_acquire)) std::this_thread::yield();
    crew->release();
  }

  XLA_FFI_Error* run() const {
    const auto* names = (const XLA_FFI_ByteSpan*)attribute("kernels", XLA_FFI_AttrType_STRING);
    const auto* lists = (const XLA_FFI_Scalar*)attribute("lists", XLA_FFI_AttrType_SCALAR);
    const auto *kinds = integers("kinds"), *records = integers("records"), *places = integers("words");
    const auto *buffers = integers("buffers"), *written = integers("written");
    if (!names || !lists || lists->dtype != XLA_FFI_DataType_S64 || !kinds || !records || !places || !buffers ||
        !written)
      return malformed("an attribute is missing");
    const int64_t count = (int64_t)kinds->size;
    if ((int64_t)records->size != RECORD * count) return malformed("records");
    if ((int64_t)written->size != frame.rets.size) return malformed("results");
    for (int64_t i = 0; i < frame.rets.size; i++) {
      const void* const expected = buffer(((const int64_t*)written->data)[i]);
      if (!expected) return malformed("results");
      if (result(i).data != expected) return malformed("a result has memory of its own");
    }

    std::vector<const Kernel*> named, of_leaf;
    const char* const stop = names->ptr + names->len;
    for (const char *p = names->ptr, *end; p < stop; p = end + 1) {
      end = std::find(p, stop, ' ');
      const std::string name(p, end);
      const std::lock_guard<std::mutex> lock(guard);
      const auto found = kernels.find(name);
      if (found == kernels.end())
        return error("fusedbun: this program was compiled with a kernel that this process has not loaded (" + name +
                     "); trace and lower the step here once, or export it with implementation=\"definition\"",
                     XLA_FFI_Error_Code_NOT_FOUND);
      named.push_back(found->second);
    }

    if (*(const int64_t*)lists->value > frame.args.size) return malformed("lists");
    std::vector<double> numbers;
    for (int64_t i = 0; i < *(const int64_t*)lists->value; i++) {
      const XLA_FFI_Buffer& list = operand(i);
      const bool is_double = list.dtype == XLA_FFI_DataType_F64;
      for (int64_t k = 0; k < list.dims[0]; k++)
        numbers.push_back(is_double ? ((const double*)list.data)[k] : ((const float*)list.data)[k]);
    }

    std::vector<Index> words((const Index*)places->data, (const Index*)places->data + places->size);
    std::vector<Leaf> leaves;
    int64_t used = 0;  // of the arrays' buffers
    for (int64_t n = 0; n < count; n++) {
      const Index* const r = (const Index*)records->data + RECORD * n;
      const auto at = [&](int field) { return words.data() + r[field]; };
      Leaf leaf{(void* const*)at(0), at(1), at(2), (const Index* const*)at(3), at(4), numbers.data() + r[5],
                r[6], r[7], r[8], r[9]};
      for (Index a = 0; a < leaf.count; a++, used++) {
        const void* const start = used < (int64_t)buffers->size ? buffer(((const int64_t*)buffers->data)[used]) : nullptr;
        if (!start) return malformed("arrays");
        at(0)[a] += (Index)start;
      }
      leaves.push_back(leaf);
      of_leaf.push_back(named.at(((const Index*)kinds->data)[n]));
    }
    work(leaves, of_leaf);
    return nullptr;
  }
};

}  // namespace

EXPORT void fusedbun_jax_driver(decltype(start_job) job, decltype(work_at) work, decltype(end_job) end) {
  start_job = job;
  work_at = work;
  end_job = end;
}

EXPORT void fusedbun_jax_kernel(const char* name, const Kernel* kernel) {
  const std::lock_guard<std::mutex> lock(guard);
  kernels[name] = kernel;
}

// The handler. XLA also calls it, without a step to do, to ask for the version that it is written for.
EXPORT XLA_FFI_Error* fusedbun_jax_step(XLA_FFI_CallFrame* frame) {
  for (auto* e = frame->extension_start; e; e = e->next) {
    if (e->type != XLA_FFI_Extension_Metadata) continue;
    XLA_FFI_Metadata& about = *((XLA_FFI_Metadata_Extension*)e)->metadata;
    about.api_version.struct_size = XLA_FFI_Api_Version_STRUCT_SIZE;
    about.api_version.major_version = XLA_FFI_API_MAJOR;
    about.api_version.minor_version = XLA_FFI_API_MINOR;
    about.traits = 0;
    return nullptr;
  }
  if (frame->stage != XLA_FFI_ExecutionStage_EXECUTE) return nullptr;
  const Call call(*frame);
  try {
    return call.run();
  } catch (const std::exception& e) {
    return call.error(std::string("fusedbun: ") + e.what(), XLA_FFI_Error_Code_RESOURCE_EXHAUSTED);
  }
}
