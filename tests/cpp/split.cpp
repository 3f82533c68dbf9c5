// Every kernel in one piece, then its work items dealt out to threads: the same bits. What that is worth without
// sanitizers is a little; with them it is the proof that work items share nothing (thread) and that nothing is read or
// written outside of a tensor (address): every buffer is as long as what lies in it. Values are test_kernels.cpp's.
#include "split.h"

#include <cstring>
#include <deque>
#include <thread>
#include <utility>
#include <vector>

using namespace fastelbo;

namespace {

constexpr int kThreads = 4;
const int64_t kSeed = 7;

uint32_t state = 1;
uint32_t bits() { return (state = state * 1664525u + 1013904223u) >> 8; }

enum class Layout { dense, shifted, stepped, permuted };
constexpr Layout kLayouts[] = {Layout::dense, Layout::shifted, Layout::stepped, Layout::permuted};
constexpr DType kFloats[2][3] = {{DType::f32, DType::bf16, DType::f16}, {DType::f64, DType::f64, DType::f64}};
constexpr DType kData[] = {DType::f32, DType::u8, DType::b8};

int64_t bytes_of(DType t) {
  return t == DType::f64 ? 8 : t == DType::f32 ? 4 : t == DType::u8 || t == DType::b8 ? 1 : 2;
}

// Numbers in (0, 1), which every likelihood takes; bytes are any.
template <class T>
void put(char* to, T value) {
  std::memcpy(to, &value, sizeof(T));
}
void fill(std::vector<char>& buffer, DType t) {
  for (size_t i = 0; i < buffer.size(); i += size_t(bytes_of(t))) {
    char* to = &buffer[i];
    switch (t) {
      case DType::f32: put(to, float(bits() + 1) / 0x1p25f); break;
      case DType::f64: put(to, double(bits() + 1) / 0x1p25); break;
      case DType::bf16: put(to, uint16_t(0x3e80 | (bits() & 0x7f))); break;
      case DType::f16: put(to, uint16_t(0x3400 | (bits() & 0x3ff))); break;
      case DType::u8: put(to, uint8_t(bits())); break;
      case DType::b8: put(to, uint8_t(bits() & 1)); break;
      default: break;
    }
  }
}

struct Memory {
  std::deque<std::vector<char>> inputs, outputs;

  char* make(bool output, DType t, int64_t count) {
    auto& buffer = (output ? outputs : inputs).emplace_back(size_t(count * bytes_of(t)));
    if (!output) fill(buffer, t);
    return buffer.data();
  }
  const void* input(DType t, int64_t count) { return make(false, t, count); }
  const double* input(int64_t count) { return reinterpret_cast<double*>(make(false, DType::f64, count)); }
  double* output(int64_t count) { return reinterpret_cast<double*>(make(true, DType::f64, count)); }
  RowScalars rows(bool is_double, int64_t K, int64_t B) {
    return {input(is_double ? DType::f64 : DType::f32, K * B), 0, B, 1};
  }

  // [K, B, D] with nothing behind the last element
  View view(bool output, DType t, int64_t K, int64_t B, int64_t D, Layout layout) {
    View v;
    v.dtype = t, v.unit = t == DType::u8;
    v.size[0] = D, v.stride[0] = layout == Layout::stepped ? 2 : 1;
    if (layout == Layout::permuted && D % 2 == 0) {
      v.ndim = 2, v.size[0] = D / 2, v.size[1] = 2, v.stride[0] = 1, v.stride[1] = D / 2;
    }
    const int64_t shift = layout == Layout::shifted ? 1 : 0;
    const int64_t row = layout == Layout::stepped ? 2 * D - 1 : D;
    v.stride_b = row + shift, v.stride_k = v.stride_b * B;
    const int64_t count = shift + (K - 1) * v.stride_k + (B - 1) * v.stride_b + row;
    v.data = make(output, t, count) + shift * bytes_of(t);
    return v;
  }

