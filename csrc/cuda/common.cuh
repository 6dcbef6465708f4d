// What the CUDA kernels share. No torch in any .cuh: nvcc compiles them alone, and tests/emulate
// runs them on a CPU. A launcher takes plain pointers, starts its kernels on a stream and returns
// the first error; it allocates nothing and waits for nothing, so CUDA graphs can capture it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace mae_fast::cuda {

constexpr int kWarp = 32;
constexpr int kWarps = 4;  // of a block in which every warp works by itself
constexpr unsigned kEveryLane = 0xffffffffu;

// N values, loaded and stored at once, 16 bytes an access.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec {
  T at[N];
};

template <int N, typename T>
__device__ Vec<T, N> load(const T* from) {
  return *reinterpret_cast<const Vec<T, N>*>(from);
}

template <typename T, int N>
__device__ void store(T* to, const Vec<T, N>& values) {
  *reinterpret_cast<Vec<T, N>*>(to) = values;
}

// How many T make 16 bytes.
template <typename T>
constexpr int kWide = 16 / int(sizeof(T));

// Whether rows of `size` values at `data`, `strides` values apart, can be read N at a time.
template <int N, typename T, typename... S>
bool aligned(const T* data, int64_t size, S... strides) {
  return reinterpret_cast<uintptr_t>(data) % (N * sizeof(T)) == 0 &&
         ((size % N == 0) && ... && (strides % N == 0));
}

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <typename T>
__device__ T narrow(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  else return x;
}

// The sum over a warp, in a fixed order: every lane gets the same bits.
template <typename T>
__device__ T warp_sum(T x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kEveryLane, x, step);
  return x;
}

// Token numbers [B, n], int32 or (wide) int64.
struct Ids {
  const void* data;
  int64_t stride[2];
  bool wide;

  __device__ int64_t at(int64_t b, int64_t i) const {
    const int64_t n = b * stride[0] + i * stride[1];
    return wide ? static_cast<const int64_t*>(data)[n] : static_cast<const int32_t*>(data)[n];
  }
};

__device__ inline uint8_t* dynamic_shared() {
  extern __shared__ uint4 shared[];
  return reinterpret_cast<uint8_t*>(shared);
}

// Starts `kernel`, unless there is nothing to do.
template <typename... P, typename... A>
cudaError_t launch(cudaStream_t stream, void (*kernel)(P...), dim3 grid, int threads,
                   int64_t shared_bytes, const A&... args) {
  if (grid.x == 0 || grid.y == 0) return cudaSuccess;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

inline unsigned blocks(int64_t work, int64_t each) { return unsigned((work + each - 1) / each); }

}  // namespace mae_fast::cuda
