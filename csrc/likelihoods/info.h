// What the checks know of a likelihood.
#pragma once

namespace fastelbo {

enum class Domain { reals, unit, counts };

// What x must be, as messages say it.
constexpr const char* data_of(Domain domain) {
  return domain == Domain::counts ? "counts: a float type, uint8, int16, int32 or int64"
                                  : "a float type, uint8 (read as x / 255) or bool";
}

inline constexpr int kMaxParameters = 4;

struct LikelihoodInfo {
  const char* name;
  int kernel;        // its index in list.h
  int fewest, most;  // parameters
  int data;          // how many of the last are data: without a gradient
  const char* parameters[kMaxParameters];
  Domain domain;    // of x
  double added;     // to a mean and to theta
  bool by_element;  // see terms.h: CUDA has no kernel of K-sample bounds for it
};

int likelihood_count();
const LikelihoodInfo& likelihood_info(int index);

}  // namespace fastelbo
