// Which instruction set is used: the last of the list that the CPU has, or the one that FASTELBO_CPU_CAPABILITY names.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels/std.h"
#include "likelihoods/list.h"

namespace fastelbo {

namespace baseline {
const KernelTable& table();
}
#if defined(__x86_64__)
#define FASTELBO_X86_ISAS
namespace avx2 {
const KernelTable& table();
}
namespace avx512 {
const KernelTable& table();
}
#endif

namespace {

#ifdef FASTELBO_X86_ISAS
bool has_f16c() {  // clang 14 knows no __builtin_cpu_supports("f16c")
  unsigned leaf[4] = {};
  __get_cpuid(1, &leaf[0], &leaf[1], &leaf[2], &leaf[3]);
  return leaf[2] & bit_F16C;
}
#endif

// In ascending order.
const IsaInfo* isas(int* count) {
#ifdef FASTELBO_X86_ISAS
  static const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  static const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const IsaInfo list[] = {
      {"baseline", true, baseline::table}, {"avx2", v3, avx2::table}, {"avx512", v4, avx512::table}};
#else
  static const IsaInfo list[] = {{"baseline", true, baseline::table}};
#endif
  *count = int(sizeof(list) / sizeof(list[0]));
  return list;
}

const IsaInfo& choose() {
  const char* wanted = std::getenv("FASTELBO_CPU_CAPABILITY");
  if (wanted && !*wanted) wanted = nullptr;
  const IsaInfo* best = nullptr;
  std::string names;
  for (int i = 0; i < isa_count(); ++i) {
    const IsaInfo& isa = isa_info(i);
    if (!isa.supported) continue;
    names += std::string(names.empty() ? "" : ", ") + isa.name;
    if (!wanted || std::strcmp(wanted, isa.name) == 0) best = &isa;
  }
  if (!best) {
    throw std::invalid_argument("FASTELBO_CPU_CAPABILITY must be one of " + names + " on this CPU; got " + wanted);
  }
  return *best;
}

template <class L>
LikelihoodInfo info_of() {
  LikelihoodInfo info{.name = L::name,
                      .fewest = L::kFewest,
                      .most = baseline::kParameters<L>,
                      .data = L::kData,
                      .domain = L::kDomain,
                      .by_element = L::kByElement};
  for (int i = 0; i < info.most; ++i) info.parameters[i] = L::parameters[i];
  return info;
}

template <class... L>
std::vector<LikelihoodInfo> all_likelihoods(baseline::TypeList<L...>) {
  std::vector<LikelihoodInfo> list = {info_of<L>()...};
  for (int i = 0; i < int(list.size()); ++i) list[i].kernel = i;
  for (const auto& shifted : baseline::kShifted) {
    for (int i = 0; i < baseline::Likelihoods::size; ++i) {
      if (std::strcmp(list[i].name, shifted.of) != 0) continue;
      list.push_back(list[i]);
      list.back().name = shifted.name, list.back().added = shifted.added;
    }
  }
  return list;
}

const std::vector<LikelihoodInfo>& likelihoods() {
  static const std::vector<LikelihoodInfo> list = all_likelihoods(baseline::Likelihoods{});
  return list;
}

}  // namespace

int isa_count() {
  int count = 0;
  isas(&count);
  return count;
}
const IsaInfo& isa_info(int index) {
  int count = 0;
  return isas(&count)[index];
}
const IsaInfo& isa_in_use() {
  static const IsaInfo& isa = choose();
  return isa;
}
const KernelTable& kernels() {
  static const KernelTable& table = isa_in_use().table();
  return table;
}

int likelihood_count() { return int(likelihoods().size()); }
const LikelihoodInfo& likelihood_info(int index) { return likelihoods()[index]; }

}  // namespace fastelbo
