// Registers of numbers, and the functions that generated kernels compute with. All of them do to every lane what IEEE 754
// says: NaN and infinities flow, and nothing is contracted or reordered, so that any width gives the same bits.
#pragma once
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernel.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE __attribute__((always_inline))
#define FORCE static inline INLINE

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define FUSEDBUN_AVX512 1
constexpr int BYTES = 64;
#elif defined(__AVX2__) && defined(__F16C__)
#define FUSEDBUN_AVX2 1
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

template <class T, int N>
struct SimdOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
  typedef T loose __attribute__((vector_size(N * sizeof(T)), aligned(sizeof(T)), may_alias));  // at any address
};
template <class T, int N>
using Simd = typename SimdOf<T, N>::type;
template <class T, int N>
using Loose = typename SimdOf<T, N>::loose;
template <class T>
constexpr int LANES = BYTES / sizeof(T);
template <class T>
using Vector = Simd<T, LANES<T>>;
using Word = uint32_t;  // integers that wrap
template <class T>
using Words = Simd<Word, LANES<T>>;  // as many as there are numbers in a register

constexpr int BLOCK = 32;  // codes that share an exponent
struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

// ---------------------------------------------------------------- repeated code, with a constant counter

template <int N>
using Count = std::integral_constant<int, N>;
template <class F, int... K>
FORCE void each_of(std::integer_sequence<int, K...>, F f) { (f(Count<K>{}), ...); }
template <int N, class F>
FORCE void each(F f) { each_of(std::make_integer_sequence<int, N>{}, f); }

// ---------------------------------------------------------------- functions of one number and of vectors

template <class V>
struct Of { using type = std::remove_reference_t<decltype(std::declval<V&>()[0])>; };
template <> struct Of<float> { using type = float; };
template <> struct Of<double> { using type = double; };
template <> struct Of<Word> { using type = Word; };
template <class V>
using Element = typename Of<V>::type;
template <class V>
constexpr bool is_number = std::is_arithmetic_v<V>;

template <class V, class X>
FORCE V wide(X x) {  // a number in every lane; a vector is left as it is
  if constexpr (std::is_same_v<V, X>) return x;
  else if constexpr (is_number<V>) return V(x);
  else return V(x - V{});
}
template <class V, class M, class A, class B>
FORCE V select(M mask, A a, B b) { return mask ? wide<V>(a) : wide<V>(b); }
template <class V>
FORCE V smaller(V a, V b) {  // a < b ? a : b, so b where either is NaN
#if FUSEDBUN_AVX512
  if constexpr (std::is_same_v<V, Vector<float>>) return (V)_mm512_min_ps((__m512)a, (__m512)b);
  if constexpr (std::is_same_v<V, Vector<double>>) return (V)_mm512_min_pd((__m512d)a, (__m512d)b);
#elif FUSEDBUN_AVX2
  if constexpr (std::is_same_v<V, Vector<float>>) return (V)_mm256_min_ps((__m256)a, (__m256)b);
  if constexpr (std::is_same_v<V, Vector<double>>) return (V)_mm256_min_pd((__m256d)a, (__m256d)b);
#endif
  return a < b ? a : b;
}
template <class V>
FORCE V larger(V a, V b) {  // a > b ? a : b
#if FUSEDBUN_AVX512
  if constexpr (std::is_same_v<V, Vector<float>>) return (V)_mm512_max_ps((__m512)a, (__m512)b);
  if constexpr (std::is_same_v<V, Vector<double>>) return (V)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif FUSEDBUN_AVX2
  if constexpr (std::is_same_v<V, Vector<float>>) return (V)_mm256_max_ps((__m256)a, (__m256)b);
  if constexpr (std::is_same_v<V, Vector<double>>) return (V)_mm256_max_pd((__m256d)a, (__m256d)b);
#endif
  return a > b ? a : b;
}
// NaN where either is NaN.
template <class V, class A, class B>
FORCE V minimum(A one, B other) { V a = wide<V>(one), m = smaller(a, wide<V>(other)); return a != a ? a : m; }
template <class V, class A, class B>
FORCE V maximum(A one, B other) { V a = wide<V>(one), m = larger(a, wide<V>(other)); return a != a ? a : m; }
template <class V>
FORCE V sign(V x) { return x > V{} ? wide<V>(Element<V>(1)) : x < V{} ? wide<V>(Element<V>(-1)) : x; }
template <class V, class F>
FORCE V lane_by_lane(V x, F f) {
  if constexpr (is_number<V>) return f(x);
  else {
    V y{};
    for (unsigned i = 0; i < sizeof(V) / sizeof(Element<V>); i++) y[i] = f(x[i]);
    return y;
  }
}
template <class V>
FORCE V absolute(V x) {
  if constexpr (is_number<V>) return std::fabs(x);
  else {
    using Bits = Simd<std::conditional_t<sizeof(Element<V>) == 4, uint32_t, uint64_t>, sizeof(V) / sizeof(Element<V>)>;
    return (V)((Bits)x & ((Bits{} - 1) >> 1));
  }
}
template <class V>
FORCE V root(V x) {
  if constexpr (is_number<V>) return std::sqrt(x);
#if FUSEDBUN_AVX512
  else if constexpr (std::is_same_v<V, Vector<float>>) return (V)_mm512_sqrt_ps((__m512)x);
  else if constexpr (std::is_same_v<V, Vector<double>>) return (V)_mm512_sqrt_pd((__m512d)x);
#elif FUSEDBUN_AVX2
  else if constexpr (std::is_same_v<V, Vector<float>>) return (V)_mm256_sqrt_ps((__m256)x);
  else if constexpr (std::is_same_v<V, Vector<double>>) return (V)_mm256_sqrt_pd((__m256d)x);
#endif
  else return lane_by_lane(x, [](Element<V> e) { return std::sqrt(e); });
}
// In double precision, so that the rounded result does not depend on which library computes it.
template <class V>
FORCE V expm1_of(V x) { return lane_by_lane(x, [](Element<V> e) { return Element<V>(std::expm1(double(e))); }); }
template <class V>
FORCE V log_of(V x) { return lane_by_lane(x, [](Element<V> e) { return Element<V>(std::log(double(e))); }); }

