// What a likelihood says of one element: log p and its gradient. A likelihood is a struct derived from Defaults, with
//   name          as users write it
//   parameters    their names, one to three; the first has the shape of the data, the others each a shape of its own
//   eval          (first, second, third, x, shared) -> Terms, as many parameters as there are
// and, where the defaults do not fit:
//   kFewest       parameters that have to be given; one that is not is 0
//   kDomain       of x: the reals or [0, 1], where bytes mean x / 255, or counts, which integers of any type are
//   kShares       whether shared() is worth a pass of its own: value and gradient need one exponential, which is long
//   shared        (first, second, third) -> that number
//   kSoftplus     whether log(1 + shared) is still to be subtracted from the value, for a shared number in [0, 1]: the
//                 CPU takes one logarithm of the product of eight
//   kZeros        whether x = 0, which most counts are, has a formula of its own: see counts.h
// What the caller does not use of the Terms costs nothing: the compiler drops it.
#pragma once

#include "likelihoods/info.h"
#include "math/elementary.h"

namespace fastelbo::FASTELBO_ISA {

struct Defaults {
  static constexpr int kFewest = 1;
  static constexpr Domain kDomain = Domain::reals;
  static constexpr bool kShares = false, kSoftplus = false, kZeros = false;
};

template <class T>
struct Terms {
  T value = 0, d_first = 0, d_second = 0, d_third = 0, d_x = 0;
};

// a where the condition holds, else b; without control flow.
template <class T>
FASTELBO_HD Terms<T> select(bool condition, const Terms<T>& a, const Terms<T>& b) {
  return {.value = condition ? a.value : b.value,
          .d_first = condition ? a.d_first : b.d_first,
          .d_second = condition ? a.d_second : b.d_second,
          .d_third = condition ? a.d_third : b.d_third,
          .d_x = condition ? a.d_x : b.d_x};
}

template <class L>
inline constexpr int kParameters = int(sizeof(L::parameters) / sizeof(L::parameters[0]));

template <class L, class T>
FASTELBO_HD T shared_of(T first, T second, T third) {
  if constexpr (!L::kShares) {
    return T(0);
  } else if constexpr (kParameters<L> == 1) {
    return L::shared(first);
  } else if constexpr (kParameters<L> == 2) {
    return L::shared(first, second);
  } else {
    return L::shared(first, second, third);
  }
}

template <class L, class T>
FASTELBO_HD Terms<T> terms_of(T first, T second, T third, T x, T shared) {
  if constexpr (kParameters<L> == 1) {
    return L::eval(first, x, shared);
  } else if constexpr (kParameters<L> == 2) {
    return L::eval(first, second, x, shared);
  } else {
    return L::eval(first, second, third, x, shared);
  }
}

// The whole of one element.
template <class L, class T>
FASTELBO_HD Terms<T> evaluate(T first, T second, T third, T x) {
  const T shared = shared_of<L>(first, second, third);
  const Terms<T> t = terms_of<L>(first, second, third, x, shared);
  const T value = L::kSoftplus ? t.value - log1p_unit(shared) : t.value;
  return {.value = value, .d_first = t.d_first, .d_second = t.d_second, .d_third = t.d_third, .d_x = t.d_x};
}

}  // namespace fastelbo::FASTELBO_ISA
