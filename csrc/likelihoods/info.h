// What the checks know of a likelihood, by its index in list.h.
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
  int fewest, most;  // parameters
  const char* parameters[kMaxParameters];
  Domain domain;  // of x
};

int likelihood_count();
const LikelihoodInfo& likelihood_info(int index);

}  // namespace fastelbo
