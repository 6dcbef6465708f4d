// The gradients of a linear layer's weight and bias in fp32, from bf16 rows, on AMX: what autocast
// rounds to bf16 and casts again. Products as in attention_amx.h.
#pragma once

#include "attention_amx.h"
#include "common.h"

MAE_FAST_BEGIN

#if MAE_FAST_AMX
namespace amx {

// A task's part of the gradient, and the rows that a product sums over at a time: the fastest of 96
// choices at ViT-B's and its decoder's shapes, within 6% at each.
constexpr int64_t OUT = 192, IN = 384, DEPTH = 512;

// x [rows, cols] in VNNI layout, [.. / 2][cols][2], rows up to a multiple of 32 zero
inline Tensor packed_rows(const Tensor& x) {
  const int64_t rows = x.size(0), cols = x.size(1), pairs = up_to(32, rows) / 2;
  const Tensor packed = at::empty({pairs, cols, 2}, x.options());
  const auto* from = x.const_data_ptr<BFloat16>();
  auto* to = reinterpret_cast<int32_t*>(packed.data_ptr());
  at::parallel_for(0, pairs, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto widened = [&](int64_t row, int64_t j) {
        const __mmask16 there = row < rows ? (1u << std::min(cols - j, W)) - 1 : 0;
        return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from + row * cols + j));
      };
      for (int64_t j = 0; j < cols; j += W) {
        const Int both = Int(widened(2 * i, j)) | (Int(widened(2 * i + 1, j)) << Int(16));
        both.store(to + i * cols + j, std::min(cols - j, W));
      }
    }
  });
  return packed;
}

inline void linear_grads(const Tensor& g, const Tensor& x, const Tensor& dweight,
                         const Tensor& dbias) {
  const int64_t M = g.size(0), N = g.size(1), K = x.size(1), ld = up_to(32, M);
  const Tensor packed = packed_rows(x);
  const auto* xp = packed.const_data_ptr<BFloat16>();
  const auto* gp = g.const_data_ptr<BFloat16>();
  auto *dw = dweight.data_ptr<float>(), *db = dbias.data_ptr<float>();
  const int64_t blocks = at::divup(K, IN);
  at::parallel_for(0, at::divup(N, OUT) * blocks, 1, [&](int64_t begin, int64_t end) {
    const auto [memory, parts] = scratch<BFloat16>(OUT * ld);
    auto* gt = parts[0];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / blocks * OUT, k = task % blocks * IN;
      const int64_t rows = std::min(N - n, OUT), cols = std::min(K - k, IN);
      if (task == begin || k == 0) {
        transpose(gp + n, N, gt, ld, M, rows);
      }
      for (int64_t i = 0; k == 0 && i < rows; ++i) {
        Vec total(0.f);
        for (int64_t m = 0; m < ld; m += W) total = total + widened(gt + i * ld + m);
        db[n + i] = sum<float>(total);
      }
      for (int64_t m = 0; m < ld; m += DEPTH) {
        brgemm(rows, cols, std::min(ld - m, DEPTH), ld, K, K, m > 0, gt + m, xp + m * K + 2 * k,
               dw + n * K + k);
      }
    }
    at::native::cpublas::brgemm_release();
  });
}

}  // namespace amx
#endif

// g [M, N], x [M, K] -> g^T x [N, K] and the sums of g's columns [N], in fp32
inline std::tuple<Tensor, Tensor> linear_grads(const Tensor& g_, const Tensor& x_) {
  TORCH_CHECK(g_.dim() == 2 && x_.dim() == 2 && g_.size(0) == x_.size(0), "linear: gradient ",
              g_.sizes(), " and input ", x_.sizes(), " do not fit");
  TORCH_CHECK(g_.scalar_type() == x_.scalar_type(), "linear: gradient of ", g_.scalar_type(),
              ", input of ", x_.scalar_type());
  check_cpu(g_, "linear: gradient");
  check_cpu(x_, "linear: input");
  const Tensor g = g_.contiguous(), x = x_.contiguous();
#if MAE_FAST_AMX
  if (g.scalar_type() == at::kBFloat16 && !*amx::why_not() && g.numel() && x.size(1)) {
    const auto wide = g.options().dtype(at::kFloat);
    const Tensor dweight = at::empty({g.size(1), x.size(1)}, wide);
    const Tensor dbias = at::empty({g.size(1)}, wide);
    amx::linear_grads(g, x, dweight, dbias);
    return {dweight, dbias};
  }
#endif
  const Tensor wide = g.to(at::kFloat);
  return {wide.t().mm(x.to(at::kFloat)), wide.sum(0)};
}

MAE_FAST_END
