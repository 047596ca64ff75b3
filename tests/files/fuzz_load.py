"""Coverage-guided fuzzing of the loader of palettized files, run by hand where atheris is installed.

A folder keeps what was found interesting:

    PYTHONPATH=tests python tests/files/fuzz_load.py CORPUS -max_total_time=600 -max_len=20000 -rss_limit_mb=4096

`test_fuzz.py` makes the same changes without it. Anything but a CheckpointError is a finding, and so is a difference
between the extension and numpy.
"""

import random
import sys
import tempfile
from pathlib import Path

import atheris
import torch

with atheris.instrument_imports(include=["r2kernels"]):
    from files.mutations import SMALL, checked_outcome, mutated, resealed, seed

folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "f"


def test_one_input(data):
    checked_outcome(path, resealed(data))


def mutate(data, most, number):
    rng = random.Random(number)
    try:
        return mutated(data, rng)[:most] if rng.random() < 0.5 else atheris.Mutate(data, most)
    except (TypeError, LookupError, ValueError, AttributeError, RecursionError):  # of bytes that are no file any more
        return atheris.Mutate(data, most)


if __name__ == "__main__":
    torch.set_num_threads(1)
    corpus = Path(next(argument for argument in sys.argv[1:] if argument[0] != "-"))
    corpus.mkdir(exist_ok=True)
    for i, kind in enumerate(SMALL):
        (corpus / f"seed{i}").write_bytes(seed(path, *kind))
    atheris.Setup(sys.argv, test_one_input, custom_mutator=mutate)
    atheris.Fuzz()
