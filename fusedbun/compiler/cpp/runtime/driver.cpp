// Steps a list of leaves with generated kernels, on as many threads as its caller runs `work` on.
//
// The work is one list of items in a fixed order: every pass over every chunk of rows of every leaf. Threads take items
// from its front. An item of a later pass waits for the leaf's pass before it, whose items all come earlier in the list,
// so that some thread is at work on them: nothing can wait for ever, whatever the number of threads. Chunks depend on the
// leaf's shape alone and their reductions are combined in their order, so the result does not depend on threads either.
#include <algorithm>
#include <atomic>
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
constexpr Index SUMMED = 256;              // more registers are added up in several chunks: float32 loses bits in long sums
constexpr Index THIN_CHUNKS = 4096;        // of one column there may be so many, of more as many as have so many numbers
constexpr Index COPIED_ELEMENTS = 1 << 14; // of a leaf whose elements do not follow one another, at a time
constexpr Index FEW_ROWS = 32;             // at most as many, and as long: tiles of columns
constexpr Index LONG_ROW = 1 << 15;
constexpr Index ALIGNMENT = 64;
constexpr Index GRADIENT = 1;              // its place among a leaf's arrays

Index quotient(Index n, Index by) { return (n + by - 1) / by; }  // rounded up
Index up(Index n, Index to) { return quotient(n, to) * to; }

constexpr std::align_val_t ALIGNED{ALIGNMENT};
struct Free { void operator()(char* p) const { ::operator delete(p, ALIGNED); } };
using Memory = std::unique_ptr<char, Free>;
Memory memory(Index bytes) { return Memory(bytes ? (char*)::operator new(up(bytes, ALIGNMENT), ALIGNED) : nullptr); }

// What a thread works at its chunks in, one after the other: as large as the largest so far.
struct Buffer {
  Memory held;
  Index bytes = 0;

  char* of(Index needed) {
    if (needed > bytes) {
      held.reset();  // before there is another
      held = memory(bytes = needed);
    }
    return held.get();
  }
};

bool in_order(const Leaf& leaf) {  // whether the elements of every array follow one another
  return std::all_of(leaf.steps, leaf.steps + leaf.count, [](const Index* s) { return !s; });
}

// Copies elements begin … end of a leaf's array, in the order of its axes, to a buffer or back.
template <class E>
void transfer(const Leaf& leaf, Index array, E* buffer, Index begin, Index end, bool back) {
  const Index* const steps = leaf.steps[array];
  const Index inner = leaf.sizes[leaf.axes - 1], step = steps[leaf.axes - 1];
  while (begin < end) {
    Index rest = begin / inner, at = begin % inner * step;
    for (Index a = leaf.axes - 1; a-- > 0; rest /= leaf.sizes[a]) at += rest % leaf.sizes[a] * steps[a];
    const Index run = std::min(end - begin, inner - begin % inner);
    char* p = (char*)leaf.arrays[array] + at;
    if (back) for (Index k = 0; k < run; k++, p += step) std::memcpy(p, buffer + k, sizeof(E));
    else for (Index k = 0; k < run; k++, p += step) std::memcpy(buffer + k, p, sizeof(E));
    begin += run;
    buffer += run;
  }
}

void transfer(const Leaf& leaf, Index array, char* buffer, Index begin, Index end, bool back) {
  switch (leaf.widths[array]) {
    case 1: return transfer(leaf, array, (uint8_t*)buffer, begin, end, back);
    case 2: return transfer(leaf, array, (uint16_t*)buffer, begin, end, back);
    case 4: return transfer(leaf, array, (uint32_t*)buffer, begin, end, back);
    default: return transfer(leaf, array, (uint64_t*)buffer, begin, end, back);
  }
}

// A leaf, how it is gone over, and how far that is.
struct Task {
  const Leaf* leaf;
  const Kernel* kernel;
  const Schedule* schedule;
  bool flat, columns;            // what is gone over: elements, tiles of columns, or else tiles of rows
  Index extent, chunk, chunks;   // how many of them, how many in a chunk, and chunks
  std::vector<Index> scattered;  // the arrays whose elements have to be copied to where they follow one another
  Work work{};
  Memory held;
  std::atomic<Index> done{0}, ready{-1};  // items ended, passes that may run