template <class V>
FORCE V floor_of(V x) {
#if FUSEDBUN_AVX512
  if constexpr (std::is_same_v<V, Vector<float>>) return (V)_mm512_roundscale_ps((__m512)x, _MM_FROUND_FLOOR);
#elif FUSEDBUN_AVX2
  if constexpr (std::is_same_v<V, Vector<float>>) return (V)_mm256_floor_ps((__m256)x);
#endif
  return lane_by_lane(x, [](Element<V> e) { return std::floor(e); });
}

// ---- words

template <class W, class V>
FORCE W bits_of(V x) {
  static_assert(sizeof(W) == sizeof(V));
  W w;
  std::memcpy(&w, &x, sizeof w);
  return w;
}
template <class V, class W>
FORCE V from_bits(W w) { return bits_of<V>(w); }
template <class V, class W>
FORCE V real(W w) {  // of whole numbers, with their sign
  if constexpr (is_number<W>) return V(int32_t(w));
  else return __builtin_convertvector((Simd<int32_t, sizeof(W) / 4>)w, V);
}
template <class W, class V>
FORCE W whole(V x) {
  if constexpr (is_number<V>) return W(int32_t(x));
  else return (W)__builtin_convertvector(x, Simd<int32_t, sizeof(W) / 4>);
}
template <class T>
FORCE Words<T> places(Index first) {  // first, first + 1, …
  Words<T> at;
  for (int i = 0; i < LANES<T>; i++) at[i] = i;
  return at + Word(first);
}

struct Sum {
  template <class V> static inline INLINE V of(V a, V b) { return a + b; }
  template <class T> static constexpr T start = 0;
};
struct Max {
  template <class V> static inline INLINE V of(V a, V b) { return maximum<V>(a, b); }
  template <class T> static constexpr T start = -INFINITY;
};
struct Min {
  template <class V> static inline INLINE V of(V a, V b) { return minimum<V>(a, b); }
  template <class T> static constexpr T start = INFINITY;
};

template <class F, class V>
FORCE auto fold(V x) {  // the lanes of a vector to one number, half by half
  if constexpr (is_number<V>) return x;
  else {
    constexpr int n = sizeof(V) / sizeof(Element<V>);
    if constexpr (n == 2) return F::of(x[0], x[1]);
    else {
      Simd<Element<V>, n / 2> low, high;
      std::memcpy(&low, &x, sizeof low);
      std::memcpy(&high, (const char*)&x + sizeof low, sizeof high);
      return fold<F>(F::of(low, high));
    }
  }
}

