// What attention's kernels on the CPU share: where a head lies, and the memory of a task.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <array>
#include <utility>

namespace mae_fast {
inline namespace CPU_CAPABILITY {

// The memory of a task and its parts, each zero (vectors read past the tails) and on a cache line
template <typename T, typename... N>
std::pair<c10::DataPtr, std::array<T*, sizeof...(N)>> scratch(N... values) {
  const auto aligned = [](int64_t n) { return at::divup(n * sizeof(T), 64) * 64; };
  const int64_t bytes = (aligned(values) + ...);
  c10::DataPtr memory = c10::GetCPUAllocator()->allocate(bytes);
  char* next = static_cast<char*>(memory.get());
  std::fill(next, next + bytes, 0);
  const std::array<T*, sizeof...(N)> parts = {
      reinterpret_cast<T*>(std::exchange(next, next + aligned(values)))...};
  return {std::move(memory), parts};
}

// One head of a [B, S, H, d] tensor whose last stride is 1.
template <typename S>
struct Head {
  S* data;
  int64_t row;
  Head(const at::Tensor& t, int64_t b, int64_t h)
      : data(static_cast<S*>(t.data_ptr()) + b * t.stride(0) + h * t.stride(2)),
        row(t.stride(1)) {}
  S* at(int64_t s) const {
    return data + s * row;
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace mae_fast
