"""What a compiled kernel costs, read from its machine code: registers, spills, 128-bit accesses, instructions per
weight. Needs no GPU."""

import functools
import heapq
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "csrc/cuda"
TYPES = {"float32": ("f", 4), "bfloat16": ("13__nv_bfloat16", 2), "float16": ("6__half", 2)}  # mangled, bytes

_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.M)
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.M)
_USAGE = re.compile(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def find_cuobjdump():
    """Path of a cuobjdump: on PATH, of the CUDA toolkit, or of the Triton wheel; None where there is none."""
    spec = importlib.util.find_spec("triton")
    folders = ["/usr/local/cuda/bin"]
    if spec and spec.origin:
        folders.append(str(Path(spec.origin).parent / "backends/nvidia/bin"))
    for path in (None, *folders):
        if found := shutil.which("cuobjdump", path=path):
            return found
    return None


def find_nvcc():
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which("nvcc", path=os.pathsep.join(f"{home}/bin" for home in homes if home)) or shutil.which("nvcc")


@functools.cache
def compiled(name):
    """Name -> Kernel of this source file as compiled for sm_90; skips the test where that cannot be done."""
    import pytest

    nvcc, cuobjdump = find_nvcc(), find_cuobjdump()
    if nvcc is None or cuobjdump is None:
        pytest.skip("no nvcc was found" if nvcc is None else "no cuobjdump was found")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        subprocess.run(
            [nvcc, "-std=c++17", "-O3", "-DR2_WITH_CUDA", "-arch=sm_90", "-cubin", "-o", cubin, SOURCES / name],
            check=True,
            timeout=900,
        )
        return kernels(cubin, cuobjdump)


@dataclass
class Kernel:
    name: str
    registers: int
    stack: int
    local: int
    instructions: list = field(default_factory=list)  # (predicate or "", opcode, operands), in order
    targets: dict = field(default_factory=dict)  # index of a jump -> index it goes to
    shared: int = 0  # bytes of shared memory that it declares itself

    @property
    def spills(self):
        return self.local or any(opcode.startswith(("LDL", "STL")) for _, opcode, _ in self.instructions)

    def count(self, prefix, contains="", path=None):
        chosen = self.instructions if path is None else [self.instructions[i] for i in path]
        return sum(opcode.startswith(prefix) and contains in opcode for _, opcode, _ in chosen)

    def _next(self, i):
        predicate, opcode, _ = self.instructions[i]
        jumps = i in self.targets
        if jumps:
            yield self.targets[i]
        if i + 1 < len(self.instructions) and not ((jumps or opcode.startswith(("EXIT", "RET"))) and not predicate):
            yield i + 1

    def _cycle(self, head):
        """Indices on the shortest way from `head` back to it."""
        best, queue = {}, [(0, n, head) for n in self._next(head)]
        while queue:
            cost, i, before = heapq.heappop(queue)
            if i in best:
                continue
            best[i] = before
            if i == head:
                path = [before]
                while path[-1] != head:
                    path.append(best[path[-1]])
                return path[::-1]
            for n in self._next(i):
                heapq.heappush(queue, (cost + 1, n, i))
        return None

    def loops(self):
        """Of each loop the indices on the shortest way once round it."""
        return [path for path in map(self._cycle, {to for i, to in self.targets.items() if to <= i}) if path]

    def main_loop(self):
        """Indices on the shortest way once round the loop that has the most 128-bit loads on it: what full tiles cost,
        rare branches aside."""
        loops = self.loops()
        return max(loops, key=lambda path: (self.count("LDG", "128", path), len(path)), default=[])

    def per_weight(self, size, loads_per_weight=1):
        """Instructions of the main loop for each weight of `size` bytes that it reads."""
        path = self.main_loop()
        weights = self.count("LDG", "128", path) * 16 / size / loads_per_weight
        return len(path) / weights if weights else float("inf")


def kernels(binary, cuobjdump):
    """Name -> Kernel for each kernel of a cubin or object file."""
    usage = subprocess.run([cuobjdump, "-res-usage", str(binary)], check=True, capture_output=True, text=True)
    found = {
        name: Kernel(name, int(reg), int(stack), int(local), shared=int(shared))
        for name, reg, stack, shared, local in _USAGE.findall(usage.stdout + usage.stderr)
    }
    parts = _FUNCTION.split(
        subprocess.run([cuobjdump, "-sass", str(binary)], check=True, capture_output=True, text=True).stdout
    )
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        if name in found:
            _read(found[name], body)
    return found


def _read(kernel, body):
    index, jumps, barriers = {}, {}, {}
    for address, text in _INSTRUCTION.findall(body):
        predicate = ""
        if text.startswith("@"):
            predicate, text = text.split(None, 1)
        opcode, _, operands = text.partition(" ")
        i = index[int(address, 16)] = len(kernel.instructions)
        kernel.instructions.append((predicate, opcode, operands.strip()))
        target = re.search(r"0x([0-9a-f]+)$", operands)
        if opcode.startswith("BSSY"):
            barriers[operands.split(",")[0].strip()] = int(target[1], 16)
        elif opcode.startswith("BSYNC"):  # threads that come together again go on where BSSY said
            jumps[i] = barriers.get(operands.split(",")[-1].strip())
        elif opcode.startswith("BRA") and target:
            jumps[i] = int(target[1], 16)
    kernel.targets = {i: index[to] for i, to in jumps.items() if to in index}
