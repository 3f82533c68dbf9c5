// What a likelihood says of one element: log p and its gradient. A likelihood is a struct derived from Defaults, with
//   name          as users write it
//   parameters    their names, one to four; the first has the shape of the data, the others each a shape of its own
//   eval          (parameters ..., x, shared) -> Terms
// and, where the defaults do not fit:
//   kFewest       parameters that have to be given; one that is not is 0
//   kData         how many of the last parameters are data: they have no gradient, and may be integers
//   kDomain       of x: the reals or [0, 1], where bytes mean x / 255, or counts, which integers of any type are
//   kShares       whether shared() is worth a pass of its own: value and gradient need one exponential, which is long
//   shared        (parameters ...) -> that number
//   kSoftplus     whether log(1 + shared) is still to be subtracted from the value, for a shared number in [0, 1]: the
//                 CPU takes one logarithm of the product of eight
//   kByElement    whether log p of every element is what it is taken for: CUDA has no kernels of the plain layout and
//   of
//                 K-sample bounds then
//   kLong         whether its formulas are so long that CUDA calls them, and inlines no copies
//   kZeros        whether x = 0, which most counts are, has a formula of its own: see counts.h
// What the caller does not use of the Terms costs nothing: the compiler drops it.
#pragma once

#include <type_traits>
#include <utility>

#include "likelihoods/info.h"
#include "math/elementary.h"

namespace fastelbo::FASTELBO_ISA {

struct Defaults {
  static constexpr int kFewest = 1, kData = 0;
  static constexpr Domain kDomain = Domain::reals;
  static constexpr bool kShares = false, kSoftplus = false, kZeros = false, kByElement = false, kLong = false;
};

// A number of each parameter, 0 where there is none. No array: of one that is declared in it, gcc 12 vectorizes no
// loop.
template <class T>
struct OfParameters {
  T first = 0, second = 0, third = 0, fourth = 0;
  static_assert(kMaxParameters == 4);

  template <int i>
  FASTELBO_HD T get() const {
    return i == 0 ? first : i == 1 ? second : i == 2 ? third : fourth;
  }
};

template <class T>
struct Terms {
  T value = 0;
  OfParameters<T> d;
  T d_x = 0;
};

// a where the condition holds, else b; without control flow.
template <class T>
FASTELBO_HD Terms<T> select(bool condition, const Terms<T>& a, const Terms<T>& b) {
  const auto of = [condition](T x, T y) { return condition ? x : y; };
  return {of(a.value, b.value),
          {of(a.d.first, b.d.first), of(a.d.second, b.d.second), of(a.d.third, b.d.third), of(a.d.fourth, b.d.fourth)},
          of(a.d_x, b.d_x)};
}

template <class T>
struct Element {
  OfParameters<T> p;
  T x = 0;
  T added = 0;  // to a mean and to theta, by likelihoods that take these: LikelihoodInfo
};

template <class L>
inline constexpr int kParameters = int(sizeof(L::parameters) / sizeof(L::parameters[0]));

// f.template operator()<0, ..., n - 1>()
template <int n, class F>
FASTELBO_HD auto with_indices(F f) {
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return f.template operator()<i...>();
  }(std::make_integer_sequence<int, n>());
}

// Of all parameters there may be, those of L. Numbers by themselves: gcc 12 vectorizes no loop over structs of floats.
template <class L, class T>
FASTELBO_HD T shared_of(T a, T b, T c, T d) {
  constexpr int n = kParameters<L>;
  if constexpr (!L::kShares)
    return T(0);
  else if constexpr (n == 1)
    return L::shared(a);
  else if constexpr (n == 2)
    return L::shared(a, b);
  else if constexpr (n == 3)
    return L::shared(a, b, c);
  else
    return L::shared(a, b, c, d);
}
template <class L, class T>
FASTELBO_HD Terms<T> terms_of(T a, T b, T c, T d, T x, T shared, T added) {
  constexpr int n = kParameters<L>;
  if constexpr (L::kZeros)
    return L::terms_of(Element<T>{{a, b, c, d}, x, added});
  else if constexpr (n == 1)
    return L::eval(a, x, shared);
  else if constexpr (n == 2)
    return L::eval(a, b, x, shared);
  else if constexpr (n == 3)
    return L::eval(a, b, c, x, shared);
  else
    return L::eval(a, b, c, d, x, shared);
}

// The whole of one element.
template <class L, class T>
FASTELBO_HD Terms<T> evaluate(const Element<T>& in) {
  const T shared = shared_of<L>(in.p.first, in.p.second, in.p.third, in.p.fourth);
  const Terms<T> t = terms_of<L>(in.p.first, in.p.second, in.p.third, in.p.fourth, in.x, shared, in.added);
  return {L::kSoftplus ? t.value - log1p_unit(shared) : t.value, t.d, t.d_x};
}

}  // namespace fastelbo::FASTELBO_ISA