  Task(const Leaf& l, const Kernel& k) : leaf(&l), kernel(&k) {
    flat = k.flat;
    columns = !flat && k.columns && l.rows <= FEW_ROWS && l.columns >= LONG_ROW && in_order(l);
    const bool packed = k.packed && l.columns < 2 * k.lanes && l.rows >= k.lanes && in_order(l);
    schedule = flat ? k.flat : columns ? k.columns : packed ? k.packed : k.rows;
    extent = flat ? l.rows * l.columns : columns ? l.columns : l.rows;
    const Index together = columns ? k.lanes : packed ? std::max(Index(1), k.lanes / l.columns) : 1;  // in a register
    const Index few = std::min(SUMMED * together, quotient(CHUNK_ELEMENTS, columns ? l.rows : l.columns));
    const Index least = columns ? few : std::max(CHUNK_ROWS, few);
    const Index most = columns ? MOST_CHUNKS : std::max(MOST_CHUNKS, THIN_CHUNKS / l.columns);
    chunk = flat ? CHUNK_ELEMENTS : up(std::max(least, quotient(extent, most)), columns ? 64 : 16);
    chunks = quotient(extent, chunk);
    for (Index a = 0; a < l.count; a++)
      if (flat ? l.steps[a] != nullptr : l.strides[a] == SCATTERED) scattered.push_back(a);
  }

  void start() {
    const auto bytes = [&](Index numbers) { return up(numbers * kernel->element, ALIGNMENT); };
    const Index vector = bytes(columns ? leaf->rows : leaf->columns);
    const Index small = schedule->vectors * vector + bytes(schedule->scalars);
    const Index kept = bytes(schedule->kept * (columns ? leaf->columns : leaf->rows));
    const Index partial = schedule->partial_vectors * vector + bytes(schedule->partial_scalars);
    held = memory(small + kept + partial * chunks);
    char* const at = held.get();
    work = {leaf, leaf->arrays, leaf->strides, at, at + small, at + small + kept, nullptr, chunks, partial};
    schedule->between[0](work);
    ready.store(0, std::memory_order_release);
  }

  void run(Index item, Buffer& buffer) {
    const Index pass = item / chunks;
    // Every other pass goes backwards, for what was read last is still in the cache.
    const Index c = pass % 2 ? chunks - 1 - item % chunks : item % chunks;
    if (item == 0) start();
    for (int spins = 0; ready.load(std::memory_order_acquire) < pass;)
      if (++spins > 1000) std::this_thread::yield();
    run_chunk(pass, c, buffer);
    if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == (pass + 1) * chunks) {
      schedule->between[pass + 1](work);
      if (pass + 1 == schedule->passes) held.reset();
      ready.store(pass + 1, std::memory_order_release);
    }
  }

  void run_chunk(Index pass, Index c, Buffer& buffer) {
    Work w = work;
    w.partial = (char*)work.partial + c * work.partial_bytes;
    const Index begin = c * chunk, end = std::min(extent, begin + chunk);
    w.buffer = buffer.of(schedule->buffer(*leaf));
    schedule->begin[pass](w);
    if (scattered.empty()) schedule->pass[pass](w, begin, end);
    else run_copies(w, pass, begin, end);
  }

  // A part of the chunk at a time: copied to where its elements follow one another, stepped there, and copied back.
  void run_copies(Work& w, Index pass, Index begin, Index end) {
    const Index unit = flat ? 1 : leaf->columns;
    const Index most = up(std::max<Index>(1, COPIED_ELEMENTS / unit), 16);
    std::vector<void*> arrays(leaf->arrays, leaf->arrays + leaf->count);
    std::vector<Index> strides(leaf->strides, leaf->strides + leaf->count);
    std::vector<Memory> copied(leaf->count);
    for (const Index a : scattered) {
      strides[a] = unit * leaf->widths[a];
      copied[a] = memory(std::min(most, end - begin) * strides[a]);
    }
    w.arrays = arrays.data();
    w.strides = strides.data();
    for (Index i = begin; i < end; i += most) {
      const Index stop = std::min(end, i + most);
      for (const Index a : scattered) {
        transfer(*leaf, a, copied[a].get(), i * unit, stop * unit, false);
        arrays[a] = copied[a].get() - i * strides[a];
      }
      schedule->pass[pass](w, i, stop);
      for (const Index a : scattered)
        if (a != GRADIENT) transfer(*leaf, a, copied[a].get(), i * unit, stop * unit, true);
    }
  }
};

struct Job {
  std::vector<std::unique_ptr<Task>> tasks;
  std::vector<Index> first;  // the first item of every task
  Index items = 0;
  std::atomic<Index> next{0};

  void work() {
    Buffer buffer;
    for (Index item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
      const Index t = std::upper_bound(first.begin(), first.end(), item) - first.begin() - 1;
      tasks[t]->run(item - first[t], buffer);
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
    const Leaf& leaf = leaves[n];
    if (!leaf.rows || !leaf.columns || !leaf.arrays[GRADIENT]) continue;  // empty, or left out of this step
    job->tasks.push_back(std::make_unique<Task>(leaf, *kernels[n]));
    job->first.push_back(job->items);
    job->items += job->tasks.back()->chunks * job->tasks.back()->schedule->passes;
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
