"""What a call was given, brought to the one form that the ops take: tensors of one number for each tensor and
column."""

import math
import numbers

import torch
from torch import Tensor

from .checks import DTYPES, check_parameter, is_dtensor, is_finite, not_sharded, number, row_weights
from .columns import accumulator
from .lasting import lasting

_constants: dict = {}
_MOST_CONSTANTS = 4096


def parameter(name, value, count, single, d, like, *, differentiable=True, allowed="a finite number", ok=is_finite):
    """One number per tensor and column, as a contiguous (count, d) tensor of the accumulator's dtype on the device of
    `like`.

    Accepts a number; a 0-dim tensor; for a tensor W also shape (d,); for a sequence also (L,), (L, d) or a sequence
    of L numbers. Under autograd the result is connected to `value`.
    """
    dtype = accumulator(like.dtype)
    if isinstance(value, Tensor):
        check_parameter(name, value, count, single, d, like, differentiable)
        if value.dtype != dtype:
            value = value.to(dtype)
        if value.dim() == 1:
            value = value.unsqueeze(0 if single else 1)
        return value.expand(count, d).contiguous().resolve_neg()
    if isinstance(value, (list, tuple)):
        if single or len(value) != count:
            lengths = "a number or a tensor" if single else f"one number, or {count}, one for each tensor of W"
            raise ValueError(f"{name} has {len(value)} values; allowed is {lengths}")
        key = tuple([number(f"{name}[{i}]", v, allowed, ok) for i, v in enumerate(value)])
    else:
        key = number(name, value, allowed, ok)
    return _constant(key, count, d, dtype, like.device)


def margin_k(k, ws, single, d):
    """k of the margin loss as an (L, d) tensor: a count of weights, or below 1 a fraction of them."""
    return parameter(
        "k",
        k,
        len(ws),
        single,
        d,
        ws[0],
        differentiable=False,
        allowed="an int >= 1, or a fraction in (0, 1)",
        ok=lambda v: 0 < v < 1 or (v >= 1 and v % 1 == 0),
    )


def parameter_gradient(grad, value, single):
    """The (count, d) gradient summed back to the shape and dtype of the `value` that `parameter` expanded."""
    if value.dim() == 0:
        grad = grad.sum() if grad.numel() > 1 else grad.reshape(())
    elif value.dim() == 1 and not single:
        grad = grad.sum(1) if grad.shape[1] > 1 else grad.reshape(-1)
    return grad.reshape(value.shape).to(value.dtype)


def _constant(key, count, d, dtype, device):
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():  # what a FakeTensorMode makes is fake
        return _fill(key, count, d, dtype, device)
    # Kept for good: a captured CUDA graph may read it at every replay.
    full = (key, count, d, dtype, device)
    value = _constants.get(full)
    if value is None:
        in_graph = device.type == "cuda" and torch.cuda.is_current_stream_capturing() and not isinstance(key, tuple)
        if len(_constants) >= _MOST_CONSTANTS or in_graph:
            return _fill(key, count, d, dtype, device)  # of one value by a kernel, which becomes part of the graph
        with torch.inference_mode(False):  # a tensor of inference mode could not be saved for backward later
            value = lasting(lambda: _fill(key, count, d, dtype, device), device, "numbers of a list")
        _constants[full] = value
    return value


def _fill(key, count, d, dtype, device):
    if isinstance(key, tuple):
        return torch.tensor(key, dtype=dtype, device=device).unsqueeze(1).expand(count, d).contiguous()
    return torch.full((count, d), key, dtype=dtype, device=device)


def finite_or_nan(c):
    """(L, K, d) centroids; all those of a tensor are NaN where one is infinite or NaN."""
    return torch.add(c, torch.linalg.vector_norm(c, torch.inf, (1, 2), keepdim=True), alpha=0)


