// The submodules `cpu` and `cuda` with the same names. Nothing is checked here that r2kernels/backends/native, the only
// caller, has not checked.
#include "bindings.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#if defined(R2_WITH_CUDA)
#include "cuda/kernels.h"
#endif

using namespace r2;

namespace r2 {
// `pointers`, where the tensors lie, comes with every call
template <>
constexpr auto fields_of<List> =
    std::make_tuple(R2_FIELD(List, tensors), R2_FIELD(List, owner), R2_FIELD(List, count), R2_FIELD(List, chunks),
                    R2_FIELD(List, chunk), R2_FIELD(List, d), R2_FIELD(List, dtype), R2_FIELD(List, alone));
template <>
constexpr auto fields_of<Forward> = std::make_tuple(
    R2_FIELD(Forward, first), R2_FIELD(Forward, second), R2_FIELD(Forward, flag), R2_FIELD(Forward, partial),
    R2_FIELD(Forward, out), R2_FIELD(Forward, saved), R2_FIELD(Forward, bits));
template <>
constexpr auto fields_of<Backward> =
    std::make_tuple(R2_FIELD(Backward, grad), R2_FIELD(Backward, grad_stride), R2_FIELD(Backward, first),
                    R2_FIELD(Backward, second), R2_FIELD(Backward, saved), R2_FIELD(Backward, target),
                    R2_FIELD(Backward, add), R2_FIELD(Backward, parameter_gradient), R2_FIELD(Backward, bits));
template <>
constexpr auto fields_of<Rank> = std::make_tuple(R2_FIELD(Rank, rank), R2_FIELD(Rank, theta), R2_FIELD(Rank, scratch));
template <>
constexpr auto fields_of<Digits> =
    std::make_tuple(R2_FIELD(Digits, prefix), R2_FIELD(Digits, place), R2_FIELD(Digits, counts));
template <>
constexpr auto fields_of<Clusters> = std::make_tuple(R2_FIELD(Clusters, size), R2_FIELD(Clusters, tau),
                                                     R2_FIELD(Clusters, most), R2_FIELD(Clusters, metric));
template <>
constexpr auto fields_of<Pass> =
    std::make_tuple(R2_FIELD(Pass, old), R2_FIELD(Pass, fresh), R2_FIELD(Pass, upstream), R2_FIELD(Pass, moments),
                    R2_FIELD(Pass, steps), R2_FIELD(Pass, grads), R2_FIELD(Pass, scratch), R2_FIELD(Pass, kept),
                    R2_FIELD(Pass, out), R2_FIELD(Pass, out_moments), R2_FIELD(Pass, target), R2_FIELD(Pass, counts));
template <>
constexpr auto fields_of<Values> =
    std::make_tuple(R2_FIELD(Values, slots), R2_FIELD(Values, values), R2_FIELD(Values, counts),
                    R2_FIELD(Values, sizes), R2_FIELD(Values, grads), R2_FIELD(Values, sums), R2_FIELD(Values, shift),
                    R2_FIELD(Values, factor), R2_FIELD(Values, targets));
template <>
constexpr auto fields_of<RowGroups> = std::make_tuple(
    R2_FIELD(RowGroups, rows), R2_FIELD(RowGroups, weights), R2_FIELD(RowGroups, drawn), R2_FIELD(RowGroups, uniform),
    R2_FIELD(RowGroups, out), R2_FIELD(RowGroups, sizes), R2_FIELD(RowGroups, clusters), R2_FIELD(RowGroups, seeds),
    R2_FIELD(RowGroups, count), R2_FIELD(RowGroups, d), R2_FIELD(RowGroups, dtype), R2_FIELD(RowGroups, max_iter));
template <>
constexpr auto fields_of<Lines> =
    std::make_tuple(R2_FIELD(Lines, values), R2_FIELD(Lines, weights), R2_FIELD(Lines, sizes),
                    R2_FIELD(Lines, clusters), R2_FIELD(Lines, scratch), R2_FIELD(Lines, out), R2_FIELD(Lines, count),
                    R2_FIELD(Lines, stride), R2_FIELD(Lines, most), R2_FIELD(Lines, dtype), R2_FIELD(Lines, max_iter));
template <>
constexpr auto fields_of<Quantizer> = std::make_tuple(
    R2_FIELD(Quantizer, first), R2_FIELD(Quantizer, second), R2_FIELD(Quantizer, third), R2_FIELD(Quantizer, bits),
    R2_FIELD(Quantizer, low), R2_FIELD(Quantizer, high), R2_FIELD(Quantizer, flag), R2_FIELD(Quantizer, sized),
    R2_FIELD(Quantizer, grads), R2_FIELD(Quantizer, partial), R2_FIELD(Quantizer, target),
    R2_FIELD(Quantizer, first_gradient), R2_FIELD(Quantizer, second_gradient));
template <>
constexpr auto fields_of<LineGroups> =
    std::make_tuple(R2_FIELD(LineGroups, sizes), R2_FIELD(LineGroups, clusters), R2_FIELD(LineGroups, weights),
                    R2_FIELD(LineGroups, out), R2_FIELD(LineGroups, count), R2_FIELD(LineGroups, dtype),
                    R2_FIELD(LineGroups, max_iter), R2_FIELD(LineGroups, zero));
template <>
constexpr auto fields_of<Tables> =
    std::make_tuple(R2_FIELD(Tables, weights), R2_FIELD(Tables, tables), R2_FIELD(Tables, groups), R2_FIELD(Tables, n),
                    R2_FIELD(Tables, entries), R2_FIELD(Tables, dtype), R2_FIELD(Tables, codes), R2_FIELD(Tables, sums),
                    R2_FIELD(Tables, counts));
}  // namespace r2

