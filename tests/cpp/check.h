// The whole test framework: named checks that count, and one line for each that fails.
#pragma once

#include <cstdio>

// gcc vectorizes no loop that it instruments: a sum then has one lane, and is rounded more often.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr double kRoundings = 2;
#else
inline constexpr double kRoundings = 1;
#endif

struct Checks {
  int passed = 0, failed = 0;
  void expect(bool ok, const char* what, double got, double limit) {
    ok ? ++passed : ++failed;
    if (!ok) std::printf("FAILED %s: %.4g, limit %.4g\n", what, got, limit);
  }
  // Not (error > limit), so that NaN fails.
  void at_most(double error, double limit, const char* what) { expect(error <= limit, what, error, limit); }
};
