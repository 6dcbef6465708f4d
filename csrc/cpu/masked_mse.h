// The loss on masked patches, its target read straight from the clip: one pass over the prediction
// gives the squared error and the gradient, which backward multiplies by the loss's own.
#pragma once

#include "common.h"

MAE_FAST_BEGIN

enum class NormPix { kNone, kPatch, kChannel };

inline NormPix norm_pix_named(std::string_view name) {
  TORCH_CHECK(name == "none" || name == "patch" || name == "channel", "masked_mse: norm_pix ", name);
  return name == "none" ? NormPix::kNone : name == "patch" ? NormPix::kPatch : NormPix::kChannel;
}

template <typename P, typename N>
inline void interleave(const P* line, int64_t stride, N patch, P* __restrict out) {
  const P* __restrict red = line;
  const P* __restrict green = line + stride;
  const P* __restrict blue = line + 2 * stride;
  for (int64_t x = 0; x < patch; ++x) {
    out[3 * x] = red[x], out[3 * x + 1] = green[x], out[3 * x + 2] = blue[x];
  }
}

// Where the values of target patches lie in a clip [B, C, T, H, W] of any strides.
struct TargetGrid {
  int64_t chans, t_patch, patch, rows, columns;
  std::vector<int64_t> frames;
  std::array<int64_t, 5> stride;

  int64_t size() const { return t_patch * patch * patch * chans; }

  // Where frame u of token `id` of clip b begins.
  template <typename P>
  const P* corner(const P* clip, int64_t b, int64_t id, int64_t u) const {
    const int64_t t = id / (rows * columns), r = id / columns % rows, c = id % columns;
    return clip + b * stride[0] + frames[t * t_patch + u] * stride[2] + r * patch * stride[3] +
           c * patch * stride[4];
  }

  // Tokens come in random order, and their rows lie far apart: they are sent for ahead of time.
  template <typename P>
  void prefetch(const P* clip, int64_t b, int64_t id) const {
    for (int64_t u = 0; u < t_patch; ++u) {
      const P* frame = corner(clip, b, id, u);
      for (int64_t y = 0; y < patch; ++y) {
        for (int64_t k = 0; k < chans; ++k) {
          __builtin_prefetch(frame + y * stride[3] + k * stride[1]);
        }
      }
    }
  }

  // The patch of token `id` of clip b, flattened channel last (u, p, p, C).
  template <typename P>
  void read(const P* clip, int64_t b, int64_t id, P* __restrict out) const {
    for (int64_t u = 0; u < t_patch; ++u) {
      const P* frame = corner(clip, b, id, u);
      for (int64_t y = 0; y < patch; ++y, out += patch * chans) {
        const P* line = frame + y * stride[3];
        if (stride[1] == 1 && stride[4] == chans) {
          std::copy_n(line, patch * chans, out);
        } else if (chans == 3 && stride[4] == 1) {
          // A constant length is what the compiler needs to shuffle vectors.
          if (patch == 16) {
            interleave(line, stride[1], std::integral_constant<int64_t, 16>(), out);
          } else {
            interleave(line, stride[1], patch, out);
          }
        } else {
          for (int64_t x = 0; x < patch; ++x) {
            for (int64_t k = 0; k < chans; ++k) {
              out[x * chans + k] = line[x * stride[4] + k * stride[1]];
            }
          }
        }
      }
    }
  }
};

// target = (pixel - shift) * scale for every pixel of one patch, or of one channel of it. Sums of bytes are exact integers;
// of floats the variance takes a second pass, since one loses it for a flat patch.
template <typename P, typename A>
std::pair<A, A> target_affine(const P* pixels, int64_t size, double mean, double std,
                              NormPix norm) {
  double average = 0, variance = 0, unit = 1;
  if constexpr (std::is_same_v<P, uint8_t>) {
    unit = 255 * std;
    if (norm == NormPix::kNone) return {A(255 * mean), A(1 / unit)};
    int64_t total = 0, squares = 0;
    for (int64_t begin = 0; begin < size; begin += 4096) {  // 32 bits hold that many squares
      uint32_t t = 0, s = 0;
      for (int64_t i = begin; i < std::min(begin + 4096, size); ++i) {
        t += pixels[i];
        s += uint32_t(pixels[i]) * pixels[i];
      }
      total += t;
      squares += s;
    }
    average = double(total) / size;
    variance = double(size * squares - total * total) / (double(size) * (size - 1));
  } else {
    if (norm == NormPix::kNone) return {A(0), A(1)};
    for (int64_t i = 0; i < size; ++i) average += double(pixels[i]);
    average /= size;
    for (int64_t i = 0; i < size; ++i) {
      const double d = double(pixels[i]) - average;
      variance += d * d;
    }
    variance /= size - 1;
  }
  if (norm == NormPix::kChannel) return {A(average), A(1 / (std::sqrt(variance) + 1e-6 * unit))};
  return {A(average), A(1 / (unit * std::sqrt(variance / (unit * unit) + 1e-6)))};
}

