// run CASE OUTPUTS: one op of csrc/cuda, on tensors read from a file; conftest.py writes it. g++
// compiles this with shim/ in place of CUDA and it runs on a CPU; nvcc compiles it as it is, and it
// runs on a GPU. It runs twice, the emulated threads and blocks the second time in reverse order:
// different bits are an error.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "decoder_tokens.cuh"
#include "masked_mse.cuh"
#include "patchify_gather.cuh"

using namespace mae_fast::cuda;

#ifndef __CUDACC__
#include <memory>
namespace mae_fast::cuda {
thread_local uint4 shared[shim::kSharedBytes / sizeof(uint4)];
}
#endif

namespace {

void check(bool right, const char* what) {
  if (!right) throw std::runtime_error(what);
}

// Memory that kernels may touch, and not a byte more.
char* allocate(size_t bytes) {
#ifdef __CUDACC__
  void* memory = nullptr;
  check(cudaMallocManaged(&memory, bytes ? bytes : 1) == cudaSuccess, "cudaMallocManaged");
#else
  void* memory = std::malloc(bytes);
#endif
  std::memset(memory, 0xff, bytes);  // NaN of every type
  return static_cast<char*>(memory);
}

enum Dtype : int64_t { kUint8, kInt32, kInt64, kFloat, kBfloat16, kHalf };

struct Tensor {
  char* data;
  Dtype dtype;
  int64_t dim, size[5], stride[5];  // strides in elements

  Ids ids() const { return {data, {stride[0], stride[1]}, dtype == kInt64}; }
  template <typename T>
  const T* as() const {
    return reinterpret_cast<const T*>(data);
  }
};

struct Case {
  std::FILE* file;
  std::vector<Tensor> tensors;
  std::vector<double> scalars;
  std::vector<std::pair<char*, size_t>> outputs;

  template <typename T>
  T read() {
    T value;
    check(std::fread(&value, sizeof value, 1, file) == 1, "the case ends early");
    return value;
  }

  void read_all() {
    tensors.resize(size_t(read<int64_t>()));
    for (Tensor& t : tensors) {
      t.dtype = read<Dtype>();
      t.dim = read<int64_t>();
      for (int64_t& n : t.size) n = read<int64_t>();
      for (int64_t& n : t.stride) n = read<int64_t>();
      const int64_t offset = read<int64_t>(), bytes = read<int64_t>();
      char* memory = allocate(size_t(bytes));
      check(std::fread(memory, 1, size_t(bytes), file) == size_t(bytes), "the case ends early");
      t.data = memory + offset;
    }
    scalars.resize(size_t(read<int64_t>()));
    for (double& x : scalars) x = read<double>();
  }

