// RandAugment's operations on a clip uint8 [T, H, W, 3], each what Pillow makes of every frame, to
// the bit: the same products and sums, rounded as it rounds them. One thread: a data worker has one.
#pragma once

#include <array>
#include <cstring>

#include "common.h"

MAE_FAST_BEGIN

// Pillow is compiled without fused products and sums; here one would round otherwise.
#if defined(__clang__)
#define MAE_FAST_NOT_FUSED _Pragma("clang fp contract(off)")
#else
#define MAE_FAST_NOT_FUSED
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

using Table = std::array<uint8_t, 256>;

inline uint8_t clipped(float x) {
  return x <= 0 ? 0 : x >= 255 ? 255 : static_cast<uint8_t>(x);
}

// Image.blend: `factor` of the way from `low` to `value`, and beyond.
inline uint8_t blend(int low, int value, float factor) {
  MAE_FAST_NOT_FUSED
  return clipped(low + factor * (value - low));
}

// convert("L").
inline int grey(const uint8_t* p) {
  return (p[0] * 19595 + p[1] * 38470 + p[2] * 7471 + 0x8000) >> 16;
}

// Pixels of one frame through a table of each channel.
inline void look_up(const uint8_t* in, uint8_t* out, int64_t pixels, const Table* tables) {
  for (int64_t i = 0; i < pixels; ++i)
    for (int64_t c = 0; c < 3; ++c) out[3 * i + c] = tables[c][in[3 * i + c]];
}

inline std::array<std::array<int64_t, 256>, 3> histogram(const uint8_t* in, int64_t pixels) {
  // Two counts of each, so that equal neighbours do not wait for one another.
  std::array<std::array<int64_t, 256>, 6> counts{};
  int64_t i = 0;
  for (; i + 2 <= pixels; i += 2)
    for (int64_t c = 0; c < 6; ++c) ++counts[c][in[3 * i + c]];
  if (i < pixels)
    for (int64_t c = 0; c < 3; ++c) ++counts[c][in[3 * i + c]];
  std::array<std::array<int64_t, 256>, 3> found;
  for (int64_t c = 0; c < 3; ++c)
    for (int64_t v = 0; v < 256; ++v) found[c][v] = counts[c][v] + counts[c + 3][v];
  return found;
}

// ImageOps.autocontrast: the smallest value to 0, the largest to 255.
inline Table contrast_table(const std::array<int64_t, 256>& counts) {
  MAE_FAST_NOT_FUSED
  int lo = 0, hi = 255;
  while (lo < 255 && !counts[lo]) ++lo;
  while (hi > 0 && !counts[hi]) --hi;
  Table table;
  const double scale = hi > lo ? 255.0 / (hi - lo) : 1, offset = hi > lo ? -lo * scale : 0;
  for (int v = 0; v < 256; ++v)
    table[v] = std::clamp(static_cast<int>(v * scale + offset), 0, 255);
  return table;
}

// ImageOps.equalize.
inline Table equal_table(const std::array<int64_t, 256>& counts) {
  int64_t pixels = 0, last = 0, different = 0;
  for (int64_t count : counts)
    if (count) pixels += count, last = count, ++different;
  const int64_t step = different > 1 ? (pixels - last) / 255 : 0;
  Table table;
  int64_t n = step / 2;
  for (int v = 0; v < 256; ++v) {
    table[v] = step ? std::min<int64_t>(n / step, 255) : v;
    n += counts[v];
  }
  return table;
}

// ImageEnhance.Contrast starts from the frame's mean grey, Brightness from black.
inline int mean_grey(const uint8_t* in, int64_t pixels) {
  int64_t sum = 0;
  for (int64_t i = 0; i < pixels; ++i) sum += grey(in + 3 * i);
  return static_cast<int>(static_cast<double>(sum) / pixels + 0.5);
}

inline Table blend_table(int low, float factor) {
  Table table;
  for (int v = 0; v < 256; ++v) table[v] = blend(low, v, factor);
  return table;
}

// ImageEnhance.Color: from grey.
inline void colour(const uint8_t* in, uint8_t* out, int64_t pixels, float factor) {
  for (int64_t i = 0; i < pixels; ++i) {
    const int low = grey(in + 3 * i);
    for (int64_t c = 0; c < 3; ++c) out[3 * i + c] = blend(low, in[3 * i + c], factor);
  }
}

