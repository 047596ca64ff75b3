// The only file that knows pybind11: submodules `cpu` and `cuda` with the same names. Addresses come as integers, and nothing is checked
// here that r2kernels/backends/native.py, the only caller, has not checked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "huffman.h"
#include "packing.h"
#include "partition.h"
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
using Passed = std::tuple<Address, Address, Address, Address, int, Address, Address, Address, Address, Address, Address, Address>;  // r2::Pass

// `run` takes (list, clusters, pass, device, queue)
template <class Run>
void def_pass(py::module_& m, const char* name, Run run) {
  m.def(name, [run](const Described& l, const Clustered& c, const Passed& p, int device, Address queue) {
    py::gil_scoped_release release;
    r2::Clusters clusters = {at<const int32_t>(std::get<0>(c)), at<void>(std::get<1>(c)), std::get<2>(c), std::get<3>(c)};
    r2::Pass pass = {at<void>(std::get<0>(p)), at<void>(std::get<1>(p)), at<void>(std::get<2>(p)), at<void>(std::get<3>(p)), std::get<4>(p), at<const int64_t>(std::get<5>(p)),
                     at<void>(std::get<6>(p)), at<void>(std::get<7>(p)), at<void>(std::get<8>(p)), at<void>(std::get<9>(p)), at<void>(std::get<10>(p)), at<const int64_t>(std::get<11>(p))};
    run(list_of(l), clusters, pass, device, queue);
  });
}

using Term = std::tuple<int, Address, Address, bool, Address, Address, Address, int>;                      // of r2::Terms<Forward>
using TermBack = std::tuple<int, Address, int64_t, Address, Address, Address, Address, int>;                // of r2::Terms<Backward>

// `forward`, `backward` and `rank` take (list, arguments, device, queue)
template <class Forward, class Back, class Rank>
void def_terms(py::module_& m, Forward forward, Back backward, Rank rank) {
  m.def("terms_fwd", [forward](const Described& l, const std::vector<Term>& given, int device, Address queue) {
    py::gil_scoped_release release;
    r2::Terms<r2::Forward> terms = {int(given.size()), {}, {}};
    for (int i = 0; i < terms.count; ++i) {
      const auto& [term, first, second, flag, partial, out, saved, bits] = given[i];
      terms.term[i] = static_cast<r2::Term>(term);
      terms.of[i] = {at<void>(first), at<void>(second), flag, at<void>(partial), at<void>(out), at<void>(saved), bits};
    }
    forward(list_of(l), terms, device, queue);
  });
  m.def("terms_bwd", [backward](const Described& l, const std::vector<TermBack>& given, Address target, bool add, int device, Address queue) {
    py::gil_scoped_release release;
    r2::Terms<r2::Backward> terms = {int(given.size()), {}, {}};
    for (int i = 0; i < terms.count; ++i) {
      const auto& [term, grad, grad_stride, first, second, saved, parameter_gradient, bits] = given[i];
      terms.term[i] = static_cast<r2::Term>(term);
      terms.of[i] = {at<void>(grad), grad_stride, at<void>(first), at<void>(second), at<void>(saved),
                     at<void>(target), add, at<void>(parameter_gradient), bits};
    }
    backward(list_of(l), terms, device, queue);
  });
  m.def("rank", [rank](const Described& l, Address ranks, Address theta, Address scratch, int device, Address queue) {
    py::gil_scoped_release release;
    rank(list_of(l), r2::Rank{at<const int64_t>(ranks), at<void>(theta), at<void>(scratch)}, device, queue);
  });
}

using Valued = std::tuple<Address, Address, Address, Address, Address, Address, Address, Address, Address>;  // r2::cpu::Values

using Quantized = std::tuple<Address, Address, Address, int, bool, Address, Address, Address, Address, Address>;  // r2::Quantizer

// `run` takes (list, quantizer, device, queue)
template <class Run>
void def_quantizer(py::module_& m, const char* name, Run run) {
  m.def(name, [run](const Described& l, const Quantized& q, int device, Address queue) {
    py::gil_scoped_release release;
    r2::Quantizer quantizer = {at<void>(std::get<0>(q)), at<void>(std::get<1>(q)), at<void>(std::get<2>(q)), std::get<3>(q), std::get<4>(q),
                               at<const int64_t>(std::get<5>(q)), at<double>(std::get<6>(q)), at<void>(std::get<7>(q)), at<void>(std::get<8>(q)),
                               at<void>(std::get<9>(q))};
    run(list_of(l), quantizer, device, queue);
  });
}

