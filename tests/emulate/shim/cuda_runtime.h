// As much of CUDA as csrc/cuda uses, on a CPU: g++ compiles the very same sources with this folder
// before all others. Every CUDA thread is a fibre, all of them on one system thread, so that a run
// repeats exactly. A fibre runs until it waits: for its block, or for its warp. ThreadSanitizer is
// told that fibres are threads and that only barriers order them, so a barrier that is missing is a
// data race whatever the order in which the fibres happened to run; a shuffle, as on a GPU, orders
// no memory. AddressSanitizer sees every access outside an allocation.
//
// Stricter than a GPU: all threads must reach every barrier, and all lanes every shuffle.
// Not seen: races between blocks, which run one after the other (tests run them in both orders).
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define SHIM_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#else
#define SHIM_UNSEEN
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

#define __host__
#define __device__
#define __global__
// One system thread runs a block, so what is local to it is shared by the block.
#define __shared__ thread_local
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using std::max, std::min;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration = 9 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace shim {

constexpr unsigned kLanes = 32, kThreads = 1024;
constexpr size_t kStackBytes = 1 << 16, kSharedBytes = 48 << 10;

inline bool backwards = false;  // the last block and the last thread first
inline void* dynamic_shared = nullptr;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated kernel: %s\n", what);
  std::_Exit(3);
}

// Marks what happened before a release of `where` as ordered before what follows its acquire.
inline void release([[maybe_unused]] void* where) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(where);
#endif
}
inline void acquire([[maybe_unused]] void* where) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(where);
#endif
}

struct Barrier {
  unsigned expected = 0, arrived = 0, generation = 0;
  char order[2];  // one address for even and one for odd generations
};

struct Warp {
  Barrier barrier, exchange;
  uint64_t slot[2][kLanes];  // for even and for odd shuffles: nobody waits for the readers
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* seen_by_tsan = nullptr;
  bool done = false;
};

struct Block {  // plain arrays: what SHIM_UNSEEN functions call would be seen
  Fiber fibers[kThreads];
  Warp warps[kThreads / kLanes];
  unsigned threads = 0;
  Barrier barrier;
  ucontext_t scheduler;
  void* scheduler_seen_by_tsan = nullptr;
  std::function<void()> body;
  unsigned current = 0, progress = 0;
  char begin, end;
};
inline Block block;

SHIM_UNSEEN inline void switch_context(ucontext_t* from, ucontext_t* to,
                                       [[maybe_unused]] void* seen_by_tsan) {
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(seen_by_tsan, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(from, to);
}

SHIM_UNSEEN inline void yield() {
  switch_context(&block.fibers[block.current].context, &block.scheduler,
                 block.scheduler_seen_by_tsan);
}

SHIM_UNSEEN inline unsigned arrive(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  ++block.progress;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) yield();
  return generation;
}

inline void wait_ordered(Barrier& barrier, unsigned parity) {
  release(&barrier.order[parity]);
  arrive(barrier);
  acquire(&barrier.order[parity]);
}

SHIM_UNSEEN inline unsigned parity(const Barrier& barrier) { return barrier.generation % 2; }

SHIM_UNSEEN inline Warp& warp() { return block.warps[block.current / kLanes]; }

SHIM_UNSEEN inline uint64_t exchange(unsigned mask, uint64_t bits, unsigned lane_mask) {
  if (mask != 0xffffffffu) fail("a shuffle of some lanes only");
  if (block.threads % kLanes) fail("a shuffle in a block that is not of whole warps");
  Warp& w = warp();
  const unsigned lane = block.current % kLanes;
  w.slot[parity(w.exchange)][lane] = bits;
  return w.slot[arrive(w.exchange) % 2][lane ^ lane_mask];
}

inline void run_fiber() {
  acquire(&block.begin);
  block.body();
  release(&block.end);
}

SHIM_UNSEEN inline void enter_fiber() {
  run_fiber();
  ++block.progress;
  block.fibers[block.current].done = true;
  yield();
}

