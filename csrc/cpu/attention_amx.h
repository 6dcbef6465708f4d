// attention_fma.h's forward and backward for bf16 on AMX: products of tiles through torch's own
// brgemm, sums and statistics in fp32.
//
// brgemm multiplies A[M, K] (rows of any stride) by B[K, N] in VNNI layout, [K / 2][N][2]: two rows
// of B interleaved. Each score block is made in the orientation that makes its operands cheap:
//
//   forward    s^T[key, query] = k (A, in place) q^T (B),   o^T[d, query] += v^T (A) p^T (B)
//              A query's statistics are lanes of plain vectors, and p^T in VNNI layout is two rows
//              of vectors, rounded and blended: no shuffle. v^T is packed once for a head.
//   backward   s[query, key] = q (A, in place) k^T (B),     dp = do (A, in place) v^T (B)
//              dv^T[d, key] += do^T (A) p (B),  dk^T += q^T (A) ds (B),  dq[query, d] += ds (A) k
//              p and ds as B are blends of two rows. ds as A is a blend of two vectors of one row:
//              its keys stand in the order 0, 16, 1, 17, ..., and k as B is packed to match.
//              q^T and do^T are packed once for a head; k^T, v^T and k once for a block of keys.
//
// Transposed operands (v^T, q^T, do^T) are padded by zeros to a multiple of 32, so that it does not
// matter what p and ds hold there; of an odd row's partner too.
//
// The order of every sum depends on the shapes alone: the bits are the same with any number of
// threads. brgemm is not a public API: torch says by a macro that it has it. Without AMX it is
// slower than attention_fma.h (with AVX512-BF16), or throws.
#pragma once

#include <torch/version.h>

#if defined(CPU_CAPABILITY_AVX512)
#include <ATen/native/CPUBlas.h>
#endif

#include <string>

#if defined(CPU_CAPABILITY_AVX512) && defined(CPUBLAS_BRGEMM_BF16BF16F32)
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>

#include "attention_memory.h"
#include "exponential.h"

namespace mae_fast {
inline namespace CPU_CAPABILITY {
namespace amx {

using at::BFloat16;
using at::native::cpublas::brgemm;
using at::vec::fmadd;
using Vec = at::vec::Vectorized<float>;
using Int = at::vec::Vectorized<int32_t>;

// Within 5% of the best at d = 32, 64, 80 and 157 to 1569 tokens. Blocks of one pass are equal: a
// short last one, or a change of shape, costs brgemm 220 ns at every call.
constexpr int64_t QUERIES = 96, KEYS = 256;  // forward
constexpr int64_t GRAD_QUERIES = 256, GRAD_KEYS = 256;
constexpr int64_t ROWS = 32;  // of s and dp that backward makes at a time: they stay in L1
constexpr int64_t W = Vec::size();
constexpr float LOG2E = 1.44269504088896f;

inline const char* why_not() {
  return at::native::cpublas::could_pack(at::kBFloat16)
             ? ""
             : "this CPU has no AMX, or oneDNN may not use it (ONEDNN_MAX_CPU_ISA)";
}

inline int64_t up_to(int64_t multiple, int64_t n) {
  return at::divup(n, multiple) * multiple;
}

// The size of equal blocks of n, each at most `most` and a multiple of `of`
inline int64_t block_size(int64_t n, int64_t most, int64_t of) {
  return up_to(of, at::divup(n, at::divup(n, most)));
}

// Rounded to bf16 in the high half; two of them in the halves of one
inline Int rounded(const Vec& x) {
  return at::vec::cast<int32_t>(x) + Int(0x8000);
}
inline Int pair(const Int& low, const Int& high) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(low, 16), high);
}

// dst[cols, rows] = src[rows, cols]^T, in blocks of up to 32, but not of 31: torch makes their mask
// by a shift that is undefined.
inline void transpose(const BFloat16* src, int64_t ld_src, BFloat16* dst, int64_t ld_dst,
                      int64_t rows, int64_t cols) {
  const auto block = [](int64_t left) { return left == 31 ? 16 : std::min<int64_t>(left, 32); };
  for (int64_t i = 0; i < rows; i += block(rows - i)) {
    for (int64_t j = 0; j < cols; j += block(cols - j)) {
      at::vec::transpose_mxn<BFloat16>(src + i * ld_src + j, ld_src, dst + j * ld_dst + i, ld_dst,
                                       block(rows - i), block(cols - j));
    }
  }
}

// src[rows, d]^T in VNNI layout, [d / 2][n][2]: a transposition of pairs
inline void pack_transposed(const BFloat16* src, int64_t ld_src, BFloat16* dst, int64_t n,
                            int64_t rows, int64_t d) {
  at::vec::transpose_mxn<float>(reinterpret_cast<const float*>(src), ld_src / 2,
                                reinterpret_cast<float*>(dst), n, rows, d / 2);
}

// src[rows, d] in VNNI layout with rows i and i + 16 of each 32 as pairs, missing rows zero
inline void pack_rows(const BFloat16* src, int64_t ld_src, BFloat16* dst, int64_t rows,
                      int64_t d) {
  const auto widened = [&](int64_t i, int64_t j) {
    const __mmask16 there = i < rows ? (1u << std::min(d - j, W)) - 1 : 0;
    return Int(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, src + i * ld_src + j)));
  };
  for (int64_t g = 0; g < rows; g += 32) {
    for (int64_t i = g; i < g + 16; ++i, dst += 2 * d) {
      for (int64_t j = 0; j < d; j += W) {
        const Int both = widened(i, j) | (widened(i + 16, j) << Int(16));
        both.store(dst + 2 * j, std::min(d - j, W));
      }
    }
  }
}

