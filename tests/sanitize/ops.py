"""Every op of the extension on the CPU with every instruction set, over inputs that tempt it to read or write what is
not its own; for tests/sanitize/run.py.

How exact results are is told by the tests; here they must be of the reference's kind, or the op did not run."""

import itertools
import math
import sys
import warnings

import cases
import torch

import r2kernels as r2
from r2kernels import _C, ops
from r2kernels.reference.columns import accumulator

SHAPES = ((1,), (7,), (4097,), (33, 3, 3, 3))
SHARED = (20, 1031)  # by two threads
GEOMETRIES = (1, "output"), (3, "output"), (2, "output"), (3, "contiguous")
EXTREME = ("constant", "denormal", "large")  # numbers cancel, vanish or overflow, in every backend in another order
TINY = {torch.float64: 5e-324, torch.float32: 1e-45, torch.bfloat16: 9.2e-41, torch.float16: 6e-8}


def ending(w):
    """w where its allocation ends, and at an odd place in it, so that what is behind it is known to be foreign."""
    memory = torch.zeros(w.numel() + 1, dtype=w.dtype)
    return memory[1:].view(w.shape).copy_(w)


def forms(dtype):
    """name -> tensors"""
    g = torch.Generator().manual_seed(0)
    plain = [(torch.randn(s, generator=g, dtype=torch.float64) * cases.SCALE).to(dtype) for s in SHAPES]
    shared = torch.randn(SHARED, generator=g, dtype=torch.float64).to(dtype) * cases.SCALE
    of_four = plain[3]
    return {
        "plain": [*plain, shared],
        "unaligned": [ending(w) for w in plain],
        "strided": [torch.stack([w, w], -1)[..., 0] for w in plain],
        "channels_last": [of_four.contiguous(memory_format=torch.channels_last), of_four.transpose(0, 1)],
        "turned": [ending(shared).t(), ending(of_four).permute(2, 0, 3, 1)],
        "constant": [torch.full_like(w, 0.1) for w in plain],
        "zero": [torch.zeros_like(w) for w in plain],
        "denormal": [(w.sign().double() * TINY[dtype] * 3).to(dtype) for w in plain],
        "large": [w.sign() * torch.finfo(dtype).max for w in plain],
        **{
            name: [w.reshape(-1).index_fill(0, torch.tensor([w.numel() // 2]), value).view(w.shape) for w in plain]
            for name, value in (("nan", math.nan), ("inf", math.inf), ("-inf", -math.inf))
        },
    }


def calls(ws, dtype, thorough):
    """(name, function of no arguments that gives tensors) of every public function; `thorough`: with every geometry
    and bit width."""
    widths, geometries = (range(1, 9), GEOMETRIES) if thorough else ((1, 3), GEOMETRIES[:2])
    for op, (d, layout) in itertools.product(cases.OPS, geometries):
        if d > 1 and not op.columns and op.family != "dkm":
            continue
        of = [w for w in ws if w.numel() >= d]
        for bits in widths if "bits" in op.options else (0,):
            name = f"{op.label} {d} {layout} {bits}"
            yield name, lambda op=op, of=of, d=d, layout=layout, bits=bits: run(op, of, dtype, d, layout, bits)
    steps = {"step": 0.02, "bits": 3}
    terms = {"l_inf": {}, "soft_min_max": {"alpha": 9.0}, "kure": {}, "bin_reg": steps, "msqe": steps}
    yield "weight_terms", lambda: [*r2.weight_terms(ws, {**terms, "partial_l2": {"fraction": 0.3}}).values()]
    yield "weight_stats", lambda: [*r2.weight_stats(ws)[:-1]]
    for place in range(dtype.itemsize):
        prefix = torch.zeros(len(ws), dtype=torch.int64)
        yield f"digits {place}", lambda place=place, prefix=prefix: [ops.digits.fwd(ws, prefix, place)]
    yield "kmeans", lambda: [c[:1] for c in r2.kmeans(ws, 5)]


def run(op, ws, dtype, d, layout, bits):
    arguments = {**op.natural(cases.SCALE, bits), **op.options, **({"bits": bits} if bits else {})}
    if op.columns or op.family == "dkm":
        arguments.update(cluster_dim=d, layout=layout)
    if op.function == "lsq" and min(w.dim() for w in ws) > 1:
        arguments.update(axis=0, step=[torch.full((w.shape[0],), arguments["step"]) for w in ws])
    ws = [w.detach().requires_grad_() for w in ws]
    if op.family == "dkm":
        k = 300 if op.function == "assign" and max(w.numel() for w in ws) < 2**14 else 6
        c = torch.linspace(-0.1, 0.1, k * d, dtype=accumulator(dtype))
        arguments["centroids"] = [c if d == 1 else c.view(k, d)] * len(ws)
    found = getattr(r2, op.function)(ws, **arguments)
    if op.function == "assign":
        return found
    flat = (
        [*found[0], *found[1]] if op.family == "dkm" else list(found) if isinstance(found, (list, tuple)) else [found]
    )
    return [*flat, *torch.autograd.grad(flat, ws, [torch.ones_like(t) for t in flat])]


def alike(found, expected):
    """Whether most numbers are about the same: a code may be its neighbour, where both are as near."""
    a, b = found.double(), expected.double()
    fine = a.isfinite() & b.isfinite()
    size = b[fine].abs().amax() if fine.any() else torch.tensor(0.0)
    near = (a - b).abs() <= 0.02 * size + 1e-6
    return (near | (a == b) | ~fine).double().mean() > 0.9 and (a.isfinite() == b.isfinite()).double().mean() > 0.9


def main():
    torch.set_num_threads(3)
    warnings.simplefilter("ignore")
    count, wrong = 0, []
    for dtype in cases.DTYPES:
        for form, tensors in forms(dtype).items():
            for name, call in calls(tensors, dtype, form == "unaligned"):
                with r2.use_backend("reference"):
                    expected = None if form in EXTREME else call()
                for isa in _C.cpu.isas():
                    _C.cpu.set_isa(isa)
                    with r2.use_backend("cpu"):
                        found = call()
                    count += 1
                    if form not in EXTREME and not all(map(alike, found, expected)):
                        wrong.append(f"{isa} {dtype} {form} {name}")
    print(f"{count} calls with {', '.join(_C.cpu.isas())}, each with its gradient", flush=True)
    return "\n".join(["not of the reference's kind:", *wrong]) if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
