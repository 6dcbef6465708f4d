// gelu(x + bias) with the exact erf, and its backward with the bias's gradient in the same pass.
#pragma once

#include "common.h"
#include "exponential.h"

MAE_FAST_BEGIN

// Phi(h), the normal distribution, and e^(-h^2 / 2). In fp32 by Abramowitz and Stegun 7.1.26, error
// 1.5e-7, as in torch's own vectors.
template <typename T>
inline std::pair<Vec<T>, Vec<T>> normal(const Vec<T>& h) {
  using V = Vec<T>;
  using A = acc_t<T>;
  if constexpr (std::is_same_v<A, double>) {
    return {V(0.5) * (V(1) + (h * V(M_SQRT1_2)).erf()), (h * h * V(-0.5)).exp()};
  } else {
    constexpr bool PRECISE = std::is_same_v<T, float>;
    const V e = exp2<PRECISE>(h * h * V(A(-0.5 * M_LOG2E)));
    const V t =
        reciprocal<PRECISE>(at::vec::fmadd(h.abs(), V(A(0.3275911 * M_SQRT1_2)), V(A(1))));
    V p = at::vec::fmadd(V(1.061405429f), t, V(-1.453152027f));
    p = at::vec::fmadd(p, t, V(1.421413741f));
    p = at::vec::fmadd(p, t, V(-0.284496736f));
    p = at::vec::fmadd(p, t, V(0.254829592f));
    const V tail = V(0.5f) * p * t * e;  // Phi(-|h|)
    return {V::blendv(V(1) - tail, tail, h < V(0)), e};
  }
}

inline void check_bias_gelu(const Tensor& x, const Tensor& bias) {
  TORCH_CHECK(x.dim() >= 1 && bias.dim() == 1 && x.size(-1) == bias.size(0), "bias_gelu: x ",
              x.sizes(), " and bias ", bias.sizes(), " do not fit");
  check_cpu(x, "bias_gelu: x");
  check_cpu(bias, "bias_gelu: bias");
}

inline Tensor bias_gelu_fwd(const Tensor& x_, const Tensor& bias_) {
  check_bias_gelu(x_, bias_);
  const Tensor x = x_.contiguous();
  const Tensor bias = bias_.to(at::toOpMathType(x.scalar_type())).contiguous();
  const int64_t size = x.size(-1), rows = size ? x.numel() / size : 0;
  Tensor out = at::empty_like(x);
  MAE_FAST_FLOATS(x.scalar_type(), "bias_gelu", [&] {
    using A = acc_t<scalar_t>;
    using V = Vec<scalar_t>;
    const auto* xp = x.const_data_ptr<scalar_t>();
    const A* bp = bias.const_data_ptr<A>();
    auto* op = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, rows, 1 + 4096 / (size + 1), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        each<scalar_t>(size, [&](int64_t i, auto n) {
          const V h = load(xp + r * size + i, n) + load(bp + i, n);
          store(op + r * size + i, h * normal<scalar_t>(h).first, n);
        });
      }
    });
  });
  return out;
}

// With h = x + bias: dx = dout * (Phi(h) + h * phi(h)), Phi and phi the normal distribution's.
inline std::tuple<Tensor, Tensor> bias_gelu_bwd(const Tensor& dout_, const Tensor& x_,
                                                const Tensor& bias_) {
  check_bias_gelu(x_, bias_);
  TORCH_CHECK(dout_.sizes() == x_.sizes(), "bias_gelu: gradient ", dout_.sizes(), " for ",
              x_.sizes());
  const auto type = x_.scalar_type(), acc = at::toOpMathType(type);
  const Tensor x = x_.contiguous(), dout = dout_.to(type).contiguous();
  const Tensor bias = bias_.to(acc).contiguous();
  const int64_t size = x.size(-1), rows = size ? x.numel() / size : 0;
  Tensor dx = at::empty_like(x);
  Tensor parts = at::zeros({num_blocks(rows), size}, x.options().dtype(acc));
  MAE_FAST_FLOATS(type, "bias_gelu", [&] {
    using A = acc_t<scalar_t>;
    using V = Vec<scalar_t>;
    const auto *xp = x.const_data_ptr<scalar_t>(), *gp = dout.const_data_ptr<scalar_t>();
    const A* bp = bias.const_data_ptr<A>();
    auto* dp = dx.mutable_data_ptr<scalar_t>();
    A* pp = parts.mutable_data_ptr<A>();
    const V density(A(M_2_SQRTPI * M_SQRT1_2 * 0.5));  // 1 / sqrt(2 pi)
    parallel_blocks(rows, [&](int64_t block, int64_t begin, int64_t end) {
      A* dbias = pp + block * size;
      for (int64_t r = begin; r < end; ++r) {
        each<scalar_t>(size, [&](int64_t i, auto n) {
          const V h = load(xp + r * size + i, n) + load(bp + i, n);
          const auto [cdf, e] = normal<scalar_t>(h);
          const V slope = at::vec::fmadd(h * density, e, cdf);
          const V d = load(gp + r * size + i, n) * slope;
          store(dp + r * size + i, d, n);
          store(dbias + i, load(dbias + i, n) + d, n);
        });
      }
    });
  });
  return {dx, parts.sum(0).to(bias_.scalar_type())};
}

MAE_FAST_END