// dst[rows, cols] bf16 = src[rows, cols] * scale
inline void store_rows(BFloat16* dst, int64_t ld_dst, const float* src, int64_t ld_src,
                       int64_t rows, int64_t cols, float scale) {
  for (int64_t i = 0; i < rows; ++i) {
    at::vec::map<BFloat16>([&](Vec x) { return x * Vec(scale); }, dst + i * ld_dst,
                           src + i * ld_src, cols);
  }
}

// s^T[keys, n] becomes p^T in VNNI layout; o^T[d, n], m[n] and l[n] move on to the new maximum, and
// no further: a row's greatest p is 1, which bf16 does not round.
inline void online_softmax(const float* s, BFloat16* p, float* ot, float* m, float* l,
                           int64_t keys, int64_t n, int64_t d, float scale, bool first) {
  const Vec c(scale);
  for (int64_t j = 0; j < n; j += W) {
    Vec top[4];
    for (int64_t i = 0; i < 4; ++i) {
      top[i] = Vec::loadu(s + j + std::min(i, keys - 1) * n);
    }
    int64_t k = 0;
    for (; k + 4 <= keys; k += 4) {
      for (int64_t i = 0; i < 4; ++i) {
        top[i] = at::vec::maximum(top[i], Vec::loadu(s + (k + i) * n + j));
      }
    }
    for (; k < keys; ++k) {
      top[0] = at::vec::maximum(top[0], Vec::loadu(s + k * n + j));
    }
    const Vec highest =
        at::vec::maximum(at::vec::maximum(top[0], top[1]), at::vec::maximum(top[2], top[3])) * c;
    Vec reference = highest, sum(0.f), sum2(0.f);
    if (!first) {
      const Vec before = Vec::loadu(m + j);
      reference = at::vec::maximum(before, highest);
      sum = Vec::loadu(l + j);
      if ((reference > before).zero_mask() != (1 << W) - 1) {
        const Vec alpha = exp2<false>(before - reference);
        sum = sum * alpha;
        for (int64_t i = 0; i < d; ++i) {
          (Vec::loadu(ot + i * n + j) * alpha).store(ot + i * n + j);
        }
      }
    }
    reference.store(m + j);
    const Vec shift = reference.neg();
    const auto exponential = [&](int64_t row) {
      return exp2<false>(fmadd(Vec::loadu(s + row * n + j), c, shift));
    };
    int32_t* to = reinterpret_cast<int32_t*>(p) + j;
    for (k = 0; k + 2 <= keys; k += 2, to += n) {
      const Vec a = exponential(k), b = exponential(k + 1);
      sum = sum + a, sum2 = sum2 + b;
      pair(rounded(a), rounded(b)).store(to);
    }
    if (k < keys) {
      const Vec a = exponential(k);
      sum = sum + a;
      pair(rounded(a), Int(0)).store(to);
    }
    (sum + sum2).store(l + j);
  }
}

