// Codes in files, for Python.
#include "bindings.h"
#include "huffman.h"
#include "packing.h"

namespace r2 {

template <>
constexpr auto fields_of<codes::Groups> =
    std::make_tuple(R2_FIELD(codes::Groups, rows), R2_FIELD(codes::Groups, each), R2_FIELD(codes::Groups, bits));

// Codes in files. Those that can fail return an r2::codes::Status.
void def_codes(py::module_ m) {
  using namespace r2::codes;
  def_struct<Groups>(m, "Groups");
  m.def(
      "pack",
      [](Address codes, const Groups& groups, Address out, int threads) { pack(to{codes}, groups, to{out}, threads); },
      "codes"_a, "groups"_a, "out"_a, "threads"_a, Release());
  m.def(
      "unpack",
      [](Address packed, const Groups& groups, Address out, int threads) {
        unpack(to{packed}, groups, to{out}, threads);
      },
      "packed"_a, "groups"_a, "out"_a, "threads"_a, Release());
  m.def(
      "look_up",
      [](Address packed, const Groups& groups, Address tables, int index_bits, int64_t size, Address out, int threads) {
        look_up(to{packed}, groups, to{tables}, index_bits, size, to{out}, threads);
      },
      "packed"_a, "groups"_a, "tables"_a, "index_bits"_a, "size"_a, "out"_a, "threads"_a, Release());
  m.def(
      "coded_sizes",
      [](Address codes, int64_t rows, int64_t block, Address lengths, Address sizes, int threads) {
        return coded_sizes(to{codes}, Blocks{rows, block}, to{lengths}, to{sizes}, threads);
      },
      "codes"_a, "rows"_a, "block"_a, "lengths"_a, "sizes"_a, "threads"_a, Release());
  m.def(
      "encode",
      [](Address codes, int64_t rows, int64_t block, Address words, Address lengths, Address offsets, Address out,
         int threads) {
        return encode(to{codes}, Blocks{rows, block}, Words{to{words}, to{lengths}}, to{offsets}, to{out}, threads);
      },
      "codes"_a, "rows"_a, "block"_a, "words"_a, "lengths"_a, "offsets"_a, "out"_a, "threads"_a, Release());
  m.def(
      "decode",
      [](Address stream, int64_t bytes, Address offsets, int64_t rows, int64_t block, Address table, Address out,
         int threads) {
        return decode(to{stream}, bytes, to{offsets}, Blocks{rows, block}, to{table}, to{out}, threads);
      },
      "stream"_a, "bytes"_a, "offsets"_a, "rows"_a, "block"_a, "table"_a, "out"_a, "threads"_a, Release());
}

}  // namespace r2
