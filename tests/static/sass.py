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

    def _way(self, start, end):
        """Indices on the shortest way from `start` to `end`, which is not among them unless it is where it starts."""
        best, queue = {}, [(0, n, start) for n in self._next(start)]
        while queue:
            cost, i, before = heapq.heappop(queue)
            if i in best:
                continue
            best[i] = before
            if i == end:
                path = [before]
                while path[-1] != start:
                    path.append(best[path[-1]])
                return path[::-1]
            for n in self._next(i):
                heapq.heappush(queue, (cost + 1, n, i))
        return None

    def loops(self):
        """Of each loop the indices on the shortest way once round it."""
        heads = {to for i, to in self.targets.items() if to <= i}
        return [path for path in (self._way(head, head) for head in heads) if path]

    def main_loop(self):
        """Indices on the shortest way once round the loop that has the most 128-bit loads on it, over memory without
        gaps, whose addresses need no division: what full tiles cost, rare branches aside."""

        def work(path):
            return self.count("LDG", "128", path), -self.count("IMAD.HI", path=path), len(path)

        return max(self.loops(), key=work, default=[])

    def in_flight(self, path):
        """Bytes of the loads of a thread that are under way at once on this way round a loop: sent, and not used."""
        waiting, most = {}, 0  # first of its registers -> how many there are, bytes
        for i in [*path, *path]:
            _, opcode, operands = self.instructions[i]
            registers = [int(r) for r in re.findall(r"R(\d+)", operands)]
            loaded = registers[: opcode.startswith("LDG")]
            for used in registers[len(loaded) :]:
                waiting = {r: (n, size) for r, (n, size) in waiting.items() if not r <= used < r + n}
            for register in loaded:
                widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
                size = next((width for mark, width in widths.items() if mark in opcode.split(".")), 4)
                waiting[register] = max(size // 4, 1), size
            most = max(most, sum(size for _, size in waiting.values()))
        return most

    def main_loop_through(self, opcodes):
        """The same, of the shortest such loop, where these instructions lie on the way that the shortest way leaves
        out, as no warp passes over them each time."""

        def work(path):
            return self.count("LDG", "128", path), self.count("MUFU", path=path)

        most = work(self.main_loop())
        head, *rest = min((path for path in self.loops() if work(path) == most), key=len)
        found = [i for i in range(head, max(rest)) if self.instructions[i][1].startswith(opcodes)]
        ways = [(self._way(head, i), self._way(i, head)) for i in found]
        return min((there + back for there, back in ways if there and back), key=len)

    def per_weight(self, size, loads_per_weight=1):
        """Instructions of the main loop for each weight of `size` bytes that it reads."""
        path = self.main_loop()
        weights = self.count("LDG", "128", path) * 16 / size / loads_per_weight
        return len(path) / weights if weights else float("inf")


# Cycles until a result can be used; of arithmetic 5. Of loads from memory: in the second cache, fetched ahead; else
# under load.
LATENCIES = {"LDS": 30, "SHFL": 26, "MUFU": 22, "REDUX": 30, "ATOMS": 60, "LDL": 40, "LDC": 40, "D": 8}
CACHED, LOADED = 300, 1000
_NO_RESULT = ("ST", "BRA", "BSSY", "BSYNC", "BAR", "RED", "CCTL", "WARPSYNC", "NOP", "EXIT", "MEMBAR", "DEPBAR")


def _registers(text, width=1):
    found = re.findall(r"(?<![\w.])U?P\d", text)
    for kind, number in re.findall(r"(?<![\w.])(U?R)(\d+)", text):
        found += [f"{kind}{int(number) + i}" for i in range(width)]
    return found


def _access(opcode, operands):
    """(registers and predicates that an instruction reads, those that it writes)"""
    parts, writes = [part.strip() for part in operands.split(",")], []
    double = opcode.startswith(("DADD", "DMUL", "DFMA", "DSETP", "IMAD.WIDE"))
    width = 4 if ".128" in opcode else 2 if ".64" in opcode or double else 1
    if not opcode.startswith(_NO_RESULT) or opcode.startswith("REDUX"):
        while parts and re.fullmatch(r"U?P[\dT]", parts[0]):
            writes += _registers(parts.pop(0))
        if parts and "SETP" not in opcode:
            writes += _registers(parts.pop(0), width)
        if parts and opcode.startswith(("IADD3", "LEA", "IMAD")) and re.fullmatch(r"P\d", parts[0]):
            writes += _registers(parts.pop(0))
    reads = [
        register
        for part in parts
        for register in _registers(part, width if double or (opcode.startswith("ST") and "[" not in part) else 1)
    ]
    return reads, writes


def alone(kernel, path):
    """When a warp that has a scheduler to itself issues each instruction of its third lap on this way: in order, one a
    cycle, each when all that it reads is there. The last number is when the next lap begins."""
    memory = CACHED if kernel.count("CCTL", "PF2") else LOADED
    latencies = {**LATENCIES, "LDG": memory, "LD.": memory}
    ready, now, times = {}, 0, []
    for _ in range(3):
        times, start = [], now
        for i in path:
            predicate, opcode, operands = kernel.instructions[i]
            reads, writes = _access(opcode, operands)
            now = max([now + 1] + [ready.get(register, 0) for register in reads + _registers(predicate)])
            times.append(now - start)
            latency = next((n for prefix, n in latencies.items() if opcode.startswith(prefix)), 5)
            ready.update(dict.fromkeys(writes, now + latency))
    return [*times, now - start]


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