  template <class Params>
  void compare(Checks& c, Kernel<Params> kernel, const Params& p, int64_t items, const char* what) {
    const auto clear = [&] {
      for (auto& o : outputs) std::fill(o.begin(), o.end(), 0);
    };
    clear();
    kernel(p, 0, items);
    const std::vector<std::vector<char>> whole(outputs.begin(), outputs.end());
    clear();
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        for (int64_t i = t; i < items; i += kThreads) kernel(p, i, i + 1);
      });
    }
    for (auto& t : threads) t.join();
    c.expect(std::equal(whole.begin(), whole.end(), outputs.begin()), what, double(items), 0);
  }
};

struct Shape {
  int64_t K, B, D;
};

// Rows of a likelihood with `count` parameters, of which the last is in turn full, [*event] or 0-d.
LogProbParams rows(Memory& m, const Shape& s, int count, bool is_double, int turn) {
  const auto [K, B, D] = s;
  const DType type = kFloats[is_double][turn % 3];
  const Layout layout = kLayouts[turn % 4];
  LogProbParams p;
  p.K = K, p.B = B, p.D = D, p.count = count;
  for (int i = 0; i < count; ++i) p.parameter[i] = m.view(false, type, K, B, D, kLayouts[(turn / (i + 1)) % 4]);
  p.x = m.view(false, turn % 2 ? type : kData[turn / 2 % 3], 1, B, D, kLayouts[turn / 3 % 4]);
  if (turn % 3 == 0) p.mask = m.view(false, kData[turn / 3 % 3], 1, B, D, kLayouts[turn / 5 % 4]);
  p.x.stride_k = p.mask.stride_k = 0;
  if (turn / 2 % 3 == 0) return p;
  for (int i = 0; i < count; ++i) {
    View& v = p.parameter[i];
    if (i == 0 || turn % 5 < 2) {
      p.grad[i] = m.view(true, type, K, B, D, layout);
      continue;
    }
    SharedGrad& g = p.shared_grad[i];
    v.stride_k = v.stride_b = 0;
    g.scalar = turn % 5 == 2;
    if (g.scalar) v.ndim = 1, v.size[0] = D, v.stride[0] = 0;
    g.size = g.scalar ? segments(D) : D;
    p.chunk = 1 + turn % 7;
    g.sums = m.make(true, is_double ? DType::f64 : DType::f32, p.chunks() * g.size);
  }
  return p;
}

void log_prob(Checks& c, const KernelTable& t, const Shape& s, bool is_double, int turn) {
  const auto [K, B, D] = s;
  for (int i = 0; i < likelihood_count(); ++i) {
    const LikelihoodInfo& info = likelihood_info(i);
    // another name of a likelihood; and of those that share nearly all of their code, one in nine
    if (info.kernel != i || (info.by_element && (turn + i) % 9)) continue;
    for (int count = info.fewest; count <= info.most; ++count) {
      ++turn;
      {
        Memory m;
        LogProbParams p = rows(m, s, count, is_double, turn);
        p.factor = m.rows(is_double, K, B);
        p.log_p = m.output(K * B * segments(D));
        if (turn % 7 == 0) p.grad_x = m.view(true, is_double ? DType::f64 : DType::f32, K, B, D, kLayouts[turn % 4]);
        m.compare(c, t.log_prob[i][count - 1][is_double], p, p.chunks() * segments(D), info.name);
      }
      Memory m;
      MultiSampleParams p;
      p.fit = rows(m, s, count, is_double, turn);
      p.fit.chunk = 1;
      for (SharedGrad& g : p.fit.shared_grad) g = {};
      p.estimator = {{0.3}, {0.5}, 1, 0, 1, -1};
      p.log_ratio = m.rows(is_double, K, B);
      const DType type = is_double ? DType::f64 : DType::f32;
      p.weights = m.output(K * B), p.bound = m.output(B), p.log_p = m.make(true, type, K * B);
      p.row_factor = m.make(true, type, K * B), p.gates = m.make(true, type, 2 * K * B);
      if (turn % 2) p.slopes = m.output(2 * B);
      m.compare(c, t.multi_sample[i][count - 1][is_double], p, B, "bounds");
    }
  }
}

