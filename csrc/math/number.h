// A number that may lie on the device: read by host code where it does not.
#pragma once

#include <cstdint>

namespace fastelbo {

enum class DType : uint8_t { f32, f64, bf16, f16, u8, b8, i16, i32, i64 };

struct Number {
  double value = 0;
  const void* data = nullptr;  // on the device; null: the value
  DType dtype = DType::f64;

  constexpr bool is_zero() const { return !data && value == 0; }  // as far as the host knows
};

}  // namespace fastelbo
