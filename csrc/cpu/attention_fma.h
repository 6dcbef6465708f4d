// softmax(q k^T / sqrt(d)) v and its gradient on the CPU, without the [Sq, Sk] matrix.
//
// Every product is `product`: a register tile over A (any strides, one value broadcast at a time)
// and B (rows of vectors). The layouts follow from it: the vectors run along a score block, never
// along d, so that any d is computed without padding (dq alone has its vectors along d).
//
//   forward    a task is a block of queries of one head. Scores are held transposed,
//              s^T[key, query], so that the softmax's statistics are plain vectors:
//                s^T = k q^T,   p^T = e^(s^T - m),   o^T[d, query] += v^T p^T
//              with the running maximum m and sum l of each query (online softmax).
//   backward   a task is one head. For a block of keys (outer) and of queries (inner):
//                s = q k^T,   p = e^(s - lse),   dp = do v^T,   ds = p (dp - delta)
//                dv^T[d, key] += do^T p,   dk^T[d, key] += q^T ds,   dq[query, d] += ds k
//              where delta = rowsum(do * out). dk^T and dv^T stay in cache, dq is summed in a
//              buffer of the head: finer tasks would have to share it, or compute s and dp twice.
//
// k is packed times 1 / sqrt(d) in both passes, so that backward's scores have forward's bits;
// bf16 and half become float when packed. The order of every sum depends on the shapes alone: the
// bits are the same with any number of threads.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/Unroll.h>

#include "attention_memory.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

