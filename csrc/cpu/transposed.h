// A transposed copy, which the weight gradient of `linear` needs: torch's own is made by one thread
// and took 3 to 4% of a training step.
#pragma once

#include "common.h"

MAE_FAST_BEGIN

// x float [M, N] with rows of any stride -> x.t() [N, M], contiguous.
inline Tensor transposed(const Tensor& x_) {
  check_cpu(x_, "transposed: x");
  TORCH_CHECK(x_.dim() == 2 && x_.scalar_type() == at::kFloat, "transposed: x must be float [M, N], ",
              "got ", x_.scalar_type(), " ", x_.sizes());
  // A tile is a cache line on either side; a band of tiles reads every page once.
  constexpr int64_t kTile = 16, kBand = 4 * kTile;
  const Tensor x = x_.stride(1) == 1 ? x_ : x_.contiguous();
  const int64_t rows = x.size(0), columns = x.size(1), stride = x.stride(0);
  Tensor out = at::empty({columns, rows}, x.options());
  const float* from = x.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  const auto tile = [&](int64_t r, int64_t c) {
    if (r + kTile <= rows && c + kTile <= columns) {
      at::vec::transpose_mxn<float, kTile, kTile>(from + r * stride + c, stride,
                                                  to + c * rows + r, rows);
      return;
    }
    for (int64_t i = r; i < std::min(r + kTile, rows); ++i) {
      for (int64_t j = c; j < std::min(c + kTile, columns); ++j) {
        to[j * rows + i] = from[i * stride + j];
      }
    }
  };
  const int64_t grain = 1 + (1 << 15) / (kBand * (rows + 1));
  at::parallel_for(0, (columns + kBand - 1) / kBand, grain, [&](int64_t begin, int64_t end) {
    for (int64_t band = begin * kBand; band < end * kBand; band += kBand) {
      for (int64_t r = 0; r < rows; r += kTile) {
        for (int64_t c = band; c < std::min(band + kBand, columns); c += kTile) tile(r, c);
      }
    }
  });
  return out;
}

MAE_FAST_END
