// The patches of just the wanted tokens, normalised: one warp a patch.
#pragma once

#include "patch.cuh"

namespace mae_fast::cuda {

// a / b as IEEE rounds it, from the rounded 1 / b: a product, and its error added (Markstein).
__device__ inline float divide(float a, float b, float reciprocal) {
  const float q = __fmul_rn(a, reciprocal);
  return __fmaf_rn(__fmaf_rn(-q, b, a), reciprocal, q);
}

// out [rows, C*u*p*p], row n being the patch of token ids[n / kept, n % kept] as T((x / 255 - mean)
// / std). The row of an id that is no token is NaN, and nothing is read for it.
template <typename T, int N>
__global__ void __launch_bounds__(kWarps* kWarp)
    patchify_gather_kernel(Clip clip, int64_t tokens, Ids ids, int64_t rows, int64_t kept,
                           float mean, float std, float inverse_std, T* out) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, size = clip.size();
  const int64_t row = int64_t(blockIdx.x) * kWarps + warp;
  if (row >= rows) return;
  uint8_t* pixels = dynamic_shared() + warp * clip.shared_bytes();
  const int64_t b = row / kept, id = ids.at(b, row % kept);
  const bool valid = id >= 0 && id < tokens;
  if (valid) {
    const int token = int(id), t = token / (clip.rows * clip.columns);
    stage_patch<false>(
        clip, b, token / clip.columns % clip.rows, token % clip.columns,
        [&](int u) { return int64_t(t) * clip.t_patch + u; }, pixels, [](uint32_t) {});
  }
  __syncwarp();
  for (int i = lane * N; i < size; i += kWarp * N) {
    const auto x = load<N>(pixels + i);
    Vec<T, N> y;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float unit = divide(float(x.at[j]), 255.f, 1.f / 255.f);
      const float z = divide(__fsub_rn(unit, mean), std, inverse_std);
      y.at[j] = narrow<T>(valid ? z : __int_as_float(0x7fffffff));
    }
    store(out + row * size + i, y);
  }
}

template <typename T>
cudaError_t patchify_gather_fwd(cudaStream_t stream, const Clip& clip, int64_t frames, Ids ids,
                                int64_t batch, int64_t kept, double mean, double std, T* out) {
  const int64_t rows = batch * kept, tokens = frames / clip.t_patch * clip.rows * clip.columns;
  const auto kernel = aligned<kWide<T>>(out, clip.size()) ? patchify_gather_kernel<T, kWide<T>>
                                                          : patchify_gather_kernel<T, 1>;
  return launch(stream, kernel, blocks(rows, kWarps), kWarps * kWarp,
                kWarps * clip.shared_bytes(), clip, tokens, ids, rows, kept, float(mean),
                float(std), 1 / float(std), out);
}

}  // namespace mae_fast::cuda