Latents latents(Memory& m, const Shape& s, bool is_double, int turn) {
  const auto view = [&](int n) {
    return m.view(false, kFloats[is_double][(turn + n) % 3], 1, s.B, s.D, kLayouts[(turn + n) % 4]);
  };
  Latents q{s.B, s.D, view(0), view(1), {}, {}};
  if (turn % 2) q.prior_mu = view(2), q.prior_logvar = view(3);
  return q;
}
LatentGrads latent_grads(Memory& m, const Shape& s, bool is_double, int turn) {
  const auto view = [&](int n) {
    return m.view(true, kFloats[is_double][(turn + n) % 3], 1, s.B, s.D, kLayouts[(turn + n) % 4]);
  };
  LatentGrads grad{view(0), view(1), {}, {}};
  if (turn % 2) grad.prior_mu = view(2), grad.prior_logvar = view(3);
  return grad;
}

void latent(Checks& c, const KernelTable& t, const Shape& s, bool is_double, int turn) {
  const auto [K, B, D] = s;
  const DType type = kFloats[is_double][turn % 3];
  const Layout layout = kLayouts[turn / 2 % 4];
  {
    Memory m;
    KlParams p;
    p.q = latents(m, s, is_double, turn);
    p.grad = latent_grads(m, s, is_double, turn);
    p.factor = m.rows(is_double, 1, B);
    p.kl = m.output(B);
    if (turn % 3 == 0) p.dim_means = m.input(D), p.free_bits = {0.5}, p.floored_kl = m.output(B);
    m.compare(c, t.kl[is_double], p, row_blocks(B, D), "kl");
  }
  {
    Memory m;
    KlDimsParams p;
    p.q = latents(m, s, is_double, turn);
    p.out = m.output(D);
    m.compare(c, t.kl_dims[is_double], p, (D + kLatentTile - 1) / kLatentTile, "kl of dimensions");
  }
  {
    Memory m;
    SampleParams p;
    p.q = latents(m, s, is_double, turn);
    p.K = K, p.seed = &kSeed, p.first_sample = turn;
    if (turn % 4 == 0) p.eps = m.view(false, type, K, B, D, layout);
    p.z = m.view(true, type, K, B, D, layout);
    p.log_ratio = m.output(K * B), p.log_q = m.output(K * B);
    m.compare(c, t.sample[is_double], p, row_blocks(B, D) * sample_blocks(K), "samples");
  }
  {
    Memory m;
    SampleBackwardParams p;
    p.q = latents(m, s, is_double, turn);
    p.grad = latent_grads(m, s, is_double, turn);
    p.K = K, p.seed = &kSeed, p.first_sample = turn;
    if (turn % 4 == 0) p.eps = m.view(false, type, K, B, D, layout), p.grad_eps = m.view(true, type, K, B, D, layout);
    if (turn % 5) p.grad_z = m.view(false, type, K, B, D, layout);
    if (turn % 3) p.grad_log_ratio = m.rows(is_double, K, B);
    if (turn % 4 == 3) p.grad_log_q = m.rows(is_double, K, B);
    if (turn % 3 == 1) p.gate_path = m.rows(is_double, K, B), p.gate_score = m.rows(is_double, K, B);
    if (turn % 2) p.grad_kl = m.rows(is_double, 1, B);
    m.compare(c, t.sample_backward[is_double], p, row_blocks(B, D), "gradients of samples");
  }
  // twice as many rows as data; no row of every third datum
  std::vector<int64_t> sample, datum, order, starts(1, 0);
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t i = 0; i < (b % 3 == turn % 3 ? 0 : 3); ++i) {
      sample.push_back((i * 5 + b) % K), datum.push_back(b), order.push_back(int64_t(order.size()));
    }
    starts.push_back(int64_t(order.size()));
  }
  const int64_t n = int64_t(order.size());
  if (n == 0) return;
  {
    Memory m;
    SampleParams p;
    p.q = latents(m, s, is_double, turn);
    p.n = n, p.sample = sample.data(), p.datum = datum.data(), p.seed = &kSeed;
    p.z = m.view(true, type, 1, n, D, layout);
    p.log_ratio = m.output(n), p.log_q = m.output(n);
    m.compare(c, t.sample[is_double], p, n, "chosen samples");
  }
  {
    Memory m;
    SampleBackwardParams p;
    p.q = latents(m, s, is_double, turn);
    p.grad = latent_grads(m, s, is_double, turn);
    p.sample = sample.data(), p.order = order.data(), p.starts = starts.data(), p.seed = &kSeed;
    if (turn % 5) p.grad_z = m.view(false, type, 1, n, D, layout);
    if (turn % 3) p.grad_log_ratio = m.rows(is_double, 1, n);
    if (turn % 4 == 3) p.grad_log_q = m.rows(is_double, 1, n);
    if (turn % 2) p.grad_kl = m.rows(is_double, 1, B);
    if (turn % 3 == 1) p.gate_path = m.rows(is_double, 1, n), p.gate_score = m.rows(is_double, 1, n);
    m.compare(c, t.sample_backward[is_double], p, B, "gradients of chosen samples");
  }
}

