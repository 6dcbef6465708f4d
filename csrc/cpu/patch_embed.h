// What surrounds the product of a patch embedding: its positions, and its gradients but the weight's.
#pragma once

#include "patchify_gather.h"

MAE_FAST_BEGIN

// out [B, K, D] += pos[ids], in place.
inline void patch_embed_add_pos(Tensor& out, const Tensor& ids_, const Tensor& pos_) {
  check_cpu(out, "patch_embed: the product");
  check_cpu(pos_, "patch_embed: pos");
  TORCH_CHECK(out.is_contiguous() && out.dim() == 3 && pos_.dim() == 2 &&
                  out.size(2) == pos_.size(1) && ids_.sizes() == out.sizes().slice(0, 2),
              "patch_embed: product ", out.sizes(), ", ids ", ids_.sizes(), " and pos ",
              pos_.sizes(), " do not fit");
  const int64_t size = out.size(2);
  const Tensor ids = checked_ids(ids_, pos_.size(0), "patch_embed: ids");
  const Tensor pos = pos_.to(out.scalar_type()).contiguous();
  MAE_FAST_FLOATS(out.scalar_type(), "patch_embed", [&] {
    const int64_t* id = ids.const_data_ptr<int64_t>();
    const scalar_t* pp = pos.const_data_ptr<scalar_t>();
    scalar_t* op = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, ids.numel(), 16, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        each<scalar_t>(size, [&](int64_t i, auto count) {
          store(op + n * size + i,
                load(op + n * size + i, count) + load(pp + id[n] * size + i, count), count);
        });
    });
  });
}

// dout [N, D] -> its columns as rows [D, N], for the product that follows, and their sums [D].
// The sums are taken in steps of 256 rows: one long sum in fp32 would lose digits.
template <typename T, typename Out>
void transpose_and_sum(const T* dout, int64_t rows, int64_t size, Out* columns, acc_t<T>* sums) {
  using A = acc_t<T>;
  constexpr int64_t V = Vec<T>::size(), STEP = 256;
  at::parallel_for(0, (size + V - 1) / V, 1, [&](int64_t begin, int64_t end) {
    A lane[V];
    for (int64_t i = begin * V; i < std::min(end * V, size); i += V) {
      const int64_t n = std::min(V, size - i);
      Vec<T> total(A(0));
      for (int64_t first = 0; first < rows; first += STEP) {
        Vec<T> part(A(0));
        for (int64_t r = first; r < std::min(first + STEP, rows); ++r) {
          const auto x = load(dout + r * size + i, n);
          part = part + x;
          x.store(lane);
          for (int64_t j = 0; j < n; ++j) columns[(i + j) * rows + r] = static_cast<Out>(lane[j]);
        }
        total = total + part;
      }
      total.store(sums + i, n);
    }
  });
}

// dpos[l] = sum of the rows of dout [N, D] whose id is l, one after the other: no atomics, and the
// same bits for any number of threads.
template <typename T, typename Out>
void sum_by_id(const T* dout, const int64_t* ids, int64_t rows, int64_t size, int64_t length,
               Out* dpos) {
  using A = acc_t<T>;
  std::vector<int64_t> first(length + 1), order(rows);  // counting sort
  for (int64_t n = 0; n < rows; ++n) ++first[ids[n] + 1];
  for (int64_t l = 0; l < length; ++l) first[l + 1] += first[l];
  auto next = first;
  for (int64_t n = 0; n < rows; ++n) order[next[ids[n]]++] = n;
  at::parallel_for(0, length, 16, [&](int64_t begin, int64_t end) {
    A lane[Vec<T>::size()];
    for (int64_t l = begin; l < end; ++l)
      each<T>(size, [&](int64_t i, auto n) {
        Vec<T> total(A(0));
        for (int64_t k = first[l]; k < first[l + 1]; ++k)
          total = total + load(dout + order[k] * size + i, n);
        total.store(lane);
        for (int64_t j = 0; j < n; ++j) dpos[l * size + i + j] = static_cast<Out>(lane[j]);
      });
  });
}

// dout [B, K, D] -> (dout as [D, B*K] of `dtype`, dbias [D] of `dtype`, dpos [length, D]).
inline std::tuple<Tensor, Tensor, Tensor> patch_embed_grads(
    const Tensor& dout_, const Tensor& ids_, int64_t length, at::ScalarType dtype,
    at::ScalarType pos_dtype, bool needs_pos) {
  check_cpu(dout_, "patch_embed: the gradient");
  TORCH_CHECK(dout_.dim() == 3 && ids_.sizes() == dout_.sizes().slice(0, 2),
              "patch_embed: gradient ", dout_.sizes(), " for ids ", ids_.sizes());
  const Tensor dout = dout_.contiguous();
  const Tensor ids = checked_ids(ids_, length, "patch_embed: ids");
  const int64_t rows = ids.numel(), size = dout.size(2);
  const auto acc = at::toOpMathType(dout.scalar_type());
  const Tensor columns = at::empty({size, rows}, dout.options().dtype(dtype));
  const Tensor sums = at::empty({size}, dout.options().dtype(acc));
  const Tensor dpos = at::empty({needs_pos ? length : 0, size}, dout.options().dtype(pos_dtype));
  MAE_FAST_FLOATS(dout.scalar_type(), "patch_embed", [&] {
    using T = scalar_t;
    const T* dp = dout.const_data_ptr<T>();
    MAE_FAST_FLOATS(dtype, "patch_embed", [&] {
      transpose_and_sum(dp, rows, size, columns.mutable_data_ptr<scalar_t>(),
                        sums.mutable_data_ptr<acc_t<T>>());
    });
    if (needs_pos)
      MAE_FAST_FLOATS(pos_dtype, "patch_embed", [&] {
        sum_by_id(dp, ids.const_data_ptr<int64_t>(), rows, size, length,
                  dpos.mutable_data_ptr<scalar_t>());
      });
  });
  return {columns, sums.to(dtype), dpos};
}

MAE_FAST_END
