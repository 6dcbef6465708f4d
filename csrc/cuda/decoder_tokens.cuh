// The decoder's input [cls | visible + position | mask token + position], one warp a row, and its
// backward, which finds each position's rows through a table and sums them over clips in order.
#pragma once

#include "common.cuh"

namespace mae_fast::cuda {

constexpr int kPositions = 8;  // of a block of the backward: one a warp
constexpr int kAhead = 4;      // clips whose rows are on their way at once
constexpr int kTableThreads = 256;

template <typename V, typename W>
using Promoted = std::conditional_t<std::is_same_v<V, W>, V, float>;

// Shapes: visible [B, K, E], cls [B, E] or null, mask_token [E], pos [L, E], out [B, S, E].
template <typename V, typename W>
struct DecoderTokens {
  const V* visible;
  const Promoted<V, W>* cls;
  const W *mask_token, *pos;
  int64_t visible_b, visible_k, cls_b;  // strides
  Ids keep, mask;
  int64_t batch, kept, masked, length;
  int width;
};

// A row whose id is no position is NaN, and nothing is read for it.
template <typename V, typename W, int N>
__global__ void __launch_bounds__(kWarps* kWarp)
    decoder_tokens_fwd_kernel(DecoderTokens<V, W> in, Promoted<V, W>* out) {
  using O = Promoted<V, W>;
  const int64_t first = in.cls ? 1 : 0, all = first + in.kept + in.masked;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= in.batch * all) return;
  const int64_t b = row / all, i = row % all - first;
  const bool keep = i >= 0 && i < in.kept;
  int64_t id = 0;
  if (i >= 0) id = keep ? in.keep.at(b, i) : in.mask.at(b, i - in.kept);
  const bool valid = id >= 0 && id < in.length;
  for (int e = threadIdx.x % kWarp * N; e < in.width; e += kWarp * N) {
    Vec<O, N> y;
    float sum[N] = {};
    const auto add = [&](const auto* values) {
      const auto x = load<N>(values + e);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] += widen(x.at[j]);
    };
    if (i < 0) add(in.cls + b * in.cls_b);
    else if (keep) add(in.visible + b * in.visible_b + i * in.visible_k);
    else add(in.mask_token);
    if (i >= 0 && valid) add(in.pos + id * in.width);
#pragma unroll
    for (int j = 0; j < N; ++j) y.at[j] = narrow<O>(valid ? sum[j] : __int_as_float(0x7fffffff));
    store(out + row * in.width + e, y);
  }
}

template <typename V, typename W>
cudaError_t decoder_tokens_fwd(cudaStream_t stream, const DecoderTokens<V, W>& in,
                               Promoted<V, W>* out) {
  constexpr int kN = kWide<Promoted<V, W>>;
  const bool wide = aligned<kN>(in.visible, in.width, in.visible_b, in.visible_k) &&
                    aligned<kN>(in.cls, in.width, in.cls_b) &&
                    aligned<kN>(in.mask_token, in.width) && aligned<kN>(in.pos, in.width) &&
                    aligned<kN>(out, in.width);
  const auto kernel =
      wide ? decoder_tokens_fwd_kernel<V, W, kN> : decoder_tokens_fwd_kernel<V, W, 1>;
  const int64_t rows = in.batch * ((in.cls ? 1 : 0) + in.kept + in.masked);
  return launch(stream, kernel, blocks(rows, kWarps), kWarps * kWarp, 0, in, out);
}

// Shapes: dout [B, S, E] contiguous; span [2, B, L] and parts [blocks(L, kPositions), E] are
// scratch; dmask_token [E], dpos [L, E].
template <typename T>
struct DecoderTokensGrad {
  const T* dout;
  Ids keep, mask;
  int64_t batch, all, kept, masked, length;
  int width;
  int32_t* span;
  float *parts, *dmask_token, *dpos;

  __device__ int64_t id(int64_t b, int i) const {
    return i < kept ? keep.at(b, i) : mask.at(b, i - kept);
  }
};

// span[0 | 1, b, l] = the first and the last i in clip b whose id is l. One block a clip. Integer
// atomics: the answer does not depend on their order.
template <typename T>
__global__ void __launch_bounds__(kTableThreads)
    decoder_tokens_table_kernel(DecoderTokensGrad<T> in) {
  const int64_t b = blockIdx.x;
  int32_t* first = in.span + b * in.length;
  int32_t* last = first + in.batch * in.length;
  for (int64_t l = threadIdx.x; l < in.length; l += kTableThreads) {
    first[l] = INT32_MAX;
    last[l] = -1;
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < in.kept + in.masked; i += kTableThreads) {
    const int64_t id = in.id(b, i);
    if (id < 0 || id >= in.length) continue;
    atomicMin(first + id, i);
    atomicMax(last + id, i);
  }
}