namespace {

void def_structs(py::module_& m) {
  py::enum_<Dtype>(m, "Dtype")
      .value("f64", Dtype::f64)
      .value("f32", Dtype::f32)
      .value("bf16", Dtype::bf16)
      .value("f16", Dtype::f16);
  py::enum_<Metric>(m, "Metric").value("euclidean", Metric::euclidean).value("sqeuclidean", Metric::sqeuclidean);
  py::class_<Tensor>(m, "Tensor")
      .def(py::init([](int64_t rows, int64_t numel, int64_t run, int64_t first_chunk, int64_t columns,
                       int64_t first_column) { return Tensor{rows, numel, run, first_chunk, columns, first_column}; }));
  def_struct<List>(m, "List");
  def_struct<Forward>(m, "Forward");
  def_struct<Backward>(m, "Backward");
  def_struct<Clusters>(m, "Clusters");
  def_struct<RowGroups>(m, "RowGroups");
  def_struct<LineGroups>(m, "LineGroups");
  def_struct<Lines>(m, "Lines");
}

// What the extension says of the op contract, and of memory that its callers make for it.
py::dict contract() {
  namespace saved = saved_numbers;
  py::dict numbers("l_inf"_a = saved::l_inf, "margin"_a = saved::margin, "soft_min_max"_a = saved::soft_min_max,
                   "soft_extrema"_a = saved::soft_extrema, "kure"_a = saved::kure, "bin_reg"_a = py::none(),
                   "msqe"_a = saved::msqe, "partial_l2"_a = saved::partial_l2);
  py::dict terms("l_inf"_a = int(Term::l_inf), "margin"_a = int(Term::margin),
                 "soft_min_max"_a = int(Term::soft_min_max), "kure"_a = int(Term::kure),
                 "bin_reg"_a = int(Term::bin_reg), "msqe"_a = int(Term::msqe), "partial_l2"_a = int(Term::partial_l2));
  return py::dict("saved"_a = numbers, "terms"_a = terms, "statistics"_a = kStatistics, "radix"_a = kRadix,
                  "fields"_a = int(sizeof(Tensor) / sizeof(int64_t)), "state"_a = kState,
                  "quantizer_sums"_a = kQuantizerSums, "floor"_a = kFloor, "half_values"_a = kHalfValues);
}

struct InstructionSet {
  const char* name;
  const cpu::RangeLosses* range_losses;
  const cpu::Regularizers* regularizers;
  const cpu::Quantizers* quantizers;
  const cpu::Dkm* dkm;
  const cpu::KMeans* kmeans;
  const cpu::TablePasses* tables;
};
#define R2_INSTRUCTION_SET(isa)                                                             \
  {#isa,           &cpu::isa::range_losses, &cpu::isa::regularizers, &cpu::isa::quantizers, \
   &cpu::isa::dkm, &cpu::isa::kmeans,       &cpu::isa::tables}

// Those that this processor runs, the widest last.
std::vector<InstructionSet> usable() {
  std::vector<InstructionSet> found = {R2_INSTRUCTION_SET(portable)};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    found.push_back(R2_INSTRUCTION_SET(avx2));
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      found.push_back(R2_INSTRUCTION_SET(avx512));
  }
#endif
  return found;
}

InstructionSet chosen = usable().back();

