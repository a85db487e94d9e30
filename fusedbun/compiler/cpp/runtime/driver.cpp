// Steps a list of leaves with generated kernels, on as many threads as its caller runs `work` on.
//
// The work is one list of items in a fixed order: every pass over every chunk of rows of every leaf. Threads take items
// from its front. An item of a later pass waits for the leaf's pass before it, whose items all come earlier in the list,
// so that some thread is at work on them: nothing can wait for ever, whatever the number of threads. Chunks depend on the
// leaf's shape alone and their reductions are combined in their order, so the result does not depend on threads either.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "kernel.h"

namespace {

constexpr Index MOST_CHUNKS = 64;
constexpr Index CHUNK_ELEMENTS = 1 << 15;  // enough that taking an item costs nothing beside it
constexpr Index CHUNK_ROWS = 128;          // a chunk's reductions take a vector of the columns: under 1% of its rows
constexpr Index COPIED_ELEMENTS = 1 << 14; // of a leaf whose elements do not follow one another, at a time
constexpr Index FEW_ROWS = 32;             // at most as many, and as long: blocks of columns
constexpr Index LONG_ROW = 1 << 15;
constexpr Index ALIGNMENT = 64;

Index up(Index n, Index to) { return (n + to - 1) / to * to; }

struct Free { void operator()(void* p) const { std::free(p); } };
using Memory = std::unique_ptr<char, Free>;
Memory memory(Index bytes) {
  char* p = bytes ? (char*)std::aligned_alloc(ALIGNMENT, up(bytes, ALIGNMENT)) : nullptr;
  if (bytes && !p) throw std::bad_alloc();
  return Memory(p);
}

bool is_left_out(const Leaf& leaf) {  // empty, or without a gradient
  return !leaf.rows || !leaf.columns || !leaf.arrays[1];
}

bool in_order(const Leaf& leaf) {  // whether the elements of every array follow one another
  return std::all_of(leaf.steps, leaf.steps + leaf.count, [](const Index* s) { return !s; });
}

// Copies elements begin … end of a leaf's array, in the order of its axes, to a buffer or back.
template <class E>
void transfer(const Leaf& leaf, const Index* steps, char* array, E* buffer, Index begin, Index end, bool back) {
  const Index inner = leaf.sizes[leaf.axes - 1], step = steps[leaf.axes - 1];
  while (begin < end) {
    Index rest = begin / inner, at = begin % inner * step;
    for (Index a = leaf.axes - 1; a-- > 0; rest /= leaf.sizes[a]) at += rest % leaf.sizes[a] * steps[a];
    const Index run = std::min(end - begin, inner - begin % inner);
    char* p = array + at;
    if (back) for (Index k = 0; k < run; k++, p += step) std::memcpy(p, buffer + k, sizeof(E));
    else for (Index k = 0; k < run; k++, p += step) std::memcpy(buffer + k, p, sizeof(E));
    begin += run;
    buffer += run;
  }
}

void transfer(const Leaf& leaf, Index a, void* buffer, Index begin, Index end, bool back) {
  char* array = (char*)leaf.arrays[a];
  switch (leaf.widths[a]) {
    case 1: return transfer(leaf, leaf.steps[a], array, (uint8_t*)buffer, begin, end, back);
    case 2: return transfer(leaf, leaf.steps[a], array, (uint16_t*)buffer, begin, end, back);
    case 4: return transfer(leaf, leaf.steps[a], array, (uint32_t*)buffer, begin, end, back);
    default: return transfer(leaf, leaf.steps[a], array, (uint64_t*)buffer, begin, end, back);
  }
}

enum class Way { flat, rows, packed, columns };

// A leaf, how it is gone over, and how far that is.
struct Task {
  const Leaf* leaf;
  const Kernel* kernel;
  const Plan* plan;
  Way way;
  Index extent, chunk, chunks;  // rows (columns, elements), of a chunk, and chunks
  Work work{};
  Memory held;
  std::atomic<Index> taken{0}, done{0}, ready{-1};  // items begun, items ended, passes that may run

  Task(const Leaf& l, const Kernel& k) : leaf(&l), kernel(&k) {
    if (k.flat) way = Way::flat, plan = k.flat;
    else if (k.columns && l.rows <= FEW_ROWS && l.columns >= LONG_ROW && in_order(l)) way = Way::columns, plan = k.columns;
    else if (k.packed && l.columns < 2 * k.lanes && l.rows >= k.lanes && in_order(l)) way = Way::packed, plan = k.packed;
    else way = Way::rows, plan = k.rows;
    if (way == Way::flat) {
      extent = l.rows * l.columns;
      chunk = CHUNK_ELEMENTS;
    } else if (way == Way::columns) {
      extent = l.columns;
      chunk = std::max(up(CHUNK_ELEMENTS / l.rows, 64), up(up(extent, MOST_CHUNKS) / MOST_CHUNKS, 64));
    } else {
      extent = l.rows;
      const Index rows = std::max(CHUNK_ROWS, up(CHUNK_ELEMENTS, l.columns) / l.columns);
      chunk = up(std::max(rows, up(extent, MOST_CHUNKS) / MOST_CHUNKS), 16);
    }
    chunks = std::max<Index>(1, (extent + chunk - 1) / chunk);
  }

  Index vector() const { return up((way == Way::columns ? leaf->rows : leaf->columns) * kernel->element, ALIGNMENT); }

