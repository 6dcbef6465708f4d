// IEEE half precision, by its value: a whole number of the smallest step, rounded to nearest even.
#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float value = exponent == 31 ? (fraction ? NAN : INFINITY)
                : exponent     ? std::ldexp(float(1024 + fraction), exponent - 25)
                               : std::ldexp(float(fraction), -24);
  return x.bits >> 15 ? -value : value;
}

inline __half __float2half_rn(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return {0x7fff};
  if (!(std::fabs(value) < 65520)) return {uint16_t(sign | 0x7c00)};
  int exponent = 0;
  std::frexp(value, &exponent);  // |value| in [2^(exponent - 1), 2^exponent)
  exponent = value == 0 || exponent < -13 ? -13 : exponent;
  const int steps = int(std::nearbyint(std::ldexp(std::fabs(value), 11 - exponent)));  // <= 2048
  // A carry out of the fraction goes to the exponent by itself.
  return {uint16_t(sign | ((exponent + 13) * 1024 + steps))};
}