// ImageEnhance.Sharpness: from ImageFilter.SMOOTH, a mean of nine with five times the centre, whose
// half is never met: (2 S + 13) / 26 is the rounded S / 13. Its edges are the frame's.
inline void sharpness(const uint8_t* in, uint8_t* out, int64_t height, int64_t width,
                      float factor) {
  const int64_t row = 3 * width;
  std::memcpy(out, in, height * row);
  for (int64_t y = 1; y < height - 1; ++y) {
    const uint8_t *above = in + (y - 1) * row, *here = above + row, *below = here + row;
    for (int64_t i = 3; i < row - 3; ++i) {
      const unsigned sum = above[i - 3] + above[i] + above[i + 3] + here[i - 3] + 5 * here[i] +
                           here[i + 3] + below[i - 3] + below[i] + below[i + 3];
      out[y * row + i] = blend((2 * sum + 13) / 26, here[i], factor);
    }
  }
}

// Pillow's cubic through four values, d of the way from the second to the third.
inline double cubic(double v1, double v2, double v3, double v4, double d) {
  MAE_FAST_NOT_FUSED
  const double p2 = -v1 + v3, p3 = 2 * (v1 - v2) + v3 - v4, p4 = -v1 + v2 - v3 + v4;
  return v2 + d * (p2 + d * (p3 + d * p4));
}

// One pixel of n values: 4 x 4 neighbours, whose rows are rows[j] + columns[i]. Where a place is a
// whole number, the cubic is its second value.
template <bool ALONG, bool ACROSS>
inline void neighbours(uint8_t* __restrict out, const uint8_t* const* rows,
                       const int64_t* columns, int64_t n, double dx, double dy) {
  const uint8_t* at[4][4];
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 4; ++i) at[j][i] = rows[j] + columns[i];
  const auto along = [&](int j, int64_t k) -> double {
    if constexpr (!ALONG) return at[j][1][k];
    return cubic(at[j][0][k], at[j][1][k], at[j][2][k], at[j][3][k], dx);
  };
  // The compiler does not prove that 16 inputs are not the output, and would take one at a time.
#pragma GCC ivdep
  for (int64_t k = 0; k < n; ++k) {
    double v;
    if constexpr (ACROSS) {
      v = cubic(along(0, k), along(1, k), along(2, k), along(3, k), dy);
    } else {
      v = along(1, k);
    }
    out[k] = v <= 0 ? 0 : v >= 255 ? 255 : static_cast<uint8_t>(static_cast<int>(v));
  }
}

// Image.transform(AFFINE, BICUBIC) of n values a pixel: in and out [H, W, n], (x, y) of the output
// at a[0] x + a[1] y + a[2], a[3] x + a[4] y + a[5] of the input; outside it is grey.
inline void affine(const uint8_t* in, uint8_t* out, int64_t height, int64_t width, int64_t n,
                   const double* a) {
  MAE_FAST_NOT_FUSED
  constexpr uint8_t kFill = 128;
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < width; ++x, out += n) {
      double at_x = a[0] * (x + 0.5) + a[1] * (y + 0.5) + a[2],
             at_y = a[3] * (x + 0.5) + a[4] * (y + 0.5) + a[5];
      if (!(at_x >= 0 && at_x < width && at_y >= 0 && at_y < height)) {
        std::memset(out, kFill, n);
        continue;
      }
      at_x -= 0.5, at_y -= 0.5;
      const int64_t left = std::floor(at_x), top = std::floor(at_y);
      const double dx = at_x - left, dy = at_y - top;
      const uint8_t* rows[4];
      int64_t columns[4];
      for (int64_t i = 0; i < 4; ++i) {
        rows[i] = in + std::clamp<int64_t>(top + i - 1, 0, height - 1) * width * n;
        columns[i] = std::clamp<int64_t>(left + i - 1, 0, width - 1) * n;
      }
      if (dx != 0 && dy != 0) {
        neighbours<true, true>(out, rows, columns, n, dx, dy);
      } else if (dx != 0) {
        neighbours<true, false>(out, rows, columns, n, dx, dy);
      } else if (dy != 0) {
        neighbours<false, true>(out, rows, columns, n, dx, dy);
      } else {
        neighbours<false, false>(out, rows, columns, n, dx, dy);
      }
    }
}

