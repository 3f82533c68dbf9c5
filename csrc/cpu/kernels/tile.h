// Tiles: up to kTile elements of a view, as contiguous numbers of the compute type in the L1 cache.
//
// A contiguous view of the compute type is used where it lies; anything else (half types, uint8, bool, any strides) is
// converted into a buffer on the way in and out. So the maths is compiled once per compute type, not once per
// combination of dtypes, and no tensor is ever copied as a whole.
#pragma once

#include <cstring>

#include "math/half.h"
#include "params.h"

namespace fastelbo::FASTELBO_ISA {

template <class T>
constexpr DType dtype_of = sizeof(T) == 4 ? DType::f32 : DType::f64;

template <class T, class From>
FASTELBO_HD T convert_in(From v, ByteScale<T> scale) {
  if constexpr (__is_same(From, BFloat16) || __is_same(From, Half)) {
    return T(to_float(v));
  } else if constexpr (sizeof(From) == 1) {
    return scaled_byte(T(v), scale);
  } else {
    return T(v);
  }
}

template <class To, class T>
FASTELBO_HD To convert_out(T v) {
  if constexpr (__is_same(To, BFloat16)) {
    return to_bfloat16(float(v));
  } else if constexpr (__is_same(To, Half)) {
    return to_half(float(v));
  } else {
    return To(v);
  }
}

// Several halves at a time: the compiler does not vectorize the scalar conversion.
#if FASTELBO_HAS_F16C
#define FASTELBO_HALVES 8
FASTELBO_HD void halves_in(float* to, const Half* from) {
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
FASTELBO_HD void halves_out(Half* to, const float* from) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(_mm256_loadu_ps(from), 0));
}
#elif FASTELBO_HAS_NEON
#define FASTELBO_HALVES 4
FASTELBO_HD void halves_in(float* to, const Half* from) {
  vst1q_f32(to, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&from->bits))));
}
FASTELBO_HD void halves_out(Half* to, const float* from) {
  vst1_u16(&to->bits, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from))));
}
#endif
#ifdef FASTELBO_HALVES
inline void halves_in(float* __restrict to, const Half* __restrict from, int64_t n) {
  int64_t i = 0;
  for (; i + FASTELBO_HALVES <= n; i += FASTELBO_HALVES) halves_in(to + i, from + i);
  for (; i < n; ++i) to[i] = to_float(from[i]);
}
inline void halves_out(Half* __restrict to, const float* __restrict from, int64_t n) {
  int64_t i = 0;
  for (; i + FASTELBO_HALVES <= n; i += FASTELBO_HALVES) halves_out(to + i, from + i);
  for (; i < n; ++i) to[i] = to_half(from[i]);
}
inline void halves_out(Half* __restrict to, const double* __restrict from, int64_t n) {  // rare
  for (int64_t i = 0; i < n; ++i) to[i] = to_half(float(from[i]));
}
#endif

// Calls f(offset, index, count) for runs of the innermost collapsed dimension that cover elements [begin, begin + n).
template <class F>
FASTELBO_HD void for_runs(const View& v, int64_t begin, int64_t n, F f) {
  int64_t done = 0;
  while (done < n) {
    int64_t rest = begin + done, offset = 0;
    const int last = v.ndim - 1;
    const int64_t inner = v.size[last], at = rest % inner;
    rest /= inner;
    offset += at * v.stride[last];
    for (int d = last - 1; d >= 0; --d) {
      offset += rest % v.size[d] * v.stride[d];
      rest /= v.size[d];
    }
    const int64_t count = inner - at < n - done ? inner - at : n - done;
    f(offset, done, count);
    done += count;
  }
}

template <class T, class From>
inline void gather(T* __restrict to, const View& v, const From* from, int64_t begin, int64_t n) {
  const ByteScale<T> scale = byte_scale(v.unit, T());
  const int64_t step = v.stride[v.ndim - 1];
  for_runs(v, begin, n, [&](int64_t offset, int64_t index, int64_t count) {
    const From* __restrict p = from + offset;
    T* __restrict q = to + index;
    if (step == 1) {
#ifdef FASTELBO_HALVES
      if constexpr (__is_same(From, Half) && __is_same(T, float)) return halves_in(q, p, count);
#endif
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) q[i] = convert_in<T>(p[i], scale);
    } else if (step == 0) {  // a number that all elements share
      const T value = convert_in<T>(*p, scale);
      for (int64_t i = 0; i < count; ++i) q[i] = value;
    } else {
      for (int64_t i = 0; i < count; ++i) q[i] = convert_in<T>(p[i * step], scale);
    }
  });
}

