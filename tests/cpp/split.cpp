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
  RowScalars rows(bool wide, int64_t K, int64_t B) { return {input(wide ? DType::f64 : DType::f32, K * B), 0, B, 1}; }

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

void log_prob(Checks& c, const KernelTable& t, const Shape& s, bool wide, int turn) {
  const auto [K, B, D] = s;
  for (int i = 0; i < likelihood_count(); ++i) {
    for (const bool scale : {false, true}) {
      if (scale && !likelihood_info(i).takes_scale) continue;
      const DType type = kFloats[wide][++turn % 3];
      const Layout layout = kLayouts[turn % 4];
      Memory m;
      LogProbParams p;
      p.K = K, p.B = B, p.D = D;
      p.recon = m.view(false, type, K, B, D, layout);
      if (scale) p.scale = m.view(false, type, K, B, D, kLayouts[turn / 4 % 4]);
      p.x = m.view(false, turn % 2 ? type : kData[turn / 2 % 3], 1, B, D, kLayouts[turn / 3 % 4]);
      if (turn % 3 == 0) p.mask = m.view(false, kData[turn / 3 % 3], 1, B, D, kLayouts[turn / 5 % 4]);
      p.x.stride_k = p.mask.stride_k = 0;
      p.grad = m.rows(wide, K, B);
      p.out = m.output(K * B * segments(D));
      const int grads = turn / 2 % 3;
      if (grads) p.grad_recon = m.view(true, type, K, B, D, layout);
      if (grads && scale) p.grad_scale = m.view(true, type, K, B, D, layout);
      if (grads == 2) p.grad_x = m.view(true, wide ? DType::f64 : DType::f32, K, B, D, layout);
      m.compare(c, t.log_prob[i][scale][wide], p, K * B * segments(D), likelihood_info(i).name);
    }
  }
}

template <class Params>
void set_latent(Memory& m, Params& p, const Shape& s, bool wide, int turn) {
  const auto view = [&](int n) {
    return m.view(false, kFloats[wide][(turn + n) % 3], 1, s.B, s.D, kLayouts[(turn + n) % 4]);
  };
  p.B = s.B, p.D = s.D;
  p.mu = view(0), p.logvar = view(1);
  if (turn % 2) p.prior_mu = view(2), p.prior_logvar = view(3);
}
template <class Params>
void set_latent_grads(Memory& m, Params& p, const Shape& s, bool wide, int turn) {
  const auto view = [&](int n) {
    return m.view(true, kFloats[wide][(turn + n) % 3], 1, s.B, s.D, kLayouts[(turn + n) % 4]);
  };
  p.grad_mu = view(0), p.grad_logvar = view(1);
  if (turn % 2) p.grad_prior_mu = view(2), p.grad_prior_logvar = view(3);
}

void latent(Checks& c, const KernelTable& t, const Shape& s, bool wide, int turn) {
  const auto [K, B, D] = s;
  const DType type = kFloats[wide][turn % 3];
  const Layout layout = kLayouts[turn / 2 % 4];
  {
    Memory m;
    KlParams p;
    set_latent(m, p, s, wide, turn);
    set_latent_grads(m, p, s, wide, turn);
    p.grad = m.rows(wide, 1, B);
    p.out = m.output(B);
    if (turn % 3 == 0) p.dim_means = m.input(D), p.free_bits = 0.5, p.charged = m.output(B);
    m.compare(c, t.kl[wide], p, row_blocks(B, D), "kl");
  }
  {
    Memory m;
    KlDimsParams p;
    set_latent(m, p, s, wide, turn);
    p.out = m.output(D);
    m.compare(c, t.kl_dims[wide], p, (D + kLatentTile - 1) / kLatentTile, "kl of dimensions");
  }
  {
    Memory m;
    SampleParams p;
    set_latent(m, p, s, wide, turn);
    p.K = K, p.seed = 7, p.first_sample = turn;
    if (turn % 4 == 0) p.eps = m.view(false, type, K, B, D, layout);
    p.z = m.view(true, type, K, B, D, layout);
    p.log_ratio = m.output(K * B);
    m.compare(c, t.sample[wide], p, row_blocks(B, D) * sample_blocks(K), "samples");
  }
  {
    Memory m;
    SampleBackwardParams p;
    set_latent(m, p, s, wide, turn);
    set_latent_grads(m, p, s, wide, turn);
    p.K = K, p.seed = 7, p.first_sample = turn;
    if (turn % 4 == 0) p.eps = m.view(false, type, K, B, D, layout), p.grad_eps = m.view(true, type, K, B, D, layout);
    if (turn % 5) p.grad_z = m.view(false, type, K, B, D, layout);
    if (turn % 3) p.grad_log_ratio = m.rows(wide, K, B);
    if (turn % 3 == 1) p.gate_path = m.rows(wide, K, B), p.gate_score = m.rows(wide, K, B);
    if (turn % 2) p.grad_kl = m.rows(wide, 1, B);
    m.compare(c, t.sample_backward[wide], p, row_blocks(B, D), "gradients of samples");
  }
}

void log_mean_exp(Checks& c, const KernelTable& t, const Shape& s, bool wide) {
  const DType type = wide ? DType::f64 : DType::f32;
  const int64_t outer = s.B, inner = s.K, columns = outer * inner;
  Memory m;
  LogMeanExpParams p;
  p.K = s.D, p.inner = inner;
  p.stride_outer = s.D * inner, p.stride_k = inner, p.stride_inner = 1;
  p.log_w = m.input(type, columns * s.D);
  p.out = m.make(true, type, columns);
  m.compare(c, t.log_mean_exp[wide], p, columns, "log mean exp");
  p.grad = m.input(type, columns);
  p.grad_log_w = m.make(true, type, columns * s.D);
  m.compare(c, t.log_mean_exp_backward[wide], p, columns, "its gradient");
}

void ppca(Checks& c, const KernelTable& t, int64_t N, int64_t D, int64_t M, bool wide, int turn) {
  const int64_t lanes = (M + kPpcaPanel - 1) / kPpcaPanel * kPpcaPanel, tiles = (D + kPpcaTile - 1) / kPpcaTile;
  const DType type = wide ? DType::f64 : DType::f32;
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
    m.compare(c, residual ? t.ppca_residual[wide] : t.ppca_moments, p, chunks * tiles, "ppca sums");
  }
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

void split(Checks& c, const KernelTable& t) {
  int turn = 0;
  for (const bool wide : {false, true}) {
    for (const int64_t D : {1, 2, 3, 8, 15, 16, 17, 34, 70, 511, 512, 514, 1030, 4096, 4098, 8200}) {
      for (const Shape& s : {Shape{1, 1, D}, Shape{1, 5, D}, Shape{3, 2, D}, Shape{70, 9, D}}) {
        if (s.K * s.B * s.D > 50000) continue;
        for (int i = 0; i < 3; ++i) log_prob(c, t, s, wide, turn += 5);
        for (int i = 0; i < 3; ++i) latent(c, t, s, wide, turn += 5);
        log_mean_exp(c, t, s, wide);
      }
    }
    for (const int64_t D : {1, 7, 16, 239, 240, 241, 500}) {
      for (const int64_t N : {1, 5, 48, 100}) {
        for (const int64_t M : {1, 16, 20}) ppca(c, t, N, D, M, wide, ++turn);
      }
    }
  }
}
