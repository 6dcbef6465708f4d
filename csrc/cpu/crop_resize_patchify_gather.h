// Patches of a resized crop, from frames as they were decoded: only the wanted pixels are converted
// to RGB, and resampled.
#pragma once

#include "patchify_gather.h"

MAE_FAST_BEGIN

// The columns of a row of the table: mae_fast/ops/source.py.
enum Column { kHeight, kWidth, kTop, kLeft, kBoxHeight, kBoxWidth, kFlip, kPlanar, kLuma, kCy, kCrv,
              kCgu, kCgv, kCbu, kColumns };

// Where the pixels of an output line fall between two pixels of the source: these, and the share of
// the second. F.interpolate(mode="bilinear", align_corners=False), in its arithmetic.
template <typename A>
struct Taps {
  Taps(int64_t start, int64_t length, int64_t size, bool flip) : lo(size), hi(size), share(size) {
    const A scale = A(length) / size;
    for (int64_t i = 0; i < size; ++i) {
      const A real = std::max(std::fma(scale, i + A(0.5), A(-0.5)), A(0));
      const int64_t low = std::min<int64_t>(real, length - 1), at = flip ? size - 1 - i : i;
      lo[at] = start + low;
      hi[at] = start + std::min(low + 1, length - 1);
      share[at] = std::min(real - low, A(1));
    }
  }
  std::vector<int> lo, hi;
  std::vector<A> share;
};

template <typename A>
struct Clip {
  Clip(const uint8_t* flat_, const int64_t* row_, int64_t size)
      : flat(flat_), row(row_), rows(row[kTop], row[kBoxHeight], size, false),
        columns(row[kLeft], row[kBoxWidth], size, row[kFlip]) {}
  const uint8_t* flat;
  const int64_t* row;
  Taps<A> rows, columns;
};

inline int64_t frame_bytes(const int64_t* row) {
  const int64_t h = row[kHeight], w = row[kWidth];
  return row[kPlanar] ? h * w + 2 * ((h + 1) / 2) * ((w + 1) / 2) : 3 * h * w;
}

inline void check_clips(const char* op, const Tensor& flat, const Tensor& table) {
  check_cpu(flat, "flat");
  check_cpu(table, "table");
  TORCH_CHECK_VALUE(flat.scalar_type() == at::kByte && flat.dim() == 1 && flat.is_contiguous(), op,
                    ": the frames must be one buffer of uint8, got ", flat.scalar_type(), " ",
                    flat.sizes());
  TORCH_CHECK_VALUE(table.scalar_type() == at::kLong && table.dim() == 2 && table.size(0) > 0 &&
                        table.size(1) > kColumns,
                    op, ": the table must be int64 [B, ", int(kColumns), " + T], got ",
                    table.scalar_type(), " ", table.sizes());
  constexpr int64_t kMost = 1 << 20;  // pixels a side, so that no product overflows
  for (int64_t b = 0; b < table.size(0); ++b) {
    const int64_t* row = table.const_data_ptr<int64_t>() + b * table.size(1);
    const int64_t top = row[kTop], left = row[kLeft], height = row[kBoxHeight],
                  width = row[kBoxWidth];
    TORCH_CHECK_VALUE(row[kHeight] >= 1 && row[kHeight] <= kMost && row[kWidth] >= 1 &&
                          row[kWidth] <= kMost,
                      op, ": frames of ", row[kHeight], "x", row[kWidth]);
    TORCH_CHECK_VALUE(top >= 0 && left >= 0 && height >= 1 && width >= 1 &&
                          top <= row[kHeight] - height && left <= row[kWidth] - width,
                      op, ": box (", top, ", ", left, ", ", height, ", ", width,
                      ") is not within a frame of ", row[kHeight], "x", row[kWidth]);
    for (int64_t i = kColumns; i < table.size(1); ++i)
      TORCH_CHECK_VALUE(row[i] >= 0 && row[i] <= flat.numel() - frame_bytes(row), op, ": frames of ",
                        frame_bytes(row), " bytes at ", row[i], ", in a buffer of ", flat.numel());
  }
}

// Lines of a frame as they are wanted of one token: R, G and B of a source row, resampled along it
// at `patch` columns. Two are kept, as the next output line needs one of them again most often.
template <typename A, typename P>
class Lines {
 public:
  explicit Lines(P patch)
      : patch_(patch), room_((2 * patch + 2 + kStep - 1) / kStep * kStep), bytes_(3 * room_),
        pixels_(3 * room_), lines_(6 * patch), near_(patch), far_(patch) {}