void def_instruction_sets(py::module_& m) {
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const InstructionSet& set : usable()) names.push_back(set.name);
    return names;
  });
  m.def("isa", [] { return std::string(chosen.name); });
  m.def(
      "set_isa",
      [](const std::string& name) {
        for (const InstructionSet& set : usable())
          if (name == set.name) return void(chosen = set);
        throw std::invalid_argument("instruction set " + name + " is not usable on this machine");
      },
      "name"_a);
}

// Every op takes a list, the address of the table of its tensors' addresses, and where it runs: the index and the
// stream of a GPU, or 0 and the number of threads. The fields of its struct follow by name, which costs less than
// making one. The first four have no names, for pybind11 would compare each with all that the call gives, in 0.1 us.
const py::arg unnamed(nullptr);

template <class Arguments, class Run>
void def_op(py::module_& m, const char* name, Run run) {
  std::apply(
      [&](auto... fields) {
        m.def(
            name,
            [run, fields...](const List& list, Address pointers, int device, Address queue,
                             typename decltype(fields)::Given... given) {
              Arguments arguments{};
              (fields.set(arguments, given), ...);
              run(list.with(to{pointers}), arguments, device, queue);
            },
            unnamed, unnamed, unnamed, unnamed, py::kw_only(), py::arg(fields.name)..., Release());
      },
      fields_of<Arguments>);
}

template <class Run>
void def_pass(py::module_& m, const char* name, Run run) {
  std::apply(
      [&](auto... fields) {
        m.def(
            name,
            [run, fields...](const List& list, Address pointers, int device, Address queue, const Clusters& clusters,
                             typename decltype(fields)::Given... given) {
              Pass pass{};
              (fields.set(pass, given), ...);
              run(list.with(to{pointers}), clusters, pass, device, queue);
            },
            unnamed, unnamed, unnamed, unnamed, py::kw_only(), "clusters"_a, py::arg(fields.name)..., Release());
      },
      fields_of<Pass>);
}

template <class Arguments, class Run>
void def_terms(py::module_& m, const char* name, Run run) {
  m.def(
      name,
      [run](const List& list, Address pointers, int device, Address queue, const std::vector<int>& term,
            const std::vector<Arguments>& of) {
        if (term.size() != of.size() || term.size() > kTerms) throw std::invalid_argument("too many terms");
        Terms<Arguments> terms = {int(term.size()), {}, {}};
        for (size_t i = 0; i < term.size(); ++i) terms.term[i] = static_cast<Term>(term[i]), terms.of[i] = of[i];
        run(list.with(to{pointers}), terms, device, queue);
      },
      unnamed, unnamed, unnamed, unnamed, py::kw_only(), "term"_a, "of"_a, Release());
}

// def(how it is bound, its arguments, its family on the CPU, its name) for every op of both halves
#define R2_OPS(def)                                      \
  def(def_op, Forward, range_losses, l_inf_fwd);         \
  def(def_op, Backward, range_losses, l_inf_bwd);        \
  def(def_op, Forward, range_losses, margin_fwd);        \
  def(def_op, Backward, range_losses, margin_bwd);       \
  def(def_op, Forward, range_losses, soft_min_max_fwd);  \
  def(def_op, Backward, range_losses, soft_min_max_bwd); \
  def(def_op, Forward, range_losses, soft_extrema_fwd);  \
  def(def_op, Backward, range_losses, soft_extrema_bwd); \
  def(def_op, Forward, regularizers, kure_fwd);          \
  def(def_op, Backward, regularizers, kure_bwd);         \
  def(def_op, Forward, regularizers, weight_stats_fwd);  \
  def(def_op, Forward, regularizers, sampled_std_fwd);   \
  def(def_terms, Forward, regularizers, terms_fwd);      \
  def(def_terms, Backward, regularizers, terms_bwd);     \
  def(def_op, Rank, regularizers, rank);                 \
  def(def_op, Digits, regularizers, digits_fwd);         \
  def(def_op, Quantizer, quantizers, lsq_fwd);           \
  def(def_op, Quantizer, quantizers, lsq_bwd);           \
  def(def_op, Quantizer, quantizers, ewgs_fwd);          \
  def(def_op, Quantizer, quantizers, ewgs_bwd);          \
  def(def_op, Quantizer, quantizers, pact_fwd);          \
  def(def_op, Quantizer, quantizers, pact_bwd);          \
  def(def_op, Quantizer, quantizers, dorefa_fwd);        \
  def(def_op, Quantizer, quantizers, dorefa_bwd);        \
  def(def_op, Quantizer, quantizers, rescale_fwd);       \
  def(def_op, Quantizer, quantizers, rescale_bwd)
