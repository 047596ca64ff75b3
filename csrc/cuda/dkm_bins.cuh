// Sums by interval: how a block reads the weights of a chunk, and the bins in shared memory that it adds to.
#pragma once
#include "dkm_common.cuh"
#include "dkm_tables.cuh"

namespace r2::cuda {

__device__ __forceinline__ void pin(int& x) { asm volatile("" : "+r"(x)); }

template <class T>
constexpr int kPacks = sizeof(T) == 2 ? 1 : 2;  // 128-bit loads of a thread at once
template <class T>
constexpr int kBatch = kPacks<T> * kPack<T>;

template <class T>
struct Batch {
  uint4 bits[kPacks<T>];

  __device__ void load(const uint4* from) {
#pragma unroll
    for (int u = 0; u < kPacks<T>; ++u) bits[u] = __ldg(from + u * blockDim.x);
  }
  __device__ void numbers(Acc<T> (&x)[kBatch<T>]) const { widen_packs<kPacks<T>, T>(bits, x); }
};

__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Those that any lane of a warp has.
__device__ __forceinline__ unsigned any_bits(unsigned bits) {
#if __CUDA_ARCH__ >= 800
  return __reduce_or_sync(~0u, bits);
#else
  for (int distance = 16; distance > 0; distance /= 2) bits |= __shfl_xor_sync(~0u, bits, distance);
  return bits;
#endif
}

// Calls lane.take(w[n], g[n], valid) for all n rows, in every thread equally often, and lane.tile_done() after each
// full tile. g may be null.
template <bool kGrads, class T, class Lane>
__device__ void sweep_chunk(const T* w, const T* g, int n, Lane& lane) {
  constexpr int packs = kPacks<T>, kAhead = 8;  // tiles on the way to the second cache
  const int threads = blockDim.x, size = threads * kBatch<T>, boundary = before_boundary(w);
  const bool aligned = !kGrads || before_boundary(g) == boundary;
  const int head = aligned ? min(boundary, n) : 0, tiles = aligned ? (n - head) / size : 0;
  const uint4 *from_w = reinterpret_cast<const uint4*>(w + head) + threadIdx.x,
              *from_g = reinterpret_cast<const uint4*>(g + (kGrads ? head : 0)) + threadIdx.x;
  Batch<T> now_w, now_g, next_w, next_g;
  if (tiles > 0) {
    now_w.load(from_w);
    if (kGrads) now_g.load(from_g);
  }
#pragma unroll 1
  for (int i = 0; i < tiles; ++i) {
    from_w += packs * threads, from_g += packs * threads;
    if (i + 1 < tiles) {
      next_w.load(from_w);
      if (kGrads) next_g.load(from_g);
    }
    if (threadIdx.x % 8 == 0 && i + kAhead < tiles) {
      prefetch(from_w + (kAhead - 1) * packs * threads);
      if (kGrads) prefetch(from_g + (kAhead - 1) * packs * threads);
      if (packs > 1) prefetch(from_w + ((kAhead - 1) * packs + 1) * threads);
      if (packs > 1 && kGrads) prefetch(from_g + ((kAhead - 1) * packs + 1) * threads);
    }
    Acc<T> x[kBatch<T>], y[kBatch<T>] = {};
    now_w.numbers(x);
    if (kGrads) now_g.numbers(y);
    lane.take(x, y, true);
    lane.tile_done();
    now_w = next_w;
    if (kGrads) now_g = next_g;
  }
  const int done = tiles * size, rest = n - done;
#pragma unroll 1
  for (int from = 0; from < rest; from += threads) {
    const int i = from + threadIdx.x, at = i < head ? i : i + done;
    const bool valid = i < rest;
    Acc<T> x[1] = {valid ? widen(w[at]) : Acc<T>(0)}, y[1] = {kGrads && valid ? widen(g[at]) : Acc<T>(0)};
    lane.take(x, y, valid);
  }
}

// How bins lie in shared memory: [bin][copy] records of a warp, in which each lane has its own copy; or, where these do
// not fit, of two warps, which add one after the other, with a copy for four lanes, 8 apart. Such lanes take turns
// where they meet, and each has a record behind the bins for what it does not add at its turn. Where not all intervals
// have a bin, the chunk is read once for each part of them.
struct Shape {
  int bins;    // intervals at once
  bool own;    // whether each lane has its own copy
  int flush;   // tiles after which the bins are emptied into float64
  int warps;   // of a block
  int blocks;  // that a multiprocessor has room for
};

// Records of so many warps.
R2_HD int records_of(int bins, bool own, int warps) { return own ? warps * bins << 5 : warps / 2 * ((bins << 3) + 32); }

template <class A, int kRecord, bool kOwn>
struct Bins {
  using Record = Numbers<A, kRecord>;
  static constexpr int kCopies = kOwn ? 5 : 3;  // as a power of two
  static constexpr int kWarps = kOwn ? 1 : 2;   // that share bins
  int own;                                      // where this lane's copy of the first bin lies in shared memory
  int spare;                                    // and its record behind the bins
  int from, count;
  int when;  // this warp adds, after so many others; the same in all lanes, as the compiler can see

