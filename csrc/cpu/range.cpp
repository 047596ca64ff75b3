// The range losses on the CPU: what each does with one chunk. Compiled once for each instruction set (R2_ISA).
#include "kernels.h"
#include "skeletons.h"

namespace r2 {
inline namespace R2_ISA {

// Feeds all numbers to vector lanes and the last few to a scalar lane, both made of `init`.
template <class Lanes, class Tail, class T, class Add>
R2_HD void sweep(const T* w, int64_t n, Lanes& lane, Tail& tail, Add add) {
  using V = Vec<Acc<T>>;
  int64_t i = 0;
  for (; i + lanes<V> <= n; i += lanes<V>) add(lane, load<V>(w + i));
  for (; i < n; ++i) add(tail, widen(w[i]));
}

template <class T>
struct Extremes {
  Acc<T> low, high;
};

// Two pairs of registers hide the latency of min and max.
template <class T>
R2_HD Extremes<T> extremes(const T* w, int64_t n) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int step = lanes<V>;
  V low0 = splat<V>(A(INFINITY)), low1 = low0, high0 = -low0, high1 = high0;
  int64_t i = 0;
  for (; i + 2 * step <= n; i += 2 * step) {
    V a = load<V>(w + i), b = load<V>(w + i + step);
    low0 = a < low0 ? a : low0, high0 = a > high0 ? a : high0;
    low1 = b < low1 ? b : low1, high1 = b > high1 ? b : high1;
  }
  Extremes<T> e = {A(INFINITY), A(-INFINITY)};
  auto take = [&](A a, A b) { e.low = a < e.low ? a : e.low, e.high = b > e.high ? b : e.high; };
  for (int l = 0; l < step; ++l) take(low0[l], high0[l]), take(low1[l], high1[l]);
  for (; i < n; ++i) take(widen(w[i]), widen(w[i]));
  return e;
}

struct OneLoss {
  static constexpr bool kLoss = true;
};

template <class Formula>
struct Plain : OneLoss, Formula {
  template <class A>
  static void merge(double* into, const A* state, Column, bool) {
    Formula::merge(into, state);
  }
  template <class A>
  static double finish(const double* state, Column c, const List&, const Forward&, int64_t at, A* saved, A*) {
    return Formula::finish(state, c, saved + at * Formula::kSaved);
  }
  template <class A>
  static auto slope(const List&, const Backward& b, int64_t t, int64_t, Column c, const A* saved) {
    return Slope<A, Formula::template Gradient>(double(static_cast<const A*>(b.grad)[t * b.grad_stride]), c, saved);
  }
  template <class A>
  static double parameter_gradient(const List&, const Backward&, int64_t, int64_t, Column, const A*) {
    return 0;
  }
};

struct LInfOp : Plain<LInf> {
  template <class T, class A>
  static void chunk(const T* w, int64_t n, Column, bool, A* state) {
    using V = Vec<A>;
    LInf::Lanes<V> lane[4] = {};
    LInf::Lanes<A> tail = {};
    int64_t i = 0, step = lanes<V>;
    for (; i + 4 * step <= n; i += 4 * step)
      for (int u = 0; u < 4; ++u) lane[u].add(load<V>(w + i + u * step));
    for (; i < n; ++i) tail.add(widen(w[i]));
    double total[2] = {double(tail.top), double(tail.ties)};
    for (auto& l : lane)
      for (int j = 0; j < step; ++j) {
        A one[2] = {l.top[j], l.ties[j]};
        LInf::merge(total, one);
      }
    state[0] = A(total[0]), state[1] = A(total[1]);
  }
};

struct MarginOp : Plain<Margin> {
  template <class T, class A>
  static void chunk(const T* w, int64_t n, Column c, bool, A* state) {
    using V = Vec<A>;
    Margin::Lanes<V> lane = {};
    Margin::Lanes<A> tail = {};
    A M = A(fabs(c.first));
    sweep(w, n, lane, tail, [M](auto& l, auto x) { l.add(x, splat<decltype(x)>(M)); });
    state[0] = A(sum(lane.excess) + tail.excess), state[1] = A(sum(lane.outside) + tail.outside);
  }
  template <class A>
  static double parameter_gradient(const List&, const Backward& b, int64_t t, int64_t, Column c, const A* saved) {
    return Margin::parameter_gradient(double(static_cast<const A*>(b.grad)[t * b.grad_stride]), c, saved);
  }
};

template <bool kVariance, class T, class A>
R2_HD void soft_chunk(const T* w, int64_t n, A k, A* state) {
  using V = Vec<A>;
  auto [low, high] = extremes(w, n);
  struct Both {
    Soft::Sums<V> wide[2] = {};
    Soft::Sums<A> tail[2] = {};
  } sums;
  int64_t i = 0;
  const V K = splat<V>(k), M = splat<V>(high), m = splat<V>(low);
  for (; i + lanes<V> <= n; i += lanes<V>) {
    V x = load<V>(w + i);
    sums.wide[0].template add<kVariance>(K * (x - M));
    sums.wide[1].template add<kVariance>(K * (m - x));
  }
  for (; i < n; ++i) {
    A x = widen(w[i]);
    sums.tail[0].template add<kVariance>(k * (x - high));
    sums.tail[1].template add<kVariance>(k * (low - x));
  }
  for (int side = 0; side < 2; ++side) {
    const auto& a = sums.wide[side];
    const auto& b = sums.tail[side];
    A* s = state + 4 * side;
    s[0] = side ? low : high, s[1] = A(sum(a.s0) + b.s0), s[2] = A(sum(a.s1) + b.s1), s[3] = A(sum(a.s2) + b.s2);
  }
}

template <bool kExtrema>
struct SoftOp : Soft {
  static constexpr bool kLoss = !kExtrema;