// [rows, columns] -> [columns, rows].
inline void turn(const uint8_t* in, uint8_t* out, int64_t rows, int64_t columns) {
  constexpr int64_t kTile = 64;
  for (int64_t r = 0; r < rows; r += kTile)
    for (int64_t c = 0; c < columns; c += kTile)
      for (int64_t i = r; i < std::min(r + kTile, rows); ++i)
        for (int64_t j = c; j < std::min(c + kTile, columns); ++j)
          out[j * rows + i] = in[i * columns + j];
}

#if !defined(__clang__)
#pragma GCC pop_options
#endif

// A new clip. operation and its numbers: table (256 values); autocontrast, equalize (none);
// brightness, contrast, color, sharpness (the factor); affine (6).
inline Tensor randaugment(const Tensor& frames_, c10::string_view operation,
                          at::ArrayRef<double> numbers) {
  check_cpu(frames_, "randaugment: frames");
  TORCH_CHECK_VALUE(frames_.dim() == 4 && frames_.size(3) == 3 && frames_.numel() &&
                        frames_.scalar_type() == at::kByte,
                    "randaugment: frames must be uint8 [T, H, W, 3], got ", frames_.scalar_type(),
                    " ", frames_.sizes());
  const bool affine_ = operation == "affine", table_ = operation == "table",
             even = operation == "autocontrast" || operation == "equalize";
  TORCH_CHECK_VALUE(affine_ || table_ || even || operation == "brightness" ||
                        operation == "contrast" || operation == "color" ||
                        operation == "sharpness",
                    "randaugment: no operation ", operation);
  const size_t wanted = affine_ ? 6 : table_ ? 256 : even ? 0 : 1;
  TORCH_CHECK_VALUE(numbers.size() == wanted, "randaugment: ", operation, " takes ", wanted,
                    " numbers, got ", numbers.size());
  const Tensor frames = frames_.contiguous();
  const int64_t count = frames.size(0), height = frames.size(1), width = frames.size(2),
                pixels = height * width;
  Tensor result = at::empty_like(frames);
  const uint8_t* in = frames.const_data_ptr<uint8_t>();
  uint8_t* out = result.mutable_data_ptr<uint8_t>();
  if (affine_) {
    // All frames move alike: the values of a pixel in all of them, side by side.
    Tensor turned = at::empty_like(frames), moved = at::empty_like(frames);
    turn(in, turned.mutable_data_ptr<uint8_t>(), count, 3 * pixels);
    affine(turned.const_data_ptr<uint8_t>(), moved.mutable_data_ptr<uint8_t>(), height, width,
           3 * count, numbers.data());
    turn(moved.const_data_ptr<uint8_t>(), out, 3 * pixels, count);
    return result;
  }
  const float factor = wanted == 1 ? static_cast<float>(numbers[0]) : 0;
  std::array<Table, 3> tables;
  if (table_)
    for (size_t v = 0; v < 256; ++v) {
      TORCH_CHECK_VALUE(numbers[v] >= 0 && numbers[v] <= 255, "randaugment: a table holds bytes");
      for (Table& table : tables) table[v] = static_cast<uint8_t>(numbers[v]);
    }
  for (int64_t t = 0; t < count; ++t, in += 3 * pixels, out += 3 * pixels) {
    if (operation == "color") {
      colour(in, out, pixels, factor);
      continue;
    }
    if (operation == "sharpness") {
      sharpness(in, out, height, width, factor);
      continue;
    }
    if (even) {
      const auto counts = histogram(in, pixels);
      for (size_t c = 0; c < 3; ++c)
        tables[c] = operation == "equalize" ? equal_table(counts[c]) : contrast_table(counts[c]);
    } else if (!table_) {
      tables.fill(blend_table(operation == "contrast" ? mean_grey(in, pixels) : 0, factor));
    }
    look_up(in, out, pixels, tables.data());
  }
  return result;
}

MAE_FAST_END
