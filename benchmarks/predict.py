"""What an H200 will need for each kernel, read from its machine code, until it has been measured.

Needs nvcc and Triton, but no GPU.

    python benchmarks/predict.py [--results FOLDER]         writes predicted-h200.md and .json

The hot loop of a kernel is the way once round the loop with the most 128-bit loads. It says how many bytes,
instructions, results of the special-function unit (MUFU: exponentials, reciprocals) and wavefronts of shared memory
each weight costs, and how long a warp takes that has a scheduler to itself: instructions issue in order, one a cycle,
each when what it reads is there. The resident warps, by registers and by shared memory, go round the loop at once; if
they are too few to fill the units meanwhile, their latency decides. Of two warps that share bins, each waits while the
other adds. The predicted time is that of the dearest of all these, as if the others were hidden behind it: a floor,
which launches, the last wave of blocks, queues and bank conflicts of shared memory add to.
"""

import argparse
import datetime
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests"
PINNED = HERE.parent / ".venv-triton36" / "bin" / "python"
sys.path[:0] = [str(TESTS), str(TESTS / "static")]

BANDWIDTH, SMS, CLOCK = 4.8e12, 132, 1.9e9  # bytes/s of an H200's memory
# instructions of a thread, MUFU results, for each clock and multiprocessor; of shared memory one wavefront
LANES, MUFU = 128, 16
WEIGHTS = {"ResNet-18": 11_678_912, "256 MB of float32": 2**26}
SIZES = {"float": 4, "__nv_bfloat16": 2, "fp32": 4, "bf16": 2}
NAMES = {"float": "float32", "__nv_bfloat16": "bfloat16", "fp32": "float32", "bf16": "bfloat16"}
TWO_ARRAYS = ("Upstream", "Recur<true>", "gradient", "adding")
ITERATIONS = 5
CLUSTERS = (16, 64, 256)
SHARED = 227  # KB of a block
TURN = 60  # cycles that a later turn at a bin takes
# prints Shape.own and warps to a multiprocessor for each pass over scalars that sums, and number of clusters
SHAPES = """
#include <cstdio>
#include "dkm_shared.cuh"
using namespace r2::cuda;
template <class Op> void put(const char* op, int most) {
  const Shape shape = choose<Op, float>(most, %d * 1024 - kReserved, false);
  printf("%%s,%%d,%%d,%%d\\n", op, most, int(shape.own), shape.warps * shape.blocks);
}
int main() {
  for (int most : {%s})
    put<UpdateSums>("UpdateSums", most), put<UpstreamSums>("UpstreamSums", most),
        put<RecurSums<false>>("RecurSums<false>", most), put<RecurSums<true>>("RecurSums<true>", most),
        put<JacobianSums>("JacobianSums", most);
}
"""


def wavefronts(kernel, loop):
    """Of shared memory, for the 32 threads of a warp, where no two meet in a bank."""
    total = 0
    for i in loop:
        opcode = kernel.instructions[i][1]
        if opcode.startswith(("LDS", "STS")):
            total += 4 if "128" in opcode else 2 if "64" in opcode else 1
        total += opcode.startswith("SHFL")
    return total


