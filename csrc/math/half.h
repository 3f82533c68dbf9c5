// Half-precision numbers as the bits that they are stored in, to and from float; a number of any floating type.
#pragma once

#include <c10/util/Half.h>
#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

#include "math/elementary.h"
#include "math/number.h"

namespace fastelbo::FASTELBO_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

FASTELBO_HD float to_float(BFloat16 v) { return bits_to<float>(uint32_t(v.bits) << 16); }

// Round to nearest even; NaN stays NaN.
FASTELBO_HD BFloat16 to_bfloat16(float v) {
  const uint32_t b = bits_to<uint32_t>(v);
  const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1)) >> 16;
  return {uint16_t(v == v ? rounded : 0x7fc0u)};
}

#if defined(__CUDA_ARCH__)
FASTELBO_HD float to_float(Half v) { return __half2float(__ushort_as_half(v.bits)); }
FASTELBO_HD Half to_half(float v) { return {__half_as_ushort(__float2half_rn(v))}; }
#elif FASTELBO_HAS_F16C
FASTELBO_HD float to_float(Half v) { return _cvtsh_ss(v.bits); }
FASTELBO_HD Half to_half(float v) { return {uint16_t(_cvtss_sh(v, 0))}; }
#elif FASTELBO_HAS_NEON
FASTELBO_HD float to_float(Half v) { return bits_to<__fp16>(v.bits); }
FASTELBO_HD Half to_half(float v) { return {bits_to<uint16_t>(__fp16(v))}; }
#else
FASTELBO_HD float to_float(Half v) { return c10::detail::fp16_ieee_to_fp32_value(v.bits); }
FASTELBO_HD Half to_half(float v) { return {c10::detail::fp16_ieee_from_fp32_value(v)}; }
#endif

FASTELBO_HD double read(const Number& n) {
  if (!n.data) return n.value;
  switch (n.dtype) {
    case DType::f32: return double(*static_cast<const float*>(n.data));
    case DType::bf16: return double(to_float(*static_cast<const BFloat16*>(n.data)));
    case DType::f16: return double(to_float(*static_cast<const Half*>(n.data)));
    default: return *static_cast<const double*>(n.data);
  }
}

}  // namespace fastelbo::FASTELBO_ISA