  void begin(const Clip<A>& clip, const uint8_t* frame, int64_t column) {
    row_ = clip.row, frame_ = frame;
    lo_ = &clip.columns.lo[column], hi_ = &clip.columns.hi[column];
    share_ = &clip.columns.share[column];
    held_[0] = held_[1] = -1;
    // The columns lie close together, and all between them are converted, or each pixel is fetched.
    first_ = std::min(lo_[0], lo_[patch_ - 1]) & ~1;
    span_ = std::max(hi_[0], hi_[patch_ - 1]) + 1 - first_;
    dense_ = span_ <= 2 * patch_ + 2;
    count_ = ((dense_ ? span_ : 2 * patch_) + kStep - 1) / kStep * kStep;
    for (int64_t x = 0; x < patch_; ++x) {
      near_[x] = dense_ ? lo_[x] - first_ : x;
      far_[x] = dense_ ? hi_[x] - first_ : patch_ + x;
    }
  }

  // [3, patch] of a row; `other` is the row that is wanted with it, and stays.
  const A* of(int row, int other) {
    for (int i = 0; i < 2; ++i)
      if (held_[i] == row) return &lines_[i * 3 * patch_];
    const int slot = held_[0] == other ? 1 : 0;
    held_[slot] = row;
    A* line = &lines_[slot * 3 * patch_];
    if (row_[kPlanar])
      convert(row);
    else
      copy(row);
    const int *__restrict near = near_.data(), *__restrict far = far_.data();
    const A* __restrict share = share_;
    for (int64_t c = 0; c < 3; ++c) {
      const A* __restrict from = &pixels_[c * room_];
      A* __restrict to = line + c * patch_;
      for (int64_t x = 0; x < patch_; ++x)
        to[x] = (1 - share[x]) * from[near[x]] + share[x] * from[far[x]];
    }
    return line;
  }

 private:
  static constexpr int64_t kStep = 16;  // what is computed comes in whole vectors

  // f(where a pixel goes, its column) for every pixel that is wanted.
  template <typename F>
  void fetch(const F& f) const {
    if (dense_) {
      for (int64_t x = 0; x < span_; ++x) f(x, first_ + x);
    } else {
      for (int64_t x = 0; x < patch_; ++x) f(x, lo_[x]), f(patch_ + x, hi_[x]);
    }
  }

  void copy(int row) {
    const uint8_t* from = frame_ + row * row_[kWidth] * 3;
    for (int64_t c = 0; c < 3; ++c) {
      A* to = &pixels_[c * room_];
      fetch([&](int64_t x, int64_t column) { to[x] = from[column * 3 + c]; });
    }
  }

  void convert(int row) {
    const int64_t width = row_[kWidth], half = (width + 1) / 2;
    const uint8_t *y = frame_ + row * width, *u = frame_ + row_[kHeight] * width + row / 2 * half,
                  *v = u + (row_[kHeight] + 1) / 2 * half;
    uint8_t *__restrict ys = bytes_.data(), *__restrict us = ys + room_, *__restrict vs = us + room_;
    if (dense_) {
      const uint8_t *__restrict luma = y + first_, *__restrict b = u + first_ / 2,
                    *__restrict r = v + first_ / 2;
      const int64_t span = span_;
      for (int64_t x = 0; x < span; ++x) ys[x] = luma[x];
      for (int64_t x = 0; x < (span + 1) / 2; ++x) us[2 * x] = us[2 * x + 1] = b[x];
      for (int64_t x = 0; x < (span + 1) / 2; ++x) vs[2 * x] = vs[2 * x + 1] = r[x];
    } else {
      fetch([&](int64_t x, int64_t at) { ys[x] = y[at], us[x] = u[at / 2], vs[x] = v[at / 2]; });
    }
    const int luma = row_[kLuma], cy = row_[kCy], crv = row_[kCrv], cgu = row_[kCgu],
              cgv = row_[kCgv], cbu = row_[kCbu];
    A *__restrict red = pixels_.data(), *__restrict green = red + room_,
      *__restrict blue = green + room_;
    const int64_t count = count_;
    for (int64_t x = 0; x < count; ++x) {
      const int a = 8 * ys[x] - luma, b = 8 * us[x] - 1024, c = 8 * vs[x] - 1024,
                bright = a * cy >> 16, r = bright + (c * crv >> 16),
                g = bright + (b * cgu >> 16) + (c * cgv >> 16), d = bright + (b * cbu >> 16);
      red[x] = std::min(std::max(r, 0), 255);
      green[x] = std::min(std::max(g, 0), 255);
      blue[x] = std::min(std::max(d, 0), 255);
    }
  }