void log_mean_exp(Checks& c, const KernelTable& t, const Shape& s, bool is_double) {
  const DType type = is_double ? DType::f64 : DType::f32;
  const int64_t outer = s.B, inner = s.K, columns = outer * inner;
  Memory m;
  LogMeanExpParams p;
  p.K = s.D, p.inner = inner;
  p.stride_outer = s.D * inner, p.stride_k = inner, p.stride_inner = 1;
  p.log_w = m.input(type, columns * s.D);
  p.out = m.make(true, type, columns);
  m.compare(c, t.log_mean_exp[is_double], p, columns, "log mean exp");
  p.grad = m.input(type, columns);
  p.grad_log_w = m.make(true, type, columns * s.D);
  m.compare(c, t.log_mean_exp_backward[is_double], p, columns, "its gradient");
}

// Of rows that have from none to all of their cells.
void csr(Checks& c, const KernelTable& t, int64_t N, int64_t D, int64_t M, bool is_double, int turn) {
  const DType type = is_double ? DType::f64 : DType::f32;
  std::vector<int64_t> starts = {0}, columns;
  for (int64_t row = 0; row < N; ++row) {
    for (int64_t d = 0; d < D; ++d) {
      if (int64_t(bits() % uint32_t(N)) <= row) columns.push_back(d);
    }
    if (row % 5 == 4) columns.resize(size_t(starts.back()));
    starts.push_back(int64_t(columns.size()));
  }
  const int64_t cells = starts.back();
  const std::vector<int32_t> narrow(columns.begin(), columns.end());
  Memory m;
  CsrParams p;
  p.N = N, p.D = D, p.lanes = (M + kCsrPanel - 1) / kCsrPanel * kCsrPanel, p.block = 16;
  p.starts = starts.data(), p.wide = turn % 2 == 0;
  p.columns = p.wide ? static_cast<const void*>(columns.data()) : narrow.data();
  p.values = m.view(false, turn % 2 ? type : kData[turn % 3], 1, 1, cells, Layout::dense);
  p.matrix = m.input(type, D * p.lanes), p.product = m.make(true, type, N * p.lanes);
  m.compare(c, t.csr_matmul[is_double], p, (N + kCsrRows - 1) / kCsrRows, "a sparse product");
  Memory of_rows;
  p.values = of_rows.view(false, type, 1, 1, cells, Layout::dense);
  p.matrix = of_rows.input(type, N * p.lanes), p.product = of_rows.make(true, type, D * p.lanes);
  of_rows.compare(c, t.csr_matmul_t[is_double], p, (D + p.block - 1) / p.block, "a sparse product, transposed");
}

