// What the CUDA kernels share: strided views four elements at a time, sums over groups of threads, the grand total.
//
// A group is g threads of a block, g a power of two from 4 to kThreads, that work on one row. All threads of a block
// take part in every shuffle and barrier, those without a row too.
#pragma once

#include "cuda/kernels/launch.h"
#include "math/half.h"

namespace fastelbo::cuda {

using namespace FASTELBO_ISA;

template <class T>
constexpr DType compute_dtype = sizeof(T) == 4 ? DType::f32 : DType::f64;

inline __device__ int64_t offset_of(const View& v, int64_t i) {
  if (v.ndim == 1) return i * v.stride[0];
  int64_t offset = 0;
  for (int d = v.ndim - 1; d >= 0; --d) {
    offset += i % v.size[d] * v.stride[d];
    i /= v.size[d];
  }
  return offset;
}

template <class T>
__device__ T load_at(const View& v, int64_t at) {
  switch (v.dtype) {
    case DType::f32: return T(static_cast<const float*>(v.data)[at]);
    case DType::f64: return T(static_cast<const double*>(v.data)[at]);
    case DType::bf16: return T(to_float(static_cast<const BFloat16*>(v.data)[at]));
    case DType::f16: return T(to_float(static_cast<const Half*>(v.data)[at]));
    case DType::i16: return T(static_cast<const int16_t*>(v.data)[at]);
    case DType::i32: return T(static_cast<const int32_t*>(v.data)[at]);
    case DType::i64: return T(static_cast<const int64_t*>(v.data)[at]);
    default: return scaled_byte(T(static_cast<const uint8_t*>(v.data)[at]), byte_scale(v.unit, T()));
  }
}
template <class T>
__device__ void store_at(const View& v, int64_t at, T value) {
  switch (v.dtype) {
    case DType::f32: static_cast<float*>(v.data)[at] = float(value); break;
    case DType::f64: static_cast<double*>(v.data)[at] = double(value); break;
    case DType::bf16: static_cast<BFloat16*>(v.data)[at] = to_bfloat16(float(value)); break;
    case DType::f16: static_cast<Half*>(v.data)[at] = to_half(float(value)); break;
    default: break;
  }
}

inline __device__ int64_t row_of(const View& v, int64_t k, int64_t b) { return k * v.stride_k + b * v.stride_b; }

template <class Word>
__device__ bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Word) == 0;
}

// Four neighbours where their memory is contiguous and aligned: one load of 4 to 16 bytes (two of 16 for float64).
// Otherwise n loads. `row` is the offset of the row, i the index in it.
template <class T>
__device__ void load4(const View& v, int64_t row, int64_t i, int n, T* to) {
  if (n == 4 && v.ndim == 1 && v.stride[0] == 1) {
    const int64_t at = row + i;
    if (v.dtype == DType::f32) {
      const float* p = static_cast<const float*>(v.data) + at;
      if (aligned<float4>(p)) {
        const float4 w = *reinterpret_cast<const float4*>(p);
        to[0] = T(w.x), to[1] = T(w.y), to[2] = T(w.z), to[3] = T(w.w);
        return;
      }
    } else if (v.dtype == DType::f64) {
      const double* p = static_cast<const double*>(v.data) + at;
      if (aligned<double2>(p)) {
        const double2 a = reinterpret_cast<const double2*>(p)[0], b = reinterpret_cast<const double2*>(p)[1];
        to[0] = T(a.x), to[1] = T(a.y), to[2] = T(b.x), to[3] = T(b.y);
        return;
      }
    } else if (v.dtype == DType::bf16 || v.dtype == DType::f16) {
      const uint16_t* p = static_cast<const uint16_t*>(v.data) + at;
      if (aligned<ushort4>(p)) {
        const ushort4 w = *reinterpret_cast<const ushort4*>(p);
        const uint16_t bits[4] = {w.x, w.y, w.z, w.w};
        for (int j = 0; j < 4; ++j)
          to[j] = T(v.dtype == DType::bf16 ? to_float(BFloat16{bits[j]}) : to_float(Half{bits[j]}));
        return;
      }
    } else if (v.dtype == DType::u8 || v.dtype == DType::b8) {
      const uint8_t* p = static_cast<const uint8_t*>(v.data) + at;
      if (aligned<uchar4>(p)) {
        const uchar4 w = *reinterpret_cast<const uchar4*>(p);
        const ByteScale<T> scale = byte_scale(v.unit, T());
        to[0] = scaled_byte(T(w.x), scale), to[1] = scaled_byte(T(w.y), scale);
        to[2] = scaled_byte(T(w.z), scale), to[3] = scaled_byte(T(w.w), scale);
        return;
      }
    }
  }
#pragma unroll  // with n in the loop's bound, the array would have to lie in memory
  for (int j = 0; j < 4; ++j) {
    if (j < n) to[j] = load_at<T>(v, row + offset_of(v, i + j));
  }
}