// The target of a patch, channel last, each channel of which has a shift and a scale of its own.
template <typename P, typename A, typename N>
void normalise_channels(const P* __restrict pixels, int64_t size, N chans, double std,
                        P* __restrict planes, std::pair<A, A>* affine, A* __restrict to) {
  const int64_t count = size / chans;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t k = 0; k < chans; ++k) planes[k * count + i] = pixels[i * chans + k];
  }
  for (int64_t k = 0; k < chans; ++k) {
    affine[k] = target_affine<P, A>(planes + k * count, count, 0, std, NormPix::kChannel);
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t k = 0; k < chans; ++k) {
      to[i * chans + k] = (A(planes[k * count + i]) - affine[k].first) * affine[k].second;
    }
  }
}

template <typename P, typename A>
void widen(const P* __restrict from, int64_t size, A* __restrict to) {
  for (int64_t i = 0; i < size; ++i) to[i] = A(from[i]);
}

// d(loss) / d(pred) over pred - target; fp16, in which it would vanish, saves the latter.
inline double unit_gradient(const Tensor& pred) {
  const bool kept_apart = pred.scalar_type() == at::kHalf || pred.numel() == 0;
  return kept_apart ? 1 : 2 / double(pred.numel());
}

// pred [B, M, P]; video [B, C, T, H, W]; ids [B, M] -> (loss [], (pred - target) * unit_gradient
// [B, M, P] of pred's dtype, or empty where nobody needs it)
inline std::tuple<Tensor, Tensor> masked_mse_fwd(const Tensor& pred_, const Tensor& video,
                                                 const Tensor& ids_, at::IntArrayRef frames,
                                                 int64_t t_patch, int64_t patch, double mean,
                                                 double std, std::string_view norm_pix, bool need_grad) {
  check_cpu(pred_, "masked_mse: pred");
  check_cpu(video, "masked_mse: video");
  TORCH_CHECK(pred_.dim() == 3 && video.dim() == 5 && t_patch > 0 && patch > 0 &&
                  frames.size() % t_patch == 0,
              "masked_mse: pred ", pred_.sizes(), ", video ", video.sizes(), ", ", frames.size(),
              " frames, ", t_patch, " x ", patch, " patches");
  TargetGrid grid{video.size(1), t_patch,         patch, video.size(3) / patch,
                  video.size(4) / patch, frames.vec(), {}};
  std::copy_n(video.strides().begin(), 5, grid.stride.begin());
  for (const int64_t f : frames) {
    TORCH_CHECK(f >= 0 && f < video.size(2), "masked_mse: frame ", f, " of ", video.size(2));
  }
  const int64_t length = int64_t(frames.size()) / t_patch * grid.rows * grid.columns;
  const Tensor ids = checked_ids(ids_, length, "masked_mse: ids");
  const int64_t batch = pred_.size(0), masked = pred_.size(1), size = pred_.size(2);
  TORCH_CHECK(size == grid.size() && ids.size(0) == batch && ids.size(1) == masked &&
                  video.size(0) == batch,
              "masked_mse: pred ", pred_.sizes(), ", ids ", ids.sizes(), " and video ",
              video.sizes(), " of ", t_patch, " x ", patch, " patches do not fit");
  const Tensor pred = pred_.stride(2) == 1 ? pred_ : pred_.contiguous();
  const auto acc = at::toOpMathType(pred.scalar_type());
  const double unit = unit_gradient(pred);
  const NormPix norm = norm_pix_named(norm_pix);
  Tensor saved = at::empty(need_grad ? pred.sizes() : at::IntArrayRef{0}, pred.options());
  Tensor errors = at::empty({batch * masked}, pred.options().dtype(at::kDouble));
  MAE_FAST_FLOATS(pred.scalar_type(), "masked_mse", [&] {
    using A = acc_t<scalar_t>;
    const auto* pp = pred.const_data_ptr<scalar_t>();
    auto* sp = need_grad ? saved.mutable_data_ptr<scalar_t>() : nullptr;
    const int64_t* ip = ids.const_data_ptr<int64_t>();
    double* ep = errors.mutable_data_ptr<double>();
    const auto run = [&](auto* clip) {
      using P = std::remove_const_t<std::remove_pointer_t<decltype(clip)>>;
      at::parallel_for(0, batch * masked, 8, [&](int64_t begin, int64_t end) {
        std::vector<P> pixels(size);
        std::vector<A> wide(size);
        std::vector<P> planes(norm == NormPix::kChannel ? size : 0);
        std::vector<std::pair<A, A>> affine(grid.chans);
        for (int64_t row = begin; row < end; ++row) {
          const int64_t b = row / masked, m = row % masked;
          if (row + 1 < end) grid.prefetch(clip, (row + 1) / masked, ip[row + 1]);
          grid.read(clip, b, ip[row], pixels.data());
          A shift = 0, scale = 1;
          if (norm != NormPix::kChannel) {
            std::tie(shift, scale) = target_affine<P, A>(pixels.data(), size, mean, std, norm);
            widen(pixels.data(), size, wide.data());
          } else if (grid.chans == 3) {
            normalise_channels(pixels.data(), size, std::integral_constant<int64_t, 3>(), std,
                               planes.data(), affine.data(), wide.data());
          } else {
            normalise_channels(pixels.data(), size, grid.chans, std, planes.data(), affine.data(),
                               wide.data());
          }
          const scalar_t* from = pp + b * pred.stride(0) + m * pred.stride(1);
          const Vec<scalar_t> shifts(shift), scales(scale), units{A(unit)};
          Vec<scalar_t> squares(A(0));
          each<scalar_t>(size, [&](int64_t i, auto n) {
            auto d = load(from + i, n) - (load(wide.data() + i, n) - shifts) * scales;
            if (n < Vec<scalar_t>::size()) d = Vec<scalar_t>::set(Vec<scalar_t>(A(0)), d, n);
            squares = at::vec::fmadd(d, d, squares);
            if (sp) store(sp + row * size + i, d * units, n);
          });
          ep[row] = sum<A>(squares);
        }
      });
    };
    if (video.scalar_type() == at::kByte) {
      run(video.const_data_ptr<uint8_t>());
    } else {
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, video.scalar_type(), "masked_mse",
                                      [&] { run(video.const_data_ptr<scalar_t>()); });
    }
  });
  const double* ep = errors.const_data_ptr<double>();
  double total = 0;
  for (int64_t i = 0; i < errors.numel(); ++i) total += ep[i];
  return {at::scalar_tensor(total / double(pred.numel()), pred.options().dtype(acc)), saved};
}

