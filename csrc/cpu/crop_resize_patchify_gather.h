// Patches of a resized crop, from the frames at source size: only the wanted pixels are resampled.
#pragma once

#include "patchify_gather.h"

MAE_FAST_BEGIN

// Where one output pixel falls between two pixels of the source, along one axis: their offsets, and
// the share of the second.
template <typename A>
struct Tap {
  int64_t lo, hi;
  A share;
};

// The taps of F.interpolate(mode="bilinear", align_corners=False), in its arithmetic.
template <typename A>
std::vector<Tap<A>> make_taps(int64_t start, int64_t length, int64_t size, int64_t stride,
                              bool flip) {
  std::vector<Tap<A>> taps(size);
  const A scale = A(length) / size;
  for (int64_t i = 0; i < size; ++i) {
    const A real = std::max(std::fma(scale, i + A(0.5), A(-0.5)), A(0));
    const int64_t lo = std::min<int64_t>(real, length - 1), hi = std::min(lo + 1, length - 1);
    taps[flip ? size - 1 - i : i] = {(start + lo) * stride, (start + hi) * stride,
                                     std::min(real - lo, A(1))};
  }
  return taps;
}

template <typename A>
struct Clip {
  Clip(const Tensor& frames, const int* box, bool flip, int64_t size)
      : pixels(frames.const_data_ptr<uint8_t>()),
        frame(frames.stride(0)),
        channel(frames.stride(3)),
        rows(make_taps<A>(box[0], box[2], size, frames.stride(1), false)),
        columns(make_taps<A>(box[1], box[3], size, frames.stride(2), flip)) {}
  const uint8_t* pixels;
  int64_t frame, channel;  // strides
  std::vector<Tap<A>> rows, columns;
};

inline void check_clips(const char* op, at::TensorList frames, const Tensor& boxes,
                        const Tensor& flips) {
  const int64_t batch = frames.size();
  TORCH_CHECK_VALUE(batch > 0, op, ": no frames");
  TORCH_CHECK_VALUE(boxes.scalar_type() == at::kInt && boxes.dim() == 2 &&
                        boxes.size(0) == batch && boxes.size(1) == 4,
                    op, ": boxes must be int32 [", batch, ", 4], got ", boxes.scalar_type(), " ",
                    boxes.sizes());
  TORCH_CHECK_VALUE(flips.scalar_type() == at::kBool && flips.dim() == 1 && flips.size(0) == batch,
                    op, ": flips must be bool [", batch, "], got ", flips.scalar_type(), " ",
                    flips.sizes());
  check_cpu(boxes, "boxes");
  check_cpu(flips, "flips");
  for (int64_t b = 0; b < batch; ++b) {
    const Tensor& f = frames[b];
    check_cpu(f, "frames");
    TORCH_CHECK_VALUE(f.scalar_type() == at::kByte && f.dim() == 4 && f.size(3) == 3 &&
                          f.size(0) == frames[0].size(0),
                      op, ": frames must be uint8 [T, H, W, 3] with one T, got ", f.scalar_type(),
                      " ", f.sizes());
    const int* p = boxes.const_data_ptr<int>() + 4 * b;
    const int64_t top = p[0], left = p[1], height = p[2], width = p[3];
    TORCH_CHECK_VALUE(top >= 0 && left >= 0 && height >= 1 && width >= 1 &&
                          top + height <= f.size(1) && left + width <= f.size(2),
                      op, ": box (", top, ", ", left, ", ", height, ", ", width,
                      ") is not within a frame of ", f.size(1), "x", f.size(2));
  }
}

inline Tensor crop_resize_patchify_gather_fwd(at::TensorList frames, const Tensor& boxes_,
                                              const Tensor& flips_, const Tensor& ids_,
                                              int64_t size, int64_t t_patch, int64_t patch,
                                              double mean, double std, at::ScalarType dtype,
                                              bool channel_last) {
  constexpr const char* op = "crop_resize_patchify_gather";
  const Tensor boxes = boxes_.contiguous(), flips = flips_.contiguous();
  check_clips(op, frames, boxes, flips);
  const int64_t length = frames[0].size(0), side = size / std::max<int64_t>(patch, 1);
  check_patches(op, {length, size, size}, t_patch, patch);
  const Tensor ids = checked_ids(ids_, length / t_patch * side * side, op);
  TORCH_CHECK_VALUE(ids.size(0) == boxes.size(0), op, ": ids ", ids.sizes(), " for ",
                    boxes.size(0), " clips");
  const int64_t kept = ids.size(1), channels = 3;
  const Tensor out = at::empty({ids.size(0), kept, t_patch * patch * patch * channels},
                               frames[0].options().dtype(dtype));
  // Where pixel (c, u, y, x) of a patch goes.
  const int64_t to_x = channel_last ? channels : 1, to_y = patch * to_x, to_u = patch * to_y,
                to_c = channel_last ? 1 : t_patch * to_u;
  MAE_FAST_FLOATS(dtype, op, [&] {
    using A = acc_t<scalar_t>;
    const A scale = 1 / (255 * std), shift = -mean / std;
    std::vector<Clip<A>> clips;
    for (size_t b = 0; b < frames.size(); ++b)
      clips.emplace_back(frames[b], boxes.const_data_ptr<int>() + 4 * b,
                         flips.const_data_ptr<bool>()[b], size);
    const int64_t* id = ids.const_data_ptr<int64_t>();
    scalar_t* patches = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, ids.numel(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const Clip<A>& clip = clips[n / kept];
        const int64_t t = id[n] / (side * side) * t_patch;
        const Tap<A>*rows = &clip.rows[id[n] / side % side * patch],
              *columns = &clip.columns[id[n] % side * patch];
        for (int64_t u = 0; u < t_patch; ++u)
          for (int64_t y = 0; y < patch; ++y) {
            const uint8_t *frame = clip.pixels + (t + u) * clip.frame,
                          *above = frame + rows[y].lo, *below = frame + rows[y].hi;
            scalar_t* to = patches + n * out.size(2) + u * to_u + y * to_y;
            for (int64_t x = 0; x < patch; ++x)
              for (int64_t c = 0; c < channels; ++c) {
                const int64_t lo = columns[x].lo + c * clip.channel,
                              hi = columns[x].hi + c * clip.channel;
                const A p = columns[x].share, q = rows[y].share;
                const A first = (1 - p) * above[lo] + p * above[hi],
                        second = (1 - p) * below[lo] + p * below[hi];
                const A pixel = (1 - q) * first + q * second;
                to[x * to_x + c * to_c] = static_cast<scalar_t>(std::fma(pixel, scale, shift));
              }
          }
      }
    });
  });
  return out;
}

MAE_FAST_END