  __device__ Bins(const Record* all, int count)
      : from(0), count(count), when(__shfl_sync(~0u, threadIdx.x / 32 % kWarps, 0)) {
    const int lane = threadIdx.x % 32, before = records_of(count, kOwn, threadIdx.x / 32 / kWarps * kWarps),
              first = int(reinterpret_cast<const char*>(all) - shared_memory()) + before * int(sizeof(Record));
    own = first + lane % (1 << kCopies) * int(sizeof(Record));
    spare = first + ((count << kCopies) + lane) * int(sizeof(Record));
    pin(own), pin(spare);
  }

  // at: a bin times the size of A
  __device__ __forceinline__ int of_lane(int at) const { return own + (at << kCopies) * kRecord; }

  static __device__ __forceinline__ void add(int place, const Record& r) {
    Record &to = *reinterpret_cast<Record*>(shared_memory() + place), sum = to;
#pragma unroll
    for (int m = 0; m < kRecord; ++m) sum.v[m] += r.v[m];
    to = sum;
  }

  // Two at a time, as an addition in memory takes long.
  __device__ __forceinline__ void add_pair(int at1, const Record& r1, int at2, const Record& r2) const {
    Record &to1 = *reinterpret_cast<Record*>(shared_memory() + of_lane(at1)),
           &to2 = *reinterpret_cast<Record*>(shared_memory() + of_lane(at2));
    Record sum1 = to1, sum2 = to2;
    const bool same = at1 == at2;
#pragma unroll
    for (int m = 0; m < kRecord; ++m) {
      sum1.v[m] += r1.v[m];
      sum2.v[m] = (same ? sum1.v[m] : sum2.v[m]) + r2.v[m];
    }
    to1 = sum1, to2 = sum2;
  }

  // The threads of a block together: a lane's turn comes after those of the lanes before it that share its copy and
  // have the same bin. All first turns, then the few others.
  template <int n>
  __device__ __forceinline__ void add_in_turn(const int (&at)[n], const Record (&r)[n]) const {
    const int lane = threadIdx.x % 32;
    int turn[n] = {};
#pragma unroll
    for (int distance = 8; distance < 32; distance += 8) {
      const int behind = (lane ^ distance) < lane;
#pragma unroll
      for (int i = 0; i < n; ++i) turn[i] += __shfl_xor_sync(~0u, at[i], distance) == at[i] ? behind : 0;
    }
    int place[n];
    unsigned meet = 0;  // bit i: lanes meet at number i
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (unsigned(at[i]) / unsigned(sizeof(A)) - from >= unsigned(count)) turn[i] = -1;
      meet |= (turn[i] > 0) << i;
      place[i] = of_lane(at[i] - from * int(sizeof(A)));
    }
    meet = any_bits(meet);
#pragma unroll 1
    for (int warp = 0; warp < kWarps; ++warp) {
      __syncthreads();
      if (warp != when) continue;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        add(turn[i] == 0 ? place[i] : spare, r[i]);
        __syncwarp();
      }
#pragma unroll
      for (int i = 0; i < n; ++i) {
        if (!(meet >> i & 1)) continue;
#pragma unroll 1
        for (int t = 1; t < 4; ++t) {
          if (turn[i] == t) add(place[i], r[i]);
          __syncwarp();
        }
      }
    }
  }

  template <int n>
  __device__ __forceinline__ void add(const int (&at)[n], const Record (&r)[n]) const {
    if constexpr (!kOwn) {
      add_in_turn(at, r);
    } else {
      if (n == 1) add(of_lane(at[0]), r[0]);
#pragma unroll
      for (int i = 0; i + 1 < n; i += 2) add_pair(at[i], r[i], at[i + 1], r[i + 1]);
    }
  }
};