void ppca(Checks& c, const KernelTable& t, int64_t N, int64_t D, int64_t M, bool is_double, int turn) {
  const int64_t lanes = (M + kPpcaPanel - 1) / kPpcaPanel * kPpcaPanel, tiles = (D + kPpcaTile - 1) / kPpcaTile;
  const DType type = is_double ? DType::f64 : DType::f32;
  const DType data = turn % 2 ? type : kData[turn % 3];
  {
    Memory m;
    PpcaProjectParams p;
    p.N = N, p.D = D, p.lanes = lanes;
    p.x = m.view(false, data, 1, N, D, kLayouts[turn % 4]);
    p.b = m.input(D), p.W = m.input(D * lanes);
    p.proj = m.output(N * lanes), p.square = m.output(N);
    m.compare(c, t.ppca_project, p, (N + kPpcaRows - 1) / kPpcaRows, "ppca projection");
  }
  {
    Memory m;
    PpcaInvertParams p;
    p.M = M, p.matrices = m.input(N * M * M), p.inverses = m.output(N * M * M);
    p.scratch = m.output(N * M), p.log_det = m.output(N);
    m.compare(c, t.ppca_invert, p, N, "inverses");
  }
  {
    Memory m;
    PpcaRestParams p;
    p.N = N, p.D = D, p.M = M, p.share = turn % 2 ? 0.25 : 1e-6;
    p.x = m.view(false, data, 1, N, D, kLayouts[turn % 4]);
    p.stride_m = (D + kPpcaPanel - 1) / kPpcaPanel * kPpcaPanel;
    p.b = m.input(D), p.Wt = m.input(M * p.stride_m);
    p.coords = m.input(N * M), p.square = m.input(N), p.rest = m.output(N);
    m.compare(c, t.ppca_rest, p, (N + kPpcaRows - 1) / kPpcaRows, "ppca rest");
  }
  for (const bool residual : {false, true}) {
    Memory m;
    PpcaSumsParams p;
    const int64_t chunks = (N + p.chunk - 1) / p.chunk;
    p.N = N, p.D = D, p.M = M, p.lanes = lanes;
    p.x = m.view(false, data, 1, N, D, kLayouts[turn % 4]);
    p.b = m.input(D), p.mean = m.input(N * lanes), p.weight = m.input(N);
    p.cross = m.make(true, residual ? type : DType::f64, chunks * D * lanes);
    p.sum = m.make(true, residual ? type : DType::f64, chunks * D);
    if (residual) {
      p.stride_m = (D + kPpcaPanel - 1) / kPpcaPanel * kPpcaPanel;
      p.Wt = m.input(M * p.stride_m), p.rounded_mean = m.input(type, N * lanes);
      p.coords = m.input(N * M);
      p.residual = m.make(true, type, N * D);
    }
    m.compare(c, residual ? t.ppca_residual[is_double] : t.ppca_moments, p, chunks * tiles, "ppca sums");
  }
}

