// The CUDA kernels under the schemas of mae_fast/ops, in a namespace of their own: the ops' CUDA
// keys choose between these and Triton's (mae_fast/ops/dispatch.py). Only this file of csrc/cuda
// sees torch. The arguments were checked in Python; what the kernels rely on is checked here.
// Nothing waits for the device, and memory is torch's: CUDA graphs can capture it.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "decoder_tokens.cuh"
#include "masked_mse.cuh"
#include "patchify_gather.cuh"

namespace mae_fast {
namespace {

using namespace cuda;
using at::Tensor;

constexpr int64_t kSharedBytes = 48 << 10;  // of a block, on every device

template <typename P>
using Of = std::remove_pointer_t<P>;

// f of a null T* for the CUDA type of a dtype.
template <typename F>
void with_float(at::ScalarType type, const F& f) {
  if (type == at::kFloat) return f(static_cast<float*>(nullptr));
  if (type == at::kBFloat16) return f(static_cast<__nv_bfloat16*>(nullptr));
  TORCH_CHECK(type == at::kHalf, "the CUDA kernels take f32, bf16 and f16, not ", type);
  f(static_cast<__half*>(nullptr));
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

void check_cuda(const Tensor& first, std::initializer_list<Tensor> others) {
  TORCH_CHECK(first.is_cuda(), "a tensor is on ", first.device(), ", not on a CUDA device");
  for (const Tensor& t : others) {
    TORCH_CHECK(t.device() == first.device(), "tensors are on ", first.device(), " and ",
                t.device());
  }
}

Ids ids_of(const Tensor& ids, int64_t batch) {
  const bool wide = ids.scalar_type() == at::kLong;
  TORCH_CHECK(ids.dim() == 2 && ids.size(0) == batch && (wide || ids.scalar_type() == at::kInt),
              "ids must be int32 or int64 [", batch, ", n], got ", ids.scalar_type(), " ",
              ids.sizes());
  return {ids.const_data_ptr(), {ids.stride(0), ids.stride(1)}, wide};
}

Clip clip_of(const Tensor& video, int64_t t_patch, int64_t patch) {
  TORCH_CHECK(video.dim() == 5 && video.scalar_type() == at::kByte,
              "video must be uint8 [B, C, T, H, W], got ", video.scalar_type(), " ", video.sizes());
  TORCH_CHECK(t_patch > 0 && patch > 0 && video.size(3) >= patch && video.size(4) >= patch &&
                  video.size(1) * t_patch * patch * patch * kWarps <= kSharedBytes - 15 * kWarps,
              "patches of ", t_patch, "x", patch, "x", patch, " do not fit a clip ", video.sizes(),
              ", or ", kWarps, " of them ", kSharedBytes, " bytes");
  return Clip(video.const_data_ptr<uint8_t>(), video.sizes().data(), video.strides().data(),
              t_patch, patch);
}

Tensor patchify_gather_fwd(const Tensor& video, const Tensor& ids, int64_t t_patch, int64_t patch,
                           double mean, double std, at::ScalarType dtype) {
  check_cuda(video, {ids});
  const c10::cuda::CUDAGuard guard(video.device());
  const Clip clip = clip_of(video, t_patch, patch);
  const Ids tokens = ids_of(ids, video.size(0));
  Tensor out = at::empty({ids.size(0), ids.size(1), clip.size()}, video.options().dtype(dtype));
  with_float(dtype, [&](auto* type) {
    using T = Of<decltype(type)>;
    C10_CUDA_CHECK(cuda::patchify_gather_fwd<T>(
        c10::cuda::getCurrentCUDAStream(), clip, video.size(2), tokens, ids.size(0), ids.size(1),
        mean, std, data<T>(out)));
  });
  return out;
}

// d(loss) / d(pred) over pred - target; fp16, in which it would vanish, saves the latter.
double unit_gradient(const Tensor& pred) {
  const bool kept_apart = pred.scalar_type() == at::kHalf || pred.numel() == 0;
  return kept_apart ? 1 : 2 / double(pred.numel());
}

std::tuple<Tensor, Tensor> masked_mse_fwd(const Tensor& pred_, const Tensor& video,
                                          const Tensor& ids, at::IntArrayRef frames_,
                                          int64_t t_patch, int64_t patch, double mean, double std,
                                          std::string_view norm_pix, bool need_grad) {
  check_cuda(pred_, {video, ids});
  TORCH_CHECK(norm_pix == "none" || norm_pix == "patch", "norm_pix ", norm_pix,
              ", and the CUDA kernel takes none and patch");
  const c10::cuda::CUDAGuard guard(pred_.device());
  const Clip clip = clip_of(video, t_patch, patch);
  const Ids tokens = ids_of(ids, video.size(0));
  TORCH_CHECK(pred_.dim() == 3 && pred_.size(0) == ids.size(0) && pred_.size(1) == ids.size(1) &&
                  pred_.size(2) == clip.size(),
              "pred ", pred_.sizes(), " and ids ", ids.sizes(), " do not fit patches of ",
              clip.size(), " values");
  TORCH_CHECK(int64_t(frames_.size()) <= kMaxFrames, frames_.size(), " target frames, more than ",
              kMaxFrames);
  TargetFrames frames{};
  for (size_t i = 0; i < frames_.size(); ++i) {
    TORCH_CHECK_INDEX(frames_[i] >= 0 && frames_[i] < video.size(2), "frame ", frames_[i], " of ",
                      video.size(2));
    frames.at[i] = int32_t(frames_[i]);
  }
  const Tensor pred = pred_.stride(2) == 1 ? pred_ : pred_.contiguous();
  const auto floats = pred.options().dtype(at::kFloat);
  Tensor saved = at::empty(need_grad ? pred.sizes() : at::IntArrayRef{0}, pred.options());
  Tensor loss = at::empty({}, floats);
  Tensor errors = at::empty({blocks(ids.numel(), kWarps)}, floats);
  with_float(pred.scalar_type(), [&](auto* type) {
    using T = Of<decltype(type)>;
    C10_CUDA_CHECK(cuda::masked_mse_fwd<T>(
        c10::cuda::getCurrentCUDAStream(), clip, frames, int64_t(frames_.size()), tokens,
        ids.size(0), ids.size(1), data<T>(pred), pred.stride(0), pred.stride(1), mean, std,
        norm_pix == "patch", unit_gradient(pred), need_grad ? data<T>(saved) : nullptr,
        data<float>(errors), data<float>(loss)));
  });
  return {loss, saved};
}

Tensor masked_mse_bwd(const Tensor& saved_, const Tensor& dloss) {
  check_cuda(saved_, {dloss});
  const c10::cuda::CUDAGuard guard(saved_.device());
  TORCH_CHECK(dloss.numel() == 1 && dloss.scalar_type() == at::kFloat, "dloss must be one float");
  const Tensor saved = saved_.contiguous();
  Tensor dpred = at::empty_like(saved);
  const int64_t n = saved.numel();
  with_float(saved.scalar_type(), [&](auto* type) {
    using T = Of<decltype(type)>;
    C10_CUDA_CHECK(cuda::masked_mse_bwd<T>(
        c10::cuda::getCurrentCUDAStream(), data<T>(saved), n, data<float>(dloss),
        2 / double(n) / unit_gradient(saved), data<T>(dpred)));
  });
  return dpred;
}

// Rows as they are where their values lie side by side, else a copy.
Tensor rows_of(const Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); }

Tensor decoder_tokens_fwd(const Tensor& visible_, const std::optional<Tensor>& cls_,
                          const Tensor& mask_token_, const Tensor& pos_, const Tensor& ids_keep,
                          const Tensor& ids_mask) {
  check_cuda(visible_, {mask_token_, pos_, ids_keep, ids_mask, cls_ ? *cls_ : visible_});
  const c10::cuda::CUDAGuard guard(visible_.device());
  TORCH_CHECK(visible_.dim() == 3 && pos_.dim() == 2, "visible must be [B, K, E] and pos [L, E]");
  const int64_t batch = visible_.size(0), kept = visible_.size(1), width = visible_.size(2);
  const Ids keep = ids_of(ids_keep, batch), mask = ids_of(ids_mask, batch);
  TORCH_CHECK(ids_keep.size(1) == kept && pos_.size(1) == width && mask_token_.numel() == width &&
                  (!cls_ || (cls_->dim() == 2 && cls_->size(0) == batch && cls_->size(1) == width)),
              "visible ", visible_.sizes(), ", mask_token ", mask_token_.sizes(), ", pos ",
              pos_.sizes(), " and ids_keep ", ids_keep.sizes(), " do not fit");
  const auto type = visible_.scalar_type(), of_pos = pos_.scalar_type();
  const Tensor visible = rows_of(visible_), pos = pos_.contiguous();
  const Tensor mask_token = mask_token_.to(of_pos).contiguous();
  const auto of_out = c10::promoteTypes(type, of_pos);
  const Tensor cls = cls_ ? rows_of(cls_->to(of_out)) : Tensor();
  const int64_t all = (cls_ ? 1 : 0) + kept + ids_mask.size(1);
  Tensor out = at::empty({batch, all, width}, visible.options().dtype(of_out));
  with_float(type, [&](auto* v) {
    with_float(of_pos, [&](auto* w) {
      using V = Of<decltype(v)>;
      using W = Of<decltype(w)>;
      using O = Promoted<V, W>;
      const DecoderTokens<V, W> in{data<V>(visible), cls_ ? data<O>(cls) : nullptr,
                                   data<W>(mask_token), data<W>(pos), visible.stride(0),
                                   visible.stride(1), cls_ ? cls.stride(0) : 0, keep, mask, batch,
                                   kept, ids_mask.size(1), pos.size(0), int(width)};
      C10_CUDA_CHECK((cuda::decoder_tokens_fwd<V, W>(c10::cuda::getCurrentCUDAStream(), in,
                                                     data<O>(out))));
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> decoder_tokens_bwd(const Tensor& dout_, const Tensor& ids_keep,
                                              const Tensor& ids_mask, int64_t length) {
  check_cuda(dout_, {ids_keep, ids_mask});
  const c10::cuda::CUDAGuard guard(dout_.device());
  TORCH_CHECK(dout_.dim() == 3, "the gradient must be [B, S, E], got ", dout_.sizes());
  const int64_t batch = dout_.size(0), all = dout_.size(1), width = dout_.size(2);
  const Ids keep = ids_of(ids_keep, batch), mask = ids_of(ids_mask, batch);
  TORCH_CHECK(ids_keep.size(1) + ids_mask.size(1) <= all, "ids_keep ", ids_keep.sizes(),
              " and ids_mask ", ids_mask.sizes(), " do not fit a gradient ", dout_.sizes());
  const Tensor dout = dout_.contiguous();
  const auto floats = dout.options().dtype(at::kFloat);
  Tensor dmask_token = at::empty({width}, floats), dpos = at::empty({length, width}, floats);
  Tensor span = at::empty({2, batch, length}, dout.options().dtype(at::kInt));
  Tensor parts = at::empty({blocks(length, kPositions), width}, floats);
  with_float(dout.scalar_type(), [&](auto* type) {
    using T = Of<decltype(type)>;
    const DecoderTokensGrad<T> in{data<T>(dout), keep, mask, batch, all, ids_keep.size(1),
                                  ids_mask.size(1), length, int(width), data<int32_t>(span),
                                  data<float>(parts), data<float>(dmask_token), data<float>(dpos)};
    C10_CUDA_CHECK(cuda::decoder_tokens_bwd<T>(c10::cuda::getCurrentCUDAStream(), in));
  });
  return {dmask_token, dpos};
}

// Whether the library holds code for the device at hand.
bool runs_here() {
  cudaFuncAttributes attributes;
  const bool found = cudaFuncGetAttributes(&attributes, masked_mse_sum_kernel) == cudaSuccess;
  if (!found) cudaGetLastError();  // the next launch shall not report it
  return found;
}

}  // namespace
}  // namespace mae_fast

TORCH_LIBRARY(mae_fast_cuda, m) {
  const auto define = [&m](const char* name, auto* function) {
    m.def(name, torch::dispatch(c10::DispatchKey::CUDA, function));
  };
  define("patchify_gather_fwd", mae_fast::patchify_gather_fwd);
  define("masked_mse_fwd", mae_fast::masked_mse_fwd);
  define("masked_mse_bwd", mae_fast::masked_mse_bwd);
  define("decoder_tokens_fwd", mae_fast::decoder_tokens_fwd);
  define("decoder_tokens_bwd", mae_fast::decoder_tokens_bwd);
  m.def("runs_here", mae_fast::runs_here);
}
