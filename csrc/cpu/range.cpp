// The range losses on the CPU: how each reads one chunk. Compiled once for each instruction set (R2_ISA).
#include "kernels.h"
#include "skeletons.h"

namespace r2 {
inline namespace R2_ISA {

// Feeds all numbers to the vector lanes, and the last few to the scalar one.
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
  auto less = [](auto a, auto b) { return a < b ? a : b; };
  auto more = [](auto a, auto b) { return a > b ? a : b; };
  Extremes<T> e = {fold<A>(less(low0, low1), less), fold<A>(more(high0, high1), more)};
  for (; i < n; ++i) e = {less(A(widen(w[i])), e.low), more(A(widen(w[i])), e.high)};
  return e;
}

struct LInfReader {
  template <class T, class A>
  static void read(const T* w, int64_t n, Column, bool, A* state) {
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

struct MarginReader {
  template <class T, class A>
  static void read(const T* w, int64_t n, Column c, bool, A* state) {
    using V = Vec<A>;
    Margin::Lanes<V> lane = {};
    Margin::Lanes<A> tail = {};
    A M = A(fabs(c.first));
    sweep(w, n, lane, tail, [M](auto& l, auto x) { l.add(x, splat<decltype(x)>(M)); });
    state[0] = A(sum(lane.excess) + tail.excess), state[1] = A(sum(lane.outside) + tail.outside);
  }
};

// Both sides of one vector or number. Far: two exponentials, each relative to its extreme. Near: one pair around the middle.
template <class A>
struct Far {
  A k, high, low;
  template <bool kVariance, class V>
  R2_HD void add(Soft::Sums<V>* sums, V x) const {
    sums[0].template add<kVariance>(k * (x - high));
    sums[1].template add<kVariance>(k * (low - x));
  }
  R2_HD void settle(double*, double*) const {}
};
template <class A>
struct Near {
  A k, high, low, middle = low + (high - low) / 2, up = k * (high - middle), down = k * (middle - low);
  template <bool kVariance, class V>
  R2_HD void add(Soft::Sums<V>* sums, V x) const {
    V y = k * (x - middle);
    Exp2Pair<V> e(y);
    sums[0].template add<kVariance>(y - up, e.up);
    sums[1].template add<kVariance>(-down - y, e.down);
  }
  // from the middle to the extremes: the roundings of `up` and `down` are made good, so the sums are relative to exact weights
  R2_HD void settle(double* s, double* t) const {
    settle_side(s, up, double(k) * (double(high) - middle));
    settle_side(t, down, double(k) * (double(middle) - low));
  }
  R2_HD static void settle_side(double* s, double rounded, double exact) {
    double r = exp2_(-rounded);
    for (int i = 0; i < 3; ++i) s[i] *= r;
    Soft::move(s, rounded - exact);
  }
};

template <bool kVariance, class Sides, class T, class A>
R2_HD void soft_sums(const T* w, int64_t n, Sides sides, A* state) {
  using V = Vec<A>;
  Soft::Sums<V> wide[2] = {};
  Soft::Sums<A> tail[2] = {};
  int64_t i = 0;
  for (; i + lanes<V> <= n; i += lanes<V>) {
    // what the next chunk reads comes in while this one computes from cache: 3.2 -> 2.0 ms for 47 MB
    __builtin_prefetch(w + n + i);
    sides.template add<kVariance>(wide, load<V>(w + i));
  }
  for (; i < n; ++i) sides.template add<kVariance>(tail, A(widen(w[i])));
  double s[2][3];
  for (int side = 0; side < 2; ++side)
    s[side][0] = sum(wide[side].s0) + tail[side].s0, s[side][1] = sum(wide[side].s1) + tail[side].s1, s[side][2] = sum(wide[side].s2) + tail[side].s2;
  sides.settle(s[0], s[1]);
  state[0] = sides.high, state[4] = sides.low;
  for (int side = 0; side < 2; ++side)
    for (int j = 0; j < 3; ++j) state[4 * side + 1 + j] = A(s[side][j]);
}

// While the exponents span no more than this, the pair loses less than a rounding of its argument.
constexpr double kNear = 16;

template <bool kVariance, class T, class A>
R2_HD void soft_chunk(const T* w, int64_t n, A k, A* state) {
  auto [low, high] = extremes(w, n);
  if (k * (high - low) <= kNear) {
    soft_sums<kVariance>(w, n, Near<A>{k, high, low}, state);
  } else {
    soft_sums<kVariance>(w, n, Far<A>{k, high, low}, state);
  }
}

struct SoftReader {
  template <class T, class A>
  static void read(const T* w, int64_t n, Column c, bool variance, A* state) {
    A k = A(Soft::scale(c.first, sizeof(A) == 4));
    variance ? soft_chunk<true>(w, n, k, state) : soft_chunk<false>(w, n, k, state);
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

struct MomentsReader {
  template <class T, class A>
  static void read(const T* w, int64_t n, Column, bool, A* state) {
    moments_chunk(w, n, state);
  }
};

}  // namespace R2_ISA

namespace cpu::R2_ISA {
extern const Kernels kernels;
#define R2_STRING_(x) #x
#define R2_STRING(x) R2_STRING_(x)
const Kernels kernels = {R2_STRING(R2_ISA),
                         forward<LInfReader, LInfOp>, forward<MarginReader, MarginOp>, forward<SoftReader, SoftOp<false>>, forward<SoftReader, SoftOp<true>>,
                         forward<MomentsReader, KureOp>, forward<MomentsReader, WeightStatsOp>,
                         backward<LInfOp>, backward<MarginOp>, backward<SoftOp<false>>, backward<SoftOp<true>>, backward<KureOp>};
}  // namespace cpu::R2_ISA
}  // namespace r2
