// The kernels without torch: what a 30-line C++ program can call. Every instruction set that this CPU has, against
// double: values and gradients, tails, strides, dtypes, masks.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/kernels/kernels.h"
#include "split.h"

using namespace fastelbo;

namespace {

View view(void* data, DType dtype, int64_t stride_k, int64_t stride_b, int64_t size, int64_t stride = 1) {
  View v;
  v.data = data, v.dtype = dtype, v.stride_k = stride_k, v.stride_b = stride_b;
  v.size[0] = size, v.stride[0] = stride;
  return v;
}

uint32_t state = 12345;
double uniform() { return (state = state * 1664525u + 1013904223u) / 4294967296.0; }

uint16_t bfloat16_of(float f) {
  uint32_t b;
  std::memcpy(&b, &f, 4);
  return uint16_t((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
float float_of(uint16_t h) {
  const uint32_t b = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}

// Bernoulli, the only formula that is needed here twice
double value_of(double l, double x) { return l * (x - (l > 0)) - std::log1p(std::exp(-std::fabs(l))); }
double slope_of(double l, double x) { return x - 1 / (1 + std::exp(-l)); }

void bernoulli(Checks& c, const KernelTable& t, int64_t D, int64_t stride, bool masked) {
  const int64_t K = 2, B = 3, n = K * B * D;
  std::vector<float> l(n * stride), x(B * D), mask(B * D), grad(n, -1);
  std::vector<uint16_t> half(n), half_grad(n);
  for (auto& v : l) v = float(uniform() * 20 - 10);
  for (auto& v : x) v = float(uniform());
  for (int64_t i = 0; i < B * D; ++i) {
    mask[i] = masked ? float(i % 3) : 1;
    if (mask[i] == 0) x[i] = NAN;
  }
  for (int64_t i = 0; i < n; ++i) half[i] = bfloat16_of(l[i * stride]);
  for (const bool is_half : {false, true}) {
    std::vector<double> out(K * B * segments(D));
    LogProbParams p;
    p.K = K, p.B = B, p.D = D;
    p.parameter[0] = is_half ? view(half.data(), DType::bf16, B * D, D, D)
                             : view(l.data(), DType::f32, B * D * stride, D * stride, D, stride);
    p.x = view(x.data(), DType::f32, 0, D, D);
    if (masked) p.mask = view(mask.data(), DType::f32, 0, D, D);
    p.grad[0] = is_half ? view(half_grad.data(), DType::bf16, B * D, D, D) : view(grad.data(), DType::f32, B * D, D, D);
    p.factor.constant = -0.25;
    p.log_p = out.data();
    t.log_prob[0][0][0](p, 0, K * B * segments(D));
    double worst = 0, worst_grad = 0;
    for (int64_t row = 0; row < K * B; ++row) {
      double sum = 0, size = 1;
      for (int64_t d = 0; d < D; ++d) {
        const int64_t i = row * D + d, b = row % B;
        const double m = mask[b * D + d], logit = is_half ? float_of(half[i]) : l[i * stride];
        const double got = is_half ? float_of(half_grad[i]) : grad[i];
        if (m == 0) {
          worst_grad = std::fmax(worst_grad, std::fabs(got));
          continue;
        }
        const double v = m * value_of(logit, x[b * D + d]), g = -0.25 * m * slope_of(logit, x[b * D + d]);
        sum += v, size += std::fabs(v);
        worst_grad = std::fmax(worst_grad, std::fabs(got - g) / (is_half ? std::fabs(g) + 1e-3 : 1));
      }
      double got = 0;
      for (int64_t s = 0; s < segments(D); ++s) got += out[row * segments(D) + s];
      worst = std::fmax(worst, std::fabs(got - sum) / size);
    }
    c.at_most(worst, kRoundings * 3e-7, "log p of a row, relative to its absolute sum");
    c.at_most(worst_grad, is_half ? 0x1p-8 : 2e-7, "gradient of a row");
  }
}

void split_anywhere(Checks& c, const KernelTable& t) {
  const int64_t B = 5, D = 10000, n = segments(D);
  std::vector<float> l(B * D), x(B * D);
  for (auto& v : l) v = float(uniform() * 4 - 2);
  for (auto& v : x) v = float(uniform());
  std::vector<double> whole(B * n), parts(B * n);
  LogProbParams p;
  p.B = B, p.D = D;
  p.parameter[0] = view(l.data(), DType::f32, 0, D, D), p.x = view(x.data(), DType::f32, 0, D, D);
  p.log_p = whole.data();
  t.log_prob[0][0][0](p, 0, B * n);
  p.log_p = parts.data();
  for (int64_t i = B * n; i-- > 0;) t.log_prob[0][0][0](p, i, i + 1);
  c.expect(whole == parts, "the same bits for any split of the work", 0, 0);
}

void samples(Checks& c, const KernelTable& t) {
  for (const int64_t D : {1, 3, 50, 513}) {
    const int64_t K = 70, B = 9, blocks = row_blocks(B, D) * sample_blocks(K);
    std::vector<float> mu(B * D), logvar(B * D), z(K * B * D), part(3 * B * D);
    for (auto& v : mu) v = float(uniform());
    for (auto& v : logvar) v = float(uniform() - 1);
    std::vector<double> ratio(K * B), log_q(K * B), part_ratio(3 * B), part_log_q(3 * B);
    SampleParams p;
    const int64_t seed = 99;
    p.K = K, p.q.B = B, p.q.D = D, p.seed = &seed;
    p.q.mu = view(mu.data(), DType::f32, 0, D, D), p.q.logvar = view(logvar.data(), DType::f32, 0, D, D);
    p.z = view(z.data(), DType::f32, B * D, D, D), p.log_ratio = ratio.data(), p.log_q = log_q.data();
    t.sample[0](p, 0, blocks);
    double worst = 0, worst_log_q = 0;
    for (int64_t row = 0; row < K * B; ++row) {
      double sum = 0, size = 1, density = 0;
      for (int64_t d = 0; d < D; ++d) {
        const double lv = logvar[row % B * D + d], zi = z[row * D + d];
        const double e = (zi - mu[row % B * D + d]) / std::exp(lv / 2);
        sum += (e * e - zi * zi + lv) / 2, size += e * e + zi * zi;
        density -= (e * e + lv + std::log(2 * M_PI)) / 2;
      }
      worst_log_q = std::fmax(worst_log_q, std::fabs(log_q[row] - density) / size);
      worst = std::fmax(worst, std::fabs(ratio[row] - sum) / size);
    }
    c.at_most(worst, 3e-6, "log ratio of the samples that came");
    c.at_most(worst_log_q, 3e-6, "log density of the samples that came");
    p.K = 3, p.first_sample = 65;
    p.z = view(part.data(), DType::f32, B * D, D, D), p.log_ratio = part_ratio.data(), p.log_q = part_log_q.data();
    t.sample[0](p, 0, row_blocks(B, D) * sample_blocks(3));
    c.expect(std::memcmp(part.data(), z.data() + 65 * B * D, part.size() * 4) == 0, "samples by chunk", double(D), 0);
  }
}

// The sums over the rows of the gradient of a Gaussian's logvar that all rows share: [D], and one number.
void shared_gradients(Checks& c, const KernelTable& t, int64_t D) {
  const int64_t K = 2, B = 5, chunk = 3, chunks = (K * B + chunk - 1) / chunk;
  int gaussian = 0;
  while (std::strcmp(likelihood_info(gaussian).name, "gaussian") != 0) ++gaussian;
  std::vector<float> mean(K * B * D), x(B * D), logvar(D), sums(chunks * std::max(D, segments(D)));
  for (auto& v : mean) v = float(uniform() - 0.5);
  for (auto& v : x) v = float(uniform());
  for (const bool scalar : {false, true}) {
    for (auto& v : logvar) v = scalar ? 0.3f : float(uniform() - 0.5);
    LogProbParams p;
    p.K = K, p.B = B, p.D = D, p.count = 2, p.chunk = chunk;
    p.parameter[0] = view(mean.data(), DType::f32, B * D, D, D);
    p.parameter[1] = view(logvar.data(), DType::f32, 0, 0, D, scalar ? 0 : 1);
    p.x = view(x.data(), DType::f32, 0, D, D);
    p.factor.constant = -0.5;
    p.shared_grad[1] = {sums.data(), scalar, scalar ? segments(D) : D};
    t.log_prob[gaussian][1][0](p, 0, chunks * segments(D));
    double worst = 0, total = 0, size = 1;
    double all = 0;
    for (int64_t d = 0; d < D; ++d) {
      double exact = 0, terms = 1e-3;
      for (int64_t row = 0; row < K * B; ++row) {
        const double delta = x[row % B * D + d] - double(mean[row * D + d]);
        const double term = -0.25 * (delta * delta * std::exp(-double(logvar[d])) - 1);
        exact += term, terms += std::fabs(term);
      }
      all += exact, size += terms;
      if (scalar) continue;
      double got = 0;
      for (int64_t i = 0; i < chunks; ++i) got += sums[i * D + d];
      worst = std::fmax(worst, std::fabs(got - exact) / terms);
    }
    for (int64_t i = 0; scalar && i < chunks * segments(D); ++i) total += sums[i];
    if (scalar) worst = std::fabs(total - all) / size;
    c.at_most(worst, 1e-6, scalar ? "gradient of one number" : "gradient that rows share");
  }
}

// The importance-weighted bound with doubly reparameterized gates, as its paper writes it.
void multi_sample(Checks& c, const KernelTable& t, int64_t D) {
  const int64_t K = 5, B = 3;
  std::vector<float> l(K * B * D), x(B * D), ratio(K * B), grad(K * B * D), log_p(K * B), factor(K * B),
      gates(2 * K * B);
  std::vector<double> weights(K * B), bound(B);
  for (auto& v : l) v = float(uniform() * 6 - 3);
  for (auto& v : x) v = float(uniform());
  for (auto& v : ratio) v = float(uniform() * 4 - 2);
  MultiSampleParams p;
  p.fit.K = K, p.fit.B = B, p.fit.D = D;
  p.fit.parameter[0] = view(l.data(), DType::f32, B * D, D, D), p.fit.x = view(x.data(), DType::f32, 0, D, D);
  p.fit.grad[0] = view(grad.data(), DType::f32, B * D, D, D);
  p.estimator = {{0}, {0}, 1, 0, 1, 0};
  p.log_ratio = {ratio.data(), 0, B, 1};
  p.datum_weight = 1.0 / B;
  p.weights = weights.data(), p.bound = bound.data();
  p.log_p = log_p.data(), p.row_factor = factor.data(), p.gates = gates.data();
  t.multi_sample[0][0][0](p, 0, B);
  double worst = 0, worst_grad = 0, worst_gate = 0;
  for (int64_t b = 0; b < B; ++b) {
    std::vector<double> log_w(K);
    double sum = 0, top = -INFINITY;
    for (int64_t k = 0; k < K; ++k) {
      log_w[k] = ratio[k * B + b];
      for (int64_t d = 0; d < D; ++d) log_w[k] += value_of(l[(k * B + b) * D + d], x[b * D + d]);
      top = std::max(top, log_w[k]);
    }
    for (int64_t k = 0; k < K; ++k) sum += std::exp(log_w[k] - top);
    worst = std::fmax(worst, std::fabs(bound[b] - (top + std::log(sum / K))) / (1 + std::fabs(top)));
    for (int64_t k = 0; k < K; ++k) {
      const double a = std::exp(log_w[k] - top) / sum;
      worst_gate = std::fmax(worst_gate, std::fabs(gates[k * B + b] - (a - 1)));
      worst_gate = std::fmax(worst_gate, std::fabs(gates[(K + k) * B + b] + 1));
      for (int64_t d = 0; d < D; ++d) {
        const int64_t i = (k * B + b) * D + d;
        const double exact = -a / B * slope_of(l[i], x[b * D + d]);
        worst_grad = std::fmax(worst_grad, std::fabs(grad[i] - exact));
      }
    }
  }
  // an error of log w moves every weight by that much, relatively
  c.at_most(worst, 3e-7, "importance-weighted bound");
  c.at_most(worst_grad, 1e-6 + 3e-7 * double(D), "its gradient by the logits");
  c.at_most(worst_gate, 1e-6 + 3e-7 * double(D), "gates of the doubly reparameterized gradient");
}

// A mixture and its gradients, by the sums of their definition; the second component has no weight.
void mixture(Checks& c, const KernelTable& t, int64_t N, int64_t C, int64_t M, bool per_dimension) {
  const int64_t groups = per_dimension ? M : 1, dims = per_dimension ? 1 : M;
  std::vector<float> z(N * M), mu(C * M), logvar(C * M), weights(C), up(groups * N);
  std::vector<float> inv_std(C * M), base(C * groups), log_p(groups * N), grad_z(N * M), grad_mu(C * M),
      grad_logvar(C * M), grad_weights(C);
  for (auto& v : z) v = float(uniform() * 4 - 2);
  for (auto& v : mu) v = float(uniform() * 4 - 2);
  for (auto& v : logvar) v = float(uniform() * 2 - 1);
  for (auto& v : weights) v = float(uniform() * 2 - 3);
  for (auto& v : up) v = float(uniform() * 2 - 1);
  if (C > 1) weights[1] = -INFINITY;
  // rows of z and of its gradient lie one behind the other, as do the numbers of a group
  const auto rows = [&](std::vector<float>& v, int64_t step, int64_t stride_b) {
    return view(v.data(), DType::f32, 0, stride_b, N, step);
  };
  MixtureComponentsParams parts;
  parts.C = C, parts.M = M, parts.per_dimension = per_dimension;
  parts.mu = view(mu.data(), DType::f32, 0, M, M), parts.logvar = view(logvar.data(), DType::f32, 0, M, M);
  parts.weights = weights.data(), parts.stride_weights = 1;
  parts.inv_std = inv_std.data(), parts.base = base.data();
  t.mixture_components[0](parts, 0, C);
  MixtureBackwardParams b;
  b.of.N = N, b.of.C = C, b.of.M = M, b.of.per_dimension = per_dimension;
  b.of.z = rows(z, M, 1);
  b.of.mu = mu.data(), b.of.inv_std = inv_std.data(), b.of.base = base.data();
  b.of.log_prob = rows(log_p, 1, N);
  t.mixture[0](b.of, 0, mixture_blocks(N));
  b.grad = rows(up, 1, N), b.grad_z = rows(grad_z, M, 1);
  b.segment = 1, b.segments = mixture_blocks(N), b.range = C;
  std::vector<double> sums(b.segments * 2 * C * M), weight_sums(b.segments * C);
  b.sums = sums.data(), b.weight_sums = weight_sums.data();
  t.mixture_backward[0](b, 0, b.segments);
  MixtureSumsParams s;
  s.C = C, s.M = M, s.segments = b.segments, s.inv_std = inv_std.data();
  s.sums = sums.data(), s.weight_sums = weight_sums.data();
  s.grad_mu = view(grad_mu.data(), DType::f32, 0, M, M), s.grad_logvar = view(grad_logvar.data(), DType::f32, 0, M, M);
  s.grad_weights = view(grad_weights.data(), DType::f32, 0, 1, 1);
  t.mixture_sums[0](s, 0, C);

  struct Sum {
    double exact = 0, terms = 1;
    void operator+=(double term) { exact += term, terms += std::fabs(term); }
  };
  std::vector<Sum> exact_z(N * M), exact_mu(C * M), exact_logvar(C * M), exact_weights(C);
  double worst = 0;
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t g = 0; g < groups; ++g) {
      std::vector<double> terms(C);
      double top = -INFINITY, sum = 0;
      for (int64_t k = 0; k < C; ++k) {
        terms[k] = weights[k];
        for (int64_t m = g; m < g + dims; ++m) {
          const double delta = z[n * M + m] - double(mu[k * M + m]), lv = logvar[k * M + m];
          terms[k] -= 0.5 * (delta * delta * std::exp(-lv) + lv + std::log(2 * M_PI));
        }
        top = std::max(top, terms[k]);
      }
      for (const double term : terms) sum += std::exp(term - top);
      const double total = top + std::log(sum);
      worst = std::max(worst, std::fabs(log_p[g * N + n] - total) / (1 + std::fabs(total)));
      for (int64_t k = 0; k < C; ++k) {
        const double r = up[g * N + n] * std::exp(terms[k] - total);
        exact_weights[k] += r;
        for (int64_t m = g; m < g + dims; ++m) {
          const double delta = z[n * M + m] - double(mu[k * M + m]);
          const double pull = delta * std::exp(-double(logvar[k * M + m]));
          exact_z[n * M + m] += -r * pull, exact_mu[k * M + m] += r * pull;
          exact_logvar[k * M + m] += 0.5 * r * (delta * pull - 1);
        }
      }
    }
  }
  const auto compare = [&](const std::vector<float>& got, const std::vector<Sum>& exact, const char* what) {
    double error = 0;
    for (size_t i = 0; i < got.size(); ++i)
      error = std::max(error, std::fabs(got[i] - exact[i].exact) / exact[i].terms);
    // an error of t moves every responsibility by that much, relatively
    c.at_most(error, kRoundings * (1e-6 + 2e-7 * double(dims)), what);
  };
  c.at_most(worst, kRoundings * 5e-7, "log density of a mixture");
  compare(grad_z, exact_z, "its gradient by z"), compare(grad_mu, exact_mu, "its gradient by mu");
  compare(grad_logvar, exact_logvar, "its gradient by logvar");
  compare(grad_weights, exact_weights, "its gradient by the weights");
}

// Normals as their bits, to standard output; of a file with those of another machine, how far these are from them.
void normals(Checks& c, const char* path) {
  const int64_t seed = 99, D = 1 << 20;
  std::vector<float> zeros(D), z(D), others(D);
  double log_ratio = 0, log_q = 0;
  SampleParams p;
  p.q.B = 1, p.q.D = D, p.seed = &seed;
  p.q.mu = p.q.logvar = view(zeros.data(), DType::f32, 0, D, D);
  p.z = view(z.data(), DType::f32, 0, D, D), p.log_ratio = &log_ratio, p.log_q = &log_q;
  kernels().sample[0](p, 0, 1);
  if (!path) {
    std::fwrite(z.data(), sizeof(float), z.size(), stdout);
    return;
  }
  std::FILE* file = std::fopen(path, "rb");
  c.expect(file && std::fread(others.data(), sizeof(float), others.size(), file) == others.size(), path, 0, 0);
  if (file) std::fclose(file);
  const auto place = [](float f) {  // among all floats, in their order
    int32_t bits;
    std::memcpy(&bits, &f, 4);
    return int64_t(bits < 0 ? INT32_MIN - bits : bits);
  };
  int64_t worst = 0, differ = 0;
  for (int64_t i = 0; i < D; ++i) {
    const int64_t ulps = std::abs(place(z[i]) - place(others[i]));
    worst = std::max(worst, ulps), differ += ulps != 0;
  }
  std::printf("%lld of %lld normals differ, by at most %lld ulp\n", (long long)differ, (long long)D, (long long)worst);
  c.at_most(double(worst), 4, "ulps between normals");
}

}  // namespace

void math_baseline(Checks&);
#if defined(__x86_64__)
void math_avx2(Checks&);
void math_avx512(Checks&);
void (*const kMaths[])(Checks&) = {math_baseline, math_avx2, math_avx512};
#else
void (*const kMaths[])(Checks&) = {math_baseline};
#endif

// For ThreadSanitizer, which is slow: split() alone starts threads, and what they share is the same on every
// instruction set, of which it takes the widest.
#ifdef __SANITIZE_THREAD__
constexpr bool kThreadsAlone = true;
#else
constexpr bool kThreadsAlone = false;
#endif

void on_one_thread(Checks& c, const KernelTable& table) {
  for (int64_t D = 1; D <= 70; ++D) bernoulli(c, table, D, 1, false);
  for (const int64_t D : {511, 512, 513, 784, 4096, 4097, 9000}) {
    for (const int64_t stride : {1, 3}) {
      bernoulli(c, table, D, stride, false);
      bernoulli(c, table, D, stride, true);
    }
  }
  for (const int64_t D : {1, 15, 784, 4097}) {
    shared_gradients(c, table, D);
    if (D <= kSegment) multi_sample(c, table, D);
  }
  for (const int64_t N : {1, 15, 64, 130, 1100}) {
    for (const int64_t C : {1, 3, 33}) {
      for (const int64_t M : {1, 2, 7, 18}) {
        for (const bool per_dimension : {false, true}) mixture(c, table, N, C, M, per_dimension);
      }
    }
  }
  split_anywhere(c, table);
  samples(c, table);
}

int main(int argc, char** argv) {
  Checks c;
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "broken") split_broken(c);
  if (what == "normals") normals(c, argv[2]);
  if (what == "broken" || what == "normals") return c.failed != 0;
  int skipped = 0;
  for (int i = 0; i < isa_count(); ++i) {
    const IsaInfo& isa = isa_info(i);
    if (!isa.supported) {
      std::printf("SKIPPED %s: this CPU has not got it\n", isa.name);
      ++skipped;
      continue;
    }
    if (kThreadsAlone && i + 1 < isa_count() && isa_info(i + 1).supported) continue;
    std::printf("kernels, %s\n", isa.name);
    if (!kThreadsAlone) kMaths[i](c), on_one_thread(c, isa.table());
    split(c, isa.table(), what == "quick");
  }
  std::printf("%d passed, %d failed, %d skipped\n", c.passed, c.failed, skipped);
  return c.failed != 0;
}
