// The bytes of one patch of a clip of any strides, brought into shared memory by one warp.
#pragma once

#include "common.cuh"

namespace mae_fast::cuda {

// A clip [B, C, T, H, W] of bytes. Tokens are (t * rows + row) * columns + column.
struct Clip {
  const uint8_t *begin, *end;  // of the memory that the clip spans
  int64_t stride[5];
  int chans, t_patch, patch, rows, columns;

  Clip(const uint8_t* data, const int64_t* size, const int64_t* strides, int64_t t_patch_,
       int64_t patch_)
      : begin(data), end(data + 1), chans(int(size[1])), t_patch(int(t_patch_)),
        patch(int(patch_)), rows(int(size[3] / patch_)), columns(int(size[4] / patch_)) {
    for (int i = 0; i < 5; ++i) {
      stride[i] = strides[i];
      end += (size[i] - 1) * strides[i];
    }
  }

  __host__ __device__ int size() const { return chans * t_patch * patch * patch; }
  // Of shared memory for one patch, in whole 16 bytes.
  __host__ __device__ int shared_bytes() const { return (size() + 15) / 16 * 16; }
  // Whether channels lie together, as in decoded frames.
  __device__ bool interleaved() const { return stride[1] == 1 && stride[4] == chans; }
};

// n <= 16 bytes, `step` apart, the rest zero: the last first, each shifting those before it.
__device__ inline uint4 load_strided(const uint8_t* from, int n, int64_t step) {
  uint64_t low = 0, high = 0;
#pragma unroll 4
  for (int i = n - 1; i >= 0; --i) {
    high = high << 8 | low >> 56;
    low = low << 8 | from[i * step];
  }
  return {uint32_t(low), uint32_t(low >> 32), uint32_t(high), uint32_t(high >> 32)};
}

// n <= 16 bytes from any address, the rest zero: the one or two aligned 16-byte words in which they
// lie, shifted together. Byte by byte where such a word would leave the clip.
__device__ inline uint4 load_bytes(const Clip& clip, const uint8_t* from, int n) {
  const unsigned shift = unsigned(reinterpret_cast<uintptr_t>(from) % 16);
  const uint8_t* word = from - shift;
  const bool two = int(shift) + n > 16;
  if (word < clip.begin || word + (two ? 32 : 16) > clip.end) return load_strided(from, n, 1);
  uint4 low = *reinterpret_cast<const uint4*>(word), high = {};
  if (two) high = *reinterpret_cast<const uint4*>(word + 16);
  uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  // Constant indices, so that w stays in registers.
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = shift & 8 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) w[i] = shift & 4 ? w[i + 1] : w[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    w[i] = __funnelshift_r(w[i], w[i + 1], shift % 4 * 8);
    if (n < 4 * i + 4) w[i] &= n > 4 * i ? (1u << (n - 4 * i) * 8) - 1 : 0;
  }
  return {w[0], w[1], w[2], w[3]};
}

// Copies the patch at column c and row r of clip b into `pixels`, [C, u, p, p] or (kChannelLast)
// [u, p, p, C]; frame(u) is the clip's number of its frame u. `see` gets every four bytes once, in
// a uint32. One warp calls it, and calls __syncwarp before it reads `pixels`.
template <bool kChannelLast, typename Frame, typename See>
__device__ void stage_patch(const Clip& clip, int64_t b, int r, int c, const Frame& frame,
                            uint8_t* pixels, const See& see) {
  constexpr int kBatch = 2;  // chunks on their way at once: 1,024 bytes a warp
  const int lane = threadIdx.x % kWarp, patch = clip.patch, chans = clip.chans;
  const bool interleaved = clip.interleaved(), contiguous = clip.stride[4] == 1 || interleaved;
  const uint8_t* corner = clip.begin + b * clip.stride[0] + int64_t(r) * patch * clip.stride[3] +
                          int64_t(c) * patch * clip.stride[4];
  // A run is one row of the patch as memory has it: of one channel, or of all where they lie
  // together. A chunk is up to 16 bytes of a run.
  const int lines = clip.t_patch * patch;
  const int run = interleaved ? patch * chans : patch, runs = interleaved ? lines : lines * chans;
  const int of_run = (run + 15) / 16, chunks = runs * of_run;
  const bool same_order = interleaved == kChannelLast || chans == 1;
  for (int first = lane; first < chunks; first += kBatch * kWarp) {
    uint4 bytes[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int chunk = first + k * kWarp;
      if (chunk >= chunks) break;
      const int i = chunk / of_run, x = chunk % of_run * 16;
      const int channel = i / lines, line = i % lines, n = min(16, run - x);
      const uint8_t* from = corner + channel * clip.stride[1] +
                            frame(line / patch) * clip.stride[2] + line % patch * clip.stride[3];
      bytes[k] = contiguous ? load_bytes(clip, from + x, n)
                            : load_strided(from + x * clip.stride[4], n, clip.stride[4]);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int chunk = first + k * kWarp;
      if (chunk >= chunks) break;
      const int i = chunk / of_run, x = chunk % of_run * 16, n = min(16, run - x);
      const uint32_t w[4] = {bytes[k].x, bytes[k].y, bytes[k].z, bytes[k].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) see(w[j]);
      if (same_order && run % 16 == 0) {
        *reinterpret_cast<uint4*>(pixels + i * run + x) = bytes[k];
        continue;
      }
      // Where byte x of run i goes, and how far apart its neighbours are.
      int to = i * run + x, step = 1, channel = i / lines;
      if (!same_order) {
        const int line = i % lines;
        to = interleaved ? (x % chans * lines + line) * patch + x / chans
                         : (line * patch + x) * chans + channel;
        step = interleaved ? lines * patch : chans;
        channel = interleaved ? x % chans : 0;
      }
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        if (j < n) pixels[to] = uint8_t(w[j / 4] >> j % 4 * 8);
        to += step;
        if (interleaved && !same_order && ++channel == chans) channel = 0, to += 1 - chans * step;
      }
    }
  }
}

}  // namespace mae_fast::cuda