def accessed(kernel, loop, prefix):
    """Bytes that a thread writes in the loop (STG), or reads in 128 bits (LDG): narrower loads look tables up, in
    cache."""
    if prefix == "LDG":
        return kernel.count("LDG", "128", loop) * 16
    widths = {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
    found = 0
    for i in loop:
        opcode = kernel.instructions[i][1]
        if opcode.startswith(prefix):
            found += next((width for mark, width in widths.items() if mark in opcode.split(".")), 4)
    return found


def row(backend, op, dtype, kernel, loop, arrays, warps=64, turns=0):
    """The cost of a weight, or None where the loop does not stream in 128-bit loads. warps: to a multiprocessor, if
    registers allow. turns: later ones that a warp takes for each number of a thread."""
    read = kernel.count("LDG", "128", loop) * 16
    weights = read // SIZES[dtype] // arrays
    if not weights:
        return None
    import sass

    written = accessed(kernel, loop, "STG")
    warps = min(warps, 65536 // (-(-kernel.registers // 8) * 8 * 32))
    *times, lap = sass.alone(kernel, loop)
    return {
        "backend": backend,
        "op": op,
        "dtype": NAMES[dtype],
        "registers": kernel.registers,
        "spills": bool(kernel.spills),
        "bytes": (accessed(kernel, loop, "LDG") + written) / weights,
        "instructions": len(loop) / weights,
        "mufu": kernel.count("MUFU", "", loop) / weights,
        "shared": wavefronts(kernel, loop) / weights / 32,
        "in flight": warps * 32 * kernel.in_flight(loop) / 1024,
        "warps": warps,
        "latency": (lap + waiting(kernel, loop, times) + 2 * turns * weights * TURN) / (warps * 32 * weights),
    }


def waiting(kernel, loop, times):
    """Cycles in which the other warp adds, where two share bins: from the barrier to the last addition."""
    opcodes = [kernel.instructions[i][1] for i in loop]
    begun = [at for at, opcode in zip(times, opcodes, strict=True) if opcode.startswith("BAR")]
    added = [at for at, opcode in zip(times, opcodes, strict=True) if opcode.startswith(("STS.128", "STS.64"))]
    return added[-1] - begun[0] if begun and added else 0


def shapes():
    """(op, clusters) -> (whether each lane has its own bins, warps to a multiprocessor), as the launcher chooses."""
    import sass

    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "shapes"
        source = program.with_suffix(".cu")
        source.write_text(SHAPES % (SHARED, ", ".join(map(str, CLUSTERS))))
        compiler = [sass.find_nvcc(), "-std=c++17", "-arch=sm_90", "-I", sass.SOURCES]
        subprocess.run([*compiler, "-o", program, source], check=True)
        lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    table = [line.split(",") for line in lines]
    return {(op, int(most)): (own == "1", int(warps)) for op, most, own, warps in table}


def sums_rows(signature, dtype, kernel, chosen):
    """A pass that sums by interval, for the numbers of clusters for which it runs in this kernel."""
    op, own, far = re.search(r"dkm_sums_kernel<(.*?), (true|false), (true|false)", signature).groups()
    for (name, clusters), (is_own, warps) in chosen.items():
        if name != op or far == "true" or is_own != (own == "true"):
            continue
        label, loop = f"dkm {op.replace('Sums', '')}, K = {clusters}", kernel.main_loop_through(("STS.128", "STS.64"))
        turns = 0 if is_own else 1 - math.exp(-48 / clusters)  # 48 pairs of lanes, weights in all intervals alike
        arrays = 2 if any(mark in label for mark in TWO_ARRAYS) else 1
        yield row("cuda", label, dtype, kernel, loop, arrays, warps, turns)


def cuda_rows():
    import sass

    chosen = shapes()
    for source in sorted(sass.SOURCES.glob("*.cu")):
        kernels = sass.compiled(source.name)
        names = subprocess.run(
            ["c++filt"], input="\n".join(kernels), capture_output=True, text=True, check=True
        ).stdout.splitlines()
        for kernel, name in zip(kernels.values(), names, strict=True):
            signature = re.sub(r"LossOp<r2::device::(\w+)>", r"\1", re.sub(r"r2::cuda::", "", name)).replace(
                "r2::device::", ""
            )
            dtype = next((d for d in ("__nv_bfloat16", "float") if re.search(rf"[<, ]{d}[,>]", signature)), None)
            if (
                dtype is None
                or "__half" in signature
                or re.search("merge|terms|tables|GivenDigit|gradient_kernel<false", signature)
            ):  # a set of terms costs what they cost
                continue
            if "dkm_sums" in signature:
                yield from sums_rows(signature, dtype, kernel, chosen)
                continue
            op = label(signature)
            if "dkm_gradient_kernel<true" in signature:
                yield gradient_row(op, dtype, kernel)
            else:
                yield row(
                    "cuda", op, dtype, kernel, kernel.main_loop(), 2 if any(mark in op for mark in TWO_ARRAYS) else 1
                )


def label(signature):
    """`partial_kernel<SoftReader<false>, float>(...)` as `Soft<false> forward`."""
    name = re.sub(r"^void |\(r2::List.*", "", signature)
    kernel, arguments = re.match(r"(\w+?)_kernel<(.*)>$", name).groups()
    arguments = re.sub(r", (float|__nv_bfloat16)|^(float|__nv_bfloat16)(, )?", "", arguments)
    adding = ", adding" if kernel.endswith("map") and arguments.endswith("true") else ""
    formula = re.sub(r"Reader|Op|(^|, )(true|false)$", "", arguments)
    if kernel == "digits":
        return kernel
    if kernel in ("bins", "bins_map"):
        return f"BinReg {'forward' if kernel == 'bins' else 'backward'}{adding}"
    if kernel == "partial":
        return f"{formula} forward"
    return (
        f"{formula} backward{adding}"
        if kernel == "map"
        else f"{kernel} {formula}".replace("_", " ").replace("Sums", "").strip()
    )


def gradient_row(op, dtype, kernel):
    """All iterations in registers: w and g are read and dL/dW written once."""
    import sass

    warps = 65536 // (-(-kernel.registers // 8) * 8 * 32) // 4 * 4  # blocks of 4
    step = max(kernel.loops(), key=lambda path: kernel.count("MUFU", path=path))
    size, weights = SIZES[dtype], kernel.count("MUFU", "", step) / 2  # an exponential and a reciprocal each
    return {
        "backend": "cuda",
        "op": f"dkm gradient, T = {ITERATIONS}",
        "dtype": NAMES[dtype],
        "registers": kernel.registers,
        "spills": bool(kernel.spills),
        "bytes": 3 * size,
        "instructions": ITERATIONS * len(step) / weights,
        "mufu": 2 * ITERATIONS,
        "in flight": None,
        "shared": ITERATIONS * wavefronts(kernel, step) / weights / 32,
        "warps": warps,
        "latency": ITERATIONS * sass.alone(kernel, step)[-1] / (warps * 32 * weights),
    }


def triton_rows():
    """In the interpreter with the Triton that GPUs run today, where that is installed."""
    python = str(PINNED) if PINNED.exists() else sys.executable
    run = subprocess.run([python, __file__, "--triton"], capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"predict: {python} failed on the Triton kernels:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout)


def triton_here():
    import os

    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        import aot_check
        import aot_dkm
        import aot_quantizers

        for dtype in ("fp32", "bf16"):
            for make, ops in ((aot_check.reduce_list, aot_check.REDUCE), (aot_check.map_chunks, aot_check.MAP)):
                for op in ops:
                    kernel = aot_check.disassemble(
                        aot_check.compile_kernel(*make(op, dtype), dtype, 90, **aot_check.registers(make, dtype))
                    )
                    yield row(
                        "triton",
                        f"{op} {'forward' if make is aot_check.reduce_list else 'backward'}",
                        dtype,
                        kernel,
                        aot_check.hot_loop(kernel),
                        1,
                    )
            for gradient in (False, True):
                kernel, pointers, constants = aot_dkm.map_scalars(dtype, gradient=gradient)
                compiled = aot_check.compile_kernel(
                    kernel, pointers, constants, dtype, 90, maxnreg=aot_dkm.scalar.most_registers(gradient, False)
                )
                kernel = aot_check.disassemble(compiled)
                yield row(
                    "triton",
                    f"dkm {'gradient, T = 1' if gradient else 'output'}",
                    dtype,
                    kernel,
                    kernel.main_loop(),
                    1 + gradient,
                )
            for formula in [name for name in aot_quantizers.FORMULAS if name != "sign_bwd"]:  # a copy
                kernel = aot_quantizers.compile_kernel(
                    *aot_quantizers.quantize_chunks(formula, dtype), dtype, 90, enable_fp_fusion=False
                )
                backward = not formula.endswith("_fwd")
                yield row(
                    "triton",
                    formula.replace("_fwd", " quantize").replace("_bwd", " gradient"),
                    dtype,
                    kernel,
                    kernel.main_loop(),
                    1 + backward,
                )
            for make, terms in (
                (aot_quantizers.reduce_terms, ("msqe", "partial_l2")),
                (aot_quantizers.map_terms, ("bin_reg", "msqe", "partial_l2")),
            ):
                for term in terms:
                    kernel = aot_quantizers.compile_kernel(*make(term, dtype), dtype, 90)
                    yield row("triton", f"{term} {make.__name__.split('_')[0]}", dtype, kernel, kernel.main_loop(), 1)


def predicted(found, weights):
    """(microseconds, what takes that long, part of the bandwidth that is then used)"""
    seconds = {
        "memory": found["bytes"] * weights / BANDWIDTH,
        "instructions": found["instructions"] * weights / (SMS * LANES * CLOCK),
        "MUFU": found["mufu"] * weights / (SMS * MUFU * CLOCK),
        "shared memory": found["shared"] * weights / (SMS * CLOCK),
        "latency": found["latency"] * weights / (SMS * CLOCK),
    }
    limit = max(seconds, key=seconds.get)
    return 1e6 * seconds[limit], limit, seconds["memory"] / seconds[limit]


def markdown(data):
    lines = [
        f"# Predicted for an H200, {data['date']}: **nothing here has run on a GPU**",
        "",
        __doc__.split("\n\n")[3].replace("\n", " ").strip(),
        "",
        f"- {BANDWIDTH / 1e12} TB/s, {SMS} multiprocessors, {CLOCK / 1e9} GHz, {MUFU} MUFU results for each clock and "
        f"multiprocessor; {data['versions']}",
        "- *in flight*: KB of loads that the resident warps of a multiprocessor, by registers, have under way at once, "
        "in the order of the instructions; 4.8 TB/s needs about 25",
        "- rows are what one pass costs each weight; partial_l2 counts by digits before (`digits`: of four passes in "
        "float32), and Triton's bin_reg compares with every bin, which has no row;",
        "  what lies behind a branch is not counted, so BinReg forward lacks its bins: about 6 instructions and 0.12 "
        "wavefronts",
        "",
        "| backend | pass | dtype | registers | warps | KB in flight | bytes | instructions | MUFU | shared wavefronts "
        "| limit | of bandwidth | " + " | ".join(f"µs, {name}" for name in WEIGHTS) + " |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---|---:|" + "---:|" * len(WEIGHTS),
    ]
    for found in data["rows"]:
        times = [predicted(found, weights) for weights in WEIGHTS.values()]
        flight = "" if found["in flight"] is None else f"{found['in flight']:.0f}"
        numbers = [
            f"{found['bytes']:.1f}",
            f"{found['instructions']:.1f}",
            f"{found['mufu']:.2f}",
            f"{found['shared']:.2f}",
        ]
        cells = [
            found["backend"],
            found["op"],
            found["dtype"],
            f"{found['registers']}{' (spills)' if found['spills'] else ''}",
            str(found["warps"]),
            flight,
            *numbers,
            times[0][1],
            f"{times[0][2]:.0%}",
            *(f"{t[0]:.1f}" for t in times),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description="Predicted times on an H200, from machine code.")
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="FOLDER")
    parser.add_argument("--triton", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.triton:
        print(json.dumps([found for found in triton_here() if found]))
        return
    rows = [found for found in cuda_rows() if found]
    rows = sorted(rows, key=lambda found: (found["op"], found["dtype"])) + triton_rows()
    import sass

    nvcc = re.search(
        r"release ([\d.]+)",
        subprocess.run([sass.find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout,
    )[1]
    python = str(PINNED) if PINNED.exists() else sys.executable
    triton = subprocess.run(
        [python, "-c", "import triton; print(triton.__version__)"], capture_output=True, text=True, check=True
    ).stdout.strip()
    data = {"date": datetime.date.today().isoformat(), "versions": f"nvcc {nvcc}, Triton {triton}", "rows": rows}
    args.results.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(data, indent=1)), (".md", markdown(data))):
        path = args.results / f"predicted-h200{suffix}"
        part = path.with_name(path.name + ".part")
        part.write_text(text)
        part.replace(path)
    print(markdown(data))


if __name__ == "__main__":
    main()