inline void fwd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                const at::Tensor& out, const at::Tensor& lse) {
  const int64_t H = q.size(2), Sq = q.size(1), Sk = k.size(1), d = q.size(3);
  const int64_t n = block_size(Sq, QUERIES, 16), kb = block_size(Sk, KEYS, 32);
  const int64_t blocks = at::divup(Sq, n), ld_v = up_to(32, Sk);
  const float scale = LOG2E / std::sqrt(float(d));
  at::parallel_for(0, q.size(0) * H * blocks, 1, [&](int64_t begin, int64_t end) {
    const auto [memory, parts] = scratch<BFloat16>(d * ld_v, d * n, kb * n);
    const auto [vt, qt, p] = parts;
    const auto [memory2, parts2] = scratch<float>(kb * n, d * n, d * n, n, n);
    const auto [s, ot, o, m, l] = parts2;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks / H, h = task / blocks % H;
      const Head<const BFloat16> qh(q, b, h), kh(k, b, h), vh(v, b, h);
      if (task == begin || task % blocks == 0) {
        transpose(vh.data, vh.row, vt, ld_v, Sk, d);
      }
      const int64_t first = task % blocks * n, queries = std::min(Sq - first, n);
      pack_transposed(qh.at(first), qh.row, qt, n, queries, d);
      for (int64_t key = 0; key < Sk; key += kb) {
        const int64_t keys = std::min(Sk - key, kb), depth = up_to(32, keys);
        brgemm(keys, n, d, kh.row, n, n, false, kh.at(key), qt, s);
        online_softmax(s, p, ot, m, l, keys, n, d, scale, key == 0);
        brgemm(d, n, depth, ld_v, n, n, key > 0, vt + key, p, ot);
      }
      for (int64_t j = 0; j < n; j += W) {
        const Vec sum = Vec::loadu(l + j), inverse = Vec(1.f) / sum;
        fmadd(Vec::loadu(m + j), Vec(1 / LOG2E), sum.log()).store(m + j);
        for (int64_t i = 0; i < d; ++i) {
          (Vec::loadu(ot + i * n + j) * inverse).store(ot + i * n + j);
        }
      }
      const Head<BFloat16> oh(out, b, h);
      at::vec::transpose_mxn<float>(ot, n, o, d, d, queries);
      store_rows(oh.at(first), oh.row, o, d, queries, d, 1.f);
      std::copy(m, m + queries, lse.data_ptr<float>() + (b * H + h) * Sq + first);
    }
    at::native::cpublas::brgemm_release();
  });
}

// s and dp [queries, n] -> p and ds as B (pairs of rows) and ds as A (its keys by pairs i, i + 16),
// where the keys that pad the last 32 are zero: in dp and s they are numbers, in dv and dk columns
// that nobody reads. lse is in units of log 2; an odd last query has a partner whose p is 0.
inline void softmax_grad(const float* s, const float* dp, BFloat16* p, BFloat16* ds_b,
                         BFloat16* ds_a, const float* lse, const float* delta, int64_t queries,
                         int64_t keys, int64_t n, float scale) {
  const Vec c(scale);
  auto *to_p = reinterpret_cast<int32_t*>(p), *to_b = reinterpret_cast<int32_t*>(ds_b),
       *to_a = reinterpret_cast<int32_t*>(ds_a);
  int32_t in_last[W];
  for (int64_t i = 0; i < W; ++i) {
    in_last[i] = (n - 32 + i < keys ? 0xffff : 0) | (n - 16 + i < keys ? int32_t(0xffff0000) : 0);
  }
  const Int all(-1), last = Int::loadu(in_last);
  for (int64_t i = 0; i < queries; i += 2, to_p += n, to_b += n, to_a += n) {
    const Vec lse0(-lse[i]), lse1(-lse[i + 1]), delta0(delta[i]), delta1(delta[i + 1]);
    const float *s0 = s + i * n, *s1 = s0 + n, *dp0 = dp + i * n, *dp1 = dp0 + n;
    const auto grad = [&](int64_t j) {
      const Vec p0 = exp2<false>(fmadd(Vec::loadu(s0 + j), c, lse0));
      const Vec p1 = exp2<false>(fmadd(Vec::loadu(s1 + j), c, lse1));
      pair(rounded(p0), rounded(p1)).store(to_p + j);
      const Int ds0 = rounded(p0 * (Vec::loadu(dp0 + j) - delta0));
      const Int ds1 = rounded(p1 * (Vec::loadu(dp1 + j) - delta1));
      pair(ds0, ds1).store(to_b + j);
      return std::make_pair(ds0, ds1);
    };
    for (int64_t j = 0; j < n; j += 2 * W) {
      const auto [low0, low1] = grad(j);
      const auto [high0, high1] = grad(j + W);
      const Int mask = j + 2 * W < n ? all : last;
      (pair(low0, high0) & mask).store(to_a + j / 2);
      (pair(low1, high1) & mask).store(to_a + n / 2 + j / 2);
    }
  }
}

