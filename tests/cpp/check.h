// The whole test framework: named checks that count, and one line for each that fails.
#pragma once

#include <cstdio>

struct Checks {
  int passed = 0, failed = 0;
  void expect(bool ok, const char* what, double got, double limit) {
    ok ? ++passed : ++failed;
    if (!ok) std::printf("FAILED %s: %.4g, limit %.4g\n", what, got, limit);
  }
  // Not (error > limit), so that NaN fails.
  void at_most(double error, double limit, const char* what) { expect(error <= limit, what, error, limit); }
};