template <class T>
__device__ void store4(const View& v, int64_t row, int64_t i, int n, const T* from) {
  if (n == 4 && v.ndim == 1 && v.stride[0] == 1) {
    const int64_t at = row + i;
    if (v.dtype == DType::f32) {
      float* p = static_cast<float*>(v.data) + at;
      if (aligned<float4>(p)) {
        *reinterpret_cast<float4*>(p) = make_float4(float(from[0]), float(from[1]), float(from[2]), float(from[3]));
        return;
      }
    } else if (v.dtype == DType::f64) {
      double* p = static_cast<double*>(v.data) + at;
      if (aligned<double2>(p)) {
        reinterpret_cast<double2*>(p)[0] = make_double2(double(from[0]), double(from[1]));
        reinterpret_cast<double2*>(p)[1] = make_double2(double(from[2]), double(from[3]));
        return;
      }
    } else if (v.dtype == DType::bf16 || v.dtype == DType::f16) {
      uint16_t* p = static_cast<uint16_t*>(v.data) + at;
      if (aligned<ushort4>(p)) {
        uint16_t bits[4];
        for (int j = 0; j < 4; ++j) {
          bits[j] = v.dtype == DType::bf16 ? to_bfloat16(float(from[j])).bits : to_half(float(from[j])).bits;
        }
        *reinterpret_cast<ushort4*>(p) = make_ushort4(bits[0], bits[1], bits[2], bits[3]);
        return;
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j < n) store_at<T>(v, row + offset_of(v, i + j), from[j]);
  }
}

// Bytes per element of what a Run holds; else 0.
inline constexpr int run_size(DType dtype) {
  switch (dtype) {
    case DType::f32: return 4;
    case DType::bf16:
    case DType::f16: return 2;
    case DType::u8:
    case DType::b8: return 1;
    default: return 0;
  }
}

// Whether rows of D elements of this view can be read and written in runs.
inline bool is_plain(const View& v, int64_t D) {
  const int size = run_size(v.dtype);
  return !v || (size != 0 && v.ndim == 1 && v.stride[0] == 1 && D % 8 == 0 && v.stride_k % 8 == 0 &&
                v.stride_b % 8 == 0 && reinterpret_cast<uintptr_t>(v.data) % (size == 1 ? 8 : 16) == 0);
}

// Eight neighbours of a row, half by half: a word of 16 bytes for all of them in 16 bits (of 8 bytes in 8), and for
// each half in float32. `half` is 0, then 1, and a constant once its loop is unrolled; branches on the dtype are the
// same in all threads.
struct Run {
  uint32_t words[4];

  // Elements at + 4 half to at + 4 half + 3.
  __device__ void read(const View& v, int64_t at, int half, float* to) {
    const int size = run_size(v.dtype);
    const char* p = static_cast<const char*>(v.data) + (at + (size == 4 ? 4 * half : 0)) * size;
    if (size == 1) {
      if (half == 0) {
        const uint2 w = *reinterpret_cast<const uint2*>(p);
        words[0] = w.x, words[1] = w.y;
      }
      const ByteScale<float> scale = byte_scale(v.unit, 0.f);
#pragma unroll
      for (int j = 0; j < 4; ++j) to[j] = scaled_byte(float(words[half] >> 8 * j & 0xff), scale);
      return;
    }
    if (size == 4 || half == 0) {
      const uint4 w = *reinterpret_cast<const uint4*>(p);
      words[0] = w.x, words[1] = w.y, words[2] = w.z, words[3] = w.w;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint16_t bits = uint16_t(words[2 * half + j / 2] >> 16 * (j % 2));
      to[j] = size == 4                ? bits_to<float>(words[j])
              : v.dtype == DType::bf16 ? to_float(BFloat16{bits})
                                       : to_float(Half{bits});
    }
  }
  // The same elements, of a floating dtype; those of 16 bits reach memory with the second half.
  __device__ void write(const View& v, int64_t at, int half, const float* from) {
    const bool whole = v.dtype == DType::f32;
    if (whole) {
#pragma unroll
      for (int j = 0; j < 4; ++j) words[j] = bits_to<uint32_t>(from[j]);
    } else {
      const auto bits = [&](float f) {
        return uint32_t(v.dtype == DType::bf16 ? to_bfloat16(f).bits : to_half(f).bits);
      };
      words[2 * half] = bits(from[0]) | bits(from[1]) << 16;
      words[2 * half + 1] = bits(from[2]) | bits(from[3]) << 16;
      if (half == 0) return;
    }
    char* p = static_cast<char*>(v.data) + (whole ? (at + 4 * half) * 4 : at * 2);
    *reinterpret_cast<uint4*>(p) = uint4{words[0], words[1], words[2], words[3]};
  }
};

// Elements [begin, end) of a row in pieces of up to four: first those in front of the leading tensor's alignment, then
// whole fours, then what is left.
struct Pieces {
  int64_t begin, end;
  int head;

  __device__ Pieces(const View& lead, int64_t row, int64_t begin, int64_t end) : begin(begin), end(end), head(0) {
    if (lead.ndim != 1 || lead.stride[0] != 1) return;
    const int64_t size = lead.dtype == DType::f64 ? 8 : lead.dtype == DType::f32 ? 4 : 2;
    const int64_t past = (int64_t(reinterpret_cast<uintptr_t>(lead.data)) / size + row + begin) & 3;
    head = int(past ? 4 - past : 0);
    if (head > end - begin) head = int(end - begin);
  }
  __device__ int64_t count() const { return (head != 0) + (end - begin - head + 3) / 4; }
  // piece c: its first element and how many
  __device__ int64_t at(int64_t c, int& n) const {
    if (head != 0 && c == 0) {
      n = head;
      return begin;
    }
    const int64_t i = begin + head + 4 * (c - (head != 0));
    n = end - i < 4 ? int(end - i) : 4;
    return i;
  }
};

// The sum over the g threads of a group, in all of them. Every thread of the block calls this.
template <class T>
__device__ T group_sum(T value, int g) {
  __shared__ T warps[kThreads / 32];
  for (int o = (g < 32 ? g : 32) / 2; o > 0; o /= 2) value += __shfl_xor_sync(0xffffffffu, value, o);
  if (g <= 32) return value;
  const int warp = int(threadIdx.x) / 32, per_group = g / 32, first = warp / per_group * per_group;
  if (threadIdx.x % 32 == 0) warps[warp] = value;
  __syncthreads();
  value = 0;
  for (int w = 0; w < per_group; ++w) value += warps[first + w];
  __syncthreads();
  return value;
}

template <class T>
__device__ T block_max(T value) {
  __shared__ T warps[kThreads / 32];
  for (int o = 16; o > 0; o /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, value, o);
    value = other > value ? other : value;
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  for (int w = 0; w < kThreads / 32; ++w) value = warps[w] > value ? warps[w] : value;
  __syncthreads();
  return value;
}

// Adds every block's share; the block that comes last adds the blocks, in order, and writes the total. `value` is this
// thread's share.
template <class T>
__device__ void add_to_total(const Total& total, double value) {
  if (!total.out) return;
  __shared__ bool last;
  const double sum = group_sum(value, kThreads);
  if (threadIdx.x == 0) {
    total.block_sums[blockIdx.x] = sum;
    __threadfence();
    last = atomicAdd(total.ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  double all = 0;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) {
    all += static_cast<const volatile double*>(total.block_sums)[b];
  }
  all = group_sum(all, kThreads);
  if (threadIdx.x == 0) *static_cast<T*>(total.out) = T(all);
}

// Threads for a row of n elements: 4 to 8 pieces of four each, and more threads where there are few rows.
inline int group_size(int64_t n, int64_t rows) {
  int g = 4;
  while (g < kThreads / 2 && int64_t(g) * 32 < n) g *= 2;
  while (g < kThreads / 2 && rows * g < 65536 && int64_t(g) * 8 < n) g *= 2;
  return g;
}

}  // namespace fastelbo::cuda
