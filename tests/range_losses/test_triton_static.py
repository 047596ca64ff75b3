"""What the compiler makes of the Triton kernels, without a GPU: no spills, 128-bit accesses, few instructions.

An H200 reads 4.3 fp32 or 8.6 16-bit weights per clock and multiprocessor, which issues 128 instructions: 30 or 15 a
weight in a forward pass, twice that in a backward pass. Registers and instructions differ between versions of Triton,
so the one that GPUs run today is asked where it is installed.
"""

import pytest
from processes import compiled, offenders

MOST = {  # instructions per fp32 weight, per 16-bit weight, on sm_90
    ("reduce_list", "soft_min_max"): (15, 16.5),
    ("reduce_list", "frozen_soft_min_max"): (11, 12.5),
    ("reduce_list", "soft_extrema"): (15, 16.5),
    ("reduce_list", "l_inf"): (4.5, 5),
    ("reduce_list", "margin"): (7, 7.5),
    ("reduce_list", "kure"): (9, 10),
    ("reduce_list", "weight_stats"): (9, 10),
    ("map_chunks", "soft_min_max"): (11.5, 13),
    ("map_chunks", "soft_extrema"): (11.5, 13),
    ("map_chunks", "l_inf"): (5.5, 7),
    ("map_chunks", "margin"): (5.5, 7),
    ("map_chunks", "kure"): (6.5, 8),
}
COLUMNS = {"reduce_list": (20.5, 21.5), "map_chunks": (19, 21)}  # of soft_min_max
ADDED = (1.5, 3)  # more, where the old gradient is read and added to


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return compiled("aot_check.py", tmp_path_factory.mktemp("triton"), ("90",), ("80", "100"))


def fast(row):
    """One column, aligned memory: what speed is promised for."""
    return not has_columns(row) and "aligned" not in row["variant"]


def has_columns(row):
    return row["variant"].startswith("d=")


def test_every_kernel_compiles_for_every_architecture(rows):
    assert {row["arch"] for row in rows} == {80, 90, 100}
    assert {row["dtype"] for row in rows if row["arch"] == 90} == {"fp32", "fp64", "bf16", "fp16"}


def test_no_kernel_spills(rows):
    assert not offenders(filter(fast, rows), lambda row: row["stack"] or row["spills"])
    # gathers and unaligned lists, for which no speed is promised: a few numbers, which ptxas finds more programs worth
    assert not offenders(rows, lambda row: row["stack"] > 32)


def test_bulk_accesses_are_128_bits_wide_and_four_loads_are_in_flight(rows):
    assert not offenders(
        filter(fast, rows), lambda row: row["loads128"] < 4 or row["other_loads"] or row["other_stores"]
    )
    assert not offenders(filter(fast, rows), lambda row: (row["stores128"] >= 4) != (row["kernel"] == "map_chunks"))


def test_instructions_per_weight(rows):
    single = [row for row in rows if fast(row) and row["arch"] == 90 and row["dtype"] != "fp64"]
    assert len(single) >= 45

    def most(row):
        wide = row["dtype"] == "fp32"
        return MOST[row["kernel"], row["op"]][not wide] + ("add=" in row["variant"]) * ADDED[not wide]

    assert not offenders(single, lambda row: not row["per_weight"] <= most(row))


def test_instructions_per_weight_of_columns(rows):
    columns = [row for row in rows if has_columns(row) and row["arch"] == 90]
    assert len(columns) == 4
    assert not offenders(columns, lambda row: not row["per_weight"] <= COLUMNS[row["kernel"]][row["dtype"] != "fp32"])


def test_loads_are_under_way_at_once(rows):
    """An H200 needs 25 KB of them in each multiprocessor for its bandwidth."""
    of_h200 = [row for row in rows if row["arch"] == 90 and row["dtype"] != "fp64"]
    assert not offenders(of_h200, lambda row: row["in_flight"] < (20 if has_columns(row) else 25))