// ---------------------------------------------------------------- memory: numbers as they are stored

template <class T, class S>
FORCE T number(const S* p) {
  if constexpr (std::is_same_v<S, bfloat16>) {
    uint32_t bits = uint32_t(p->bits) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  } else if constexpr (std::is_same_v<S, float16>) {
    _Float16 x;
    std::memcpy(&x, p, 2);
    return T(x);
  } else return T(*p);
}
template <class S, class T>
FORCE void put(S* p, T x) {
  if constexpr (std::is_same_v<S, bfloat16>) {  // to the nearest, ties to even
    uint32_t bits;
    float y = x;
    std::memcpy(&bits, &y, 4);
    p->bits = x != x ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  } else if constexpr (std::is_same_v<S, float16>) {
    _Float16 y = (_Float16)x;
    std::memcpy(p, &y, 2);
  } else *p = S(x);
}

// A whole register from or to memory.
struct Whole {
  template <class T, class S>
  static inline INLINE Vector<T> load(const S* p) {
    constexpr int n = LANES<T>;
    if constexpr (std::is_same_v<S, T>) return *(const Loose<T, n>*)p;
    else if constexpr (std::is_same_v<S, bfloat16>) {
#if FUSEDBUN_AVX512
      const Simd<Word, n> bits = (Simd<Word, n>)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif FUSEDBUN_AVX2
      const Simd<Word, n> bits = (Simd<Word, n>)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
      const Simd<Word, n> bits = __builtin_convertvector(*(const Loose<uint16_t, n>*)p, Simd<Word, n>);
#endif
      return (Vector<T>)(bits << 16);
    } else if constexpr (std::is_same_v<S, float16>) {
#if FUSEDBUN_AVX512
      return (Vector<T>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif FUSEDBUN_AVX2
      return (Vector<T>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
      Vector<T> x{};
      for (int i = 0; i < n; i++) x[i] = number<T>(p + i);
      return x;
#endif
    } else return __builtin_convertvector(*(const Loose<S, n>*)p, Vector<T>);
  }
  template <class S, class V>
  static inline INLINE void store(S* p, V x) {
    using T = Element<V>;
    constexpr int n = sizeof(V) / sizeof(T);
    if constexpr (std::is_same_v<S, bfloat16> && std::is_same_v<T, Word>) store_top(p, x);
    else if constexpr (std::is_same_v<T, Word>) store_words<S, n>(p, x);
    else if constexpr (std::is_same_v<S, T>) *(Loose<T, n>*)p = x;
    else if constexpr (std::is_same_v<S, bfloat16>) {
      const Simd<Word, n> bits = (Simd<Word, n>)x;
      store_top(p, x != x ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1));
    } else if constexpr (std::is_same_v<S, float16>) {
#if FUSEDBUN_AVX512
      _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif FUSEDBUN_AVX2
      _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
      for (int i = 0; i < n; i++) put(p + i, x[i]);
#endif
    } else store_words<S, n>(p, whole<Simd<Word, n>>(x));
  }
  template <class W>
  static inline INLINE void store_top(bfloat16* p, W words) {  // of each word the upper half
    constexpr int n = sizeof(W) / sizeof(Word);
#if FUSEDBUN_AVX512
    if constexpr (n == 16) _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)words, 16)));
    else
#endif
    *(Loose<uint16_t, n>*)p = __builtin_convertvector(words >> 16, Simd<uint16_t, n>);
  }
  template <class S, int n>
  static inline INLINE void store_words(S* p, Simd<Word, n> x) {
    if constexpr (sizeof(S) == sizeof(Word)) *(Loose<Word, n>*)p = x;
#if FUSEDBUN_AVX512
    else if constexpr (sizeof(S) == 1 && n == 16) _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)x));
#elif FUSEDBUN_AVX2
    else if constexpr (sizeof(S) == 1 && n == 8) {
      const __m256i first = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                             0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
      const __m256i bytes = _mm256_shuffle_epi8((__m256i)x, first);
      const __m256i both = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 1, 1, 1, 1, 1));
      _mm_storel_epi64((__m128i*)p, _mm256_castsi256_si128(both));
    }
