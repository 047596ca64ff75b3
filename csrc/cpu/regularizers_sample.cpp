// The standard deviation of a sample of each tensor, into `out`.
#include "../sample.h"
#include "regularizers_terms.h"
#include "skeletons.h"

namespace r2 {
inline namespace R2_ISA {

// Sums in double, which no square of a float leaves.
struct Spread {
  double pivot, sum[Sample::kRun] = {}, squares[Sample::kRun] = {};

  R2_HD void add(double w, int lane) {
    const double x = w - pivot;
    sum[lane] += x, squares[lane] += x * x;
  }
};

template <class T>
double deviation(const T* w, int64_t numel) {
  const Sample sample(numel);
  Spread spread = {double(widen(w[0]))};
  const int64_t runs = sample.size / Sample::kRun;
  for (int64_t i = 0; i < runs; ++i) {
    const T* run = w + sample.run(i);
    for (int lane = 0; lane < Sample::kRun; ++lane) spread.add(double(widen(run[lane])), lane);
  }
  for (int64_t j = runs * Sample::kRun; j < sample.size; ++j) spread.add(double(widen(w[j])), 0);
  double sum = 0, squares = 0;
  for (int lane = 0; lane < Sample::kRun; ++lane) sum += spread.sum[lane], squares += spread.squares[lane];
  return sample.deviation(sum, squares);
}

void sampled_std(const List& list, const Forward& f, int threads) {
  with_type(list.dtype, [&](auto like) {
    using T = decltype(like);
    threads = threads_for(list, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < list.count; ++t)
      static_cast<Acc<T>*>(f.out)[t] =
          Acc<T>(deviation(reinterpret_cast<const T*>(list.pointers[t]), tensor_of(list, t).numel));
  });
}

}  // namespace R2_ISA
}  // namespace r2
