// Counter-based normal noise: a pure function of (seed, element index), the same on host and device.
//
// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) on the counter index / 4 turns
// into four normals by Box-Muller; element index takes number index mod 4. The noise has float32 resolution: 32 bits
// for the radius (|z| <= 6.7) and 32 for the angle.
#pragma once

#include <cmath>

#include "math/elementary.h"

namespace fastelbo::FASTELBO_ISA {

struct Words {
  uint32_t w0, w1, w2, w3;
};

FASTELBO_HD uint32_t mul_high(uint32_t a, uint32_t b) { return uint32_t((uint64_t(a) * b) >> 32); }

template <int kRounds>
FASTELBO_HD Words philox_rounds(Words c, uint32_t k0, uint32_t k1) {
  if constexpr (kRounds == 0) {
    return c;
  } else {
    const uint32_t a = 0xD2511F53u, b = 0xCD9E8D57u;
    const Words next{mul_high(b, c.w2) ^ c.w1 ^ k0, b * c.w2, mul_high(a, c.w0) ^ c.w3 ^ k1, a * c.w0};
    return philox_rounds<kRounds - 1>(next, k0 + 0x9E3779B9u, k1 + 0xBB67AE85u);
  }
}

FASTELBO_HD Words philox(uint64_t seed, uint32_t counter_low, uint32_t counter_high) {
  return philox_rounds<10>({counter_low, counter_high, 0, 0}, uint32_t(seed), uint32_t(seed >> 32));
}

struct NormalPair {
  float first, second;
};

// Box-Muller in two halves, r cos(2 pi b 2^-32) and r sin(2 pi b 2^-32) with r = sqrt(-2 log((a + 1/2) 2^-32)): each
// is a loop of its own on the CPU. Relative error of r 3e-7, absolute error of the cosine and sine 2e-7.

// r^2
FASTELBO_HD float radius_squared(uint32_t a) {
  // u above 1/2 is taken by its complement v = 1 - u, which stays exact to float precision where u is near 1
  const uint32_t upper = uint32_t(int32_t(a) >> 31);  // all bits or none
  const float v = float(int32_t(a ^ upper)) * 0x1p-32f + 0x1p-33f;
  const Split<float> s = split_log(upper ? 1 - v : v);
  return -2 * log_split(s.exponent, s.exponent == 0 ? -v : s.f);
}

FASTELBO_HD NormalPair on_circle(float radius_squared, uint32_t b) {
  const float r = std::sqrt(radius_squared);
  // the angle as the nearest half turn, which is a sign, and the rest in [-1/4, 1/4) of a turn
  const uint32_t half_turn = (b + 0x40000000u) & 0x80000000u;
  const float t = float(int32_t(b << 1)) * 0x1p-33f;
  const float w = t * t;
  const float sine = t * poly(w, 6.283185274f, -41.34167748f, 81.60223124f, -76.57499201f, 39.71091657f);
  const float cosine = 1 + w * poly(w, -19.73918209f, 64.93522239f, -85.2540187f, 56.34065298f);
  const float signed_r = bits_to<float>(bits_to<uint32_t>(r) ^ half_turn);
  return {signed_r * cosine, signed_r * sine};
}

FASTELBO_HD NormalPair box_muller(uint32_t a, uint32_t b) { return on_circle(radius_squared(a), b); }

}  // namespace fastelbo::FASTELBO_ISA
