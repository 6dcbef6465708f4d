// Layer norm over the last dimension, alone and after a residual addition, and its backward.
#pragma once

#include "common.h"

MAE_FAST_BEGIN

// What a norm gives is of x's dtype or, where x is in fp32, in bf16 or f16.
inline bool gives(at::ScalarType type, at::ScalarType out) {
  return out == type || (type == at::kFloat && (out == at::kBFloat16 || out == at::kHalf));
}

// f(O()) for the type of what a norm of T gives.
template <typename T, typename F>
void with_out(at::ScalarType out, const F& f) {
  if constexpr (std::is_same_v<T, float>) {
    if (out == at::kBFloat16) return f(at::BFloat16());
    if (out == at::kHalf) return f(at::Half());
  }
  f(T());
}

// out = norm(row) * weight + bias; two passes, since one loses the variance of a distant mean.
template <typename T, typename O>
void norm_row(const T* row, const acc_t<T>* weight, const acc_t<T>* bias, acc_t<T> eps,
              int64_t size, O* out, acc_t<T>& mean, acc_t<T>& rstd) {
  using A = acc_t<T>;
  Vec<T> total(A(0)), squares(A(0));
  each<T>(size, [&](int64_t i, auto n) { total = total + load(row + i, n); });
  mean = sum<A>(total) / size;
  const Vec<T> m(mean);
  each<T>(size, [&](int64_t i, auto n) {
    const auto d = Vec<T>::set(Vec<T>(A(0)), load(row + i, n) - m, n);
    squares = at::vec::fmadd(d, d, squares);
  });
  rstd = 1 / std::sqrt(sum<A>(squares) / size + eps);
  const Vec<T> r(rstd);
  each<T>(size, [&](int64_t i, auto n) {
    const auto x = (load(row + i, n) - m) * r;
    store(out + i, at::vec::fmadd(x, load(weight + i, n), load(bias + i, n)), n);
  });
}

inline void check_norm(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  TORCH_CHECK(x.dim() >= 1 && weight.dim() == 1 && x.size(-1) == weight.size(0) &&
                  bias.sizes() == weight.sizes(),
              "layer_norm: x ", x.sizes(), ", weight ", weight.sizes(), " and bias ", bias.sizes(),
              " do not fit");
  for (const auto& t : {x, weight, bias}) check_cpu(t, "layer_norm: a tensor");
}

// sum = x + y (where there is a y), out = norm(sum) of `dtype`; mean, rstd [rows] in fp32 (fp64).
inline std::tuple<Tensor, Tensor, Tensor, Tensor> norm_forward(
    const Tensor& x_, const std::optional<Tensor>& y_, const Tensor& weight_, const Tensor& bias_,
    double eps, at::ScalarType dtype) {
  check_norm(x_, weight_, bias_);
  TORCH_CHECK(gives(x_.scalar_type(), dtype), "layer_norm: of ", x_.scalar_type(), " gives no ",
              dtype);
  const Tensor x = x_.contiguous(), y = y_ ? y_->to(x.scalar_type()).contiguous() : Tensor();
  if (y_) {
    TORCH_CHECK(y.sizes() == x.sizes(), "add_layer_norm: x ", x.sizes(), " and y ", y.sizes(),
                " differ");
    check_cpu(y, "add_layer_norm: y");
  }
  const auto acc = at::toOpMathType(x.scalar_type());
  const Tensor weight = weight_.to(acc).contiguous(), bias = bias_.to(acc).contiguous();
  const int64_t size = x.size(-1), rows = size ? x.numel() / size : 0;
  Tensor out = at::empty_like(x, dtype), total = y_ ? at::empty_like(x) : Tensor();
  Tensor mean = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(acc));
  Tensor rstd = at::empty_like(mean);
  MAE_FAST_FLOATS(x.scalar_type(), "layer_norm", [&] {
    using A = acc_t<scalar_t>;
    const auto *xp = x.const_data_ptr<scalar_t>(),
               *yp = y_ ? y.const_data_ptr<scalar_t>() : nullptr;
    const A *wp = weight.const_data_ptr<A>(), *bp = bias.const_data_ptr<A>();
    auto* tp = y_ ? total.mutable_data_ptr<scalar_t>() : nullptr;
    A *mp = mean.mutable_data_ptr<A>(), *rp = rstd.mutable_data_ptr<A>();
    with_out<scalar_t>(dtype, [&](auto given) {
      auto* op = out.mutable_data_ptr<decltype(given)>();
      at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          const scalar_t* row = xp + r * size;
          if (yp) {
            each<scalar_t>(size, [&](int64_t i, auto n) {
              store(tp + r * size + i, load(row + i, n) + load(yp + r * size + i, n), n);
            });
            row = tp + r * size;
          }
          norm_row<scalar_t>(row, wp, bp, A(eps), size, op + r * size, mp[r], rp[r]);
        }
      });
    });
  });
  return {total, out, mean, rstd};
}

