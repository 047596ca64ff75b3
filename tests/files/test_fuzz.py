"""20,000 palettized files that are changed at random: each is refused, or read alike by the extension and by numpy."""

import random
import resource
import time

import pytest
from files.mutations import BLOCKS, SMALL, checked_outcome, mutated, seed
from files.stored import raw
from safetensors.torch import load_file

from r2kernels.cli.expand import expand
from r2kernels.files.loading import Palettized

pytestmark = pytest.mark.usefixtures("one_thread")

FILES, FEW = 20_000, 40  # of which as many are large
EXPANDED = 20  # of those that are read one in so many is written dense too
MOST_SECONDS, MOST_BYTES = 1, 2**26  # of processor time for one file; of memory for all
# what must have been said or read, so that each check is reached
REACHED = (
    "is truncated",
    "its header is corrupt",
    "has metadata that is not text",
    "is not a palettized file",
    "has checksums that are not those of",
    "is corrupt (its checksum differs)",
    "does not begin where the tensor before it ends",
    "bytes of data where its header says",
    "is not described as a clustered or quantized weight is",
    "the input of b is not described as it must be",
    "which is not allowed",
    "which does not agree with its own shape",
    "is another name of nothing",
    "its user's metadata is corrupt",
    "t has values that are neither true nor false",
    "(the lengths of the code words are those of no code)",
    "(its blocks are not as long as its codes)",
    "(the stream holds a word that is none)",
    "(the stream is too short)",
    "(the stream is too long)",
)


def expanded(path, dense):
    """What the safetensors package reads of the dense file: the writer takes all that the reader does."""
    with Palettized(path) as file:
        expand(file, dense, overwrite=True)
    return {name: raw(tensor) for name, tensor in load_file(dense).items()}


def test_changed_files(tmp_path):
    rng, path = random.Random(0), tmp_path / "f"
    small, large = [seed(path, *kind) for kind in SMALL], seed(path, *BLOCKS)
    for data in (*small, large):
        assert isinstance(checked_outcome(path, data), dict)
    memory, slowest, read, reasons = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0, 0, set()
    for i in range(FILES):
        data = mutated(large if i % (FILES // FEW) == 0 else rng.choice(small), rng)
        began = time.process_time()
        found = checked_outcome(path, data)
        slowest = max(slowest, time.process_time() - began)
        read += isinstance(found, dict)
        if isinstance(found, dict) and read % EXPANDED == 0:
            assert expanded(path, tmp_path / "dense.safetensors") == found
        reasons |= {reason for reason in REACHED if isinstance(found, str) and reason in found}
    assert slowest < MOST_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024 < MOST_BYTES
    assert FILES // 10 < read < FILES // 2, "of the changes many are seen, and many cannot be"
    assert reasons == {*REACHED}
