// attention_fwd and attention_bwd, checked, by tiles (attention_amx.h) or by vectors
// (attention_fma.h); also of q, k and v in one tensor.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "attention_amx.h"
#include "attention_fma.h"

namespace mae_fast {
inline namespace CPU_CAPABILITY {

using at::Tensor;

inline void check(const char* name, const Tensor& t, at::IntArrayRef sizes, at::ScalarType dtype) {
  TORCH_CHECK(t.sizes() == sizes, "attention: ", name, " must be ", sizes, ", got ", t.sizes());
  TORCH_CHECK(t.scalar_type() == dtype, "attention: ", name, " must be ", dtype, ", got ",
              t.scalar_type());
  TORCH_CHECK(t.device().is_cpu(), "attention: ", name, " must be on cpu, got ", t.device());
}

inline void check_qkv(const Tensor& q, const Tensor& k, const Tensor& v, bool amx) {
  TORCH_CHECK(q.dim() == 4, "attention: q must be [B, Sq, H, d], got ", q.sizes());
  TORCH_CHECK(k.dim() == 4, "attention: k must be [B, Sk, H, d], got ", k.sizes());
  check("q", q, q.sizes(), q.scalar_type());
  check("k", k, {q.size(0), k.size(1), q.size(2), q.size(3)}, q.scalar_type());
  check("v", v, k.sizes(), q.scalar_type());
  TORCH_CHECK(q.size(3) >= 1 && q.size(3) <= MAX_HEAD_DIM, "attention: head dim must be 1 to ",
              MAX_HEAD_DIM, ", got ", q.size(3));
  TORCH_CHECK(k.size(1) >= 1, "attention: k must have at least one key, got ", k.sizes());
  if (amx) {
    TORCH_CHECK(q.scalar_type() == at::kBFloat16, "attention: tiles are of bfloat16, got ",
                q.scalar_type());
    TORCH_CHECK(q.size(3) % 2 == 0, "attention: head dim must be even, got ", q.size(3));
  }
}

// Rows that lie together; for tiles in pairs of values too
inline Tensor readable(const Tensor& t, bool amx) {
  bool fits = t.stride(3) == 1;
  if (amx) {
    for (int64_t i = 0; i < 3; ++i) {
      fits = fits && t.stride(i) % 2 == 0;
    }
    fits = fits && reinterpret_cast<uintptr_t>(t.data_ptr()) % 4 == 0;
  }
  return fits ? t : t.clone(at::MemoryFormat::Contiguous);
}

// out [B, Sq, H, d], lse [B, H, Sq] (natural logarithm; float, or double for double)
inline std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q_, const Tensor& k_,
                                                const Tensor& v_, bool amx) {
  check_qkv(q_, k_, v_, amx);
  const auto q = readable(q_, amx), k = readable(k_, amx), v = readable(v_, amx);
  const auto out = at::empty(q.sizes(), q.options());
  const auto lse = at::empty({q.size(0), q.size(2), q.size(1)},
                             q.options().dtype(at::toOpMathType(q.scalar_type())));
  if (out.numel() == 0) {
    return {out, lse};
  }
#if MAE_FAST_AMX
  if (amx && !*amx::why_not()) {  // oneDNN may have been switched off since it was chosen
    amx::fwd(q, k, v, out, lse);
    return {out, lse};
  }
#endif
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, q.scalar_type(), "attention_fwd",
                                  [&] { fwd<scalar_t>(q, k, v, out, lse); });
  return {out, lse};
}

// Writes dq, dk and dv, each [B, S, H, d] of the inputs' dtype and of any strides whose last is 1.
inline void write_gradients(const Tensor& dout_, const Tensor& q_, const Tensor& k_,
                            const Tensor& v_, const Tensor& out_, const Tensor& lse_,
                            const Tensor& dq, const Tensor& dk, const Tensor& dv, bool amx) {
  check_qkv(q_, k_, v_, amx);
  check("dout", dout_, q_.sizes(), q_.scalar_type());
  check("out", out_, q_.sizes(), q_.scalar_type());
  check("lse", lse_, {q_.size(0), q_.size(2), q_.size(1)}, at::toOpMathType(q_.scalar_type()));
  const auto q = readable(q_, amx), k = readable(k_, amx), v = readable(v_, amx),
             out = readable(out_, amx), dout = readable(dout_, amx), lse = lse_.contiguous();
  if (q.numel() == 0) {
    dk.zero_(), dv.zero_();
    return;
  }
#if MAE_FAST_AMX
  if (amx && !*amx::why_not()) {
    amx::bwd(dout, q, k, v, out, lse, dq, dk, dv);
    return;
  }
#endif
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, q.scalar_type(), "attention_bwd",
      [&] { bwd<scalar_t>(dout, q, k, v, out, lse, dq, dk, dv); });
}

// -> dq, dk, dv
inline std::tuple<Tensor, Tensor, Tensor> attention_bwd(const Tensor& dout, const Tensor& q,
                                                        const Tensor& k, const Tensor& v,
                                                        const Tensor& out, const Tensor& lse,
                                                        bool amx) {
  const auto dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), q.options()),
             dv = at::empty(k.sizes(), q.options());
  write_gradients(dout, q, k, v, out, lse, dq, dk, dv, amx);
  return {dq, dk, dv};
}

// q, k and v of qkv [B, S, 3, H, d]; queries are those of the tokens from `first` on
inline std::tuple<Tensor, Tensor, Tensor> split_qkv(const Tensor& qkv, int64_t first) {
  TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3 && first >= 0 && first <= qkv.size(1),
              "attention: qkv must be [B, S, 3, H, d], S >= ", first, ", got ", qkv.sizes());
  return {qkv.select(2, 0).narrow(1, first, qkv.size(1) - first), qkv.select(2, 1),
          qkv.select(2, 2)};
}

inline std::tuple<Tensor, Tensor> attention_qkv_fwd(const Tensor& qkv, int64_t first, bool amx) {
  const auto [q, k, v] = split_qkv(qkv, first);
  return attention_fwd(q, k, v, amx);
}

// -> dqkv, where queries that were not asked for have zeros
inline Tensor attention_qkv_bwd(const Tensor& dout, const Tensor& qkv, const Tensor& out,
                                const Tensor& lse, bool amx) {
  const int64_t first = qkv.size(1) - out.size(1);
  const auto [q, k, v] = split_qkv(qkv, first);
  const auto dqkv = at::empty(qkv.sizes(), qkv.options());
  const auto [dq, dk, dv] = split_qkv(dqkv, first);
  dqkv.select(2, 0).narrow(1, 0, first).zero_();
  write_gradients(dout, q, k, v, out, lse, dq, dk, dv, amx);
  return dqkv;
}

}  // namespace CPU_CAPABILITY
}  // namespace mae_fast
