// Products of a sparse matrix X [N, D], by rows (CSR), with dense ones: X A, and X' A.
//
// Each number of X reads, for X' A also writes, a row of `lanes` numbers. A block of columns of X is taken at a time,
// so that the rows of A or of X' A that belong to it stay in the L2 cache. Every sum runs in the order of X's columns,
// or of its rows, whatever the blocks and threads are.
#pragma once

#include "cpu/kernels/tile.h"

namespace fastelbo::FASTELBO_ISA {

inline constexpr int64_t kCsrChunk = 256;  // numbers of X that are converted at a time

struct CsrColumns {
  const void* data;
  bool wide;

  explicit CsrColumns(const CsrParams& p) : data(p.columns), wide(p.wide) {}
  FASTELBO_HD int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
  // The first of [begin, end), whose columns rise, that is not in front of `column`.
  FASTELBO_HD int64_t find(int64_t begin, int64_t end, int64_t column) const {
    while (begin < end) {
      const int64_t middle = begin + (end - begin) / 2;
      (*this)[middle] < column ? begin = middle + 1 : end = middle;
    }
    return begin;
  }
};

// 64 kCount bytes of a row, which stay in registers.
template <int kCount, class T>
struct Panels {
  static constexpr int kVectors = kCount * 64 / kVectorBytes, kLength = kVectorBytes / int(sizeof(T));
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
  Vector v[kVectors];

  // By value: a reference would lose the alignment of its type with clang.
  static FASTELBO_HD Vector load(const T* p, int i) { return *reinterpret_cast<const Unaligned*>(p + i * kLength); }
  static FASTELBO_HD void store(T* p, int i, Vector x) { *reinterpret_cast<Unaligned*>(p + i * kLength) = x; }

  FASTELBO_HD explicit Panels(const T* p) {
    FASTELBO_UNROLL(16)
    for (int i = 0; i < kVectors; ++i) v[i] = load(p, i);
  }
  FASTELBO_HD void store(T* p) const {
    FASTELBO_UNROLL(16)
    for (int i = 0; i < kVectors; ++i) store(p, i, v[i]);
  }
  FASTELBO_HD void add(T factor, const T* p) {
    FASTELBO_UNROLL(16)
    for (int i = 0; i < kVectors; ++i) v[i] += factor * load(p, i);
  }
  FASTELBO_HD void add_to(T factor, T* p) const {
    FASTELBO_UNROLL(16)
    for (int i = 0; i < kVectors; ++i) store(p, i, load(p, i) + factor * v[i]);
  }
};

// Calls f<kCount>(lane) for the lanes in panels of up to 256 bytes, 128 with 16 registers of 16 bytes.
template <class T, class F>
FASTELBO_HD void for_panels(int64_t lanes, F f) {
  constexpr int kMost = kVectorBytes == 16 ? 2 : 4;
  constexpr int64_t kPanel = 64 / int64_t(sizeof(T));
  int64_t lane = 0;
  for (; lane + kMost * kPanel <= lanes; lane += kMost * kPanel) f.template operator()<kMost>(lane);
  for (; lane < lanes; lane += kPanel) f.template operator()<1>(lane);
}

// Calls f(first, numbers, n) for the numbers [begin, end) of X, in pieces.
template <class T, class F>
FASTELBO_HD void for_chunks(const CsrParams& p, int64_t begin, int64_t end, F f) {
  alignas(64) T buffer[kCsrChunk];
  for (int64_t i = begin; i < end; i += kCsrChunk) {
    const int64_t n = end - i < kCsrChunk ? end - i : kCsrChunk;
    f(i, load<T>(p.values, 0, 0, i, n, buffer), n);
  }
}

// Work items: blocks of kCsrRows rows.
template <class T>
void csr_matmul_kernel(const CsrParams& p, int64_t begin, int64_t end) {
  const CsrColumns columns(p);
  const T* A = static_cast<const T*>(p.matrix);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * kCsrRows, rows = p.N - first < kCsrRows ? p.N - first : kCsrRows;
    T* product = static_cast<T*>(p.product) + first * p.lanes;
    std::memset(product, 0, size_t(rows * p.lanes) * sizeof(T));
    int64_t at[kCsrRows];
    for (int64_t i = 0; i < rows; ++i) at[i] = p.starts[first + i];
    for (int64_t d = 0; d < p.D; d += p.block) {
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t from = at[i], to = columns.find(from, p.starts[first + i + 1], d + p.block);
        at[i] = to;
        for_chunks<T>(p, from, to, [&](int64_t k, const T* numbers, int64_t n) {
          for_panels<T>(p.lanes, [&]<int kCount>(int64_t lane) {
            T* y = product + i * p.lanes + lane;
            Panels<kCount, T> sums(y);
            for (int64_t j = 0; j < n; ++j) sums.add(numbers[j], A + columns[k + j] * p.lanes + lane);
            sums.store(y);
          });
        });
      }
    }
  }
}

// Work items: blocks of columns of X.
template <class T>
void csr_matmul_t_kernel(const CsrParams& p, int64_t begin, int64_t end) {
  const CsrColumns columns(p);
  T* product = static_cast<T*>(p.product);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t d = item * p.block, last = p.D - d < p.block ? p.D : d + p.block;
    std::memset(product + d * p.lanes, 0, size_t((last - d) * p.lanes) * sizeof(T));
    for (int64_t row = 0; row < p.N; ++row) {
      const int64_t end_of_row = p.starts[row + 1], from = columns.find(p.starts[row], end_of_row, d);
      const int64_t to = columns.find(from, end_of_row, last);
      const T* a = static_cast<const T*>(p.matrix) + row * p.lanes;
      for_chunks<T>(p, from, to, [&](int64_t k, const T* numbers, int64_t n) {
        for_panels<T>(p.lanes, [&]<int kCount>(int64_t lane) {
          const Panels<kCount, T> one(a + lane);
          for (int64_t j = 0; j < n; ++j) one.add_to(numbers[j], product + columns[k + j] * p.lanes + lane);
        });
      });
    }
  }
}

}  // namespace fastelbo::FASTELBO_ISA
