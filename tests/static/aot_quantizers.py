"""Compiles the Triton kernels of the quantizers and of sets of terms ahead of time, like aot_check.py.

    python tests/static/aot_quantizers.py [architecture ...]       default: 90 in every variant, 80 and 100 in a few

`per_element`: instructions of the shortest way once round the loop over full tiles, for each element of x that it
reads.
"""

import json
import os
import sys
import tempfile

import aot_check
import triton
from aot_check import DTYPES, accumulator, chunks, kernels, skeletons
from triton.compiler import ASTSource

channels, quantizers = kernels("channel_skeletons"), kernels("quantizers_kernels")
terms_kernels, counts = kernels("regularizers_terms_kernels"), kernels("regularizers_counts_kernels")
sample, bins = kernels("regularizers_sample_kernels"), kernels("regularizers_bins_kernels")
FORMULAS = {  # of the passes: quantizer, backward, FLAG
    "lsq_fwd": ("lsq", False, False),
    "lsq_bwd": ("lsq", True, False),
    "seq_fwd": ("lsq", False, False),
    "seq_bwd": ("lsq", True, False),
    "ewgs_fwd": ("ewgs", False, True),
    "ewgs_bwd": ("ewgs", True, True),
    "pact_fwd": ("pact", False, False),
    "pact_bwd": ("pact", True, True),
    "dorefa_fwd": ("dorefa", False, False),
    "dorefa_bwd": ("dorefa", True, False),
    "dorefa_detached": ("dorefa_detached", True, False),
    "sign_fwd": ("dorefa_sign", False, False),
    "sign_bwd": ("dorefa_sign", True, False),
    "rescale_fwd": ("rescale_sized", False, False),
    "rescale_bwd": ("rescale_sized", True, False),
}
CODES = {"lsq": (8.0, 7.0), "seq": (7.5, 7.5)}  # LOW and HIGH; else 0 and 7
PARAMETERS = {"ewgs": 3, "ewgs_sized": 3}  # else one
LEARNED = {"lsq": 1, "ewgs": 2, "pact": 1, "lsq_sized": 1, "ewgs_sized": 2, "rescale_sized": 1}


def compile_kernel(kernel, arguments, dtype, architecture, **options):
    """`arguments`: name -> kind of the argument, a tuple of kinds, or ("=", a constant)."""
    signature, constants, divisible = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = arguments.get(name, "i32")
        if isinstance(kind, tuple) and kind[:1] == ("=",):
            signature[name], constants[name] = "constexpr", kind[1]
            continue
        signature[name] = tuple("constexpr" if k is None else k for k in kind) if isinstance(kind, tuple) else kind
        places = {(i, j): k for j, k in enumerate(kind)} if isinstance(kind, tuple) else {(i,): kind}
        constants.update({place: None for place, k in places.items() if k is None})
        divisible.update(
            {
                place: [["tt.divisibility", 16]]
                for place, k in places.items()
                if k and (k.startswith("*") or name == "n_chunk")
            }
        )
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    options = {"num_warps": chunks.WARPS, "enable_fp_fusion": True, **options}
    return aot_check.disassemble(
        triton.compile(source, target=aot_check.GPUTarget("cuda", architecture, 32), options=options).asm["cubin"]
    )


def constant(**values):
    return {name: ("=", value) for name, value in values.items()}


def types(dtype, aligned=True):
    return constant(DT=DTYPES[dtype][0], ACC=DTYPES[accumulator(dtype)][0], ALIGNED=aligned)


def quantize_chunks(formula, dtype, place="WHOLE", aligned=True, alone=False):
    name, backward, flag = FORMULAS[formula]
    low, high = CODES.get(formula.partition("_")[0], (0.0, 7.0))
    quantizer, wide = quantizers.QUANTIZERS[name], accumulator(dtype)
    block, unroll = chunks.tile_of_rows(DTYPES[dtype][1], reads=1 + backward)
    weights, sums = "*" + dtype if alone else "*i64", quantizer.sums if backward else 0
    return channels.quantize_chunks, {
        "p_xs": weights,
        "p_gs": weights if backward else ("=", None),
        "p_ys": weights,
        "p_tensors": ("i64",) * chunks.FIELDS.value if alone else "*i64",
        "p_owner": ("=", None) if alone else "*i32",
        "p_parameters": ("*" + wide,) * PARAMETERS.get(name, 1),
        "p_sums": "*" + wide if sums else ("=", None),
        **constant(
            SETUP=quantizer.setup,
            FORMULA=quantizer.bwd if backward else quantizer.fwd,
            SUMS=sums,
            FLAG=flag,
            LOW=low,
            HIGH=high,
            PLACE=getattr(channels, place),
            BLOCK=block,
            UNROLL=unroll,
        ),
        **types(dtype, aligned),
    }