  void start() {
    const Index small = plan->vectors * vector() + up(plan->scalars * kernel->element, ALIGNMENT);
    const Index kept = up(plan->kept * (way == Way::columns ? leaf->columns : leaf->rows) * kernel->element, ALIGNMENT);
    work.partial_bytes = plan->partial_vectors * vector() + up(plan->partial_scalars * kernel->element, ALIGNMENT);
    held = memory(small + kept + work.partial_bytes * chunks);
    work.leaf = leaf;
    work.arrays = leaf->arrays;
    work.strides = leaf->strides;
    work.small = held.get();
    work.kept = held.get() + small;
    work.partial = held.get() + small + kept;
    work.chunks = chunks;
    plan->between[0](work);
    ready.store(0, std::memory_order_release);
  }

  void run(Index item) {
    const Index pass = item / chunks;
    // Every other pass goes backwards, for what was read last is still in the cache.
    const Index c = pass % 2 ? chunks - 1 - item % chunks : item % chunks;
    if (item == 0) start();
    for (int spins = 0; ready.load(std::memory_order_acquire) < pass;)
      if (++spins > 1000) std::this_thread::yield();
    chunk_of(pass, c);
    if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == (pass + 1) * chunks) {
      plan->between[pass + 1](work);
      if (pass + 1 == plan->passes) held.reset();
      ready.store(pass + 1, std::memory_order_release);
    }
  }

  void chunk_of(Index pass, Index c) {
    Work w = work;
    w.partial = (char*)work.partial + c * work.partial_bytes;
    const Index begin = c * chunk, end = std::min(extent, begin + chunk);
    const Memory buffer = memory(plan->buffer(*leaf));
    w.buffer = buffer.get();
    plan->begin[pass](w);
    if (way == Way::flat ? in_order(*leaf) : !is_scattered()) plan->pass[pass](w, begin, end);
    else copied(w, pass, begin, end);
  }

  bool is_scattered() const {
    return std::any_of(leaf->strides, leaf->strides + leaf->count, [](Index s) { return s == SCATTERED; });
  }

  // A part of the chunk at a time: copied to where its elements follow one another, stepped there, and copied back.
  void copied(Work& w, Index pass, Index begin, Index end) {
    const Index unit = way == Way::flat ? 1 : leaf->columns;
    const Index most = way == Way::flat ? COPIED_ELEMENTS : up(std::max<Index>(1, COPIED_ELEMENTS / unit), 16);
    std::vector<void*> arrays(leaf->arrays, leaf->arrays + leaf->count);
    std::vector<Index> strides(leaf->strides, leaf->strides + leaf->count);
    std::vector<Memory> copies(leaf->count);
    const auto copy_of = [&](Index a) { return leaf->steps[a] && (way == Way::flat || strides[a] == SCATTERED); };
    for (Index a = 0; a < leaf->count; a++)
      if (copy_of(a)) copies[a] = memory(std::min(most, end - begin) * unit * leaf->widths[a]);
    for (Index i = begin; i < end; i += most) {
      const Index stop = std::min(end, i + most);
      for (Index a = 0; a < leaf->count; a++) {
        if (!copies[a]) continue;
        transfer(*leaf, a, copies[a].get(), i * unit, stop * unit, false);
        arrays[a] = copies[a].get() - i * unit * leaf->widths[a];
      }
      std::vector<Index> dense = strides;
      for (Index a = 0; a < leaf->count; a++)
        if (copies[a]) dense[a] = unit * leaf->widths[a];
      w.arrays = arrays.data();
      w.strides = dense.data();
      plan->pass[pass](w, i, stop);
      for (Index a = 0; a < leaf->count; a++)
        if (copies[a] && a != 1) transfer(*leaf, a, copies[a].get(), i * unit, stop * unit, true);
    }
  }
};

struct Job {
  std::vector<std::unique_ptr<Task>> tasks;
  std::vector<Index> first;  // the first item of every task
  Index items = 0;
  std::atomic<Index> next{0};

  void work() {
    for (Index item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
      const Index t = std::upper_bound(first.begin(), first.end(), item) - first.begin() - 1;
      tasks[t]->run(item - first[t]);
    }
  }
};

}  // namespace

// Runs `work(data)` on some threads, the caller's among them; OpenMP's GOMP_parallel is one.
using Parallel = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

#define EXPORT __attribute__((visibility("default")))
extern "C" {

EXPORT void* fusedbun_job(const Leaf* leaves, const Kernel* const* kernels, Index count) {
  Job* job = new Job;
  for (Index n = 0; n < count; n++) {
    if (is_left_out(leaves[n])) continue;
    job->tasks.push_back(std::make_unique<Task>(leaves[n], *kernels[n]));
    job->first.push_back(job->items);
    job->items += job->tasks.back()->chunks * job->tasks.back()->plan->passes;
  }
  return job;
}

EXPORT void fusedbun_work(void* job) { ((Job*)job)->work(); }

EXPORT void fusedbun_end(void* job) { delete (Job*)job; }

EXPORT void fusedbun_step(const Leaf* leaves, const Kernel* const* kernels, Index count, int threads, Parallel parallel) {
  Job* job = (Job*)fusedbun_job(leaves, kernels, count);
  Index elements = 0;
  for (const auto& task : job->tasks) elements += task->leaf->rows * task->leaf->columns;
  const int useful = (int)std::min<Index>({threads, job->items, 1 + elements / (CHUNK_ELEMENTS / 2)});
  if (useful <= 1) {
    job->work();
  } else if (parallel) {
    parallel(fusedbun_work, job, (unsigned)useful, 0);
  } else {
    std::vector<std::thread> others;
    for (int t = 1; t < useful; t++) others.emplace_back(fusedbun_work, job);
    job->work();
    for (std::thread& t : others) t.join();
  }
  fusedbun_end(job);
}

// The widest registers that this machine has: 3 for AVX-512, 2 for AVX2, 1 for what every machine has.
EXPORT int fusedbun_registers() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd"))
    return 3;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return 2;
#endif
  return 1;
}

}  // extern "C"
