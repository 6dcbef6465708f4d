// 2^x and 1 / x of float vectors, as precise as what is stored of them.
#pragma once

#include <ATen/cpu/vec/vec.h>

namespace mae_fast {
inline namespace CPU_CAPABILITY {

// 2^x, exactly 1 at 0, 0 for -inf. Relative error 3e-6, or 2e-7 where PRECISE; fp32's own is 6e-8,
// bf16's 4e-3.
template <bool PRECISE>
inline at::vec::Vectorized<float> exp2(const at::vec::Vectorized<float>& x) {
  using Vec = at::vec::Vectorized<float>;
#if defined(CPU_CAPABILITY_AVX512)
  // A polynomial of the part above the next lower integer, times 2^that.
  constexpr int DOWN = 9;  // the rounding; no exceptions
  const Vec f = _mm512_reduce_ps(x, DOWN);
  Vec y;
  if constexpr (PRECISE) {
    y = at::vec::fmadd(f, Vec(1.867130302e-3f), Vec(9.017029828e-3f));
    y = at::vec::fmadd(f, y, Vec(5.579991346e-2f));
    y = at::vec::fmadd(f, y, Vec(2.401644501e-1f));
    y = at::vec::fmadd(f, y, Vec(6.931513118e-1f));
  } else {
    y = at::vec::fmadd(f, Vec(1.342668629e-2f), Vec(5.224247096e-2f));
    y = at::vec::fmadd(f, y, Vec(2.412802063e-1f));
    y = at::vec::fmadd(f, y, Vec(6.930448447e-1f));
  }
  return _mm512_scalef_ps(at::vec::fmadd(f, y, Vec(1.f)), x);
#else
  return (x * Vec(0.693147181f)).exp_u20();
#endif
}

// Relative error 6e-5 unless PRECISE.
template <bool PRECISE>
inline at::vec::Vectorized<float> reciprocal(const at::vec::Vectorized<float>& x) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (!PRECISE) {
    return _mm512_rcp14_ps(x);
  }
#endif
  return at::vec::Vectorized<float>(1.f) / x;
}

}  // namespace CPU_CAPABILITY
}  // namespace mae_fast