  template <typename T>
  T* output(int64_t count) {
    outputs.emplace_back(allocate(size_t(count) * sizeof(T)), size_t(count) * sizeof(T));
    return reinterpret_cast<T*>(outputs.back().first);
  }
};

// f of a null T* for the type of dtype.
template <typename F>
cudaError_t with_float(int64_t dtype, const F& f) {
  if (dtype == kBfloat16) return f(static_cast<__nv_bfloat16*>(nullptr));
  if (dtype == kHalf) return f(static_cast<__half*>(nullptr));
  check(dtype == kFloat, "not a floating type");
  return f(static_cast<float*>(nullptr));
}

template <typename P>
using Of = std::remove_pointer_t<P>;

// video, ids; t_patch, patch, mean, std, dtype
cudaError_t run_patchify_gather_fwd(Case& c) {
  const Tensor &video = c.tensors[0], &ids = c.tensors[1];
  const auto& s = c.scalars;
  const Clip clip(video.as<uint8_t>(), video.size, video.stride, int64_t(s[0]), int64_t(s[1]));
  return with_float(int64_t(s[4]), [&](auto* type) {
    using T = Of<decltype(type)>;
    T* out = c.output<T>(ids.size[0] * ids.size[1] * clip.size());
    return patchify_gather_fwd<T>(nullptr, clip, video.size[2], ids.ids(), ids.size[0], ids.size[1],
                                  s[2], s[3], out);
  });
}

// pred, video, ids; t_patch, patch, mean, std, norm, unit, need_grad, frames...
cudaError_t run_masked_mse_fwd(Case& c) {
  const Tensor &pred = c.tensors[0], &video = c.tensors[1], &ids = c.tensors[2];
  const auto& s = c.scalars;
  const Clip clip(video.as<uint8_t>(), video.size, video.stride, int64_t(s[0]), int64_t(s[1]));
  TargetFrames frames{};
  const int64_t count = int64_t(s.size()) - 7, rows = ids.size[0] * ids.size[1];
  for (int64_t i = 0; i < count; ++i) frames.at[i] = int32_t(s[size_t(7 + i)]);
  return with_float(pred.dtype, [&](auto* type) {
    using T = Of<decltype(type)>;
    float* loss = c.output<float>(1);
    T* saved = s[6] != 0 ? c.output<T>(rows * clip.size()) : nullptr;
    float* errors = reinterpret_cast<float*>(allocate(size_t(blocks(rows, kWarps)) * 4));
    return masked_mse_fwd<T>(nullptr, clip, frames, count, ids.ids(), ids.size[0], ids.size[1],
                             pred.as<T>(), pred.stride[0], pred.stride[1], s[2], s[3], s[4] != 0,
                             s[5], saved, errors, loss);
  });
}

// saved, dloss; factor
cudaError_t run_masked_mse_bwd(Case& c) {
  const Tensor& saved = c.tensors[0];
  int64_t count = 1;
  for (int i = 0; i < saved.dim; ++i) count *= saved.size[i];
  return with_float(saved.dtype, [&](auto* type) {
    using T = Of<decltype(type)>;
    return masked_mse_bwd<T>(nullptr, saved.as<T>(), count, c.tensors[1].as<float>(), c.scalars[0],
                             c.output<T>(count));
  });
}

// visible, mask_token, pos, ids_keep, ids_mask [, cls]
cudaError_t run_decoder_tokens_fwd(Case& c) {
  const Tensor &visible = c.tensors[0], &mask_token = c.tensors[1], &pos = c.tensors[2],
               &keep = c.tensors[3], &mask = c.tensors[4];
  const Tensor* cls = c.tensors.size() > 5 ? &c.tensors[5] : nullptr;
  return with_float(visible.dtype, [&](auto* v) {
    return with_float(pos.dtype, [&](auto* w) {
      using V = Of<decltype(v)>;
      using W = Of<decltype(w)>;
      using O = Promoted<V, W>;
      const DecoderTokens<V, W> in{visible.as<V>(),
                                   cls ? cls->as<O>() : nullptr,
                                   mask_token.as<W>(),
                                   pos.as<W>(),
                                   visible.stride[0],
                                   visible.stride[1],
                                   cls ? cls->stride[0] : 0,
                                   keep.ids(),
                                   mask.ids(),
                                   visible.size[0],
                                   visible.size[1],
                                   mask.size[1],
                                   pos.size[0],
                                   int(visible.size[2])};
      const int64_t all = (cls ? 1 : 0) + in.kept + in.masked;
      return decoder_tokens_fwd<V, W>(nullptr, in, c.output<O>(in.batch * all * in.width));
    });
  });
}

// dout, ids_keep, ids_mask; length
cudaError_t run_decoder_tokens_bwd(Case& c) {
  const Tensor &dout = c.tensors[0], &keep = c.tensors[1], &mask = c.tensors[2];
  const int64_t length = int64_t(c.scalars[0]), batch = dout.size[0], width = dout.size[2];
  return with_float(dout.dtype, [&](auto* type) {
    using T = Of<decltype(type)>;
    float* dmask_token = c.output<float>(width);
    float* dpos = c.output<float>(length * width);
    char* span = allocate(size_t(2 * batch * length) * 4);
    char* parts = allocate(size_t(blocks(length, kPositions) * width) * 4);
    const DecoderTokensGrad<T> in{dout.as<T>(), keep.ids(), mask.ids(), batch, dout.size[1],
                                  keep.size[1], mask.size[1], length, int(width),
                                  reinterpret_cast<int32_t*>(span),
                                  reinterpret_cast<float*>(parts), dmask_token, dpos};
    return decoder_tokens_bwd<T>(nullptr, in);
  });
}

cudaError_t run(const std::string& op, Case& c) {
  if (op == "patchify_gather_fwd") return run_patchify_gather_fwd(c);
  if (op == "masked_mse_fwd") return run_masked_mse_fwd(c);
  if (op == "masked_mse_bwd") return run_masked_mse_bwd(c);
  if (op == "decoder_tokens_fwd") return run_decoder_tokens_fwd(c);
  if (op == "decoder_tokens_bwd") return run_decoder_tokens_bwd(c);
  throw std::runtime_error("unknown op " + op);
}

void run_checked(const std::string& op, Case& c, bool backwards) {
#ifdef __CUDACC__
  check(run(op, c) == cudaSuccess, "a launch failed");
  check(cudaDeviceSynchronize() == cudaSuccess, "a kernel failed");
  (void)backwards;
#else
  shim::dynamic_shared = shared;
  shim::backwards = backwards;
  check(run(op, c) == cudaSuccess, "a launch failed");
#endif
}

}  // namespace

int main(int argc, char** argv) try {
  check(argc == 4, "usage: run OP CASE OUTPUTS");
  Case c{std::fopen(argv[2], "rb"), {}, {}, {}};
  check(c.file, "no such case");
  c.read_all();
  run_checked(argv[1], c, false);
  const auto outputs = std::move(c.outputs);
  c.outputs.clear();
  run_checked(argv[1], c, true);
  std::FILE* out = std::fopen(argv[3], "wb");
  check(out, "cannot write");
  for (size_t i = 0; i < outputs.size(); ++i) {
    const auto [data, bytes] = outputs[i];
    check(!std::memcmp(data, c.outputs[i].first, bytes), "the second run gave other bits");
    check(std::fwrite(data, 1, bytes, out) == bytes, "cannot write");
  }
  std::fclose(out);
  std::fflush(nullptr);
  return 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "run: %s\n", e.what());
  return 2;
}