#endif
    else *(Loose<S, n>*)p = __builtin_convertvector(x, Simd<S, n>);
  }
  template <class T, class S>
  static inline INLINE Words<T> words(const S* p) {
    constexpr int n = LANES<T>;
    if constexpr (sizeof(S) == sizeof(Word)) return *(const Loose<Word, n>*)p;
#if FUSEDBUN_AVX512
    else if constexpr (std::is_same_v<S, int8_t> && n == 16)
      return (Words<T>)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif FUSEDBUN_AVX2
    else if constexpr (std::is_same_v<S, int8_t> && n == 8)
      return (Words<T>)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#endif
    else return (Words<T>)__builtin_convertvector(*(const Loose<S, n>*)p, Simd<int32_t, n>);
  }
  template <class V>
  static inline INLINE V only(V x, V) { return x; }
};

// The first `n` lanes of a register; the others load as 0, and are neither stored nor taken up by a reduction.
struct First {
  int n;
  template <class T, class S>
  INLINE Vector<T> load(const S* p) const {
#if FUSEDBUN_AVX512
    if constexpr (std::is_same_v<S, float> && std::is_same_v<T, float>)
      return (Vector<T>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
    else if constexpr (std::is_same_v<S, double>) return (Vector<T>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
    else
#elif FUSEDBUN_AVX2
    if constexpr (std::is_same_v<S, float> && std::is_same_v<T, float>)
      return (Vector<T>)_mm256_maskload_ps(p, (__m256i)lanes<T>());
    else if constexpr (std::is_same_v<S, double>) return (Vector<T>)_mm256_maskload_pd(p, (__m256i)lanes<T>());
    else
#endif
    {
      S whole[LANES<T>] = {};
      for (int i = 0; i < n; i++) whole[i] = p[i];
      return Whole{}.template load<T>(whole);
    }
  }
  template <class T, class S>
  INLINE Words<T> words(const S* p) const {
    S whole[LANES<T>] = {};
    for (int i = 0; i < n; i++) whole[i] = p[i];
    return Whole::words<T>(whole);
  }
  template <class S, class V>
  INLINE void store(S* p, V x) const {
    using T = Element<V>;
#if FUSEDBUN_AVX512
    if constexpr (std::is_same_v<S, float> && std::is_same_v<T, float>)
      _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)x);
    else if constexpr (std::is_same_v<S, double>) _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)x);
    else
#elif FUSEDBUN_AVX2
    if constexpr (std::is_same_v<S, float> && std::is_same_v<T, float>)
      _mm256_maskstore_ps(p, (__m256i)lanes<T>(), (__m256)x);
    else if constexpr (std::is_same_v<S, double>) _mm256_maskstore_pd(p, (__m256i)lanes<T>(), (__m256d)x);
    else
#endif
    {
      S whole[sizeof(V) / sizeof(T)];
      Whole{}.store(whole, x);
      for (int i = 0; i < n; i++) p[i] = whole[i];
    }
  }
  template <class V>
  INLINE V only(V x, V otherwise) const { return lanes<Element<V>>() ? x : otherwise; }
  template <class T>
  INLINE auto lanes() const {
    using I = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    Simd<I, LANES<T>> at;
    for (int i = 0; i < LANES<T>; i++) at[i] = i;
    return at < I(n);
  }
};

// Calls `body(lanes, j)` for every register of `n` elements.
template <class T, class F>
FORCE void sweep(Index n, F body) {
  Index j = 0;
  for (; j + LANES<T> <= n; j += LANES<T>) body(Whole{}, j);
  if (j < n) body(First{int(n - j)}, j);
}

// ---- blocks of codes

