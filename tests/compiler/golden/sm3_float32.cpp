#include "vectors.h"

// %0 = input param                             FULL
// %1 = input grad                              FULL
// %2 = input sm3_accumulate.axis0              ROW
// %3 = input sm3_accumulate.axis1              COLUMN
// %4 = input lr                                HOST
// %5 = input rms_scale.eps_root                HOST
// %6 = minimum %3 %2                           FULL
// %7 = const 1.0                               HOST
// %8 = mul %1 %1                               FULL
// %9 = add %6 %8                               FULL
// %10 = across max %9                          ROW
// %11 = maximum %2 %10                         ROW
// %12 = down max %9                            COLUMN
// %13 = maximum %3 %12                         COLUMN
// %14 = add %9 %5                              FULL
// %15 = sqrt %14                               FULL
// %16 = const 0.0                              HOST
// %17 = abs %1                                 FULL
// %18 = add %15 %17                            FULL
// %19 = eq %18 %16                             FULL
// %20 = where %19 %7 %15                       FULL
// %21 = div %1 %20                             FULL
// %22 = mul %4 %21                             FULL
// %23 = sub %0 %22                             FULL
// param <- %23
// sm3_accumulate.axis0 <- %11
// sm3_accumulate.axis1 <- %13

namespace {
using T = float;
using P = float;

namespace rows {
// tiles of rows
// before pass 0
// pass 0, sweep 0
//   each row   %2
//   elements   %6 %1 %8 %9 %0 %14 %15 %17 %18 %19 %20 %21 %22 %23
//   reduce     %10 %12
//   store      param <- %23
// pass 0, after each tile
//   each row   %10 %11
//   store      sm3_accumulate.axis0 <- %11
// at the end
//   compute    %12 %13
//   store      sm3_accumulate.axis1 <- %13

void between0(const Work& w) {
  (void)w;
}

void between1(const Work& w) {
  {  // %12
    T* const out = vector<T>(w.small, w.leaf->columns, 0);
    combine<Max>(out, vector<T>(w.partial, w.leaf->columns, 0), w.leaf->columns, w.chunks, w.partial_bytes);
  }
  {  // %13
    T* const out = vector<T>(w.small, w.leaf->columns, 1);
    for (Index i1 = 0; i1 < w.leaf->sizes[1]; i1++)
    {
      out[i1] = T(maximum<T>(number<T>(((float*)w.arrays[3]) + i1), vector<T>(w.small, w.leaf->columns, 0)[i1]));
    }
  }
  copy(((float*)w.arrays[3]), vector<T>(w.small, w.leaf->columns, 1), w.leaf->sizes[1]);
}

void begin0(const Work& w) {
  fill(vector<T>(w.partial, w.leaf->columns, 0), w.leaf->columns, Max::start<T>);
}

void rows0(const Work& w, Index begin, Index end) {
  const T s4 = T(w.leaf->scalars[0]);
  const T s5 = T(w.leaf->scalars[1]);
  const Index n = w.leaf->columns;
  const auto* const c3_ = ((float*)w.arrays[3]);
  T* const a12_ = vector<T>(w.partial, w.leaf->columns, 0);
  const auto tile = [&](auto count, Index i) __attribute__((always_inline)) {
    constexpr int K = count;
    const RowsOf<P, K> p0(w, 0, i);
    const RowsOf<P, K> p1(w, 1, i);
    T r2[K]; each<K>([&](auto k) __attribute__((always_inline)) { r2[k] = number<T>(((float*)w.arrays[2]) + i + k); });
    Vector<T> q10[K]; each<K>([&](auto k) __attribute__((always_inline)) { q10[k] = wide<Vector<T>>(Max::start<T>); });
    sweep<T>(n, [&](auto lanes, Index j) __attribute__((always_inline)) {
      const auto c3 = lanes.template load<T>(c3_ + j);
      auto a12 = lanes.template load<T>(a12_ + j);
      Vector<T> o0[K];
      each<K>([&](auto k) __attribute__((always_inline)) {
        if constexpr (K == ROWS) p1.ask_ahead(k, j, n);
        if constexpr (K == ROWS) p0.ask_ahead(k, j, n);
        const auto x6 = minimum<Vector<T>>(c3, r2[k]);
        const auto x1 = lanes.template load<T>(p1[k] + j);
        const auto x8 = x1 * x1;
        const auto x9 = x6 + x8;
        const auto x0 = lanes.template load<T>(p0[k] + j);
        const auto x14 = x9 + s5;
        const auto x15 = root(x14);
        const auto x17 = absolute(x1);
        const auto x18 = x15 + x17;
        const auto x19 = x18 == T(0.0);
        const auto x20 = select<Vector<T>>(x19, T(1.0), x15);
        const auto x21 = x1 / x20;
        const auto x22 = s4 * x21;
        const auto x23 = x0 - x22;
        q10[k] = lanes.only(Max::of(q10[k], x9), q10[k]);
        a12 = Max::of(a12, x9);
        o0[k] = x23;
      });
      lanes.store(a12_ + j, a12);
      each<K>([&](auto k) __attribute__((always_inline)) { lanes.store(p0[k] + j, o0[k]); });
    });
    T r10[K]; each<K>([&](auto k) __attribute__((always_inline)) { r10[k] = fold<Max>(q10[k]); });
    T r11[K]; each<K>([&](auto k) __attribute__((always_inline)) { r11[k] = maximum<T>(r2[k], r10[k]); });
    each<K>([&](auto k) __attribute__((always_inline)) { put(((float*)w.arrays[2]) + i + k, r11[k]); });
  };
  Index i = begin;
  for (; i + ROWS <= end; i += ROWS) tile(Count<ROWS>{}, i);
  for (; i < end; i++) tile(Count<1>{}, i);
}

void packed0(const Work& w, Index begin, Index end) {
  const T s4 = T(w.leaf->scalars[0]);
  const T s5 = T(w.leaf->scalars[1]);
  const Index n = w.leaf->columns;
  Room room(w.buffer);
  const auto* const row_of = rows_of_lanes<T>(room, n);
  const auto* const c3_ = repeat<T>(room, ((float*)w.arrays[3]), n);
  T* const a12_ = start<Max, T>(room, n * LANES<T>);
  T* const q10_ = room.take<T>(n * LANES<T>);
  constexpr int K = 1;
  const Whole lanes;
  Index i = begin;
  for (; i + LANES<T> <= end; i += LANES<T>) {
    auto* const p0 = ((P*)w.arrays[0]) + i * n;
    auto* const p1 = ((P*)w.arrays[1]) + i * n;
    Vector<T> r2[K]; each<K>([&](auto k) __attribute__((always_inline)) { r2[k] = lanes.template load<T>(((float*)w.arrays[2]) + i); });
    for (Index j = 0; j < n * LANES<T>; j += LANES<T>) {
      const auto c3 = lanes.template load<T>(c3_ + j);
      auto a12 = lanes.template load<T>(a12_ + j);
      Vector<T> o0[K];
      each<K>([&](auto k) __attribute__((always_inline)) {
        ask(p1 + j + LONG_AHEAD);
        ask(p0 + j + LONG_AHEAD);
        const auto x6 = minimum<Vector<T>>(c3, spread(r2[k], row_of + j));
        const auto x1 = lanes.template load<T>(p1 + j);
        const auto x8 = x1 * x1;
        const auto x9 = x6 + x8;
        const auto x0 = lanes.template load<T>(p0 + j);
        const auto x14 = x9 + s5;
        const auto x15 = root(x14);
        const auto x17 = absolute(x1);
        const auto x18 = x15 + x17;
        const auto x19 = x18 == T(0.0);
        const auto x20 = select<Vector<T>>(x19, T(1.0), x15);
        const auto x21 = x1 / x20;
        const auto x22 = s4 * x21;
        const auto x23 = x0 - x22;
        lanes.store(q10_ + j, x9);
        a12 = Max::of(a12, x9);
        o0[k] = x23;
      });
      lanes.store(a12_ + j, a12);
      each<K>([&](auto k) __attribute__((always_inline)) { lanes.store(p0 + j, o0[k]); });
    }
    Vector<T> r10[K]; each<K>([&](auto k) __attribute__((always_inline)) { r10[k] = fold_rows<Max>(q10_, n); });
    Vector<T> r11[K]; each<K>([&](auto k) __attribute__((always_inline)) { r11[k] = maximum<Vector<T>>(r2[k], r10[k]); });
    each<K>([&](auto k) __attribute__((always_inline)) { lanes.store(((float*)w.arrays[2]) + i, r11[k]); });
  }
  collapse<Max>(vector<T>(w.partial, w.leaf->columns, 0), a12_, n);
  if (i < end) rows0(w, i, end);
}

void (*const between[])(const Work&) = {between0, between1};
void (*const begin[])(const Work&) = {begin0};
void (*const rows_passes[])(const Work&, Index, Index) = {rows0};
Index rows_buffer(const Leaf& leaf) { return 0 * ROWS * up(leaf.columns, LANES<T>) * Index(sizeof(T)); }
const Schedule rows_schedule = {1, 2, 0, 1, 0, 0, between, begin, rows_passes, rows_buffer};
void (*const packed_passes[])(const Work&, Index, Index) = {packed0};
Index packed_buffer(const Leaf& leaf) { return 4 * up(leaf.columns * LANES<T> * Index(sizeof(T)), ALIGNMENT) + 0 * ROWS * up(leaf.columns, LANES<T>) * Index(sizeof(T)); }
const Schedule packed_schedule = {1, 2, 0, 1, 0, 0, between, begin, packed_passes, packed_buffer};
}  // namespace rows

namespace columns {
// tiles of columns
// before pass 0
// pass 0, sweep 0
//   each column%3
//   elements   %6 %1 %8 %9 %0 %14 %15 %17 %18 %19 %20 %21 %22 %23
//   reduce     %10 %12
//   store      param <- %23
// pass 0, after each tile
//   each column%12 %13
//   store      sm3_accumulate.axis1 <- %13
// at the end
//   compute    %10 %11
//   store      sm3_accumulate.axis0 <- %11

void between0(const Work& w) {
  (void)w;
}

void between1(const Work& w) {
  {  // %10
    T* const out = vector<T>(w.small, w.leaf->rows, 0);
    combine<Max>(out, vector<T>(w.partial, w.leaf->rows, 0), w.leaf->rows, w.chunks, w.partial_bytes);
  }
  {  // %11
    T* const out = vector<T>(w.small, w.leaf->rows, 1);
    for (Index i0 = 0; i0 < w.leaf->sizes[0]; i0++)
    {
      out[i0] = T(maximum<T>(number<T>(((float*)w.arrays[2]) + i0), vector<T>(w.small, w.leaf->rows, 0)[i0]));
    }
  }
  copy(((float*)w.arrays[2]), vector<T>(w.small, w.leaf->rows, 1), w.leaf->sizes[0]);
}

void begin0(const Work& w) {
  fill(vector<T>(w.partial, w.leaf->rows, 0), w.leaf->rows, Max::start<T>);
}

void columns0(const Work& w, Index begin, Index end) {
  const T s4 = T(w.leaf->scalars[0]);
  const T s5 = T(w.leaf->scalars[1]);
  const Index m = w.leaf->rows;
  Room room(w.buffer);
  const auto* const r2_ = ((float*)w.arrays[2]);
  T* const a10_ = start<Max, T>(room, m * LANES<T>);
  const auto tile = [&](auto count, auto lanes, Index j) __attribute__((always_inline)) {
    constexpr int K = count;
    Vector<T> c3[K]; each<K>([&](auto k) __attribute__((always_inline)) { c3[k] = lanes.template load<T>(((float*)w.arrays[3]) + j + k * LANES<T>); });
    Vector<T> q12[K]; each<K>([&](auto k) __attribute__((always_inline)) { q12[k] = wide<Vector<T>>(Max::start<T>); });
    for (Index i = 0; i < m; i++) {
      auto* const p0 = row<P>(w, 0, i) + j;
      auto* const p1 = row<P>(w, 1, i) + j;
      const auto r2 = number<T>(r2_ + i);
      auto a10 = lanes.template load<T>(a10_ + i * LANES<T>);
      Vector<T> o0[K];
      each<K>([&](auto k) __attribute__((always_inline)) {
        if constexpr (K == ROWS) ask(p1 + k * LANES<T> + AHEAD);
        if constexpr (K == ROWS) ask(p0 + k * LANES<T> + AHEAD);
        const auto x6 = minimum<Vector<T>>(c3[k], r2);
        const auto x1 = lanes.template load<T>(p1 + k * LANES<T>);
        const auto x8 = x1 * x1;
        const auto x9 = x6 + x8;
        const auto x0 = lanes.template load<T>(p0 + k * LANES<T>);
        const auto x14 = x9 + s5;
        const auto x15 = root(x14);
        const auto x17 = absolute(x1);
        const auto x18 = x15 + x17;
        const auto x19 = x18 == T(0.0);
        const auto x20 = select<Vector<T>>(x19, T(1.0), x15);
        const auto x21 = x1 / x20;
        const auto x22 = s4 * x21;
        const auto x23 = x0 - x22;
        a10 = lanes.only(Max::of(a10, x9), a10);
        q12[k] = lanes.only(Max::of(q12[k], x9), q12[k]);
        o0[k] = x23;
      });
      lanes.store(a10_ + i * LANES<T>, a10);
      each<K>([&](auto k) __attribute__((always_inline)) { lanes.store(p0 + k * LANES<T>, o0[k]); });
    }
    Vector<T> c12[K]; each<K>([&](auto k) __attribute__((always_inline)) { c12[k] = q12[k]; });
    Vector<T> c13[K]; each<K>([&](auto k) __attribute__((always_inline)) { c13[k] = maximum<Vector<T>>(c3[k], c12[k]); });
    each<K>([&](auto k) __attribute__((always_inline)) { lanes.store(((float*)w.arrays[3]) + j + k * LANES<T>, c13[k]); });
  };
  Index j = begin;
  for (; j + ROWS * LANES<T> <= end; j += ROWS * LANES<T>) tile(Count<ROWS>{}, Whole{}, j);
  for (; j + LANES<T> <= end; j += LANES<T>) tile(Count<1>{}, Whole{}, j);
  if (j < end) tile(Count<1>{}, First{int(end - j)}, j);
  for (Index i = 0; i < m; i++) vector<T>(w.partial, w.leaf->rows, 0)[i] = Max::of(vector<T>(w.partial, w.leaf->rows, 0)[i], fold<Max>(Whole::load<T>(a10_ + i * LANES<T>)));
}

void (*const between[])(const Work&) = {between0, between1};
void (*const begin[])(const Work&) = {begin0};
void (*const columns_passes[])(const Work&, Index, Index) = {columns0};
Index columns_buffer(const Leaf& leaf) { return (1 + 0 * ROWS) * up(leaf.rows * BYTES, ALIGNMENT); }
const Schedule columns_schedule = {1, 2, 0, 1, 0, 0, between, begin, columns_passes, columns_buffer};
}  // namespace columns

const Kernel kernel = {sizeof(T), LANES<T>, nullptr, &rows::rows_schedule, &rows::packed_schedule, &columns::columns_schedule};
}  // namespace

EXPORT const Kernel* fusedbun_kernel() { return &kernel; }