// The passes that sum. A record of kRecord numbers for each weight; kCounts: and the number of weights that equal the
// reference. `row` has the numbers of the weight's interval.
template <bool kG, int kRecordOf, bool kCountsOf, int kGroupsOf, int kNumbersOf = 2>
struct SumsOf {
  static constexpr bool kGrads = kG, kCounts = kCountsOf;
  static constexpr int kRecord = kRecordOf, kGroups = kGroupsOf, kNumbers = kNumbersOf, kSums = kRecord + kCounts;

  template <class... Ignored>
  static __device__ void fill(const Ignored&...) {}
};

struct UpdateSums : SumsOf<false, 4, true, 1> {
  template <class A>
  static __device__ Numbers<A, 4> record(Shares<A> s, A, A x, A, const A*) {
    return {s.left, s.left * x, s.right, s.right * x};
  }
};

struct UpstreamSums : SumsOf<true, 4, false, 1> {
  template <class A>
  static __device__ Numbers<A, 4> record(Shares<A> s, A, A x, A g, const A*) {
    return {s.left * g, s.right * g, x == A(0) ? g : A(0), x == A(0) ? A(1) : A(0)};
  }
};

// What attention makes of v_j (w - c'_j) + g (c'_j - end), with the left share relative to the left end of the
// interval, with the right share relative to the right one: so are all means, for a weight near an end to lose nothing.
template <bool kLast>
struct RecurSums : SumsOf<kLast, 2, !kLast, 4, kLast ? 9 : 7> {
  enum : int { kRight = kBend + 1, kLeftV, kRightV, kLeftE, kRightE, kLeftO, kRightO };

  template <class A, class Put>
  static __device__ void fill(const Iteration<A>& it, const Groups<4>& groups, const Row<4>& row, int k, Put put) {
    const double by = k > 0 && k < it.size ? groups.gap[k - 1] : 0;
    put(kRight, double(it.old[k < it.size ? k : k - 1]));
    put(kLeftV, row.left[1]), put(kRightV, row.right[1]), put(kLeftE, row.left[2]),
        put(kRightE, row.right[2] - by * row.right[1]);
    if (kLast) put(kLeftO, row.left[0]), put(kRightO, row.right[0] - by);
  }
  template <class A>
  static __device__ Numbers<A, 2> record(Shares<A> s, A w, A x, A g, const A* row) {
    const A y = w - row[kRight];
    A left = fma(x, row[kLeftV], -row[kLeftE]), right = fma(y, row[kRightV], -row[kRightE]);
    if (!kLast) {
      const A P = fma(s.left, left, s.right * right);
      return {s.left * P, s.right * P};
    }
    const A shift = g * (x - y);
    left = fma(g, row[kLeftO], left), right = fma(g, row[kRightO], right);
    return {s.left * fma(s.left, left, s.right * (right + shift)),
            s.right * fma(s.left, left - shift, s.right * right)};
  }
};

struct JacobianSums : SumsOf<false, 6, true, 1> {
  template <class A>
  static __device__ Numbers<A, 6> record(Shares<A> s, A, A x, A, const A*) {
    const A ll = s.left * s.left, lr = s.left * s.right, rr = s.right * s.right;
    return {ll, ll * x, lr, lr * x, rr, rr * x};
  }
};

template <class Op, bool kOwn, class T>
struct SumLane {
  using A = Acc<T>;
  using Record = Numbers<A, Op::kRecord>;

  Tables<Op, A> tables;
  Finder<A> finder;
  A slope;
  int K;
  Bins<A, Op::kRecord, kOwn> bins;
  Record* all;              // the bins of all warps
  double* totals;           // of the chunk, in Pass.scratch
  int *equal, flush, left;  // left: tiles until the next flush

