// Normal noise for a run of element indices, as math/philox.h defines it, several counters at a time.
//
// Philox is written with vectors of 64-bit lanes: the widening multiply then needs no shuffles, and the upper halves of
// the lanes may hold anything, since it reads the lower halves only. gcc makes 4x as many instructions of the scalar
// form. tests/cpp compares both.
#pragma once

#include "math/philox.h"
#include "params.h"

namespace fastelbo::FASTELBO_ISA {

inline constexpr int kCounters = kVectorBytes / 8;
using Lanes = uint64_t __attribute__((vector_size(8 * kCounters)));
using Words32 = uint32_t __attribute__((vector_size(4 * kCounters)));

// Product of the lower 32 bits of every lane.
FASTELBO_HD Lanes mul_wide(Lanes a, Lanes b) {
#if FASTELBO_HAS_SSE && FASTELBO_VECTOR_BYTES == 64
  return Lanes(_mm512_mul_epu32(__m512i(a), __m512i(b)));
#elif FASTELBO_HAS_SSE && FASTELBO_VECTOR_BYTES == 32
  return Lanes(_mm256_mul_epu32(__m256i(a), __m256i(b)));
#elif FASTELBO_HAS_SSE
  return Lanes(_mm_mul_epu32(__m128i(a), __m128i(b)));
#elif FASTELBO_HAS_NEON
  return Lanes(vmull_u32(vmovn_u64(uint64x2_t(a)), vmovn_u64(uint64x2_t(b))));
#else
  const Lanes low = Lanes{} + 0xffffffffu;
  return (a & low) * (b & low);
#endif
}

// A run starts up to three numbers late and is drawn in steps of kInterleaved counters, four numbers each.
inline constexpr int kInterleaved = 4 * kCounters;
inline constexpr int kMaxCounters = int(kLatentTile) / 4 + 2 * kInterleaved;

struct NoiseBuffer {
  alignas(64) float values[4 * kMaxCounters];
  alignas(64) uint32_t words[4][kMaxCounters];
  alignas(64) float radii[kMaxCounters], normals[4][kMaxCounters];
};

// The four words of `counters` counters from `first` on. Four independent chains side by side: alone, a chain waits for
// the latency of its multiplications.
inline void philox_run(uint64_t seed, uint64_t first, int counters, NoiseBuffer& buffer) {
  constexpr int kChains = kInterleaved / kCounters;
  Lanes lane;
  for (int i = 0; i < kCounters; ++i) lane[i] = uint64_t(i);
  const Lanes a = Lanes{} + 0xD2511F53u, b = Lanes{} + 0xCD9E8D57u;
  for (int i = 0; i < counters; i += kInterleaved) {
    Lanes c[4][kChains];
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int u = 0; u < kChains; ++u) {  // the first round, with words 2 and 3 of the counter 0
      const Lanes counter = lane + (first + uint64_t(i + u * kCounters)), product = mul_wide(counter, a);
      c[0][u] = (counter >> 32) ^ (Lanes{} + k0);
      c[1][u] = Lanes{};
      c[2][u] = (product >> 32) ^ (Lanes{} + k1);
      c[3][u] = product;
    }
    FASTELBO_UNROLL(9)
    for (int round = 1; round < 10; ++round) {
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
      const Lanes key0 = Lanes{} + k0, key1 = Lanes{} + k1;
      FASTELBO_UNROLL(4)
      for (int u = 0; u < kChains; ++u) {
        const Lanes p0 = mul_wide(c[0][u], a), p1 = mul_wide(c[2][u], b);
        c[0][u] = (p1 >> 32) ^ c[1][u] ^ key0;
        c[2][u] = (p0 >> 32) ^ c[3][u] ^ key1;
        c[1][u] = p1, c[3][u] = p0;
      }
    }
    for (int j = 0; j < 4; ++j) {
      for (int u = 0; u < kChains; ++u) {
        const Words32 low = __builtin_convertvector(c[j][u], Words32);
        memcpy(&buffer.words[j][i + u * kCounters], &low, sizeof(low));
      }
    }
  }
}

// Noise of the elements [index, index + n), n <= kLatentTile, at the returned place in the buffer.
inline const float* normal_run(uint64_t seed, int64_t index, int64_t n, NoiseBuffer& buffer) {
  const int64_t skip = index & 3;
  const int counters = int((skip + n + 3) / 4 + kInterleaved - 1) / kInterleaved * kInterleaved;
  philox_run(seed, uint64_t(index) >> 2, counters, buffer);
  float* __restrict r = buffer.radii;
  for (int pair = 0; pair < 4; pair += 2) {
    const uint32_t* __restrict wa = buffer.words[pair];
    const uint32_t* __restrict wb = buffer.words[pair + 1];
    float* __restrict first = buffer.normals[pair];
    float* __restrict second = buffer.normals[pair + 1];
#pragma omp simd
    for (int i = 0; i < counters; ++i) r[i] = radius_squared(wa[i]);
#pragma omp simd
    for (int i = 0; i < counters; ++i) {
      const NormalPair z = on_circle(r[i], wb[i]);
      first[i] = z.first;
      second[i] = z.second;
    }
  }
  float* __restrict out = buffer.values;
  const auto* __restrict z = buffer.normals;
#pragma omp simd
  for (int i = 0; i < counters; ++i) {
    out[4 * i] = z[0][i], out[4 * i + 1] = z[1][i], out[4 * i + 2] = z[2][i], out[4 * i + 3] = z[3][i];
  }
  return buffer.values + skip;
}

}  // namespace fastelbo::FASTELBO_ISA