// dpred = saved * dloss (times what unit_gradient left out), in fp32 until it is stored.
inline Tensor masked_mse_bwd(const Tensor& saved_, const Tensor& dloss) {
  check_cpu(saved_, "masked_mse: saved");
  check_cpu(dloss, "masked_mse: dloss");
  const Tensor saved = saved_.contiguous();
  const int64_t values = saved.numel();
  const double factor =
      values ? dloss.item<double>() * 2 / double(values) / unit_gradient(saved) : 0;
  Tensor dpred = at::empty_like(saved);
  MAE_FAST_FLOATS(saved.scalar_type(), "masked_mse", [&] {
    const auto* from = saved.const_data_ptr<scalar_t>();
    auto* to = dpred.mutable_data_ptr<scalar_t>();
    const Vec<scalar_t> f{acc_t<scalar_t>(factor)};
    constexpr int64_t kChunk = 1 << 14;
    at::parallel_for(0, values / kChunk + 1, 1, [&](int64_t begin, int64_t end) {
      const int64_t start = begin * kChunk, stop = std::min(end * kChunk, values);
      each<scalar_t>(stop - start, [&](int64_t i, auto n) {
        store(to + start + i, load(from + start + i, n) * f, n);
      });
    });
  });
  return dpred;
}

MAE_FAST_END