namespace mae_fast {
inline namespace CPU_CAPABILITY {

using at::vec::Vectorized;

// Measured on Zen 4, each from 32 or 64 to 256: within 5%. One block holds all keys of 157 tokens.
constexpr int64_t FWD_QUERIES = 64, FWD_KEYS = 192;
constexpr int64_t BWD_QUERIES = 64, BWD_KEYS = 64;
constexpr int64_t MAX_HEAD_DIM = 256;
// Multiply-adds of a product worth another thread.
constexpr int64_t GRAIN = 1 << 18;

// Accumulators of a tile: what the register file holds beside a row of B and a broadcast value.
#if defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
constexpr int TILE_VECTORS = 4, TILE_REGISTERS = 24;
#else
constexpr int TILE_VECTORS = 3, TILE_REGISTERS = 12;
#endif
constexpr int tile_rows(int vectors) {
  return std::min(TILE_REGISTERS / vectors, 12);
}

template <typename T>
using Tile = void (*)(int64_t, const T*, int64_t, int64_t, const T*, int64_t, T*, int64_t, bool);

// Vectors made one by one and loops unrolled by template: an array that is first constructed, or
// indexed in a loop that the compiler unrolls late, would live in memory.
template <typename F, int... I>
C10_ALWAYS_INLINE auto vectors(std::integer_sequence<int, I...>, const F& make) {
  return std::array{make(std::integral_constant<int, I>())...};
}

// c[MR, NV vectors] (+)= sum over k of a[i * a_row + k * a_k] * b[k * ldb + j]
template <typename T, int NV, int MR>
void tile(int64_t depth, const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t ldb, T* c,
          int64_t ldc, bool accumulate) {
  using Vec = Vectorized<T>;
  constexpr int WIDTH = Vec::size();
  constexpr std::make_integer_sequence<int, MR * NV> all{};
  constexpr std::make_integer_sequence<int, NV> columns{};
  const auto load = [&](auto i) { return Vec::loadu(c + i / NV * ldc + i % NV * WIDTH); };
  auto acc = accumulate ? vectors(all, load) : vectors(all, [](auto) { return Vec(T(0)); });
  for (int64_t k = 0; k < depth; ++k, a += a_k, b += ldb) {
    const auto row = vectors(columns, [&](auto j) { return Vec::loadu(b + j * WIDTH); });
    c10::ForcedUnroll<MR * NV>{}([&](auto i) {
      acc[i] = at::vec::fmadd(Vec(a[i / NV * a_row]), row[i % NV], acc[i]);
    });
  }
  c10::ForcedUnroll<MR * NV>{}(
      [&](auto i) { acc[i].store(c + i / NV * ldc + i % NV * WIDTH); });
}

template <typename T, int NV, int... I>
constexpr std::array<Tile<T>, sizeof...(I)> tiles(std::integer_sequence<int, I...>) {
  return {tile<T, NV, I + 1>...};
}

template <typename T, int NV>
void product_columns(int64_t m, int64_t depth, const T* a, int64_t a_row, int64_t a_k, const T* b,
                     int64_t ldb, T* c, int64_t ldc, bool accumulate) {
  constexpr int ROWS = tile_rows(NV);
  static constexpr auto TILES = tiles<T, NV>(std::make_integer_sequence<int, ROWS>());
  for (int64_t i = 0; i < m; i += ROWS) {
    TILES[std::min<int64_t>(m - i, ROWS) - 1](depth, a + i * a_row, a_row, a_k, b, ldb,
                                              c + i * ldc, ldc, accumulate);
  }
}

// c[m, n] (+)= A[m, depth] B[depth, n], n a multiple of the vector
template <typename T>
void product(int64_t m, int64_t n, int64_t depth, const T* a, int64_t a_row, int64_t a_k,
             const T* b, int64_t ldb, T* c, int64_t ldc, bool accumulate) {
  constexpr int64_t WIDTH = Vectorized<T>::size();
  int64_t groups = at::divup(n, WIDTH * TILE_VECTORS);
  for (int64_t left = n / WIDTH; groups > 0; --groups) {
    const int64_t nv = at::divup(left, groups);
    if (nv == 1) {
      product_columns<T, 1>(m, depth, a, a_row, a_k, b, ldb, c, ldc, accumulate);
    } else if (nv == 2) {
      product_columns<T, 2>(m, depth, a, a_row, a_k, b, ldb, c, ldc, accumulate);
    } else if (nv == 3) {
      product_columns<T, 3>(m, depth, a, a_row, a_k, b, ldb, c, ldc, accumulate);
    } else {
      product_columns<T, TILE_VECTORS>(m, depth, a, a_row, a_k, b, ldb, c, ldc, accumulate);
    }
    left -= nv, b += nv * WIDTH, c += nv * WIDTH;
  }
}

inline Vectorized<double> vector_exp(const Vectorized<double>& x) {
  return x.exp();
}

// e^x for x <= 1 or so (below -87 it stays e^-87), exactly 1 at 0. Near the maximum, where it
// counts, the relative error is 2e-7; exp_u20's is 2e-6, and exp is a call.
// x log2(e) = n + f, |f| <= 1/2: 2^f is a minimax polynomial, 2^n is made of n's bits.
inline Vectorized<float> vector_exp(const Vectorized<float>& x) {
  using Vec = Vectorized<float>;
  const Vec log2e(1.44269504f);
  // Adding 1.5 * 2^23 rounds to an integer in the low bits; 127 is the exponent's bias.
  const Vec shift(12582912.f + 127.f);
  const Vec clamped = at::vec::clamp_min(x, Vec(-87.f));
  const Vec shifted = at::vec::fmadd(clamped, log2e, shift);
  const Vec f = at::vec::fmadd(clamped, log2e, shift - shifted);
  Vec y = at::vec::fmadd(f, Vec(1.327647198e-3f), Vec(9.675541334e-3f));
  y = at::vec::fmadd(f, y, Vec(5.550713274e-2f));
  y = at::vec::fmadd(f, y, Vec(2.402211972e-1f));
  y = at::vec::fmadd(f, y, Vec(6.931469671e-1f));
  y = at::vec::fmadd(f, y, Vec(1.f));
  const auto bits = at::vec::cast<int32_t>(shifted) << Vectorized<int32_t>(23);
  return y * at::vec::cast<float>(bits);
}

// dst[rows, cols] = src[rows, cols] * scale
template <typename D, typename S, typename T>
void copy_rows(D* dst, int64_t ld_dst, const S* src, int64_t ld_src, int64_t rows, int64_t cols,
               T scale) {
  for (int64_t i = 0; i < rows; ++i, dst += ld_dst, src += ld_src) {
    for (int64_t j = 0; j < cols; ++j) {
      dst[j] = static_cast<D>(static_cast<T>(src[j]) * scale);
    }
  }
}

// dst[cols, rows] = src[rows, cols]^T
template <typename D, typename S>
void copy_transposed(D* dst, int64_t ld_dst, const S* src, int64_t ld_src, int64_t rows,
                     int64_t cols) {
  if constexpr (std::is_same_v<D, S>) {
    at::vec::transpose_mxn<S>(src, ld_src, dst, ld_dst, rows, cols);
  } else {
    for (int64_t j = 0; j < cols; ++j) {
      for (int64_t i = 0; i < rows; ++i) {
        dst[j * ld_dst + i] = static_cast<D>(src[i * ld_src + j]);
      }
    }
  }
}

template <typename T>
int64_t round_up(int64_t n) {
  return at::divup(n, Vectorized<T>::size()) * Vectorized<T>::size();
}

// s[keys, n] becomes p in place; ot[d, n], m[n] and l[n] move on to the new maximum
template <typename T>
void online_softmax(T* s, T* ot, T* m, T* l, int64_t keys, int64_t n, int64_t ld, int64_t d) {
  using Vec = Vectorized<T>;
  for (int64_t j = 0; j < n; j += Vec::size()) {
    const Vec m_old = Vec::loadu(m + j);
    Vec m_new = m_old;
    for (int64_t k = 0; k < keys; ++k) {
      m_new = at::vec::clamp_min(Vec::loadu(s + k * ld + j), m_new);
    }
    m_new.store(m + j);
    Vec sum(T(0));
    for (int64_t k = 0; k < keys; ++k) {
      const Vec p = vector_exp(Vec::loadu(s + k * ld + j) - m_new);
      p.store(s + k * ld + j);
      sum = sum + p;
    }
    const Vec alpha = vector_exp(m_old - m_new);
    at::vec::fmadd(Vec::loadu(l + j), alpha, sum).store(l + j);
    for (int64_t i = 0; i < d; ++i) {
      (Vec::loadu(ot + i * ld + j) * alpha).store(ot + i * ld + j);
    }
  }
}

template <typename S>
void fwd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
         const at::Tensor& lse) {
  using T = at::opmath_type<S>;
  using Vec = Vectorized<T>;
  const int64_t H = q.size(2), Sq = q.size(1), Sk = k.size(1), d = q.size(3);
  const int64_t blocks = at::divup(Sq, FWD_QUERIES), ld = FWD_QUERIES;
  const T scale = T(1) / std::sqrt(T(d));
  const int64_t grain = at::divup(GRAIN, FWD_QUERIES * Sk * d);
  at::parallel_for(0, q.size(0) * H * blocks, grain, [&](int64_t begin, int64_t end) {
    const auto [memory, parts] = scratch<T>(Sk * d, Sk * d, d * ld, FWD_KEYS * ld, d * ld, ld, ld);
    const auto [ks, vs, qt, s, ot, m, l] = parts;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks / H, h = task / blocks % H;
      if (task == begin || task % blocks == 0) {
        const Head<const S> kh(k, b, h), vh(v, b, h);
        copy_rows(ks, d, kh.data, kh.row, Sk, d, scale);
        copy_rows(vs, d, vh.data, vh.row, Sk, d, T(1));
      }
      const int64_t first = task % blocks * FWD_QUERIES;
      const int64_t queries = std::min(Sq - first, FWD_QUERIES), n = round_up<T>(queries);
      const Head<const S> qh(q, b, h);
      copy_transposed(qt, ld, qh.at(first), qh.row, queries, d);
      std::fill(ot, ot + d * ld, T(0));
      std::fill(m, m + ld, -std::numeric_limits<T>::infinity());
      std::fill(l, l + ld, T(0));
      for (int64_t key = 0; key < Sk; key += FWD_KEYS) {
        const int64_t keys = std::min(Sk - key, FWD_KEYS);
        product(keys, n, d, ks + key * d, d, int64_t(1), qt, ld, s, ld, false);
        online_softmax(s, ot, m, l, keys, n, ld, d);
        product(d, n, keys, vs + key * d, int64_t(1), d, s, ld, ot, ld, true);
      }
      for (int64_t j = 0; j < n; j += Vec::size()) {
        const Vec sum = Vec::loadu(l + j);
        const Vec inverse = Vec(T(1)) / sum;
        (Vec::loadu(m + j) + sum.log()).store(m + j);
        for (int64_t i = 0; i < d; ++i) {
          (Vec::loadu(ot + i * ld + j) * inverse).store(ot + i * ld + j);
        }
      }
      const Head<S> oh(out, b, h);
      copy_transposed(oh.at(first), oh.row, ot, ld, d, queries);
      std::copy(m, m + queries, lse.data_ptr<T>() + (b * H + h) * Sq + first);
    }
  });
}