  template <int n>
  __device__ __forceinline__ void take(const A (&w)[n], const A (&g)[n], bool valid) {
    int at[n];
    Record r[n];
    bool any = false;
    finder.find(tables.next, tables.grid, K, w, at);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const A *row = tables.row(at[i]), x = w[i] - row[kReference];
      r[i] = Op::record(Shares<A>(fma(x, slope, -row[kBend])), w[i], x, g[i], row);
      any |= x == A(0);
    }
    if (n == 1 && !valid) r[0] = Record();
    bins.add(at, r);
    if constexpr (Op::kCounts) {
      if (!any || !valid) return;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const int k = at[i] / int(sizeof(A));
        if (w[i] == tables.row(at[i])[kReference] && unsigned(k - bins.from) < unsigned(bins.count))
          atomicAdd(equal + k, 1);
      }
    }
  }

  __device__ __forceinline__ void tile_done() {
    if (--left > 0) return;
    left = flush;
    empty();
  }

  // The bins' sums into the totals, in a fixed order.
  __device__ void empty() {
    constexpr int copies = 1 << bins.kCopies;
    const int sets = blockDim.x / 32 / bins.kWarps, each = records_of(bins.count, kOwn, bins.kWarps);
    __syncthreads();
    for (int i = threadIdx.x; i < min(bins.count, K + 1 - bins.from) * Op::kRecord; i += blockDim.x) {
      const int bin = i / Op::kRecord, m = i % Op::kRecord;
      double &total = totals[(bins.from + bin) * Op::kSums + m], sum = total;
      for (int set = 0; set < sets; ++set) {
        Record* own = all + set * each + (bin << bins.kCopies);
        for (int c = 0; c < copies; c += 4) {
          A four[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            A& from = own[(c + j + bin) & (copies - 1)].v[m];  // other banks for other bins
            four[j] = from, from = 0;
          }
          sum += (double(four[0]) + double(four[1])) + (double(four[2]) + double(four[3]));
        }
      }
      total = sum;
    }
    __syncthreads();
  }
};

template <bool kOwn>
constexpr int kMostWarps = kOwn ? 4 : 6;  // of a block of dkm_sums_kernel

// What a block of dkm_sums_kernel keeps in shared memory; the tables may lie elsewhere.
template <class Op, class A>
struct SumsRoom {
  using Record = Numbers<A, Op::kRecord>;
  Tables<Op, A> tables;
  int* equal;
  Record* bins;

  R2_HD SumsRoom(Space& space, Space& of_tables, int most, size_t records)
      : tables(of_tables, most), equal(space.take<int>(Op::kCounts ? most + 1 : 0)), bins(space.take<Record>(records)) {
  }

  static size_t bytes(int most, size_t records, bool far) {
    Space space = {}, other = {};
    SumsRoom(space, far ? other : space, most, records);
    return space.used;
  }
};

// kFar: the tables are read where they have been made, as shared memory is too small for them.
template <class Op, bool kOwn, bool kFar, class T>
__global__ void __launch_bounds__(32 * kMostWarps<kOwn>, 512 / (32 * kMostWarps<kOwn>))
    dkm_sums_kernel(List list, Clusters clusters, Pass pass, Shape shape, int64_t numbers, Rooms rooms) {
  using A = Acc<T>;
  using Lane = SumLane<Op, kOwn, T>;
  const RowChunk part(list, clusters);
  const int K = part.clusters, count = min(shape.bins, K + 1), records = records_of(count, kOwn, blockDim.x / 32);
  Space space = {shared_memory()}, made = {rooms.of(part.tensor)};
  const SumsRoom<Op, A> room(space, kFar ? made : space, clusters.most, records);
  if constexpr (!kFar) copy(room.tables.grid, made.base, rooms.tables);
  each(Op::kCounts ? K + 1 : 0, [&](int k) { room.equal[k] = 0; });
  double* out = Scratch(list, pass, numbers).of(part);
  each((K + 1) * Op::kSums, [&](int i) { out[i] = 0; });
  __syncthreads();

  const auto* constants = room.tables.constants;
  Lane sums = {room.tables, constants->finder, constants->slope, K,          {room.bins, count}, room.bins,
               out,         room.equal,        shape.flush,      shape.flush};

  const T* w = place<const T>(list, list.pointers, part.tensor) + part.row;
  const T* g = Op::kGrads ? place<const T>(list, pass.grads, part.tensor) + part.row : nullptr;
  for (; sums.bins.from <= K; sums.bins.from += count) {
    each(records, [&](int i) { room.bins[i] = typename Lane::Record(); });
    __syncthreads();
    sweep_chunk<Op::kGrads>(w, g, part.rows, sums);
    sums.empty();
  }
  each(Op::kCounts ? K + 1 : 0, [&](int k) { out[k * Op::kSums + Op::kRecord] = room.equal[k]; });
}

}  // namespace r2::cuda
