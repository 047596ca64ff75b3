// k-means of sorted scalars, on a GPU.
#include "kmeans.cuh"

namespace r2::cuda {

int64_t lines_scratch(int stride, int most, bool weighted) { return LineScratch(stride, most, weighted).bytes(); }

void fit_lines(const Lines& lines, int device, uintptr_t stream) {
  const Queue queue("kmeans", device, stream);
  const auto run = [&](void (*kernel)(Lines, int)) {
    cudaFuncAttributes own;
    check(queue.op, cudaFuncGetAttributes(&own, reinterpret_cast<const void*>(kernel)));
    const int limit = shared_limit(queue) - int(own.sharedSizeBytes);
    int cells = lines.stride < kMostCells ? lines.stride : kMostCells;
    while (line_bytes(cells) > size_t(limit)) --cells;
    grant_shared(queue, reinterpret_cast<const void*>(kernel));
    kernel<<<unsigned(lines.count), kLineThreads, line_bytes(cells), queue.stream>>>(lines, cells);
    check(queue.op, cudaGetLastError());
  };
  if (lines.dtype == Dtype::f64)
    run(lines.weights ? lines_kernel<double, true> : lines_kernel<double, false>);
  else
    run(lines.weights ? lines_kernel<float, true> : lines_kernel<float, false>);
}

}  // namespace r2::cuda