def padded(given, d):
    """(L, K, d): the centroids of all tensors, filled up with zeros."""
    rows, counts = [c.reshape(-1, d) for c in given], [c.shape[0] for c in given]
    most = max(counts)
    if min(counts) == most:
        return torch.stack(rows)
    zeros, places, first = sum(counts), [], 0  # of the row behind all others, and of every row
    for count in counts:
        places += [*range(first, first + count), *[zeros] * (most - count)]
        first += count
    device, dtype = rows[0].device, rows[0].dtype
    places = _constant(tuple(places), len(places), 1, torch.int64, device)[:, 0]
    return torch.cat([*rows, _constant(0.0, 1, d, dtype, device)]).index_select(0, places).view(len(given), most, d)


def are_centroids(clusters, device):
    """(L, K, 1): which of the numbers that `padded` gives are there."""
    most = max(clusters)
    key = tuple([k < count for count in clusters for k in range(most)])
    return _constant(key, len(key), 1, torch.bool, device).view(-1, most, 1)


def temperature(tau, ws, single):
    """tau as an (L,) tensor."""
    return parameter(
        "tau",
        tau,
        len(ws),
        single,
        1,
        ws[0],
        differentiable=False,
        allowed="a finite number > 0",
        ok=lambda v: 0 < v < math.inf,
    )[:, 0]


def tolerance(tol, ws):
    """(L,) float64: `tol`, by default 1e-6 of the range of each tensor."""
    if tol is not None:
        return torch.full((len(ws),), float(tol), dtype=torch.float64, device=ws[0].device)
    ranges = [w.amax().double() - w.amin().double() if w.numel() else w.new_zeros((), dtype=torch.float64) for w in ws]
    return 1e-6 * torch.stack(ranges)


def levels(bits, signed, kind="lsq"):
    """(QN, QP) of LSQ: codes run from -QN to QP in steps of 1; those of one signed bit are -1 and 1 alone. `kind`:
    "ternary" for -1, 0, 1, "seq" for half-integers (of one bit again -1 and 1)."""
    if not signed:
        return 0, 2**bits - 1
    if bits == 1 or kind == "ternary":
        return 1, 1
    half = 2 ** (bits - 1)
    return (half - 0.5, half - 0.5) if kind == "seq" else (half, half - 1)


def channels(
    name,
    value,
    xs,
    single,
    axis=None,
    allowed="a finite number > 0",
    ok=lambda v: 0 < v < math.inf,
    differentiable=True,
):
    """The numbers of a quantizer's parameter as a flat tensor of the accumulator's dtype: one for each tensor, or
    with `axis` one for each channel of each tensor, one tensor's after the other's. Connected to `value` under
    autograd.

    Accepts what `parameter` does for d = 1; with `axis` also (C,) for a single tensor, and for a sequence a sequence
    with a number, a 0-dim or a (C,) tensor for each.
    """
    if axis is None:
        if not single and isinstance(value, (list, tuple)) and any([isinstance(v, Tensor) for v in value]):
            value = torch.stack(
                [_numbers(f"{name}[{i}]", v, (), xs[0], allowed, ok, differentiable) for i, v in enumerate(value)]
            )
        return parameter(
            name, value, len(xs), single, 1, xs[0], differentiable=differentiable, allowed=allowed, ok=ok
        ).reshape(-1)
    sizes = [x.shape[axis] for x in xs]
    if isinstance(value, (list, tuple)):
        if single or len(value) != len(xs):
            raise ValueError(
                f"{name} has {len(value)} values; allowed is "
                + ("a number or a tensor" if single else f"one for each of the {len(xs)} tensors")
            )
        names = [f"{name}[{i}]" for i in range(len(xs))]
    else:
        value, names = [value] * len(xs), [name] * len(xs)
    return torch.cat(
        [
            _numbers(n, v, (C,), xs[0], allowed, ok, differentiable).expand(C)
            for n, v, C in zip(names, value, sizes, strict=True)
        ]
    )