using r2::cpu::DkmKernels;
using r2::cpu::Kernels;
using r2::cpu::QuantizerKernels;
using r2::cpu::TermKernels;

struct Compiled {
  const Kernels* kernels;
  const DkmKernels* dkm;
  const QuantizerKernels* quantizers;
  const TermKernels* terms;
};

// Those that this processor runs, the widest last.
std::vector<Compiled> usable() {
  std::vector<Compiled> found = {{&r2::cpu::portable::kernels, &r2::cpu::portable::dkm, &r2::cpu::portable::quantizers, &r2::cpu::portable::terms}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    found.push_back({&r2::cpu::avx2::kernels, &r2::cpu::avx2::dkm, &r2::cpu::avx2::quantizers, &r2::cpu::avx2::terms});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      found.push_back({&r2::cpu::avx512::kernels, &r2::cpu::avx512::dkm, &r2::cpu::avx512::quantizers, &r2::cpu::avx512::terms});
  }
#endif
  return found;
}

Compiled chosen = usable().back();

template <auto Kernels::*Function>
auto on_cpu = [](const r2::List& list, const auto& arguments, int, Address threads) { (chosen.kernels->*Function)(list, arguments, int(threads)); };

template <auto DkmKernels::*Function>
auto pass_on_cpu = [](const r2::List& list, const r2::Clusters& clusters, const r2::Pass& pass, int, Address threads) {
  (chosen.dkm->*Function)(list, clusters, pass, int(threads));
};

template <auto QuantizerKernels::*Function>
auto quantizer_on_cpu = [](const r2::List& list, const r2::Quantizer& q, int, Address threads) { (chosen.quantizers->*Function)(list, q, int(threads)); };
template <auto TermKernels::*Function>
auto terms_on_cpu = [](const r2::List& list, const auto& arguments, int, Address threads) { (chosen.terms->*Function)(list, arguments, int(threads)); };

// Codes in files. Those that can fail return an r2::codes::Status.
void def_codes(py::module_ m) {
  using namespace r2::codes;
  using Counts = std::tuple<int64_t, int64_t, int>;  // Groups
  auto groups_of = [](const Counts& c) { return Groups{std::get<0>(c), std::get<1>(c), std::get<2>(c)}; };
  m.def("pack", [=](Address codes, const Counts& counts, Address out, int threads) {
    py::gil_scoped_release release;
    pack(at<const uint8_t>(codes), groups_of(counts), at<uint8_t>(out), threads);
  });
  m.def("unpack", [=](Address packed, const Counts& counts, Address out, int threads) {
    py::gil_scoped_release release;
    unpack(at<const uint8_t>(packed), groups_of(counts), at<uint8_t>(out), threads);
  });
  m.def("look_up", [=](Address packed, const Counts& counts, Address tables, int index_bits, int64_t size, Address out, int threads) {
    py::gil_scoped_release release;
    look_up(at<const uint8_t>(packed), groups_of(counts), at<const char>(tables), index_bits, size, at<char>(out), threads);
  });
  m.def("coded_sizes", [](Address codes, int64_t rows, int64_t block, Address lengths, Address sizes, int threads) -> int {
    py::gil_scoped_release release;
    return coded_sizes(at<const uint8_t>(codes), Blocks{rows, block}, at<const uint8_t>(lengths), at<int32_t>(sizes), threads);
  });
  m.def("encode", [](Address codes, int64_t rows, int64_t block, Address words, Address lengths, Address offsets, Address out, int threads) -> int {
    py::gil_scoped_release release;
    Words book = {at<const uint16_t>(words), at<const uint8_t>(lengths)};
    return encode(at<const uint8_t>(codes), Blocks{rows, block}, book, at<const int64_t>(offsets), at<uint8_t>(out), threads);
  });
  m.def("decode", [](Address stream, int64_t bytes, Address offsets, int64_t rows, int64_t block, Address table, Address out, int threads) -> int {
    py::gil_scoped_release release;
    Blocks blocks = {rows, block};
    return decode(at<const uint8_t>(stream), bytes, at<const int64_t>(offsets), blocks, at<const uint64_t>(table), at<uint8_t>(out), threads);
  });
}