inline std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x, const Tensor& weight,
                                                         const Tensor& bias, double eps,
                                                         at::ScalarType dtype) {
  auto [_, out, mean, rstd] = norm_forward(x, std::nullopt, weight, bias, eps, dtype);
  return {out, mean, rstd};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(
    const Tensor& x, const Tensor& y, const Tensor& weight, const Tensor& bias, double eps,
    at::ScalarType dtype) {
  return norm_forward(x, y, weight, bias, eps, dtype);
}

// With g = dout * weight and n = (x - mean) * rstd: dx = rstd * (g - mean(g) - n * mean(g * n)),
// plus dtotal where x is a sum that went on, from token `first` of each sequence; dweight = sum of
// dout * n, dbias = sum of dout.
inline std::tuple<Tensor, Tensor, Tensor> norm_backward(
    const std::optional<Tensor>& dtotal_, const Tensor& dout_, const Tensor& x_,
    const Tensor& weight_, const Tensor& mean_, const Tensor& rstd_, int64_t first = 0) {
  check_norm(x_, weight_, weight_);
  const auto type = x_.scalar_type(), acc = at::toOpMathType(type);
  TORCH_CHECK(dout_.sizes() == x_.sizes(), "layer_norm: gradient ", dout_.sizes(), " for ",
              x_.sizes());
  const auto given = gives(type, dout_.scalar_type()) ? dout_.scalar_type() : type;
  const Tensor x = x_.contiguous(), dout = dout_.to(given).contiguous();
  const Tensor dtotal = dtotal_ ? dtotal_->to(type).contiguous() : Tensor();
  const Tensor weight = weight_.to(acc).contiguous();
  const Tensor mean = mean_.contiguous(), rstd = rstd_.contiguous();
  const int64_t size = x.size(-1), rows = size ? x.numel() / size : 0;
  TORCH_CHECK(mean.numel() == rows && rstd.numel() == rows, "layer_norm: ", rows, " rows, ",
              mean.numel(), " means and ", rstd.numel(), " deviations");
  const int64_t tokens = first ? x.size(-2) : rows;
  TORCH_CHECK(first >= 0 && first <= tokens && (!tokens || !dtotal_ ||
                  dtotal.numel() == rows / tokens * (tokens - first) * size),
              "add_layer_norm: gradient ", dtotal.sizes(), " of the sum from token ", first,
              " on of ", x.sizes());
  Tensor dx = at::empty_like(x);
  Tensor parts = at::zeros({num_blocks(rows), 2, size}, x.options().dtype(acc));
  MAE_FAST_FLOATS(type, "layer_norm", [&] {
    using A = acc_t<scalar_t>;
    const auto *xp = x.const_data_ptr<scalar_t>(),
               *tp = dtotal_ ? dtotal.const_data_ptr<scalar_t>() : nullptr;
    const A *wp = weight.const_data_ptr<A>(), *mp = mean.const_data_ptr<A>(),
            *rp = rstd.const_data_ptr<A>();
    auto* dp = dx.mutable_data_ptr<scalar_t>();
    A* pp = parts.mutable_data_ptr<A>();
    with_out<scalar_t>(given, [&](auto of_dout) {
      const auto* gp = dout.const_data_ptr<decltype(of_dout)>();
      parallel_blocks(rows, [&](int64_t block, int64_t begin, int64_t end) {
        A *dweight = pp + block * 2 * size, *dbias = dweight + size;
        for (int64_t r = begin; r < end; ++r) {
          const scalar_t* row = xp + r * size;
          const auto* grad = gp + r * size;
          const Vec<scalar_t> m(mp[r]), s(rp[r]);
          Vec<scalar_t> g1(A(0)), g2(A(0));
          each<scalar_t>(size, [&](int64_t i, auto n) {
            // Past the row's end grad is zero, and so is everything added.
            const auto d = load(grad + i, n), x = (load(row + i, n) - m) * s;
            const auto g = d * load(wp + i, n);
            g1 = g1 + g;
            g2 = at::vec::fmadd(g, x, g2);
            store(dweight + i, at::vec::fmadd(d, x, load(dweight + i, n)), n);
            store(dbias + i, load(dbias + i, n) + d, n);
          });
          const Vec<scalar_t> a(sum<A>(g1) / size), b(sum<A>(g2) / size);
          const int64_t token = r % tokens - first;
          const scalar_t* added = tp && token >= 0
              ? tp + (r / tokens * (tokens - first) + token) * size : nullptr;
          each<scalar_t>(size, [&](int64_t i, auto n) {
            const auto x = (load(row + i, n) - m) * s;
            auto d = (load(grad + i, n) * load(wp + i, n) - a - x * b) * s;
            if (added) d = d + load(added + i, n);
            store(dp + r * size + i, d, n);
          });
        }
      });
    });
  });
  const Tensor sums = parts.sum(0).to(weight_.scalar_type());
  return {dx, sums[0].clone(), sums[1].clone()};
}

inline std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dout, const Tensor& x,
                                                         const Tensor& weight, const Tensor& mean,
                                                         const Tensor& rstd) {
  return norm_backward(std::nullopt, dout, x, weight, mean, rstd);
}

// The second is dx of y_dtype, or holds nothing where dx is; the last dx's columns' sums, if `sums`.
inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_bwd(
    const std::optional<Tensor>& dtotal, const Tensor& dout, const Tensor& total,
    const Tensor& weight, const Tensor& mean, const Tensor& rstd, at::ScalarType y_dtype,
    int64_t first, bool sums) {
  auto [dx, dweight, dbias] = norm_backward(dtotal, dout, total, weight, mean, rstd, first);
  const Tensor dy = dx.scalar_type() == y_dtype ? at::empty({0}, dx.options())
                                                : dx.to(y_dtype);
  const Tensor of_dx = sums ? dx.reshape({-1, weight.size(0)}).sum(0, false, at::kFloat)
                            : at::empty({0}, dx.options().dtype(at::kFloat));
  return {dx, dy, dweight, dbias, of_dx};
}

MAE_FAST_END
