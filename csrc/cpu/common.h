// What every CPU kernel shares: vectors that compute in fp32 (fp64 for double) whatever is stored.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

// One library for each CPU capability is built from the same source: names must not meet.
#define MAE_FAST_BEGIN namespace mae_fast { inline namespace CPU_CAPABILITY {
#define MAE_FAST_END }}

#define MAE_FAST_FLOATS(TYPE, NAME, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, TYPE, NAME, __VA_ARGS__)

MAE_FAST_BEGIN

using at::Tensor;

template <typename T>
using acc_t = at::opmath_type<T>;
template <typename T>
using Vec = at::vec::Vectorized<acc_t<T>>;

// A vector of fp32 from as many 16-bit numbers, and back: half of a vector of those.
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
template <typename T>
inline Vec<T> widened(const T* p) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  __m512 wide;
#else
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  __m256 wide;
#endif
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    at::vec::cvtbf16_fp32(half, wide);
  } else {
    at::vec::cvtfp16_fp32(half, wide);
  }
  return wide;
}

template <typename T>
inline void store_narrowed(T* p, const Vec<T>& v) {
  const auto half = [&] {
    if constexpr (std::is_same_v<T, at::BFloat16>) {
      return at::vec::cvtfp32_bf16(v);
    } else {
      return at::vec::cvtfp32_fp16(v);
    }
  }();
#if defined(CPU_CAPABILITY_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
#else
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
#endif
}
#else
template <typename T>
inline Vec<T> widened(const T* p) {
  constexpr int64_t V = Vec<T>::size();
  return std::get<0>(at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(p, V)));
}

template <typename T>
inline void store_narrowed(T* p, const Vec<T>& v) {
  at::vec::convert_from_float<T>(v, v).store(p, Vec<T>::size());
}
#endif

// n elements at p, n <= Vec<T>::size(), the rest zero.
template <typename T>
inline Vec<T> load(const T* p, int64_t n = Vec<T>::size()) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    return n == Vec<T>::size() ? Vec<T>::loadu(p) : Vec<T>::loadu(p, n);
  } else {
    return n == Vec<T>::size()
               ? widened(p)
               : std::get<0>(at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(p, n)));
  }
}

template <typename T>
inline void store(T* p, Vec<T> v, int64_t n = Vec<T>::size()) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    v.store(p, n);
  } else if (n == Vec<T>::size()) {
    store_narrowed(p, v);
  } else {
    at::vec::convert_from_float<T>(v, v).store(p, n);
  }
}

template <typename A>
inline A sum(const at::vec::Vectorized<A>& v) {
  return at::vec::vec_reduce_all<A>([](auto& a, auto& b) { return a + b; }, v);
}

// f(i, n) for every vector of a row: n elements from i on. n is a constant, the vector's size, but
// for what is left at the end, so that f takes it as `auto`.
template <typename T, typename F>
inline void each(int64_t size, const F& f) {
  constexpr int64_t V = Vec<T>::size();
  int64_t i = 0;
  for (; i + V <= size; i += V) f(i, std::integral_constant<int64_t, V>());
  if (i < size) f(i, size - i);
}

// Rows go to blocks of a number that no thread count changes, so that sums over rows, taken block
// by block and then over the blocks in order, give the same bits every time.
constexpr int64_t kBlocks = 64;

inline int64_t num_blocks(int64_t rows) {
  return std::clamp<int64_t>(rows / 32, 1, kBlocks);
}

// f(block, first row, end row), in parallel over blocks.
template <typename F>
inline void parallel_blocks(int64_t rows, const F& f) {
  const int64_t blocks = num_blocks(rows);
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) f(b, rows * b / blocks, rows * (b + 1) / blocks);
  });
}

inline void check_cpu(const Tensor& t, const char* name) {
  TORCH_CHECK(t.device().is_cpu(), name, " must be on the CPU, it is on ", t.device());
}

// ids as int64 [B, n], every one within [0, length).
inline Tensor checked_ids(const Tensor& ids, int64_t length, const char* name) {
  TORCH_CHECK(ids.dim() == 2 && (ids.scalar_type() == at::kInt || ids.scalar_type() == at::kLong),
              name, " must be int32 or int64 [B, n], got ", ids.scalar_type(), " ", ids.sizes());
  check_cpu(ids, name);
  Tensor wide = ids.to(at::kLong).contiguous();
  const int64_t* p = wide.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < wide.numel(); ++i) {
    TORCH_CHECK_INDEX(p[i] >= 0 && p[i] < length, name, " holds ", p[i], ", outside [0, ", length,
                      ")");
  }
  return wide;
}

MAE_FAST_END
