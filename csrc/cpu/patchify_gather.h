// The patches of just the wanted tokens, normalised, straight from a clip of any strides.
#pragma once

#include "common.h"

#include <array>

MAE_FAST_BEGIN

inline void check_patches(const char* op, at::IntArrayRef clip, int64_t t_patch, int64_t patch) {
  const auto fits = [](int64_t size, int64_t part) {
    return part >= 1 && size >= part && size % part == 0;
  };
  TORCH_CHECK_VALUE(fits(clip[0], t_patch) && fits(clip[1], patch) && fits(clip[2], patch), op,
                    ": a clip of ", clip, " cannot be cut into patches of ", t_patch, "x", patch,
                    "x", patch);
}

// norm(x) = (x / 255 - mean) / std of every byte x, rounded as the reference rounds.
template <typename T>
std::array<T, 256> normal_table(double mean, double std) {
  using A = acc_t<T>;
  std::array<T, 256> table;
  for (int x = 0; x < 256; ++x)
    table[x] = static_cast<T>((A(x) / A(255) - A(mean)) / A(std));
  return table;
}

// out [B, K, C, t_patch, patch, patch] = f(pixel) of tokens ids [B, K].
template <typename In, typename Out, typename F>
void gather_patches(const Tensor& video, const Tensor& ids, const Tensor& out, const F& f) {
  const auto stride = video.strides();
  const int64_t kept = ids.size(1), channels = out.size(2), frames = out.size(3),
                patch = out.size(4), size = channels * frames * patch * patch;
  const int64_t rows = video.size(3) / patch, columns = video.size(4) / patch, step = stride[4];
  const In* clips = video.const_data_ptr<In>();
  const int64_t* id = ids.const_data_ptr<int64_t>();
  Out* patches = out.mutable_data_ptr<Out>();
  const auto corner = [&](int64_t n) {
    const int64_t t = id[n] / (rows * columns), r = id[n] / columns % rows, c = id[n] % columns;
    return n / kept * stride[0] + t * frames * stride[2] + r * patch * stride[3] + c * patch * step;
  };
  at::parallel_for(0, ids.numel(), 4, [&](int64_t begin, int64_t end) {
    Out* to = patches + begin * size;
    for (int64_t n = begin; n < end; ++n) {
      // The next token's rows are on their way while this one's are read: they lie far apart.
      const In *token = clips + corner(n), *next = clips + corner(std::min(n + 1, end - 1));
      for (int64_t channel = 0; channel < channels; ++channel)
        for (int64_t frame = 0; frame < frames; ++frame)
          for (int64_t y = 0; y < patch; ++y, to += patch) {
            const int64_t at = channel * stride[1] + frame * stride[2] + y * stride[3];
            const In* from = token + at;
            __builtin_prefetch(next + at);
            __builtin_prefetch(next + at + (patch - 1) * step);
            if (step == 1)
              std::transform(from, from + patch, to, f);
            else
              for (int64_t x = 0; x < patch; ++x) to[x] = f(from[x * step]);
          }
    }
  });
}

inline Tensor patchify_gather_fwd(const Tensor& video, const Tensor& ids_, int64_t t_patch,
                                  int64_t patch, double mean, double std, at::ScalarType dtype) {
  constexpr const char* op = "patchify_gather";
  check_cpu(video, "video");
  TORCH_CHECK_VALUE(video.dim() == 5, op, ": video must be [B, C, T, H, W], got ", video.sizes());
  check_patches(op, video.sizes().slice(2), t_patch, patch);
  const int64_t tokens =
      (video.size(2) / t_patch) * (video.size(3) / patch) * (video.size(4) / patch);
  const Tensor ids = checked_ids(ids_, tokens, "patchify_gather: ids");
  TORCH_CHECK_VALUE(ids.size(0) == video.size(0), op, ": ids ", ids.sizes(), " and video ",
                    video.sizes(), " do not fit");
  const Tensor out = at::empty({ids.size(0), ids.size(1), video.size(1), t_patch, patch, patch},
                               video.options().dtype(dtype));
  MAE_FAST_FLOATS(dtype, op, [&] {
    using Out = scalar_t;
    if (video.scalar_type() == at::kByte) {
      const auto table = normal_table<Out>(mean, std);
      gather_patches<uint8_t, Out>(video, ids, out, [&](uint8_t x) { return table[x]; });
    } else {
      MAE_FAST_FLOATS(video.scalar_type(), op, [&] {
        gather_patches<scalar_t, Out>(video, ids, out,
                                      [](scalar_t x) { return c10::convert<Out>(x); });
      });
    }
  });
  return out.flatten(2);
}

MAE_FAST_END