// dpos, and parts[block] = the sum over the block's positions of what their mask tokens get.
template <typename T, int N>
__global__ void __launch_bounds__(kPositions* kWarp, 2)
    decoder_tokens_bwd_kernel(DecoderTokensGrad<T> in) {
  __shared__ float of_warp[kPositions][kWarp * N];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t l = int64_t(blockIdx.x) * kPositions + warp;
  const int column = (int(blockIdx.y) * kWarp + lane) * N;
  float sum[N] = {}, masked[N] = {};
  if (l < in.length && column < in.width) {
    const T* rows = in.dout + (in.all - in.kept - in.masked) * in.width + column;
    const auto add = [&](const Vec<T, N>& x, int i) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        sum[j] += widen(x.at[j]);
        masked[j] += i < in.kept ? 0 : widen(x.at[j]);
      }
    };
    for (int64_t b = 0; b < in.batch; b += kAhead) {
      int first[kAhead], last[kAhead];
      Vec<T, N> x[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        last[k] = -1;
        if (b + k < in.batch) {
          const int32_t* at = in.span + (b + k) * in.length + l;
          first[k] = at[0];
          last[k] = at[in.batch * in.length];
        }
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (last[k] >= 0) x[k] = load<N>(rows + ((b + k) * in.all + first[k]) * in.width);
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (last[k] < 0) continue;
        add(x[k], first[k]);
        // A position that a clip holds more than once: rare, and found by looking.
        for (int i = first[k] + 1; i <= last[k]; ++i) {
          if (in.id(b + k, i) == l) add(load<N>(rows + ((b + k) * in.all + i) * in.width), i);
        }
      }
    }
    Vec<float, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) out.at[j] = sum[j];
    store(in.dpos + l * in.width + column, out);
  }
#pragma unroll
  for (int j = 0; j < N; ++j) of_warp[warp][lane * N + j] = masked[j];
  __syncthreads();
  const int64_t e = int64_t(blockIdx.y) * kWarp * N + threadIdx.x;
  if (threadIdx.x < kWarp * N && e < in.width) {
    float total = 0;
    for (int i = 0; i < kPositions; ++i) total += of_warp[i][threadIdx.x];
    in.parts[blockIdx.x * int64_t(in.width) + e] = total;
  }
}

// out [columns] = the sum of parts [n, columns] over n, in a fixed order.
__global__ void __launch_bounds__(kPositions* kWarp)
    decoder_tokens_sum_kernel(const float* parts, int64_t n, int columns, float* out) {
  __shared__ float of_warp[kPositions][kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int column = int(blockIdx.x) * kWarp + lane;
  float sum = 0;
  if (column < columns) {
    for (int64_t i = warp; i < n; i += kPositions) sum += parts[i * columns + column];
  }
  of_warp[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && column < columns) {
    float total = 0;
    for (int i = 0; i < kPositions; ++i) total += of_warp[i][lane];
    out[column] = total;
  }
}

template <typename T>
cudaError_t decoder_tokens_bwd(cudaStream_t stream, const DecoderTokensGrad<T>& in) {
  constexpr int kN = kWide<T>;
  const bool wide = aligned<kN>(in.dout, in.width) && aligned<kWide<float>>(in.dpos, in.width);
  const auto kernel = wide ? decoder_tokens_bwd_kernel<T, kN> : decoder_tokens_bwd_kernel<T, 1>;
  const unsigned parts = blocks(in.length, kPositions);
  cudaError_t error = launch(stream, decoder_tokens_table_kernel<T>, unsigned(in.batch),
                             kTableThreads, 0, in);
  if (error != cudaSuccess) return error;
  error = launch(stream, kernel, dim3(parts, blocks(in.width, kWarp * (wide ? kN : 1))),
                 kPositions * kWarp, 0, in);
  if (error != cudaSuccess) return error;
  return launch(stream, decoder_tokens_sum_kernel, blocks(in.width, kWarp), kPositions * kWarp, 0,
                in.parts, parts, in.width, in.dmask_token);
}

}  // namespace mae_fast::cuda