// Calls `body(lanes_of, b)` for every block of `n` elements; `lanes_of(r)` are the lanes of its register r.
template <class T, class F>
FORCE void blocks(Index n, F body) {
  Index b = 0;
  for (; (b + 1) * BLOCK <= n; b++) body([](int) { return Whole{}; }, b);
  const int rest = int(n - b * BLOCK);
  if (rest > 0) {
    body([=](int r) {
      const int left = rest - r * LANES<T>;
      return First{left < 0 ? 0 : left < LANES<T> ? left : LANES<T>};
    }, b);
  }
}
template <int N, int BY>
FORCE Simd<Word, N> exchanged(Simd<Word, N> x) {  // every lane with the one that is BY away
  Simd<Word, N> y;
#ifdef __clang__
  for (int i = 0; i < N; i++) y[i] = x[i ^ BY];
#else
  Simd<Word, N> at;
  for (int i = 0; i < N; i++) at[i] = i ^ BY;
  y = __builtin_shuffle(x, at);
#endif
  return y;
}
template <class T, class F>
FORCE Words<T> largest(const Words<T>* x, F lanes_of) {  // of a block's words, none of which has a sign
  using Signed = Simd<int32_t, LANES<T>>;
  Signed most{};
  each<BLOCK / LANES<T>>([&](auto r) INLINE {
    const Signed here = (Signed)lanes_of(r).only(x[r], Words<T>{});
    most = here > most ? here : most;
  });
  each<LANES<T> == 16 ? 4 : LANES<T> == 8 ? 3 : 2>([&](auto s) INLINE {  // each lane meets the one 2^s away
    const Signed other = (Signed)exchanged<LANES<T>, 1 << s>((Words<T>)most);
    most = other > most ? other : most;
  });
  return (Words<T>)most;
}
// Codes of 1, 2 or 4 bits: a block's first words are the lowest bits of its bytes, and so on upwards.
template <class T, int BITS>
FORCE Words<T> from_packed(const uint8_t* p, Index b, int r) {  // register r of block b
  constexpr int size = BLOCK * BITS / 8, n = LANES<T>;
  constexpr Word mask = (1 << BITS) - 1, sign = 1 << (BITS - 1);
  p += b * size;
  Words<T> x;
  if constexpr (n <= size) x = Whole::words<T>(p + r * n % size) >> (r * n / size * BITS);
  else for (int i = r * n; i < (r + 1) * n; i++) x[i - r * n] = p[i % size] >> (i / size * BITS);
  return ((x & mask) ^ sign) - sign;
}
template <class T, int BITS, class F>
FORCE void to_packed(uint8_t* p, Index b, const Words<T>* codes, F lanes_of) {  // what fills the last block up is 0
  constexpr int size = BLOCK * BITS / 8, n = LANES<T>;
  p += b * size;
  Words<T> x[BLOCK / n];
  each<BLOCK / n>([&](auto r) INLINE { x[r] = lanes_of(r).only(codes[r], Words<T>{}) & ((1 << BITS) - 1); });
  if constexpr (n <= size) {
    each<size / n>([&](auto r) INLINE {
      Words<T> bytes = x[r];
      each<8 / BITS - 1>([&](auto f) INLINE { bytes |= x[r + (f + 1) * (size / n)] << ((f + 1) * BITS); });
      Whole::store(p + r * n, bytes);
    });
  } else {
    for (int i = 0; i < size; i++) p[i] = 0;
    for (int i = 0; i < BLOCK; i++) p[i % size] |= x[i / n][i % n] << (i / size * BITS);
  }
}

#define EXPORT extern "C" __attribute__((visibility("default")))

// ---------------------------------------------------------------- what passes are made of

constexpr int ROWS = 4;          // in a tile: enough loads under way at once, and few enough to stay in registers
constexpr int AHEAD = 192;       // elements of a row to ask for ahead: far enough for memory to answer in time
constexpr int LONG_AHEAD = 512;  // and in a leaf that is one long row

// Asks for memory that is needed soon.
FORCE void ask(const void* p) { __builtin_prefetch(p, 0, 3); }

FORCE Index up(Index n, Index to) { return (n + to - 1) / to * to; }

constexpr Index ALIGNMENT = 64;  // of vectors in a leaf's work memory, in bytes
template <class T>
FORCE T* vector(void* memory, Index n, Index number) {
  return (T*)((char*)memory + number * up(n * Index(sizeof(T)), ALIGNMENT));
}
template <class T>
FORCE T* single(void* memory, Index n, Index vectors, Index number) { return vector<T>(memory, n, vectors) + number; }
template <class T>
FORCE T* kept(const Work& w, Index number, Index n) { return (T*)w.kept + number * n; }

template <class S>
FORCE S* row(const Work& w, Index array, Index i) { return (S*)((char*)w.arrays[array] + i * w.strides[array]); }