template <class T, class To>
inline void scatter(const T* __restrict from, const View& v, To* to, int64_t begin, int64_t n) {
  const int64_t step = v.stride[v.ndim - 1];
  for_runs(v, begin, n, [&](int64_t offset, int64_t index, int64_t count) {
    To* __restrict p = to + offset;
    const T* __restrict q = from + index;
    if (step == 1) {
#ifdef FASTELBO_HALVES
      if constexpr (__is_same(To, Half)) return halves_out(p, q, count);
#endif
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) p[i] = convert_out<To>(q[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) p[i * step] = convert_out<To>(q[i]);
    }
  });
}

template <class T>
FASTELBO_HD bool lies_as(const View& v) {
  return v.dtype == dtype_of<T> && v.ndim == 1 && v.stride[0] == 1;
}

// The elements from `begin` on of row (k, b) where they are bytes in a row, else null.
inline const uint8_t* bytes_of(const View& v, int64_t k, int64_t b, int64_t begin) {
  const bool bytes = (v.dtype == DType::u8 || v.dtype == DType::b8) && v.ndim == 1 && v.stride[0] == 1;
  return bytes ? static_cast<const uint8_t*>(v.data) + k * v.stride_k + b * v.stride_b + begin : nullptr;
}

// read() and write() convert between any dtype and the buffer. They are not inlined: code of nine dtypes, called once a
// tile.
template <class T>
[[gnu::noinline]] void read(const View& v, int64_t row, int64_t begin, int64_t n, T* buffer) {
  switch (v.dtype) {
    case DType::f32: gather(buffer, v, static_cast<const float*>(v.data) + row, begin, n); break;
    case DType::f64: gather(buffer, v, static_cast<const double*>(v.data) + row, begin, n); break;
    case DType::bf16: gather(buffer, v, static_cast<const BFloat16*>(v.data) + row, begin, n); break;
    case DType::f16: gather(buffer, v, static_cast<const Half*>(v.data) + row, begin, n); break;
    case DType::u8:
    case DType::b8: gather(buffer, v, static_cast<const uint8_t*>(v.data) + row, begin, n); break;
    case DType::i16: gather(buffer, v, static_cast<const int16_t*>(v.data) + row, begin, n); break;
    case DType::i32: gather(buffer, v, static_cast<const int32_t*>(v.data) + row, begin, n); break;
    case DType::i64: gather(buffer, v, static_cast<const int64_t*>(v.data) + row, begin, n); break;
  }
}
template <class T>
[[gnu::noinline]] void write(const View& v, int64_t row, int64_t begin, int64_t n, const T* buffer) {
  switch (v.dtype) {
    case DType::f32: scatter(buffer, v, static_cast<float*>(v.data) + row, begin, n); break;
    case DType::f64: scatter(buffer, v, static_cast<double*>(v.data) + row, begin, n); break;
    case DType::bf16: scatter(buffer, v, static_cast<BFloat16*>(v.data) + row, begin, n); break;
    case DType::f16: scatter(buffer, v, static_cast<Half*>(v.data) + row, begin, n); break;
    default: break;
  }
}

// Where elements [begin, begin + n) of row (k, b) can be read: in place, or in the buffer after conversion.
template <class T>
inline const T* load(const View& v, int64_t k, int64_t b, int64_t begin, int64_t n, T* buffer) {
  const int64_t row = k * v.stride_k + b * v.stride_b;
  if (lies_as<T>(v)) return static_cast<const T*>(v.data) + row + begin;
  read(v, row, begin, n, buffer);
  return buffer;
}

// Where elements [begin, begin + n) of row (k, b) are to be written: in place, or in the buffer, which store()
// converts.
template <class T>
inline T* target(const View& v, int64_t k, int64_t b, int64_t begin, T* buffer) {
  return v && lies_as<T>(v) ? static_cast<T*>(v.data) + k * v.stride_k + b * v.stride_b + begin : buffer;
}
template <class T>
inline void store(const View& v, int64_t k, int64_t b, int64_t begin, int64_t n, const T* buffer) {
  if (v && !lies_as<T>(v)) write(v, k * v.stride_k + b * v.stride_b, begin, n, buffer);
}

inline constexpr int64_t kLanes = 16;  // the widest vector of the compute types

// The sum of n numbers, the last vector of which overlaps the one before: no scalar loop for the tail of a row.
template <class T>
inline T sum_of(const T* p, int64_t n) {
  T sum = 0;
  const int64_t whole = n - n % kLanes;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < whole; ++i) sum += p[i];
  if (n < kLanes) {
    for (int64_t i = 0; i < n; ++i) sum += p[i];
  } else if (whole < n) {
    const T* last = p + n - kLanes;
    const int fresh = int(kLanes - (n - whole));
    T rest = 0;
#pragma omp simd reduction(+ : rest)
    for (int i = 0; i < int(kLanes); ++i) rest += i >= fresh ? last[i] : T(0);
    sum += rest;
  }
  return sum;
}

}  // namespace fastelbo::FASTELBO_ISA