  const P patch_;
  const int64_t room_;
  std::vector<uint8_t> bytes_;
  std::vector<A> pixels_, lines_;
  std::vector<int> near_, far_;
  const int64_t* row_ = nullptr;
  const uint8_t* frame_ = nullptr;
  const int *lo_ = nullptr, *hi_ = nullptr;
  const A* share_ = nullptr;
  int64_t first_ = 0, span_ = 0, count_ = 0;
  bool dense_ = false;
  int held_[2];
};

// One line of a patch [3, patch], between two lines of the source.
template <typename A, typename P>
inline void blend(const A* __restrict above, const A* __restrict below, A q, P patch, A scale,
                  A shift, A* __restrict line) {
  const A p = 1 - q;
  for (int64_t i = 0; i < 3 * patch; ++i)
    line[i] = std::fma(p * above[i] + q * below[i], scale, shift);
}

// To where it belongs: x has a step of 3 where the channels c have one of 1.
template <typename A, typename T, typename P>
inline void put(const A* __restrict line, P patch, int64_t to_c, T* __restrict to) {
  if (to_c == 1) {
    for (int64_t x = 0; x < patch; ++x)
      for (int64_t c = 0; c < 3; ++c) to[3 * x + c] = static_cast<T>(line[c * patch + x]);
  } else {
    for (int64_t c = 0; c < 3; ++c)
      for (int64_t x = 0; x < patch; ++x) to[c * to_c + x] = static_cast<T>(line[c * patch + x]);
  }
}

inline Tensor crop_resize_patchify_gather_fwd(const Tensor& flat, const Tensor& table_,
                                              const Tensor& ids_, int64_t size, int64_t t_patch,
                                              int64_t patch, double mean, double std,
                                              at::ScalarType dtype, bool channel_last) {
  constexpr const char* op = "crop_resize_patchify_gather";
  const Tensor table = table_.contiguous();
  check_clips(op, flat, table);
  const int64_t length = table.size(1) - kColumns, side = size / std::max<int64_t>(patch, 1);
  check_patches(op, {length, size, size}, t_patch, patch);
  const Tensor ids = checked_ids(ids_, length / t_patch * side * side, op);
  TORCH_CHECK_VALUE(ids.size(0) == table.size(0), op, ": ids ", ids.sizes(), " for ", table.size(0),
                    " clips");
  const int64_t kept = ids.size(1), channels = 3;
  const Tensor out = at::empty({ids.size(0), kept, t_patch * patch * patch * channels},
                               flat.options().dtype(dtype));
  // Where pixel (c, u, y, x) of a patch goes; x has a step of 3 where c has one of 1.
  const int64_t to_y = channel_last ? patch * channels : patch, to_u = patch * to_y,
                to_c = channel_last ? 1 : t_patch * to_u;
  MAE_FAST_FLOATS(dtype, op, [&] {
    using A = acc_t<scalar_t>;
    const A scale = 1 / (255 * std), shift = -mean / std;
    std::vector<Clip<A>> clips;
    for (int64_t b = 0; b < table.size(0); ++b)
      clips.emplace_back(flat.const_data_ptr<uint8_t>(),
                         table.const_data_ptr<int64_t>() + b * table.size(1), size);
    const int64_t* id = ids.const_data_ptr<int64_t>();
    scalar_t* patches = out.mutable_data_ptr<scalar_t>();
    const auto run = [&](auto patch) {  // a constant where it can be, for the compiler's vectors
      at::parallel_for(0, ids.numel(), 1, [&](int64_t begin, int64_t end) {
        Lines<A, decltype(patch)> lines(patch);
        std::vector<A> line(3 * patch);
        for (int64_t n = begin; n < end; ++n) {
          const Clip<A>& clip = clips[n / kept];
          const int64_t t = id[n] / (side * side) * t_patch, top = id[n] / side % side * patch;
          const Taps<A>& rows = clip.rows;
          for (int64_t u = 0; u < t_patch; ++u) {
            lines.begin(clip, clip.flat + clip.row[kColumns + t + u], id[n] % side * patch);
            for (int64_t y = 0; y < patch; ++y) {
              const int lo = rows.lo[top + y], hi = rows.hi[top + y];
              const A *above = lines.of(lo, hi), *below = lines.of(hi, lo);
              scalar_t* to = patches + n * out.size(2) + u * to_u + y * to_y;
              blend(above, below, rows.share[top + y], patch, scale, shift, line.data());
              put(line.data(), patch, to_c, to);
            }
          }
        }
      });
    };
    if (patch == 16)
      run(std::integral_constant<int64_t, 16>());
    else
      run(patch);
  });
  return out;
}

MAE_FAST_END