#define R2_PASSES(def) \
  def(update);         \
  def(output);         \
  def(upstream);       \
  def(recur);          \
  def(gradient);       \
  def(jacobian);       \
  def(assign)

void def_kmeans(py::module_& m) {
  m.def(
      "fit_lines",
      [](Address pointers, const LineGroups& groups, int threads) {
        chosen.kmeans->fit_lines(to{pointers}, groups, threads);
      },
      "pointers"_a, "groups"_a, "threads"_a, Release());
  m.def(
      "fit_rows", [](const RowGroups& groups, int threads) { chosen.kmeans->fit_rows(groups, threads); }, "groups"_a,
      "threads"_a, Release());
  m.def(
      "partition",
      [](Address prefix, int64_t cells, int64_t clusters, Address starts) {
        chosen.kmeans->partition(to{prefix}, cells, clusters, to{starts});
      },
      "prefix"_a, "cells"_a, "clusters"_a, "starts"_a, Release());
}

void def_tables(py::module_& m) {
  def_struct<Tables>(m, "Tables");
  m.def(
      "nearest", [](const Tables& tables, int threads) { chosen.tables->nearest(tables, threads); }, "tables"_a,
      "threads"_a, Release());
  m.def(
      "errors", [](const Tables& tables, int threads) { chosen.tables->errors(tables, threads); }, "tables"_a,
      "threads"_a, Release());
}

void def_cpu(py::module_ m) {
  def_instruction_sets(m);
#define R2_DEF(bind, Arguments, family, op)                                                   \
  bind<Arguments>(m, #op, [](const List& list, const auto& arguments, int, Address threads) { \
    chosen.family->op(list, arguments, int(threads));                                         \
  })
  R2_OPS(R2_DEF);
#undef R2_DEF
#define R2_DEF(pass)                                                                                     \
  def_pass(m, "dkm_" #pass,                                                                              \
           [](const List& list, const Clusters& clusters, const Pass& arguments, int, Address threads) { \
             chosen.dkm->pass(list, clusters, arguments, int(threads));                                  \
           })
  R2_PASSES(R2_DEF);
#undef R2_DEF
#define R2_DEF(pass)                                                                                 \
  def_op<Values>(m, "dkm_" #pass, [](const List& list, const Values& values, int, Address threads) { \
    chosen.dkm->pass(list, values, int(threads));                                                    \
  })
  R2_DEF(collect);
  R2_DEF(sum_by_value);
  R2_DEF(look_up);
#undef R2_DEF
  m.def(
      "dkm_scratch",
      [](int64_t chunks, int64_t, int most, int d, Metric metric) {
        return chunks * chosen.dkm->scratch(most, d, metric);
      },
      "chunks"_a, "tensors"_a, "most"_a, "d"_a, "metric"_a);
  def_kmeans(m);
  def_tables(m);
}

#if defined(R2_WITH_CUDA)
void def_cuda(py::module_ m) {
  m.def("problem", &cuda::problem);
  m.def(
      "write_words",
      [](Address words, int64_t count, Address out, int device, Address queue) {
        cuda::write_words(to{words}, count, to{out}, device, queue);
      },
      unnamed, unnamed, unnamed, unnamed, unnamed, Release());
#define R2_DEF(bind, Arguments, family, op) bind<Arguments>(m, #op, &cuda::op)
  R2_OPS(R2_DEF);
#undef R2_DEF
#define R2_DEF(pass) def_pass(m, "dkm_" #pass, &cuda::dkm_##pass)
  R2_PASSES(R2_DEF);
#undef R2_DEF
  m.def("dkm_scratch", &cuda::dkm_scratch, "chunks"_a, "tensors"_a, "most"_a, "d"_a, "metric"_a);
  m.def("rank_scratch", &cuda::rank_scratch, "count"_a);
  m.def(
      "fit_lines", [](const Lines& lines, int device, Address queue) { cuda::fit_lines(lines, device, queue); },
      unnamed, unnamed, unnamed, Release());
  m.def("lines_scratch", &cuda::lines_scratch, "stride"_a, "most"_a, "weighted"_a);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("build") = std::string("C++ " R2_COMPILER)
#if defined(R2_WITH_CUDA)
                    + ", CUDA for " + cuda::architectures()
#endif
      ;
  m.def("contract", &contract);
  def_structs(m);
  def_codes(m.def_submodule("codes"));
  def_cpu(m.def_submodule("cpu"));
#if defined(R2_WITH_CUDA)
  def_cuda(m.def_submodule("cuda"));
#endif
}