template <auto DkmKernels::*Function>
void def_values(py::module_& m, const char* name) {
  m.def(name, [](const Described& l, const Valued& v, int threads) {
    py::gil_scoped_release release;
    r2::cpu::Values values = {at<uint16_t>(std::get<0>(v)), at<float>(std::get<1>(v)), at<float>(std::get<2>(v)), at<int64_t>(std::get<3>(v)),
                              at<const int64_t>(std::get<4>(v)), at<float>(std::get<5>(v)), at<const int64_t>(std::get<6>(v)),
                              at<const int64_t>(std::get<7>(v)), at<const int64_t>(std::get<8>(v))};
    (chosen.dkm->*Function)(list_of(l), values, threads);
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::module_ cpu = m.def_submodule("cpu");
  cpu.def("isas", [] {
    std::vector<std::string> names;
    for (const Compiled& c : usable()) names.push_back(c.kernels->name);
    return names;
  });
  cpu.def("isa", [] { return std::string(chosen.kernels->name); });
  cpu.def("set_isa", [](const std::string& name) {
    for (const Compiled& c : usable())
      if (name == c.kernels->name) return void(chosen = c);
    throw std::invalid_argument("instruction set " + name + " is not usable on this machine");
  });
  m.def("partition", [](Address prefix, int64_t cells, int64_t clusters, Address starts) {
    py::gil_scoped_release release;
    r2::Partition::run(at<const double>(prefix), cells, clusters, at<int64_t>(starts));
  });
  def_codes(m.def_submodule("codes"));
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

#define R2_PASS(pass) def_pass(cpu, "dkm_" #pass, pass_on_cpu<&DkmKernels::pass>)
  R2_PASS(update), R2_PASS(output), R2_PASS(upstream), R2_PASS(recur), R2_PASS(gradient), R2_PASS(jacobian), R2_PASS(assign);
#undef R2_PASS
  def_values<&DkmKernels::collect>(cpu, "dkm_collect"), def_values<&DkmKernels::sum_by_value>(cpu, "dkm_sum_by_value"), def_values<&DkmKernels::look_up>(cpu, "dkm_look_up");
  cpu.def("dkm_scratch", [](int most, int d, int metric) { return chosen.dkm->scratch(most, d, metric); });

#define R2_QUANTIZER(op) def_quantizer(cpu, #op, quantizer_on_cpu<&QuantizerKernels::op>)
#define R2_QUANTIZERS                                                                                                        \
  R2_QUANTIZER(lsq_fwd), R2_QUANTIZER(lsq_bwd), R2_QUANTIZER(ewgs_fwd), R2_QUANTIZER(ewgs_bwd), R2_QUANTIZER(pact_fwd), R2_QUANTIZER(pact_bwd); \
  R2_QUANTIZER(dorefa_fwd), R2_QUANTIZER(dorefa_bwd)
  R2_QUANTIZERS;
#undef R2_QUANTIZER
  def_terms(cpu, terms_on_cpu<&TermKernels::forward>, terms_on_cpu<&TermKernels::backward>, terms_on_cpu<&TermKernels::rank>);

#if defined(R2_WITH_CUDA)
  py::module_ cuda = m.def_submodule("cuda");
  cuda.def("problem", &r2::cuda::problem);
#define R2_FORWARD(op) def_forward(cuda, #op "_fwd", &r2::cuda::op##_fwd)
#define R2_BACKWARD(op) def_backward(cuda, #op "_bwd", &r2::cuda::op##_bwd)
  R2_OPS;
#define R2_PASS(pass) def_pass(cuda, "dkm_" #pass, &r2::cuda::dkm_##pass)
  R2_PASS(update), R2_PASS(output), R2_PASS(upstream), R2_PASS(recur), R2_PASS(gradient), R2_PASS(jacobian), R2_PASS(assign);
  cuda.def("dkm_scratch", &r2::cuda::dkm_scratch);
#define R2_QUANTIZER(op) def_quantizer(cuda, #op, &r2::cuda::op)
  R2_QUANTIZERS;
  def_terms(cuda, &r2::cuda::terms_fwd, &r2::cuda::terms_bwd, &r2::cuda::rank);
  cuda.def("rank_scratch", &r2::cuda::rank_scratch);
#endif
}