// Runs every fibre in turn until all are done.
SHIM_UNSEEN inline void run_fibers() {
  const unsigned threads = block.threads;
  for (unsigned left = threads; left > 0;) {
    const unsigned before = block.progress;
    left = 0;
    for (unsigned n = 0; n < threads; ++n) {
      const unsigned i = backwards ? threads - 1 - n : n;
      Fiber& fiber = block.fibers[i];
      if (fiber.done) continue;
      block.current = i;
      threadIdx = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
      switch_context(&block.scheduler, &fiber.context, fiber.seen_by_tsan);
      left += !fiber.done;
    }
    if (left && before == block.progress) fail("a barrier that not every thread reaches");
  }
}

inline void prepare(Fiber& fiber) {
  fiber.done = false;
  if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
#if defined(__SANITIZE_THREAD__)
  if (!fiber.seen_by_tsan) fiber.seen_by_tsan = __tsan_create_fiber(0);
#endif
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.context, enter_fiber, 0);
}

inline void run_block(unsigned threads, size_t shared_bytes) {
  block.threads = threads;
  block.barrier = Barrier();
  block.barrier.expected = threads;
  for (unsigned i = 0; i < threads; ++i) {
    Warp& warp = block.warps[i / kLanes];
    if (i % kLanes == 0) {
      warp.barrier = warp.exchange = Barrier();
      warp.barrier.expected = warp.exchange.expected = std::min(kLanes, threads - i);
    }
    prepare(block.fibers[i]);
  }
#if defined(__SANITIZE_THREAD__)
  block.scheduler_seen_by_tsan = __tsan_get_current_fiber();
#endif
  if (shared_bytes) {  // nothing that an earlier block left
    ASAN_UNPOISON_MEMORY_REGION(dynamic_shared, kSharedBytes);
    std::memset(dynamic_shared, 0xff, kSharedBytes);
    char* end = static_cast<char*>(dynamic_shared) + shared_bytes;
    ASAN_POISON_MEMORY_REGION(end, kSharedBytes - shared_bytes);
  }
  release(&block.begin);
  run_fibers();
  acquire(&block.end);
}

template <typename T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// *at = better(*at, value) as one step that orders nothing else.
template <typename F>
int atomic_update(int* at, int value, F better) {
  int old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(at, &old, better(old, value), false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  return old;
}

}  // namespace shim

inline void __syncthreads() {
  shim::wait_ordered(shim::block.barrier, shim::parity(shim::block.barrier));
}
inline void __syncwarp() {
  shim::wait_ordered(shim::warp().barrier, shim::parity(shim::warp().barrier));
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return shim::from_bits<T>(shim::exchange(mask, shim::to_bits(value), unsigned(lane_mask)));
}

inline int atomicMin(int* at, int value) {
  return shim::atomic_update(at, value, [](int a, int b) { return std::min(a, b); });
}
inline int atomicMax(int* at, int value) {
  return shim::atomic_update(at, value, [](int a, int b) { return std::max(a, b); });
}

inline float __fmul_rn(float a, float b) { return a * b; }  // -ffp-contract=off
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __int_as_float(int bits) { return shim::from_bits<float>(unsigned(bits)); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned sum) {
  for (int shift = 0; shift < 32; shift += 8) sum += (a >> shift & 255) * (b >> shift & 255);
  return sum;
}

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                               A&&... args) {
  const dim3 grid = config->gridDim, threads = config->blockDim;
  const uint64_t count = uint64_t(grid.x) * grid.y * grid.z;
  const unsigned per_block = threads.x * threads.y * threads.z;
  if (!count || !per_block || per_block > shim::kThreads ||
      config->dynamicSmemBytes > shim::kSharedBytes) {
    return cudaErrorInvalidConfiguration;
  }
  gridDim = grid, blockDim = threads;
  shim::block.body = [=] { kernel(P(args)...); };
  for (uint64_t n = 0; n < count; ++n) {
    const uint64_t i = shim::backwards ? count - 1 - n : n;
    blockIdx = dim3(unsigned(i % grid.x), unsigned(i / grid.x % grid.y),
                    unsigned(i / grid.x / grid.y));
    shim::run_block(per_block, config->dynamicSmemBytes);
  }
  return cudaSuccess;
}
