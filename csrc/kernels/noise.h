// Normal noise for a run of element indices, as math/philox.h defines it, several counters at a time.
//
// Philox is written with vectors of 64-bit lanes: the widening multiply then needs no shuffles, and the upper halves of
// the lanes may hold anything, since it reads the lower halves only. gcc makes 4x as many instructions of the scalar
// form. tests/cpp compares both.
#pragma once

#include "kernels/params.h"
#include "math/philox.h"

namespace fastelbo::FASTELBO_ISA {

inline constexpr int kCounters = FASTELBO_X86_LEVEL == 4 ? 8 : FASTELBO_X86_LEVEL == 3 ? 4 : 2;
using Lanes = uint64_t __attribute__((vector_size(8 * kCounters)));
using Words32 = uint32_t __attribute__((vector_size(4 * kCounters)));

// Product of the lower 32 bits of every lane.
FASTELBO_HD Lanes mul_wide(Lanes a, Lanes b) {
#if FASTELBO_X86_LEVEL == 4
  return Lanes(_mm512_mul_epu32(__m512i(a), __m512i(b)));
#elif FASTELBO_X86_LEVEL == 3
  return Lanes(_mm256_mul_epu32(__m256i(a), __m256i(b)));
#elif FASTELBO_X86_LEVEL == 2
  return Lanes(_mm_mul_epu32(__m128i(a), __m128i(b)));
#else
  const Lanes low = Lanes{} + 0xffffffffu;
  return (a & low) * (b & low);
#endif
}

struct NoiseBuffer {
  alignas(64) float values[kTile + 64];
};

// Noise of the elements [index, index + n), n <= kTile, at the returned place in the buffer. The counters are index /
// 4, so a run that starts inside a counter's four begins up to three numbers late.
inline const float* normal_run(uint64_t seed, int64_t index, int64_t n, NoiseBuffer& buffer) {
  constexpr int kMax = (kTile + 64) / 4;
  alignas(64) uint32_t words[4][kMax];
  const uint64_t first = uint64_t(index) >> 2;
  const int64_t skip = index & 3;
  const int counters = int((skip + n + 3) / 4 + 15) / 16 * 16;
  Lanes lane;
  for (int i = 0; i < kCounters; ++i) lane[i] = uint64_t(i);
  const Lanes a = Lanes{} + 0xD2511F53u, b = Lanes{} + 0xCD9E8D57u;
  for (int i = 0; i < counters; i += kCounters) {
    const Lanes counter = lane + (first + uint64_t(i));
    Lanes c0 = counter, c1 = counter >> 32, c2 = Lanes{}, c3 = Lanes{};
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const Lanes p0 = mul_wide(c0, a), p1 = mul_wide(c2, b);
      c0 = (p1 >> 32) ^ c1 ^ (Lanes{} + k0);
      c2 = (p0 >> 32) ^ c3 ^ (Lanes{} + k1);
      c1 = p1, c3 = p0;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    const Lanes block[4] = {c0, c1, c2, c3};
    for (int j = 0; j < 4; ++j) {
      const Words32 low = __builtin_convertvector(block[j], Words32);
      memcpy(&words[j][i], &low, sizeof(low));
    }
  }
  float* __restrict out = buffer.values;
#pragma omp simd
  for (int i = 0; i < counters; ++i) {
    const NormalPair x = box_muller(words[0][i], words[1][i]), y = box_muller(words[2][i], words[3][i]);
    out[4 * i] = x.first;
    out[4 * i + 1] = x.second;
    out[4 * i + 2] = y.first;
    out[4 * i + 3] = y.second;
  }
  return buffer.values + skip;
}

}  // namespace fastelbo::FASTELBO_ISA
