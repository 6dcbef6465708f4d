// The loss on histograms of oriented gradients of masked patches, straight from the clip: a patch
// and the pixels around it are read once, channel by channel.
#pragma once

#include "masked_mse.h"

MAE_FAST_BEGIN

constexpr int64_t kBins = 9, kCell = 8;

// What is one pixel outside of a frame is its neighbour's neighbour.
inline int64_t reflected(int64_t i, int64_t size) {
  return i < 0 ? -i : i >= size ? 2 * (size - 1) - i : i;
}

// The histograms of one channel of one patch at (top, left) of a frame, to[k * n * n + cell] for
// every bin k, where n * n cells make the patch. A bin's edges are compared with, not divided by:
// of bytes, whose gradients are integers, this is exact.
template <typename P, typename A>
class Histogram {
 public:
  explicit Histogram(int64_t patch)
      : patch_(patch), lines_((patch + 2) * (patch + 2)), magnitude_(patch), bin_(patch) {
    for (int64_t k = 1; k < kBins; ++k) {
      cos_[k - 1] = A(std::cos(k * M_PI / kBins));
      sin_[k - 1] = A(std::sin(k * M_PI / kBins));
    }
  }

  void make(const P* frame, int64_t row_stride, int64_t column_stride, int64_t height,
            int64_t width, int64_t top, int64_t left, A* to) {
    const int64_t n = patch_ / kCell, wide = patch_ + 2;
    for (int64_t i = 0; i < wide; ++i) {
      const P* line = frame + reflected(top + i - 1, height) * row_stride;
      A* out = lines_.data() + i * wide;
      out[0] = A(line[reflected(left - 1, width) * column_stride]);
      for (int64_t j = 1; j <= patch_; ++j) out[j] = A(line[(left + j - 1) * column_stride]);
      out[wide - 1] = A(line[reflected(left + patch_, width) * column_stride]);
    }
    std::fill_n(to, kBins * n * n, A(0));
    for (int64_t y = 0; y < patch_; ++y) {
      gradients(lines_.data() + y * wide, wide);
      for (int64_t x = 0; x < patch_; ++x) {
        to[(bin_[x] * n + y / kCell) * n + x / kCell] += magnitude_[x];
      }
    }
    const A least = std::is_same_v<P, uint8_t> ? A(1) : A(1e-12);  // of bytes, 0 or at least 1
    for (int64_t cell = 0; cell < n * n; ++cell) {
      A square = 0;
      for (int64_t k = 0; k < kBins; ++k) square += to[k * n * n + cell] * to[k * n * n + cell];
      const A norm = std::max(std::sqrt(square), least);
      for (int64_t k = 0; k < kBins; ++k) to[k * n * n + cell] /= norm;
    }
  }

 private:
  // Magnitude and bin of a line of pixels, whose neighbours above stand at `above`.
  void gradients(const A* __restrict above, int64_t wide) {
    const A *__restrict at = above + wide, *__restrict below = at + wide;
    A* __restrict magnitude = magnitude_.data();
    int32_t* __restrict bin = bin_.data();
    for (int64_t x = 0; x < patch_; ++x) {
      A gx = (above[x] + 2 * at[x] + below[x]) - (above[x + 2] + 2 * at[x + 2] + below[x + 2]);
      A gy = (above[x] - below[x]) + 2 * (above[x + 1] - below[x + 1]) +
             (above[x + 2] - below[x + 2]);
      magnitude[x] = std::sqrt(gx * gx + gy * gy);
      const bool turn = gx < 0 || (gx == 0 && gy < 0);  // an angle within [0, pi)
      gx = turn ? -gx : gx;
      gy = turn ? -gy : gy;
      int32_t k = 0;
      for (int64_t edge = 0; edge < kBins - 1; ++edge) k += gx * cos_[edge] >= gy * sin_[edge];
      bin[x] = k;
    }
  }

  int64_t patch_;
  std::vector<A> lines_, magnitude_;
  std::vector<int32_t> bin_;
  std::array<A, kBins - 1> cos_, sin_;
};

