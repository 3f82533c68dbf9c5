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

// r cos(2 pi b 2^-32), r sin(2 pi b 2^-32), r = sqrt(-2 log((a + 1/2) 2^-32)). Relative error 4e-7 of r, absolute 2e-7
// of the sine and cosine.
FASTELBO_HD NormalPair box_muller(uint32_t a, uint32_t b) {
  const float scale = 0x1p-32f, half = 0x1p-33f;
  const Split<float> u = split_log(float(a) * scale + half);
  const float complement = float(~a) * scale + half;  // 1 - u, exact to float precision where u is near 1
  const float log_u = log_split(u.exponent, u.exponent < 0 ? u.f : -complement);
  const float r = std::sqrt(-2 * log_u);
  // the angle in quarter turns: the nearest one, and the rest in [-1/8, 1/8] of a turn
  const uint32_t quarter = (b + 0x20000000u) >> 30;
  const float t = float(int32_t(b - (quarter << 30))) * scale;
  const float w = t * t;
  const float s = t * poly(w, 6.283185287f, -41.34166146f, 81.59235403f, -75.39356658f);
  const float c = 1 + w * poly(w, -19.73920869f, 64.93932649f, -85.44374284f, 59.24597949f);
  const bool odd = quarter & 1;
  const float cos_t = odd ? s : c, sin_t = odd ? c : s;
  return {(quarter + 1) & 2 ? -r * cos_t : r * cos_t, quarter & 2 ? -r * sin_t : r * sin_t};
}

}  // namespace fastelbo::FASTELBO_ISA