// Of rows that share weights, of rows of the same weights, or of rows with weights of their own.
void mixture(Checks& c, const KernelTable& t, int64_t N, int64_t C, int64_t M, bool is_double, int turn) {
  const DType type = is_double ? DType::f64 : DType::f32, other = kFloats[is_double][turn % 3];
  const int64_t weight_rows = turn % 3 == 2 ? 2 : 1, sets = (N + weight_rows - 1) / weight_rows;
  const bool per_dimension = turn % 2;
  const int64_t groups = per_dimension ? M : 1, blocks = mixture_blocks(N);
  const Layout layout = kLayouts[turn % 4];
  const auto rows = [&](Memory& m) {
    MixtureParams p;
    p.N = N, p.C = C, p.M = M, p.per_dimension = per_dimension, p.weight_rows = weight_rows;
    p.z = m.view(false, other, 1, M, N, layout);
    p.mu = m.input(type, C * M), p.inv_std = m.input(type, C * M), p.base = m.input(type, C * groups);
    if (turn % 3) p.weights = m.view(false, type, 1, C, sets, kLayouts[turn / 2 % 4]);
    return p;
  };
  {
    Memory m;
    MixtureComponentsParams p;
    p.C = C, p.M = M, p.per_dimension = per_dimension, p.stride_weights = 1;
    p.mu = m.view(false, other, 1, C, M, layout), p.logvar = m.view(false, other, 1, C, M, kLayouts[turn / 2 % 4]);
    if (turn % 3 == 0) p.weights = m.input(type, C);
    if (turn % 4) p.copied_mu = m.make(true, type, C * M);
    p.inv_std = m.make(true, type, C * M), p.base = m.make(true, type, C * groups);
    m.compare(c, t.mixture_components[is_double], p, C, "components of a mixture");
  }
  {
    Memory m;
    MixtureParams p = rows(m);
    p.log_prob = m.view(true, type, 1, groups, N, layout);
    m.compare(c, t.mixture[is_double], p, blocks, "mixture");
  }
  for (const bool by_components : {false, true}) {
    Memory m;
    MixtureBackwardParams p;
    p.of = rows(m);
    p.of.log_prob = m.view(false, type, 1, groups, N, layout);
    p.grad = m.view(false, type, 1, groups, N, kLayouts[turn / 2 % 4]);
    p.segment = by_components ? blocks : 1, p.segments = (blocks + p.segment - 1) / p.segment;
    p.range = by_components ? kMixtureTile : C, p.ranges = (C + p.range - 1) / p.range;
    if (!by_components) p.grad_z = m.view(true, other, 1, M, N, kLayouts[turn / 3 % 4]);
    p.sums = m.output(p.segments * 2 * C * M), p.weight_sums = m.output(p.segments * C);
    if (p.of.weights && (weight_rows == 1 || by_components)) {
      p.grad_weights = m.view(true, weight_rows > 1 ? DType::f64 : type, 1, C, sets, layout);
    }
    m.compare(c, t.mixture_backward[is_double], p, p.segments * p.ranges, "gradients of a mixture");
  }
  Memory m;
  MixtureSumsParams p;
  p.C = C, p.M = M, p.segments = 1 + turn % 3, p.inv_std = m.input(type, C * M);
  p.sums = m.input(p.segments * 2 * C * M), p.weight_sums = m.input(p.segments * C);
  p.grad_mu = m.view(true, other, 1, C, M, layout), p.grad_logvar = m.view(true, other, 1, C, M, layout);
  p.grad_weights = m.view(true, other, 1, C, 1, layout);
  m.compare(c, t.mixture_sums[is_double], p, C, "sums of a mixture");
}

// Item i reads what item i + 1 writes, and the last one what lies behind the end.
void broken_kernel(const KlDimsParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) p.out[i] = p.out[i + 1] + 1;
}

}  // namespace

void split_broken(Checks& c) {
  Memory m;
  KlDimsParams p;
  p.out = m.output(64);
  m.compare(c, Kernel<KlDimsParams>(broken_kernel), p, 64, "a broken kernel");
}

void split(Checks& c, const KernelTable& t, bool quick) {
  int turn = 0;
  for (const bool is_double : {false, true}) {
    for (const int64_t D : {1, 2, 3, 8, 15, 16, 17, 34, 70, 511, 512, 514, 1030, 4096, 4098, 8200}) {
      for (const Shape& s : {Shape{1, 1, D}, Shape{1, 5, D}, Shape{3, 2, D}, Shape{70, 9, D}}) {
        if (s.K * s.B * s.D > (quick ? 1000 : 50000)) continue;
        for (int i = 0; i < 3; ++i) log_prob(c, t, s, is_double, turn += 5);
        for (int i = 0; i < 3; ++i) latent(c, t, s, is_double, turn += 5);
        log_mean_exp(c, t, s, is_double);
      }
    }
    for (const int64_t D : {1, 7, 16, 239, 240, 241, 500}) {
      for (const int64_t N : {1, 5, 48, 100}) {
        for (const int64_t M : {1, 16, 20}) {
          ppca(c, t, N, D, M, is_double, ++turn);
          csr(c, t, N, D, 5 * M, is_double, turn);
        }
      }
    }
    for (const int64_t N : {1, 7, 64, 130, 1100}) {
      if (quick && N > 64) continue;
      for (const int64_t C : {1, 5, 40, 70}) {
        for (const int64_t M : {1, 2, 3, 9}) mixture(c, t, N, C, M, is_double, turn += 5);
      }
    }
  }
}
