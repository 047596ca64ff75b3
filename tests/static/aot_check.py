"""Compiles the Triton kernels of the losses ahead of time, without GPU or torch, and prints what ptxas made of them.

    python tests/static/aot_check.py [architecture ...]         default: 90 in every variant, 80 and 100 in a few

The cache lies where TRITON_CACHE_DIR says. Of each kernel: registers, stack and spills of all of it; of its hot loop
the 128-bit loads and stores, other accesses, and instructions per weight.

The hot loop is the innermost loop (a backward branch whose span holds no other) that loads without predicates, so not
the masked tail, and the longest of those, so the sums rather than the search for extremes. Every instruction in its
span counts, whatever it does. A 128-bit load brings 16 / itemsize weights to a thread (half of the loads bring old
gradients where they are added to).
"""

import importlib
import json
import os
import pathlib
import sys
import tempfile
import types

import sass
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SOURCES = pathlib.Path(__file__).parents[2] / "r2kernels" / "backends" / "triton"
CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
DTYPES = {"fp32": (tl.float32, 4), "bf16": (tl.bfloat16, 2), "fp16": (tl.float16, 2), "fp64": (tl.float64, 8)}
REDUCE = ("soft_min_max", "frozen_soft_min_max", "soft_extrema", "l_inf", "margin", "kure", "weight_stats")
MAP = ("soft_min_max", "soft_extrema", "l_inf", "margin", "kure")
PARAMETERS = {"l_inf": 0, "weight_stats": 0, "margin": 2}  # else one


def kernels(name):
    """A module of the Triton backend in a package of its own, since importing r2kernels needs torch."""
    if "kernels" not in sys.modules:
        sys.modules["kernels"] = types.ModuleType("kernels")
        sys.modules["kernels"].__path__ = [str(SOURCES)]
    return importlib.import_module(f"kernels.{name}")


chunks, skeletons = kernels("chunks"), kernels("skeletons")
FORMULAS = {**kernels("range_losses_kernels").FORMULAS, **kernels("regularizers_moments_kernels").FORMULAS}


def accumulator(dtype):
    return "fp64" if dtype == "fp64" else "fp32"


def absent(op):
    """The parameters that an op does not have."""
    return dict.fromkeys(("p_first", "p_second")[PARAMETERS.get(op, 1) :])


def geometry(dtype, d, aligned):
    block, unroll = chunks.tile_of_rows(DTYPES[dtype][1], d)
    return {
        "DT": DTYPES[dtype][0],
        "ACC": DTYPES[accumulator(dtype)][0],
        "D": d,
        "ALIGNED": aligned,
        "BLOCK": block,
        "UNROLL": unroll,
    }


def reduce_list(op, dtype, d=1, aligned=True):
    """`op` with "frozen_" before it: where its parameter learns nothing."""
    pointers = {"p_weights": "*i64", "p_tensors": "*i64", "p_owner": "*i32", "p_counters": "*i32"}
    frozen, formula = op.startswith("frozen_"), FORMULAS[op.removeprefix("frozen_")]
    constants = {
        "REDUCE": formula.reduce_frozen if frozen else formula.reduce,
        "MERGE": formula.merge,
        "LOSSES": formula.losses,
        "LANES": skeletons.LAST_LANES,
        **absent(op),
    }
    return skeletons.reduce_list, pointers, {**constants, **geometry(dtype, d, aligned)}


def map_chunks(op, dtype, add=False, alone=False, d=1, aligned=True):
    """`alone`: for a list of one, which has no tables."""
    pointers = {"p_weights": "*i64", "p_targets": "*i64", "p_tensors": "*i64", "p_owner": "*i32"}
    if alone:
        pointers = {"p_weights": "*" + dtype, "p_targets": "*" + dtype, "p_tensors": ("i64",) * chunks.FIELDS.value}
    constants = {
        "SETUP": FORMULAS[op].setup,
        "GRADIENT": FORMULAS[op].gradient,
        "ADD": add,
        **({"p_owner": None} if alone else {}),
        **absent(op),
    }
    if op in ("l_inf", "kure"):
        constants["p_parameter_gradient"] = None
    return skeletons.map_chunks, pointers, {**constants, **geometry(dtype, d, aligned)}


def variants(everything):
    """(kernel, op, dtype, variant, arguments of the function above)"""
    for dtype in DTYPES if everything else ("fp32", "bf16"):
        for op in REDUCE:
            yield reduce_list, op, dtype, {}
        for op in MAP:
            yield map_chunks, op, dtype, {}
            if everything:
                yield map_chunks, op, dtype, {"add": True}
    if everything:
        for dtype in ("fp32", "bf16"):
            for change in ({"d": 3}, {"aligned": False}):
                yield reduce_list, "soft_min_max", dtype, change
                yield map_chunks, "soft_min_max", dtype, change
            yield map_chunks, "soft_min_max", dtype, {"alone": True}


def compile_kernel(kernel, pointers, constants, dtype, architecture, **options):
    """`pointers`: those that are not to numbers of the accumulator's dtype."""
    number = "*" + accumulator(dtype)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, number if name.startswith("p_") else "i32")
        for name in kernel.arg_names
    }
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if i not in kernel.do_not_specialize_on_alignment
        and (name == "n_chunk" or isinstance(kind, str) and kind.startswith("*"))
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    options = {"num_warps": chunks.WARPS, "enable_fp_fusion": True, **options}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm["cubin"]


def disassemble(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return next(iter(sass.kernels(file.name, CUOBJDUMP).values()))


def hot_loop(kernel):
    """Indices of its instructions."""
    spans = [(start, end) for end, start in kernel.targets.items() if start < end]
    innermost = [range(s, e + 1) for s, e in spans if not any((s, e) != (t, f) and s <= t and f <= e for t, f in spans)]

    def predicates(loop):
        return [
            predicate for predicate, opcode, _ in (kernel.instructions[i] for i in loop) if opcode.startswith("LDG")
        ]

    return max((loop for loop in innermost if predicates(loop) and not any(predicates(loop))), key=len, default=())


def check(make, op, dtype, change, architecture):
    kernel = disassemble(compile_kernel(*make(op, dtype, **change), dtype, architecture))
    loop = hot_loop(kernel)
    loads, wide_loads, stores, wide_stores = [
        kernel.count(prefix, contains, loop) for prefix in ("LDG", "STG") for contains in ("", ".128")
    ]
    weights = wide_loads * 16 // DTYPES[dtype][1] // (2 if change.get("add") else 1)
    return {
        "kernel": make.__name__,
        "op": op,
        "dtype": dtype,
        "variant": " ".join(f"{k}={v}" for k, v in change.items()),
        "arch": architecture,
        "registers": kernel.registers,
        "stack": kernel.stack + kernel.local,
        "spills": kernel.count("LDL") + kernel.count("STL"),
        "loads128": wide_loads,
        "other_loads": loads - wide_loads,
        "stores128": wide_stores,
        "other_stores": stores - wide_stores,
        "per_weight": round(len(loop) / weights, 2) if weights and loads == wide_loads else None,
    }


if __name__ == "__main__":
    architectures = [int(a) for a in sys.argv[1:]] or [90, 80, 100]
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        print(json.dumps([check(*variant, a) for a in architectures for variant in variants(a == 90)]))