// pred [B, M, C * 9 * (patch / 8)^2]; video [B, C, T, H, W]; ids [B, M] -> as masked_mse_fwd.
inline std::tuple<Tensor, Tensor> masked_hog_mse_fwd(const Tensor& pred_, const Tensor& video,
                                                     const Tensor& ids_, at::IntArrayRef frames_,
                                                     int64_t patch, double std, bool need_grad) {
  check_cpu(pred_, "masked_hog_mse: pred");
  check_cpu(video, "masked_hog_mse: video");
  TORCH_CHECK(pred_.dim() == 3 && video.dim() == 5 && patch > 0 && patch % kCell == 0,
              "masked_hog_mse: pred ", pred_.sizes(), ", video ", video.sizes(), ", patches of ",
              patch);
  const std::vector<int64_t> frames = frames_.vec();
  for (const int64_t f : frames) {
    TORCH_CHECK(f >= 0 && f < video.size(2), "masked_hog_mse: frame ", f, " of ", video.size(2));
  }
  const int64_t chans = video.size(1), height = video.size(3), width = video.size(4),
                rows = height / patch, columns = width / patch, n = patch / kCell;
  const Tensor ids =
      checked_ids(ids_, int64_t(frames.size()) * rows * columns, "masked_hog_mse: ids");
  const int64_t masked = pred_.size(1), size = pred_.size(2), of_channel = kBins * n * n;
  TORCH_CHECK(size == chans * of_channel && ids.size(0) == pred_.size(0) &&
                  ids.size(1) == masked && video.size(0) == pred_.size(0),
              "masked_hog_mse: pred ", pred_.sizes(), ", ids ", ids.sizes(), " and video ",
              video.sizes(), " do not fit");
  const Tensor pred = pred_.stride(2) == 1 ? pred_ : pred_.contiguous();
  const auto acc = at::toOpMathType(pred.scalar_type());
  const double unit = unit_gradient(pred);
  Tensor saved = at::empty(need_grad ? pred.sizes() : at::IntArrayRef{0}, pred.options());
  Tensor errors = at::empty({ids.numel()}, pred.options().dtype(at::kDouble));
  const auto stride = video.strides();
  MAE_FAST_FLOATS(pred.scalar_type(), "masked_hog_mse", [&] {
    using A = acc_t<scalar_t>;
    const auto* pp = pred.const_data_ptr<scalar_t>();
    auto* sp = need_grad ? saved.mutable_data_ptr<scalar_t>() : nullptr;
    const int64_t* ip = ids.const_data_ptr<int64_t>();
    double* ep = errors.mutable_data_ptr<double>();
    const auto run = [&](auto* clip) {
      using P = std::remove_const_t<std::remove_pointer_t<decltype(clip)>>;
      at::parallel_for(0, ids.numel(), 8, [&](int64_t begin, int64_t end) {
        std::vector<A> target(size);
        Histogram<P, A> histogram(patch);
        for (int64_t row = begin; row < end; ++row) {
          const int64_t b = row / masked, m = row % masked, id = ip[row];
          const int64_t t = id / (rows * columns), r = id / columns % rows, c = id % columns;
          for (int64_t k = 0; k < chans; ++k) {
            histogram.make(clip + b * stride[0] + k * stride[1] + frames[t] * stride[2], stride[3],
                           stride[4], height, width, r * patch, c * patch,
                           target.data() + k * of_channel);
          }
          const scalar_t* from = pp + b * pred.stride(0) + m * pred.stride(1);
          const Vec<scalar_t> units{A(unit)};
          Vec<scalar_t> squares(A(0));
          each<scalar_t>(size, [&](int64_t i, auto count) {
            auto d = load(from + i, count) - load(target.data() + i, count);
            if (count < Vec<scalar_t>::size()) {
              d = Vec<scalar_t>::set(Vec<scalar_t>(A(0)), d, count);
            }
            squares = at::vec::fmadd(d, d, squares);
            if (sp) store(sp + row * size + i, d * units, count);
          });
          ep[row] = sum<A>(squares);
        }
      });
    };
    if (video.scalar_type() == at::kByte) {
      run(video.const_data_ptr<uint8_t>());
    } else {
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, video.scalar_type(),
                                      "masked_hog_mse",
                                      [&] { run(video.const_data_ptr<scalar_t>()); });
    }
  });
  const double* ep = errors.const_data_ptr<double>();
  double total = 0;
  for (int64_t i = 0; i < errors.numel(); ++i) total += ep[i];
  return {at::scalar_tensor(total / double(pred.numel()), pred.options().dtype(acc)), saved};
}

MAE_FAST_END