def _numbers(name, value, shape, like, allowed, ok, differentiable):
    """A number, a 0-dim tensor or one of `shape` as a tensor of the accumulator's dtype."""
    dtype = accumulator(like.dtype)
    if not isinstance(value, Tensor):
        return _constant(number(name, value, allowed, ok), 1, 1, dtype, like.device).reshape(())
    not_sharded(name, value)
    if not differentiable and value.requires_grad:
        raise ValueError(f"{name} requires grad, but no gradient is defined for it; pass {name}.detach() or a number")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {value.dtype}; allowed are float64, float32, bfloat16 and float16")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device} but the tensor that it belongs to is on {like.device}")
    if tuple(value.shape) not in {(), shape}:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; allowed is ()" + (f" or {shape}" if shape else ""))
    return value.to(dtype)


def bounds(lower, upper, delta, xs, single):
    """lower, upper and delta of EWGS as flat tensors; Python numbers with lower >= upper are an error."""
    flat = [
        channels(name, value, xs, single, None, "a finite number", is_finite)
        for name, value in (("lower", lower), ("upper", upper))
    ]
    pairs = [
        (
            [v] * len(xs)
            if isinstance(v, numbers.Real)
            else list(v)
            if isinstance(v, (list, tuple))
            else [None] * len(xs)
        )
        for v in (lower, upper)
    ]
    for low, high in zip(*pairs, strict=True):
        if isinstance(low, numbers.Real) and isinstance(high, numbers.Real) and low >= high:
            raise ValueError(f"lower must be below upper, got lower={low:g} and upper={high:g}")
    return *flat, channels("delta", delta, xs, single, None, "a finite number >= 0", lambda v: 0 <= v < math.inf, False)


def step(name, value, ws, single, differentiable=True):
    """A step size > 0 as an (L, 1) tensor."""
    return parameter(
        name,
        value,
        len(ws),
        single,
        1,
        ws[0],
        differentiable=differentiable,
        allowed="a finite number > 0",
        ok=lambda v: 0 < v < math.inf,
    )


def rank(fraction, ws, single):
    """ceil(fraction N), at least 1, for each tensor: (L,) int64; 0 where a tensor holds a fraction that is not in
    (0, 1].

    What is less than half a unit in the last place of the fraction's dtype above a whole number counts as that number:
    float32 has 0.3 as 0.30000001, and 0.07 * 100 is a rounding above 7.
    """
    like = torch.empty(0, dtype=torch.float64, device=ws[0].device)
    given = parameter(
        "fraction",
        fraction,
        len(ws),
        single,
        1,
        like,
        differentiable=False,
        allowed="a number in (0, 1]",
        ok=lambda v: 0 < v <= 1,
    )
    numels = _constant(tuple([float(w.numel()) for w in ws]), len(ws), 1, torch.float64, like.device)
    rounding = torch.finfo(fraction.dtype).eps / 2 if isinstance(fraction, Tensor) else 0.0
    found = (given * numels * (1 - max(rounding, 1e-12))).ceil().clamp(min=1)[:, 0]
    return torch.where((given[:, 0] > 0) & (given[:, 0] <= 1), found, 0).long()


def masses(weight, ws, single, d):
    """The weights of the rows of each tensor, float64, or None. Their values are read: a negative or infinite one is
    an error."""
    if weight is None:
        return [None] * len(ws)
    if single:
        return [_mass("weight", weight, ws[0], d)]
    if isinstance(weight, Tensor) or not hasattr(weight, "__iter__"):
        raise TypeError(f"weight must be a sequence of tensors, as W is, got {type(weight).__name__}")
    weight = list(weight)
    if len(weight) != len(ws):
        raise ValueError(f"weight has {len(weight)} tensors; allowed are {len(ws)}, one for each tensor of W")
    return [
        None if m is None else _mass(f"weight[{i}]", m, w, d) for i, (m, w) in enumerate(zip(weight, ws, strict=True))
    ]


def _mass(name, mass, w, d):
    row_weights(name, mass, w, d)
    if is_dtensor(mass):
        mass = mass.full_tensor()
    mass = mass.detach().reshape(-1).double().resolve_neg()
    low, high = torch.aminmax(mass)
    if not 0 <= low.item() <= high.item() < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, got values from {low.item():g} to {high.item():g}")
    if high.item() == 0:
        raise ValueError(f"{name} is 0 for every row; at least one must be positive")
    return mass
