#include "vectors.h"

// %0 = input param                             FULL
// %1 = input grad                              FULL
// %2 = input scale_by_lion.moment              FULL
// %3 = input lr                                HOST
// %4 = input scale_by_lion.beta1               HOST
// %5 = input scale_by_lion.beta2               HOST
// %6 = input decay.weight_decay                HOST
// %7 = mul %4 %2                               FULL
// %8 = const 1.0                               HOST
// %9 = sub %8 %4                               HOST
// %10 = mul %9 %1                              FULL
// %11 = add %7 %10                             FULL
// %12 = sign %11                               FULL
// %13 = mul %5 %2                              FULL
// %14 = sub %8 %5                              HOST
// %15 = mul %14 %1                             FULL
// %16 = add %13 %15                            FULL
// %17 = mul %6 %0                              FULL
// %18 = add %12 %17                            FULL
// %19 = mul %3 %18                             FULL
// %20 = sub %0 %19                             FULL
// param <- %20
// scale_by_lion.moment <- %16

namespace {
using T = float;
using P = bfloat16;

namespace flat {
// tiles of rows
// before pass 0
// pass 0, sweep 0
//   elements   %0 %2 %7 %1 %10 %11 %12 %17 %18 %19 %20 %13 %15 %16
//   store      param <- %20
//   store      scale_by_lion.moment <- %16
// at the end

void between0(const Work& w) {
  (void)w;
}

void between1(const Work& w) {
  (void)w;
}

void begin0(const Work& w) {
  (void)w;
}

void flat0(const Work& w, Index begin, Index end) {
  const T s3 = T(w.leaf->scalars[0]);
  const T s4 = T(w.leaf->scalars[1]);
  const T s5 = T(w.leaf->scalars[2]);
  const T s6 = T(w.leaf->scalars[3]);
  const T s9 = T(w.leaf->scalars[4]);
  const T s14 = T(w.leaf->scalars[5]);
  auto* const p0 = ((P*)w.arrays[0]) + begin;
  auto* const p1 = ((P*)w.arrays[1]) + begin;
  auto* const p2 = ((float*)w.arrays[2]) + begin;
  constexpr int K = 1;
  sweep<T>(end - begin, [&](auto lanes, Index j) __attribute__((always_inline)) {
    Vector<T> o0[K];
    Vector<T> o2[K];
    each<K>([&](auto k) __attribute__((always_inline)) {
      ask(p0 + j + LONG_AHEAD);
      ask(p2 + j + LONG_AHEAD);
      ask(p1 + j + LONG_AHEAD);
      const auto x0 = lanes.template load<T>(p0 + j);
      const auto x2 = lanes.template load<T>(p2 + j);
      const auto x7 = s4 * x2;
      const auto x1 = lanes.template load<T>(p1 + j);
      const auto x10 = s9 * x1;
      const auto x11 = x7 + x10;
      const auto x12 = sign(x11);
      const auto x17 = s6 * x0;
      const auto x18 = x12 + x17;
      const auto x19 = s3 * x18;
      const auto x20 = x0 - x19;
      const auto x13 = s5 * x2;
      const auto x15 = s14 * x1;
      const auto x16 = x13 + x15;
      o0[k] = x20;
      o2[k] = x16;
    });
    each<K>([&](auto k) __attribute__((always_inline)) { lanes.store(p0 + j, o0[k]); });
    each<K>([&](auto k) __attribute__((always_inline)) { lanes.store(p2 + j, o2[k]); });
  });
}

void (*const between[])(const Work&) = {between0, between1};
void (*const begin[])(const Work&) = {begin0};
void (*const flat_passes[])(const Work&, Index, Index) = {flat0};
Index flat_buffer(const Leaf& leaf) { (void)leaf; return 0; }
const Schedule flat_schedule = {1, 0, 0, 0, 0, 0, between, begin, flat_passes, flat_buffer};
}  // namespace flat

const Kernel kernel = {sizeof(T), LANES<T>, &flat::flat_schedule, nullptr, nullptr, nullptr};
}  // namespace

EXPORT const Kernel* fusedbun_kernel() { return &kernel; }
