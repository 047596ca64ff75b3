"""What tests of Triton run in processes of their own: its compiler ahead of time, and its interpreter."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PINNED = ROOT / ".venv-triton36" / "bin" / "python"


def compiled(script, cache, *runs):
    """The rows that tests/static/`script` prints, of Triton 3.6.0 where it is installed; `runs`: the arguments of
    each of the processes, which run side by side."""
    python = str(PINNED) if PINNED.exists() else sys.executable
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    found = subprocess.run(
        [python, "-c", "import triton; print(triton.__version__)"], env=environment, capture_output=True, text=True
    )
    if found.returncode:
        pytest.skip(f"{python} has no usable Triton: {found.stderr.strip().splitlines()[-1]}")
    absent = "" if python == str(PINNED) else f" ({PINNED.relative_to(ROOT)} with Triton 3.6.0 is absent)"
    print(f"Triton {found.stdout.strip()}{absent}")
    command = [python, str(ROOT / "tests" / "static" / script)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, *arguments], env=environment, **pipes) for arguments in runs or ((),)]
    rows = []
    for process in processes:
        output, errors = process.communicate()
        assert process.returncode == 0, output[-4000:] + errors[-4000:]
        rows += json.loads(output)
    return rows


def offenders(rows, wrong):
    return [" ".join(map(str, row.values())) for row in rows if wrong(row)]


class Interpreted:
    """A pytest of these files with Triton's interpreter on, and what it has printed. It is on or off for a whole
    process, from before triton is imported."""

    def __init__(self, *files, options=()):
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        quiet = ["-q", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *[str(ROOT / "tests" / file) for file in files], *options, *quiet],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    def check(self):
        """Waits; fails with what it has printed, if it failed."""
        code = self.process.wait()
        self.output.seek(0)
        output = self.output.read()
        print(output.strip().splitlines()[-1])
        assert code == 0, output[-20000:]
        assert " passed" in output.strip().splitlines()[-1], output

    def stop(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.output.close()