// s and dp [queries, n] become p and ds in place
template <typename T>
void softmax_grad(T* s, T* dp, const T* lse, const T* delta, int64_t queries, int64_t n,
                  int64_t ld) {
  using Vec = Vectorized<T>;
  for (int64_t i = 0; i < queries; ++i) {
    const Vec row_lse(lse[i]), row_delta(delta[i]);
    for (int64_t j = i * ld; j < i * ld + n; j += Vec::size()) {
      const Vec p = vector_exp(Vec::loadu(s + j) - row_lse);
      p.store(s + j);
      (p * (Vec::loadu(dp + j) - row_delta)).store(dp + j);
    }
  }
}

template <typename S>
void bwd(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
         const at::Tensor& out, const at::Tensor& lse, const at::Tensor& dq, const at::Tensor& dk,
         const at::Tensor& dv) {
  using T = at::opmath_type<S>;
  const int64_t H = q.size(2), Sq = q.size(1), Sk = k.size(1), d = q.size(3);
  const int64_t width = round_up<T>(d), ld = BWD_KEYS;
  const T scale = T(1) / std::sqrt(T(d));
  const int64_t grain = at::divup(GRAIN, Sq * Sk * d + 1);
  at::parallel_for(0, q.size(0) * H, grain, [&](int64_t begin, int64_t end) {
    const auto [memory, parts] =
        scratch<T>(Sq * d, Sq * d, Sq * width, Sq, BWD_KEYS * width, d * ld, d * ld, d * ld,
                   d * ld, BWD_QUERIES * ld, BWD_QUERIES * ld);
    const auto [qs, dos, dqs, delta, kr, kt, vt, dkt, dvt, s, ds] = parts;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / H, h = task % H;
      const Head<const S> qh(q, b, h), kh(k, b, h), vh(v, b, h), oh(out, b, h), doh(dout, b, h);
      const T* lses = lse.data_ptr<T>() + task * Sq;
      const Head<S> dqh(dq, b, h), dkh(dk, b, h), dvh(dv, b, h);
      copy_rows(qs, d, qh.data, qh.row, Sq, d, T(1));
      copy_rows(dos, d, doh.data, doh.row, Sq, d, T(1));
      for (int64_t i = 0; i < Sq; ++i) {
        delta[i] = at::vec::map2_reduce_all<S>([](auto x, auto y) { return x * y; },
                                               [](auto x, auto y) { return x + y; }, doh.at(i),
                                               oh.at(i), d);
      }
      for (int64_t key = 0; key < Sk; key += BWD_KEYS) {
        const int64_t keys = std::min(Sk - key, BWD_KEYS), n = round_up<T>(keys);
        copy_rows(kr, width, kh.at(key), kh.row, keys, d, scale);
        copy_transposed(kt, ld, kr, width, keys, d);
        copy_transposed(vt, ld, vh.at(key), vh.row, keys, d);
        for (int64_t i = 0; i < Sq; i += BWD_QUERIES) {
          const int64_t queries = std::min(Sq - i, BWD_QUERIES);
          const T *qi = qs + i * d, *doi = dos + i * d;
          product(queries, n, d, qi, d, int64_t(1), kt, ld, s, ld, false);
          product(queries, n, d, doi, d, int64_t(1), vt, ld, ds, ld, false);
          softmax_grad(s, ds, lses + i, delta + i, queries, n, ld);
          product(d, n, queries, doi, int64_t(1), d, s, ld, dvt, ld, i > 0);
          product(d, n, queries, qi, int64_t(1), d, ds, ld, dkt, ld, i > 0);
          product(queries, width, keys, ds, ld, int64_t(1), kr, width, dqs + i * width, width,
                  key > 0);
        }
        copy_rows(dkt, ld, dkt, ld, d, n, scale);
        copy_transposed(dkh.at(key), dkh.row, dkt, ld, d, keys);
        copy_transposed(dvh.at(key), dvh.row, dvt, ld, d, keys);
      }
      copy_rows(dqh.data, dqh.row, dqs, width, Sq, d, T(1));
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace mae_fast