// Some rows of an array, and the rows of the next tile.
template <class S, int K>
struct RowsOf {
  S* at[K];
  Index stride;
  INLINE RowsOf(const Work& w, Index array, Index i) : stride(w.strides[array]) {
    each<K>([&](auto k) INLINE { at[k] = row<S>(w, array, i + k); });
  }
  INLINE S* operator[](int k) const { return at[k]; }
  static constexpr Index LINE = 64 / sizeof(S);  // of the cache, in elements
  INLINE void ask_ahead(int k, Index j, Index n) const {  // past the row's end: in the row of the next tile
    if (sizeof(S) < 4 && j % LINE >= LINE / 2) return;  // a register is half a line or less: one asks for both
    j += AHEAD;
    ask(j < n ? at[k] + j : next(k) + (j - n));
  }
  INLINE void ask_next(int k, Index j) const { ask(next(k) + j); }
  INLINE const S* next(int k) const { return (const S*)((const char*)at[k] + K * stride); }
};

// Room in a chunk's buffer, taken piece by piece.
struct Room {
  char* free;
  explicit Room(void* buffer) : free((char*)buffer) {}
  template <class T>
  T* take(Index n) {
    T* p = (T*)free;
    free += up(n * Index(sizeof(T)), ALIGNMENT);
    return p;
  }
};

template <class F, class T>
T* start(Room& room, Index n) {
  T* p = room.take<T>(n);
  for (Index j = 0; j < n; j++) p[j] = F::template start<T>;
  return p;
}

// The partial reductions of a leaf's chunks, combined in their order.
template <class F, class T>
void combine(T* out, const T* partial, Index n, Index chunks, Index bytes) {
  std::memcpy(out, partial, n * sizeof(T));
  for (Index c = 1; c < chunks; c++) {
    const T* next = (const T*)((const char*)partial + c * bytes);
    sweep<T>(n, [&](auto lanes, Index j) INLINE {
      lanes.store(out + j, F::of(lanes.template load<T>(out + j), lanes.template load<T>(next + j)));
    });
  }
}

template <class T>
void fill(T* p, Index n, T x) { for (Index j = 0; j < n; j++) p[j] = x; }
template <class S, class T>
void copy(S* to, const T* from, Index n) { for (Index j = 0; j < n; j++) put(to + j, from[j]); }

// ---- rows shorter than a register: as many rows as it has lanes, one after another

template <class T>
using LaneNumber = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <class T>
const LaneNumber<T>* rows_of_lanes(Room& room, Index n) {  // which of the tile's rows each of its elements is in
  auto* p = room.take<LaneNumber<T>>(n * LANES<T>);
  for (Index j = 0; j < n * LANES<T>; j++) p[j] = j / n;
  return p;
}
template <class T, class S>
const T* repeat(Room& room, const S* from, Index n) {
  T* p = room.take<T>(n * LANES<T>);
  for (Index j = 0; j < n * LANES<T>; j++) p[j] = number<T>(from + j % n);
  return p;
}
template <class V>
FORCE V spread(V rows, const LaneNumber<Element<V>>* row_of) {  // every element's row's number
  const auto from = *(const Loose<LaneNumber<Element<V>>, LANES<Element<V>>>*)row_of;
#ifdef __clang__
  V y;
  for (int i = 0; i < LANES<Element<V>>; i++) y[i] = rows[from[i]];
  return y;
#else
  return __builtin_shuffle(rows, (Simd<LaneNumber<Element<V>>, LANES<Element<V>>>)from);
#endif
}
template <class T>
FORCE Vector<T> every(const T* p, Index n) {  // elements 0, n, 2*n, …
#if FUSEDBUN_AVX512
  if constexpr (sizeof(T) == 4) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return (Vector<T>)_mm512_i32gather_ps(_mm512_mullo_epi32(lane, _mm512_set1_epi32(int(n))), p, 4);
  } else
#elif FUSEDBUN_AVX2
  if constexpr (sizeof(T) == 4) {
    const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    return (Vector<T>)_mm256_i32gather_ps(p, _mm256_mullo_epi32(lane, _mm256_set1_epi32(int(n))), 4);
  } else
#endif
  {
    Vector<T> x;
    for (int i = 0; i < LANES<T>; i++) x[i] = p[i * n];
    return x;
  }
}
template <class F, class T>
FORCE Vector<T> fold_rows(const T* tile, Index n) {
  Vector<T> x = every(tile, n);
  for (Index j = 1; j < n; j++) x = F::of(x, every(tile + j, n));
  return x;
}
template <class F, class T>
void collapse(T* into, const T* tile, Index n) {  // the reductions of a tile's columns, over its rows
  for (Index j = 0; j < n * LANES<T>; j++) into[j % n] = F::of(into[j % n], tile[j]);
}
