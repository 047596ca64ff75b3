// What all files that know pybind11 need: addresses come as integers, and the structs of csrc/contract.h are made by
// the names of their fields.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <type_traits>

namespace py = pybind11;
using namespace pybind11::literals;

namespace r2 {

using Address = uintptr_t;
using Release = py::call_guard<py::gil_scoped_release>;

struct to {
  Address address;
  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(address);
  }
};

template <class S, class M>
struct Field {
  using Given = std::conditional_t<std::is_pointer_v<M>, Address, M>;
  const char* name;
  M S::* member;

  void set(S& made, Given given) const {
    if constexpr (std::is_pointer_v<M>) {
      made.*member = to{given};
    } else {
      made.*member = given;
    }
  }
};
#define R2_FIELD(S, field) \
  Field<S, decltype(S::field)> { #field, &S::field }

// The fields of a struct of csrc/contract.h that Python gives, by their names.
template <class S>
constexpr auto fields_of = std::make_tuple();
template <class S>
void def_struct(py::module_& m, const char* name) {
  std::apply(
      [&](auto... fields) {
        auto make = [fields...](typename decltype(fields)::Given... given) {
          S made{};
          (fields.set(made, given), ...);
          return made;
        };
        py::class_<S>(m, name).def(py::init(make), py::kw_only(), py::arg(fields.name)...);
      },
      fields_of<S>);
}

void def_codes(py::module_ m);  // bindings_codes.cpp

}  // namespace r2
