"""Quantizers and regularizers in Triton: what the compiler makes of the kernels, and interpreted.py."""

from fractions import Fraction

import pytest
from processes import Interpreted, compiled, offenders

MOST = {  # instructions for an fp32 element, for a 16-bit one, on sm_90; of sets of terms not more than of those apart
    "lsq_fwd": (17.5, 19),
    "lsq_bwd": (27, 29.5),
    "seq_fwd": (19.5, 21),
    "seq_bwd": (29, 31.5),
    "ewgs_fwd": (23.5, 25),
    "ewgs_bwd": (34, 36.5),
    "pact_fwd": (19.5, 21),
    "pact_bwd": (29, 32.5),
    "dorefa_fwd": (45, 46),
    "dorefa_bwd": (35, 37),
    "dorefa_detached": (31, 33),
    "sign_fwd": (6.5, 7),
    "sign_bwd": (5.5, 3),
    "rescale_fwd": (2.5, 4.5),
    "rescale_bwd": (8, 8.5),
    "reduce msqe": (19, 20),
    "reduce partial_l2": (5, 6),
    "map bin_reg": (34, 35.5),
    "map msqe": (18.5, 20),
    "map partial_l2": (6.5, 6),
    "reduce soft_min_max+kure+msqe": (42, 44),
    "reduce frozen": (11.5, 12.5),
    "map soft_min_max+kure+msqe": (33.5, 36),
    "map frozen+bin_reg": (46, 48),
    "reduce l_inf+margin+soft_min_max+kure+msqe+partial_l2": (53.5, 55),
    "map l_inf+margin+soft_min_max+kure+bin_reg+msqe+partial_l2": (83, 85),
}
# of bin_reg's forward, once for each 32 bins; a histogram for the counts alone takes 93
MOST_OF_BINS = {"bits=1": (29, 28.5), "bits=4": (74, 74), "bits=8": (123, 123)}
MASKED = (
    "quantize_columns",
    "merge_columns",
    "merge_terms",
    "correct_maxima",
    "count_chunks",
    "sum_bins",
    "merge_bins",
    "store_threshold",
    "std_of_sample",
)  # no loop over full tiles


@pytest.fixture(scope="module", autouse=True)
def interpreter(request, device):
    """The process with the interpreter, started before anything else here."""
    if device != "cpu" or request.config.getoption("--backend"):
        yield None
        return
    running = Interpreted("quantizers/interpreted.py")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return compiled("aot_quantizers.py", tmp_path_factory.mktemp("triton"), ("90",))


def fast(row):
    """Aligned memory whose channels are dense: what speed is promised for."""
    return row["kernel"] not in MASKED and not any(slow in row["variant"] for slow in ("aligned", "SPREAD", "HUGE"))


def test_no_kernel_spills(rows):
    assert not offenders(
        rows,
        lambda row: (row["stack"] or row["spills"]) and (row["dtype"] != "fp64" or "l_inf+margin" not in row["op"]),
    )
    assert not offenders(
        rows, lambda row: row["stack"] > 32
    )  # the gradients of all seven terms in float64, for which no speed is promised


def test_bulk_accesses_are_128_bits_wide_and_four_loads_are_in_flight(rows):
    gathers = [row for row in rows if fast(row) and "bin_reg" not in row["op"]]
    assert not offenders(gathers, lambda row: row["other_loads"])
    assert not offenders(
        filter(fast, rows), lambda row: row["loads128"] < (2 if row["op"] == "sign_bwd" else 4) or row["other_stores"]
    )
    assert not offenders(filter(fast, rows), lambda row: (row["stores128"] >= 2) == (row["kernel"] == "reduce_terms"))


def test_short_channels_are_read_and_written_128_bits_at_a_time(rows):
    columns = [row for row in rows if row["kernel"] == "quantize_columns"]
    assert len(columns) == 9 and not offenders(columns, lambda row: row["loads128"] < 4 or row["stores128"] < 2)


def test_instructions_per_element(rows):
    single = [row for row in rows if fast(row) and row["dtype"] != "fp64"]
    assert len(single) >= 60

    def most(row):
        return MOST[
            row["op"] if row["kernel"] == "quantize_chunks" else f"{row['kernel'].partition('_')[0]} {row['op']}"
        ][row["dtype"] != "fp32"]

    assert not offenders(single, lambda row: not row["per_element"] <= most(row))
    bins = [row for row in rows if row["kernel"] == "sum_bins" and row["dtype"] != "fp64"]
    assert len(bins) == 9
    assert not offenders(
        bins, lambda row: not row["per_element"] <= MOST_OF_BINS[row["variant"]][row["dtype"] != "fp32"]
    )


def rounded(x, digits):
    """The nearest number of so many binary digits, half to even."""
    if x == 0:
        return x
    unit = Fraction(2) ** (len(bin(abs(x.numerator))) - len(bin(x.denominator)) - digits)
    while abs(x) < unit * 2 ** (digits - 1):
        unit /= 2
    while abs(x) >= unit * 2**digits:
        unit *= 2
    return round(x / unit) * unit


@pytest.mark.parametrize("digits", [24, 53])
def test_a_share_by_corrected_product_is_the_quotient(digits):
    """rounding.divide_by_levels, whose tl.fma the interpreter does not fuse"""
    for bits in range(1, 9):
        n = 2**bits - 1
        inverse = rounded(rounded(Fraction(1, n), 53), digits)
        for c in range(-n, n + 1):
            q = rounded(c * inverse, digits)
            assert rounded(q + rounded(c - q * n, digits) * inverse, digits) == rounded(Fraction(c, n), digits)


def test_in_the_interpreter(interpreter):
    if interpreter is None:
        pytest.skip("this run is of other backends, or of a GPU")
    interpreter.check()