// dst[keys, d] = src[d, keys]^T * scale, by way of buffer[keys, d]
inline void store_transposed(BFloat16* dst, int64_t ld_dst, const float* src, int64_t ld_src,
                             float* buffer, int64_t keys, int64_t d, float scale) {
  at::vec::transpose_mxn<float>(src, ld_src, buffer, d, d, keys);
  store_rows(dst, ld_dst, buffer, d, keys, d, scale);
}

inline void bwd(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k,
                const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
                const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv) {
  const int64_t H = q.size(2), Sq = q.size(1), Sk = k.size(1), d = q.size(3);
  const int64_t qb = block_size(Sq, GRAD_QUERIES, ROWS), kb = block_size(Sk, GRAD_KEYS, 32);
  const int64_t ld_q = up_to(32, Sq), tile = qb * kb;
  const float scale = 1 / std::sqrt(float(d));
  at::parallel_for(0, q.size(0) * H, 1, [&](int64_t begin, int64_t end) {
    const auto [memory, parts] =
        scratch<BFloat16>(d * ld_q, d * ld_q, kb * d, kb * d, kb * d, tile, tile, tile);
    const auto [qt, dot, kt, vt, kr, p, ds_b, ds_a] = parts;
    const auto [memory2, parts2] = scratch<float>(ld_q * d, ld_q, ld_q, kb * d, kb * d, kb * d,
                                                  ROWS * kb, ROWS * kb);
    const auto [dqs, lses, delta, dkt, dvt, buffer, s, dp] = parts2;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / H, h = task % H;
      const Head<const BFloat16> qh(q, b, h), kh(k, b, h), vh(v, b, h), oh(out, b, h),
          doh(dout, b, h);
      const Head<BFloat16> dqh(dq, b, h), dkh(dk, b, h), dvh(dv, b, h);
      transpose(qh.data, qh.row, qt, ld_q, Sq, d);
      transpose(doh.data, doh.row, dot, ld_q, Sq, d);
      for (int64_t i = 0; i < ld_q; ++i) {
        lses[i] = i < Sq ? lse.data_ptr<float>()[task * Sq + i] * LOG2E : 1e30f;
        delta[i] = i < Sq ? at::vec::map2_reduce_all<BFloat16>(
                                [](auto x, auto y) { return x * y; },
                                [](auto x, auto y) { return x + y; }, doh.at(i), oh.at(i), d)
                          : 0.f;
      }
      for (int64_t key = 0; key < Sk; key += kb) {
        const int64_t keys = std::min(Sk - key, kb), n = up_to(32, keys);
        pack_transposed(kh.at(key), kh.row, kt, n, keys, d);
        pack_transposed(vh.at(key), vh.row, vt, n, keys, d);
        pack_rows(kh.at(key), kh.row, kr, keys, d);
        for (int64_t i = 0; i < Sq; i += qb) {
          const int64_t queries = std::min(Sq - i, qb), depth = up_to(32, queries);
          for (int64_t r = 0; r < queries; r += ROWS) {
            const int64_t rows = std::min(queries - r, ROWS);
            brgemm(rows, n, d, qh.row, n, n, false, qh.at(i + r), kt, s);
            brgemm(rows, n, d, doh.row, n, n, false, doh.at(i + r), vt, dp);
            softmax_grad(s, dp, p + r * n, ds_b + r * n, ds_a + r * n, lses + i + r, delta + i + r,
                         rows, keys, n, scale * LOG2E);
          }
          brgemm(d, n, depth, ld_q, n, n, i > 0, dot + i, p, dvt);
          brgemm(d, n, depth, ld_q, n, n, i > 0, qt + i, ds_b, dkt);
          brgemm(queries, d, n, n, d, d, key > 0, ds_a, kr, dqs + i * d);
        }
        store_transposed(dkh.at(key), dkh.row, dkt, n, buffer, keys, d, scale);
        store_transposed(dvh.at(key), dvh.row, dvt, n, buffer, keys, d, 1.f);
      }
      store_rows(dqh.data, dqh.row, dqs, d, Sq, d, scale);
    }
    at::native::cpublas::brgemm_release();
  });
}

}  // namespace amx
}  // namespace CPU_CAPABILITY
}  // namespace mae_fast
#define MAE_FAST_AMX 1
#else
#define MAE_FAST_AMX 0
namespace mae_fast {
inline namespace CPU_CAPABILITY {
namespace amx {
inline const char* why_not() {
#if defined(CPU_CAPABILITY_AVX512)
  return "torch " TORCH_VERSION " has no brgemm for bf16";
#else
  return "this CPU has no AMX";
#endif
}
}  // namespace amx
}  // namespace CPU_CAPABILITY
}  // namespace mae_fast
#endif
