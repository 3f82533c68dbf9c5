// Loops that threads share out, on the OpenMP runtime that torch has loaded.
//
// at::parallel_for is a template: its `#pragma omp parallel` would be compiled here, by clang for LLVM's OpenMP, which
// is a second runtime, with threads and numbers of threads of its own. So no source is compiled with -fopenmp, and this
// calls what g++ makes of the pragma. Every runtime that torch may have loaded on Linux offers that: GCC's, LLVM's and
// Intel's. Elsewhere, and with a torch without OpenMP, the loops are serial, and build_info() says so.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <exception>

#if AT_PARALLEL_OPENMP && defined(__linux__)
#define FASTELBO_OPENMP 1
extern "C" {
void GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_num_threads() noexcept;
int omp_get_thread_num() noexcept;
}
#else
#define FASTELBO_OPENMP 0
#endif

namespace fastelbo {

#if FASTELBO_OPENMP
// A team of threads, each with its part of [begin, end).
template <class F>
struct Team {
  const int64_t begin, end, grain;
  const F& f;
  std::atomic_flag failed{};
  std::exception_ptr error{};

  static void run(void* data) {
    Team& team = *static_cast<Team*>(data);
    const int64_t items = team.end - team.begin;
    const int64_t threads = std::min<int64_t>(omp_get_num_threads(), at::divup(items, team.grain));
    const int64_t part = at::divup(items, threads), first = team.begin + omp_get_thread_num() * part;
    try {
      at::parallel_for(first, std::min(team.end, first + part), team.grain, team.f);  // if not empty, on this thread
    } catch (...) {
      if (!team.failed.test_and_set()) team.error = std::current_exception();
    }
  }
};

// f(first, last) of parts of [begin, end) that together are all of it, as at::parallel_for shares them out.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (end - begin <= grain || at::in_parallel_region() || at::get_num_threads() == 1) {
    return at::parallel_for(begin, end, grain, f);  // on this thread
  }
  Team<F> team{begin, end, grain, f};
  GOMP_parallel(Team<F>::run, &team, 0, 0);  // 0: as many threads as torch.set_num_threads() has set
  if (team.error) std::rethrow_exception(team.error);
}
#else
using at::parallel_for;
#endif

}  // namespace fastelbo
