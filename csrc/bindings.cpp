// The only file that knows pybind11: submodules `cpu` and `cuda` with the same names. Addresses come as integers, and nothing is checked
// here that r2kernels/backends/native.py, the only caller, has not checked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#if defined(R2_WITH_CUDA)
#include "cuda/kernels.h"
#endif

namespace py = pybind11;
using Address = uintptr_t;

namespace {

using Described = std::tuple<Address, Address, Address, int64_t, int64_t, int64_t, int, int>;

template <class T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

r2::List list_of(const Described& l) {
  return {at<const int64_t>(std::get<0>(l)), at<const r2::Tensor>(std::get<1>(l)), at<const int32_t>(std::get<2>(l)), std::get<3>(l),
          std::get<4>(l), std::get<5>(l), std::get<6>(l), static_cast<r2::Dtype>(std::get<7>(l))};
}

// `run` takes (list, arguments, device, queue)
template <class Run>
void def_forward(py::module_& m, const char* name, Run run) {
  m.def(name, [run](const Described& l, Address first, Address second, bool flag, Address partial, Address out, Address saved, int device, Address queue) {
    py::gil_scoped_release release;
    run(list_of(l), r2::Forward{at<void>(first), at<void>(second), flag, at<void>(partial), at<void>(out), at<void>(saved)}, device, queue);
  });
}

template <class Run>
void def_backward(py::module_& m, const char* name, Run run) {
  m.def(name, [run](const Described& l, Address grad, int64_t grad_stride, Address first, Address second, Address saved, Address target, bool add,
                    Address parameter_gradient, int device, Address queue) {
    py::gil_scoped_release release;
    run(list_of(l), r2::Backward{at<void>(grad), grad_stride, at<void>(first), at<void>(second), at<void>(saved), at<void>(target), add, at<void>(parameter_gradient)},
        device, queue);
  });
}

using Clustered = std::tuple<Address, Address, int, int>;                                                                        // r2::Clusters
using Passed = std::tuple<Address, Address, Address, Address, int, Address, Address, Address, Address, Address, Address>;  // r2::Pass

// `run` takes (list, clusters, pass, device, queue)
template <class Run>
void def_pass(py::module_& m, const char* name, Run run) {
  m.def(name, [run](const Described& l, const Clustered& c, const Passed& p, int device, Address queue) {
    py::gil_scoped_release release;
    r2::Clusters clusters = {at<const int32_t>(std::get<0>(c)), at<void>(std::get<1>(c)), std::get<2>(c), std::get<3>(c)};
    r2::Pass pass = {at<void>(std::get<0>(p)), at<void>(std::get<1>(p)), at<void>(std::get<2>(p)), at<void>(std::get<3>(p)), std::get<4>(p), at<const int64_t>(std::get<5>(p)),
                     at<void>(std::get<6>(p)), at<void>(std::get<7>(p)), at<void>(std::get<8>(p)), at<void>(std::get<9>(p)), at<void>(std::get<10>(p))};
    run(list_of(l), clusters, pass, device, queue);
  });
}

using r2::cpu::Kernels;

// Those that this processor runs, the widest last.
std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> found = {&r2::cpu::portable::kernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    found.push_back(&r2::cpu::avx2::kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      found.push_back(&r2::cpu::avx512::kernels);
  }
#endif
  return found;
}

const Kernels* kernels = usable().back();

template <auto Kernels::*Function>
auto on_cpu = [](const r2::List& list, const auto& arguments, int, Address threads) { (kernels->*Function)(list, arguments, int(threads)); };

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::module_ cpu = m.def_submodule("cpu");
  cpu.def("isas", [] {
    std::vector<std::string> names;
    for (const Kernels* k : usable()) names.push_back(k->name);
    return names;
  });
  cpu.def("isa", [] { return std::string(kernels->name); });
  cpu.def("set_isa", [](const std::string& name) {
    for (const Kernels* k : usable())
      if (name == k->name) return void(kernels = k);
    throw std::invalid_argument("instruction set " + name + " is not usable on this machine");
  });
  m.attr("build") = std::string("C++ " R2_COMPILER)
#if defined(R2_WITH_CUDA)
                    + ", CUDA for " + r2::cuda::architectures()
#endif
      ;

#define R2_FORWARD(op) def_forward(cpu, #op "_fwd", on_cpu<&Kernels::op##_fwd>)
#define R2_BACKWARD(op) def_backward(cpu, #op "_bwd", on_cpu<&Kernels::op##_bwd>)
#define R2_OPS                                                                                                                     \
  R2_FORWARD(l_inf), R2_FORWARD(margin), R2_FORWARD(soft_min_max), R2_FORWARD(soft_extrema), R2_FORWARD(kure), R2_FORWARD(weight_stats); \
  R2_BACKWARD(l_inf), R2_BACKWARD(margin), R2_BACKWARD(soft_min_max), R2_BACKWARD(soft_extrema), R2_BACKWARD(kure)
  R2_OPS;
#undef R2_FORWARD
#undef R2_BACKWARD

#if defined(R2_WITH_CUDA)
  py::module_ cuda = m.def_submodule("cuda");
  cuda.def("problem", &r2::cuda::problem);
#define R2_FORWARD(op) def_forward(cuda, #op "_fwd", &r2::cuda::op##_fwd)
#define R2_BACKWARD(op) def_backward(cuda, #op "_bwd", &r2::cuda::op##_bwd)
  R2_OPS;
#endif
}
