// The two families of DKM's kernels: scalars in the Euclidean metric by interval, and rows of any width in either
// metric.
#pragma once
#include "dkm_common.cuh"

namespace r2::cuda {

struct ScalarPasses {
  // whether a block's shared memory holds the tables of so many clusters
  static bool serves(const Queue& queue, const List& list, const Clusters& clusters);
  static int64_t scratch(int64_t chunks, int64_t tensors, int most);
  static void update(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass);
  static void output(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass);
  static void upstream(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass);
  static void recur(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass);
  static void gradient(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass);
  static void jacobian(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass);
};

struct RowPasses {
  static int64_t scratch(int64_t chunks, int most, int d);
  static void update(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass);
  static void output(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass);
  static void upstream(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass);
  static void recur(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass);
  static void gradient(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass);
  static void assign(const Queue& queue, const List& list, const Clusters& clusters, const Pass& pass);
};

}  // namespace r2::cuda
