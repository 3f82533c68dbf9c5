// What the checks know of a likelihood, by its index in list.h.
#pragma once

namespace fastelbo {

enum class Domain { reals, unit, counts };

struct LikelihoodInfo {
  const char* name;
  int fewest, most;  // parameters
  const char* parameters[4];
  Domain domain;  // of x
};

int likelihood_count();
const LikelihoodInfo& likelihood_info(int index);

}  // namespace fastelbo
