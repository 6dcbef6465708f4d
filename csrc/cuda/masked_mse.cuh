// The loss on masked patches and its gradient, in one pass: one warp a patch, which reads the bytes
// of the target once, sums them and their squares as integers, and never stores it.
#pragma once

#include "patch.cuh"

namespace mae_fast::cuda {

constexpr int kMaxFrames = 128;  // of a clip that are targets: they travel as kernel arguments
constexpr int kSumThreads = 1024;

struct TargetFrames {
  int32_t at[kMaxFrames];
};

// target = (x * count - total) * scale + shift of a byte x. Normalised, the first product is
// exact, and nothing cancels.
struct Affine {
  int count, total;
  float scale, shift;
};

__device__ inline Affine target_affine(int size, uint32_t total, uint32_t squares, float mean,
                                       float std, bool norm) {
  const float unit = 255 * std;
  if (!norm) return {1, 0, 1 / unit, -mean / std};
  const uint64_t spread = uint64_t(size) * squares - uint64_t(total) * total;
  const float pairs = float(size) * float(size - 1);
  const float variance = float(spread) / pairs / (unit * unit);
  return {size, int(total), 1 / (float(size) * unit * sqrtf(variance + 1e-6f)), 0};
}

// One warp's patch: stores (pred - target) * unit, and returns the sum of (pred - target)^2.
template <typename T, int N>
__device__ float patch_error(const Clip& clip, const TargetFrames& frames, int64_t tokens,
                             int64_t b, int64_t id, const T* pred, T* saved, uint8_t* pixels,
                             float mean, float std, bool norm, float unit) {
  constexpr int kHeld = 3;  // loads of the prediction that are on their way beside the clip's
  const int lane = threadIdx.x % kWarp, size = clip.size();
  Vec<T, N> held[kHeld];
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int i = (k * kWarp + lane) * N;
    if (i < size) held[k] = load<N>(pred + i);
  }
  const bool valid = id >= 0 && id < tokens;
  uint32_t total = 0, squares = 0;
  if (valid) {
    const int token = int(id), t = token / (clip.rows * clip.columns);
    stage_patch<true>(
        clip, b, token / clip.columns % clip.rows, token % clip.columns,
        [&](int u) { return int64_t(frames.at[t * clip.t_patch + u]); }, pixels,
        [&](uint32_t w) {
          total = __dp4a(w, 0x01010101u, total);
          squares = __dp4a(w, w, squares);
        });
  }
  __syncwarp();
  Affine to = target_affine(size, warp_sum(total), warp_sum(squares), mean, std, norm);
  if (!valid) to.shift = __int_as_float(0x7fffffff);
  float error = 0;
  const auto step = [&](const Vec<T, N>& p, int i) {
    const auto x = load<N>(pixels + i);
    Vec<T, N> s;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float d = widen(p.at[j]) - (float(x.at[j] * to.count - to.total) * to.scale + to.shift);
      error += d * d;
      s.at[j] = narrow<T>(d * unit);
    }
    if (saved) store(saved + i, s);
  };
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int i = (k * kWarp + lane) * N;
    if (i < size) step(held[k], i);
  }
  for (int i = (kHeld * kWarp + lane) * N; i < size; i += kWarp * N) step(load<N>(pred + i), i);
  return warp_sum(error);
}

// errors[block] = the sum over its patches of (pred - target)^2; saved [rows, P] or null. The error
// of an id that is no token is NaN, and nothing is read for it.
template <typename T, int N>
__global__ void __launch_bounds__(kWarps* kWarp, 6)
    masked_mse_fwd_kernel(Clip clip, TargetFrames frames, int64_t tokens, Ids ids, int64_t rows,
                          int64_t masked, const T* pred, int64_t pred_b, int64_t pred_m, float mean,
                          float std, bool norm, float unit, T* saved, float* errors) {
  __shared__ float of_warp[kWarps];
  const int warp = threadIdx.x / kWarp;
  const int64_t row = int64_t(blockIdx.x) * kWarps + warp;
  float error = 0;
  if (row < rows) {
    const int64_t b = row / masked, m = row % masked;
    error = patch_error<T, N>(clip, frames, tokens, b, ids.at(b, m), pred + b * pred_b + m * pred_m,
                              saved ? saved + row * clip.size() : nullptr,
                              dynamic_shared() + warp * clip.shared_bytes(), mean, std, norm, unit);
  }
  if (threadIdx.x % kWarp == 0) of_warp[warp] = error;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += of_warp[i];
    errors[blockIdx.x] = sum;
  }
}

// loss = sum of errors[n] / values, in a fixed order, by one block.
__global__ void __launch_bounds__(kSumThreads)
    masked_mse_sum_kernel(const float* errors, int64_t n, double values, float* loss) {
  __shared__ double of_warp[kSumThreads / kWarp];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kSumThreads) sum += errors[i];
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x / kWarp == 0) {
    sum = warp_sum(of_warp[threadIdx.x]);
    if (threadIdx.x == 0) *loss = float(sum / values);
  }
}

// saved is null where nobody needs it; errors has room for one float per kWarps patches.
template <typename T>
cudaError_t masked_mse_fwd(cudaStream_t stream, const Clip& clip, const TargetFrames& frames,
                           int64_t count, Ids ids, int64_t batch, int64_t masked, const T* pred,
                           int64_t pred_b, int64_t pred_m, double mean, double std, bool norm,
                           double unit, T* saved, float* errors, float* loss) {
  constexpr int kN = kWide<T>;
  const int64_t rows = batch * masked, tokens = count / clip.t_patch * clip.rows * clip.columns;
  const bool wide = aligned<kN>(pred, clip.size(), pred_b, pred_m) &&
                    aligned<kN>(saved, clip.size());
  const auto kernel = wide ? masked_mse_fwd_kernel<T, kN> : masked_mse_fwd_kernel<T, 1>;
  const unsigned grid = blocks(rows, kWarps);
  const cudaError_t error =
      launch(stream, kernel, grid, kWarps * kWarp, kWarps * clip.shared_bytes(), clip, frames,
             tokens, ids, rows, masked, pred, pred_b, pred_m, float(mean), float(std), norm,
             float(unit), saved, errors);
  if (error != cudaSuccess) return error;
  return launch(stream, masked_mse_sum_kernel, 1, kSumThreads, 0, errors, grid,
                double(rows) * clip.size(), loss);
}

// dpred = saved * *dloss * factor
template <typename T, int N>
__global__ void __launch_bounds__(256)
    masked_mse_bwd_kernel(const T* saved, int64_t n, const float* dloss, float factor, T* dpred) {
  const int64_t i = (int64_t(blockIdx.x) * 256 + threadIdx.x) * N;
  if (i >= n) return;
  const float scale = *dloss * factor;
  auto values = load<N>(saved + i);
#pragma unroll
  for (int j = 0; j < N; ++j) values.at[j] = narrow<T>(widen(values.at[j]) * scale);
  store(dpred + i, values);
}

template <typename T>
cudaError_t masked_mse_bwd(cudaStream_t stream, const T* saved, int64_t n, const float* dloss,
                           double factor, T* dpred) {
  constexpr int kN = kWide<T>;
  const bool wide = aligned<kN>(saved, n) && aligned<kN>(dpred, n);
  const auto kernel = wide ? masked_mse_bwd_kernel<T, kN> : masked_mse_bwd_kernel<T, 1>;
  return launch(stream, kernel, blocks(n, 256 * (wide ? kN : 1)), 256, 0, saved, n, dloss,
                float(factor), dpred);
}

}  // namespace mae_fast::cuda