  template <class T, class A>
  static void chunk(const T* w, int64_t n, Column c, bool variance, A* state) {
    A k = A(scale(c.first, sizeof(A) == 4));
    variance ? soft_chunk<true>(w, n, k, state) : soft_chunk<false>(w, n, k, state);
  }
  // k as the chunks had it, rounded to their type
  static double scale_of(Column c, bool single) { return single ? double(float(scale(c.first, true))) : scale(c.first, false); }

  template <class A>
  static void merge(double* into, const A* state, Column c, bool single) {
    Soft::merge(into, state, scale_of(c, single));
  }
  template <class A>
  static double finish(const double* state, Column c, const List& list, const Forward&, int64_t at, A* saved, A* out) {
    double extremes[2], loss = Soft::finish(state, c, scale_of(c, sizeof(A) == 4), saved + at * kSaved, extremes);
    if (kExtrema) out[at] = A(extremes[0]), out[list.count * list.d + at] = A(extremes[1]);
    return loss;
  }

  struct Upstream {
    double low, high;
  };
  template <class A>
  static Upstream upstream(const List& list, const Backward& b, int64_t t, int64_t at) {
    const A* grad = static_cast<const A*>(b.grad);
    if (kExtrema) return {double(grad[at]), double(grad[list.count * list.d + at])};
    double g = double(grad[t * b.grad_stride]);
    return {-g, g};
  }
  template <class A>
  static auto slope(const List& list, const Backward& b, int64_t t, int64_t at, Column c, const A* saved) {
    Upstream g = upstream<A>(list, b, t, at);
    return Slope<A, Gradient>(g.high, g.low, c, saved);
  }
  template <class A>
  static double parameter_gradient(const List& list, const Backward& b, int64_t t, int64_t at, Column c, const A* saved) {
    Upstream g = upstream<A>(list, b, t, at);
    return Soft::parameter_gradient(g.high, g.low, saved) - (kExtrema ? 0 : g.high * exp(-c.first));
  }
};

// The chunk lies in cache: its mean first, then the powers of what is left.
template <class T, class A>
R2_HD void moments_chunk(const T* w, int64_t n, A* state) {
  using V = Vec<A>;
  struct Total {
    V wide = {};
    A tail = 0;
  } total;
  const A pivot = widen(w[0]);
  sweep(w, n, total.wide, total.tail, [pivot](auto& t, auto x) { t += x - splat<decltype(x)>(pivot); });
  const A mean = A(double(pivot) + (sum(total.wide) + total.tail) / n);
  Moments::Lanes<V> lane = {};
  Moments::Lanes<A> tail = {};
  sweep(w, n, lane, tail, [mean](auto& l, auto x) { l.add(x - splat<decltype(x)>(mean)); });
  auto [low, high] = extremes(w, n);
  if (!(mean - mean == 0))
    for (int64_t i = 0; i < n; ++i)
      if (widen(w[i]) != widen(w[i])) low = high = A(NAN);
  state[0] = A(n), state[1] = mean + A((sum(lane.m1) + tail.m1) / n), state[2] = A(sum(lane.m2) + tail.m2);
  state[3] = A(sum(lane.m3) + tail.m3), state[4] = A(sum(lane.m4) + tail.m4), state[5] = low, state[6] = high;
}

struct KureOp : Plain<Kure> {
  template <class T, class A>
  static void chunk(const T* w, int64_t n, Column, bool, A* state) {
    moments_chunk(w, n, state);
  }
};

struct WeightStatsOp : Plain<Kure> {
  static constexpr bool kLoss = false;
  template <class T, class A>
  static void chunk(const T* w, int64_t n, Column, bool, A* state) {
    moments_chunk(w, n, state);
  }
  template <class A>
  static double finish(const double* state, Column, const List&, const Forward&, int64_t at, A*, A* out) {
    WeightStats::finish(state, out + at * 6);
    return 0;
  }
};

}  // namespace R2_ISA

namespace cpu::R2_ISA {
extern const Kernels kernels;
#define R2_STRING_(x) #x
#define R2_STRING(x) R2_STRING_(x)
const Kernels kernels = {R2_STRING(R2_ISA),
                         forward<LInfOp>, forward<MarginOp>, forward<SoftOp<false>>, forward<SoftOp<true>>, forward<KureOp>, forward<WeightStatsOp>,
                         backward<LInfOp>, backward<MarginOp>, backward<SoftOp<false>>, backward<SoftOp<true>>, backward<KureOp>};
}  // namespace cpu::R2_ISA
}  // namespace r2
