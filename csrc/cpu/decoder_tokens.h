// The decoder's input [cls | visible + position | mask token + position], and its backward, which
// sums each position's gradient over clips in their order: no atomics, the same bits every time.
#pragma once

#include "common.h"

MAE_FAST_BEGIN

// visible [B, K, E] (any strides of its rows), cls [B, E] or none, mask_token [E], pos [L, E]
inline Tensor decoder_tokens_fwd(const Tensor& visible_, const std::optional<Tensor>& cls_,
                                 const Tensor& mask_token_, const Tensor& pos_,
                                 const Tensor& ids_keep_, const Tensor& ids_mask_) {
  const auto type = at::promote_types(visible_.scalar_type(), pos_.scalar_type());
  const Tensor visible = visible_.to(type).contiguous(), pos = pos_.to(type).contiguous();
  const Tensor cls = cls_ ? cls_->to(type).contiguous() : Tensor();
  const Tensor mask_token = mask_token_.to(type).contiguous();
  const Tensor ids_keep = checked_ids(ids_keep_, pos.size(0), "decoder_tokens: ids_keep");
  const Tensor ids_mask = checked_ids(ids_mask_, pos.size(0), "decoder_tokens: ids_mask");
  const int64_t batch = visible.size(0), kept = visible.size(1), size = visible.size(2);
  const int64_t masked = ids_mask.size(1), first = cls_ ? 1 : 0, all = first + kept + masked;
  TORCH_CHECK(pos.size(1) == size && mask_token.numel() == size && ids_keep.size(0) == batch &&
                  ids_mask.size(0) == batch && ids_keep.size(1) == kept &&
                  (!cls_ || cls.numel() == batch * size),
              "decoder_tokens: visible ", visible.sizes(), ", mask_token ", mask_token.sizes(),
              ", pos ", pos.sizes(), ", ids_keep ", ids_keep.sizes(), " and ids_mask ",
              ids_mask.sizes(), " do not fit");
  for (const auto& t : {visible_, mask_token_, pos_}) check_cpu(t, "decoder_tokens: a tensor");
  Tensor out = at::empty({batch, all, size}, visible.options());
  MAE_FAST_FLOATS(type, "decoder_tokens", [&] {
    const auto *vp = visible.const_data_ptr<scalar_t>(), *pp = pos.const_data_ptr<scalar_t>(),
               *tp = mask_token.const_data_ptr<scalar_t>(),
               *cp = cls_ ? cls.const_data_ptr<scalar_t>() : nullptr;
    const auto *kp = ids_keep.const_data_ptr<int64_t>(), *mp = ids_mask.const_data_ptr<int64_t>();
    auto* op = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, batch * all, 64, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t b = row / all, i = row % all - first;
        scalar_t* to = op + row * size;
        if (i < 0) {
          std::copy_n(cp + b * size, size, to);
          continue;
        }
        const bool keep = i < kept;
        const scalar_t* token = keep ? vp + (b * kept + i) * size : tp;
        const scalar_t* at = pp + size * (keep ? kp[b * kept + i] : mp[b * masked + i - kept]);
        each<scalar_t>(size, [&](int64_t j, auto n) {
          store(to + j, load(token + j, n) + load(at + j, n), n);
        });
      }
    });
  });
  return out;
}

// -> (dmask_token [E], dpos [L, E]) in fp32 (fp64); the gradients of visible and cls are slices.
inline std::tuple<Tensor, Tensor> decoder_tokens_bwd(const Tensor& dout_, const Tensor& ids_keep_,
                                                     const Tensor& ids_mask_, int64_t length) {
  TORCH_CHECK(dout_.dim() == 3, "decoder_tokens: gradient must be [B, S, E], got ", dout_.sizes());
  check_cpu(dout_, "decoder_tokens: gradient");
  const Tensor dout = dout_.contiguous();
  const Tensor ids_keep = checked_ids(ids_keep_, length, "decoder_tokens: ids_keep");
  const Tensor ids_mask = checked_ids(ids_mask_, length, "decoder_tokens: ids_mask");
  const int64_t batch = dout.size(0), all = dout.size(1), size = dout.size(2);
  const int64_t kept = ids_keep.size(1), masked = ids_mask.size(1), first = all - kept - masked;
  TORCH_CHECK(first >= 0 && ids_keep.size(0) == batch && ids_mask.size(0) == batch,
              "decoder_tokens: gradient ", dout.sizes(), ", ids_keep ", ids_keep.sizes(),
              " and ids_mask ", ids_mask.sizes(), " do not fit");
  const auto acc = at::toOpMathType(dout.scalar_type());
  Tensor dpos = at::zeros({length, size}, dout.options().dtype(acc));
  Tensor parts = at::zeros({num_blocks(length), size}, dpos.options());
  MAE_FAST_FLOATS(dout.scalar_type(), "decoder_tokens", [&] {
    using A = acc_t<scalar_t>;
    const auto* gp = dout.const_data_ptr<scalar_t>();
    const auto *kp = ids_keep.const_data_ptr<int64_t>(), *mp = ids_mask.const_data_ptr<int64_t>();
    A *dp = dpos.mutable_data_ptr<A>(), *tp = parts.mutable_data_ptr<A>();
    // A block owns some positions, and looks through all ids for them.
    parallel_blocks(length, [&](int64_t block, int64_t begin, int64_t end) {
      const auto add = [&](A* to, const scalar_t* row) {
        each<scalar_t>(size, [&](int64_t j, auto n) {
          store(to + j, load(to + j, n) + load(row + j, n), n);
        });
      };
      for (int64_t b = 0; b < batch; ++b) {
        for (int64_t i = 0; i < kept + masked; ++i) {
          const int64_t id = i < kept ? kp[b * kept + i] : mp[b * masked + i - kept];
          if (id < begin || id >= end) continue;
          const scalar_t* row = gp + (b * all + first + i) * size;
          add(dp + id * size, row);
          if (i >= kept) add(tp + block * size, row);
        }
      }
    });
  });
  return {parts.sum(0), dpos};
}

MAE_FAST_END
