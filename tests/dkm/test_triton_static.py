"""DKM in Triton: what the compiler makes of the kernels, and in a process of its own interpreted.py."""

import pytest
from processes import PINNED, Interpreted, compiled, offenders

# instructions on sm_90 of W_hat per fp32 and 16-bit weight, whatever K; of dL/dW of one iteration; of every one more
OUTPUT, GRADIENT, STEP = (33.5, 35.5), (51.5, 55), 48
AT_MOST_CLUSTERS = 34.5  # of OUTPUT for K = 4096, where the address of W_hat, from a table, is one register too many
PAIR = {  # instructions for a row and a centroid
    "cluster_sums mode=UPDATE": 19,
    "cluster_sums mode=UPSTREAM": 11,
    "cluster_sums mode=RECUR": 20,
    "cluster_sums mode=JACOBIAN": 18,
    "cluster_sums mode=UPDATE d=4 last=False": 30,
    "map_rows d=4 gradient=False": 32,
    "map_rows d=4 gradient=True": 90,
    "nearest ": 9,
}


@pytest.fixture(scope="module", autouse=True)
def interpreter(request, device):
    """The process with the interpreter, started before anything else here."""
    if device != "cpu" or request.config.getoption("--backend"):
        yield None
        return
    running = Interpreted("dkm/interpreted.py")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return compiled("aot_dkm.py", tmp_path_factory.mktemp("triton"))


def scalars(rows):
    """W_hat and dL/dW of scalars in aligned memory: what speed is promised for."""
    return [row for row in rows if row["kernel"] == "map_scalars" and "aligned" not in row["variant"]]


def test_every_kernel_compiles_without_spills(rows):
    assert {row["arch"] for row in rows} == {80, 90, 100}
    pinned = PINNED.exists()
    assert not offenders(rows if pinned else scalars(rows), lambda row: row["stack"] or row["spills"])


def test_weights_are_read_and_written_128_bits_at_a_time(rows):
    size = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
    assert not offenders(
        scalars(rows), lambda row: row["weights"] != 8 or row["stores128"] * 16 != 8 * size[row["dtype"]]
    )


def test_instructions_per_weight(rows):
    chosen = [row for row in scalars(rows) if row["arch"] == 90 and row["dtype"] != "fp64"]
    assert len(chosen) >= 10

    def most(row):
        if "K=4096" in row["variant"]:
            return AT_MOST_CLUSTERS
        return (GRADIENT if "gradient=True" in row["variant"] else OUTPUT)[row["dtype"] != "fp32"]

    assert not offenders(chosen, lambda row: row["per_weight"] > most(row) or row["per_step"] > STEP)
    by_name = {
        f"{row['kernel']} {row['variant']}": row["per_pair"]
        for row in rows
        if row["arch"] == 90 and row["dtype"] == "fp32" and "per_pair" in row
    }
    assert not {name: by_name[name] for name, most in PAIR.items() if by_name[name] > most}


def test_in_the_interpreter(interpreter):
    if interpreter is None:
        pytest.skip("this run is of other backends, or of a GPU")
    interpreter.check()