def quantize_columns(formula, dtype, each):
    name, backward, _ = FORMULAS[formula]
    block, unroll = chunks.tile_of_rows(DTYPES[dtype][1], reads=1 + backward)
    width = triton.next_power_of_2(each)
    return channels.quantize_columns, {
        **quantize_chunks(formula, dtype)[1],
        "p_gradients": ("*" + accumulator(dtype),) * (LEARNED[name] if backward else 0),
        **constant(FINISH=quantizers.QUANTIZERS[name].finish, COLUMNS=block * unroll // width, EACH=each, WIDTH=width),
    }


def merge_columns(op, dtype, columns=1, lanes=skeletons.MERGE_LANES):
    quantizer = quantizers.QUANTIZERS[op]
    return channels.merge_columns, {
        "p_sums": "*" + dtype,
        "p_tensors": "*i64",
        "p_parameters": ("*" + dtype,) * PARAMETERS.get(op, 1),
        "p_gradients": ("*" + dtype,) * LEARNED[op],
        **constant(FINISH=quantizer.finish, SUMS=quantizer.sums, HIGH=7.0, COLUMNS=columns, LANES=lanes),
    }


def correct_maxima(op, dtype):
    arguments = quantize_chunks("dorefa_bwd", dtype)[1]
    return quantizers.correct_maxima, {**arguments, **constant(LANES=skeletons.MERGE_LANES)}


TERMS = {  # name -> its parameters
    "l_inf": 0,
    "margin": 2,
    "soft_min_max": 1,
    "frozen": 1,
    "kure": 1,
    "bin_reg": 1,
    "msqe": 1,
    "partial_l2": 1,
}
LEARNED_TERMS = ("margin", "soft_min_max", "frozen", "msqe")


SETS = (
    "bin_reg",
    "msqe",
    "partial_l2",
    "soft_min_max+kure+msqe",
    "frozen+bin_reg",
    "l_inf+margin+soft_min_max+kure+bin_reg+msqe+partial_l2",
)


def terms(names, dtype, bits=4):
    """Arguments that have to do with the set of terms; `names` are joined by +."""
    names, wide = names.split("+"), "*" + accumulator(dtype)
    codes = terms_kernels.encode(names, [bits if name in ("bin_reg", "msqe") else 0 for name in names])

    def each(kind):
        return tuple(kind(name) for name in names)

    return {
        "p_first": each(lambda name: "*i64" if name == "partial_l2" else wide if TERMS[name] else None),
        "p_second": each(lambda name: wide if TERMS[name] == 2 else None),
        "p_saved": each(lambda name: wide),
        "p_losses": each(lambda name: wide),
        "p_grads": each(lambda name: wide),
        "p_parameter_gradients": each(lambda name: wide if name in LEARNED_TERMS else None),
        "p_weights": "*i64",
        "p_tensors": "*i64",
        "p_owner": "*i32",
        "p_states": wide,
        **constant(TERMS=codes),
        **types(dtype),
    }


def tiles(dtype):
    block, unroll = chunks.tile_of_rows(DTYPES[dtype][1])
    return constant(BLOCK=block, UNROLL=unroll)


def reduce_terms(names, dtype, bits=4):
    return terms_kernels.reduce_terms, {**terms(names, dtype, bits), **tiles(dtype)}


def merge_terms(names, dtype):
    return terms_kernels.merge_terms, {**terms(names, dtype), **constant(LANES=skeletons.MERGE_LANES)}


def map_terms(names, dtype, bits=4):
    return terms_kernels.map_terms, {
        **terms(names, dtype, bits),
        "p_targets": "*i64",
        **tiles(dtype),
        **constant(ADD=False),
    }


def count_chunks(op, dtype, digit):
    return counts.count_chunks, {
        "p_weights": "*i64",
        "p_tensors": "*i64",
        "p_owner": "*i32",
        "p_rank": "*i64" if op == "partial_l2" else ("=", None),
        "p_prefix": "*i64" if op == "digits" else ("=", None),
        "p_counts": "*i32" if op == "partial_l2" else "*i64",
        **constant(PASS=digit, BLOCK=1024),
        **types(dtype),
    }


def sum_bins(op, dtype, bits):
    return bins.sum_bins, {
        "p_weights": "*i64",
        "p_tensors": "*i64",
        "p_owner": "*i32",
        "p_step": "*" + accumulator(dtype),
        "p_sums": "*" + accumulator(dtype),
        **constant(BITS=bits, BINS=bins.bins_of_program(bits, DTYPES[dtype][1]), BLOCK=bins.LANES, UNROLL=bins.UNROLL),
        **types(dtype),
    }


def merge_bins(op, dtype, bits):
    wide = "*" + dtype
    return bins.merge_bins, {
        "p_sums": wide,
        "p_tensors": "*i64",
        "p_loss": wide,
        "p_saved": wide,
        **constant(BINS=bins.bins_of_program(bits, DTYPES[dtype][1]), ALL=2**bits, LANES=bins.MERGED // 2**bits),
        **types(dtype),
    }


def store_threshold(op, dtype):
    return counts.store_threshold, {
        "p_rank": "*i64",
        "p_counts": "*i32",
        "p_saved": "*" + accumulator(dtype),
        **constant(PASSES=DTYPES[dtype][1]),
        **types(dtype),
    }


def std_of_sample(op, dtype):
    return sample.std_of_sample, {
        "p_weights": "*i64",
        "p_tensors": "*i64",
        "p_out": "*" + accumulator(dtype),
        **constant(BLOCK=1024),
        **types(dtype),
    }


def variants(everything):
    """(function above, its op, dtype, other arguments)"""
    for dtype in DTYPES if everything else ("fp32", "bf16"):
        for formula in FORMULAS:
            yield quantize_chunks, formula, dtype, {}
        yield correct_maxima, "dorefa", dtype, {}
        for names in SETS:
            read = "+".join([name for name in names.split("+") if name != "bin_reg"])
            if read:
                yield reduce_terms, read, dtype, {}
            yield map_terms, names, dtype, {}
        for bits in (1, 4, 8):
            yield sum_bins, "bin_reg", dtype, {"bits": bits}
        yield count_chunks, "partial_l2", dtype, {"digit": 1}
        yield count_chunks, "digits", dtype, {"digit": 1}
        yield store_threshold, "partial_l2", dtype, {}
        yield std_of_sample, "sampled_std", dtype, {}
    yield merge_terms, "+".join([name for name in TERMS if name != "bin_reg"]), "fp32", {}
    for bits in (1, 8):
        yield merge_bins, "bin_reg", "fp32", {"bits": bits}
    yield merge_bins, "bin_reg", "fp64", {"bits": 8}
    for op in LEARNED:
        yield merge_columns, op, "fp32", {}
    if everything:
        yield merge_columns, "lsq", "fp32", {"columns": 32, "lanes": 16}
        for dtype in ("fp32", "bf16"):
            for formula in ("lsq_fwd", "lsq_bwd"):
                for change in (
                    {"alone": True},
                    {"place": "RUNS"},
                    {"place": "RUNS", "aligned": False},
                    {"place": "SPREAD"},
                ):
                    yield quantize_chunks, formula, dtype, change
            for formula in ("lsq_fwd", "lsq_bwd", "seq_bwd"):
                yield quantize_columns, formula, dtype, {"each": 128}
            yield quantize_columns, "lsq_bwd", dtype, {"each": 32}
        yield quantize_chunks, "lsq_bwd", "fp32", {"place": "HUGE"}
        yield quantize_columns, "lsq_bwd", "fp32", {"each": 20}


def check(make, op, dtype, change, architecture):
    kernel, arguments = make(op, dtype, **change)
    found = compile_kernel(
        kernel,
        arguments,
        dtype,
        architecture,
        enable_fp_fusion=make not in (quantize_chunks, quantize_columns, correct_maxima),
    )
    loop = range(len(found.instructions)) if make is quantize_columns else found.main_loop()
    loads, stores = found.count("LDG", "128", loop), found.count("STG", "128", loop)
    reads = 2 if make in (quantize_chunks, quantize_columns) and not op.endswith("_fwd") else 1
    elements = loads * 16 // DTYPES[dtype][1] // reads
    if make is sum_bins:  # a weight for each thread, or two of 16 bits, at a time: no 128-bit loads
        loops = [loop for loop in found.loops() if found.count("LDG", "", loop) == bins.UNROLL]
        loop = min(loops, key=len)
        elements = bins.UNROLL * (2 if DTYPES[dtype][1] == 2 else 1)
    return {
        "kernel": make.__name__,
        "op": op,
        "dtype": dtype,
        "variant": " ".join(f"{k}={v}" for k, v in change.items()),
        "arch": architecture,
        "registers": found.registers,
        "stack": found.stack + found.local,
        "spills": found.count("LDL") + found.count("STL"),
        "loads128": loads,
        "other_loads": found.count("LDG", "", loop) - loads,
        "stores128": stores,
        "other_stores": found.count("STG", "", loop) - stores,
        "per_element": round(len(loop) / elements, 2) if elements else None,
    }


if __name__ == "__main__":
    architectures = [int(a) for a in sys.argv[1:]] or [90, 80, 100]
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        print(json.dumps([check(*variant, a) for a in architectures for variant in variants(a == 90)]))
