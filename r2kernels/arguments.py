"""What a call was given: every argument checked before any work, and brought to the one form that the ops take."""
import math
import numbers
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("output", "contiguous")
_DTYPES, _STRIDED, _PLAIN = {*DTYPES}, {torch.strided}, {Tensor, torch.nn.Parameter, torch.nn.Buffer}
_constants: dict = {}
_MOST_CONSTANTS = 4096


def accumulator(dtype):
    """The dtype of sums, losses and parameters beside weights of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def weights(W, cluster_dim=1, layout="output", name="W"):
    """(list of tensors, whether W was a single tensor); TypeError or ValueError says what is wrong with which one. `name` is what the caller calls W."""
    count("cluster_dim", cluster_dim)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    single = isinstance(W, Tensor)
    if single:
        ws = [W]
    elif isinstance(W, (str, bytes, dict)) or not hasattr(W, "__iter__"):
        raise TypeError(f"{name} must be a floating-point tensor or a sequence of them, got {type(W).__name__}")
    else:
        ws = list(W)
    if not ws:
        raise ValueError(f"{name} is an empty sequence; it must hold at least one tensor")
    if torch.compiler.is_compiling() or not _uniform(ws, cluster_dim):
        _check_each(ws, single, cluster_dim, name)
    return ws, single


def _uniform(ws, cluster_dim):
    """Whether all is well, for long lists in a fraction of the time that it takes to say what is not."""
    if not _PLAIN.issuperset(map(type, ws)):
        return False
    dtypes = {w.dtype for w in ws}
    return (len(dtypes) == 1 and dtypes <= _DTYPES and len({w.device for w in ws}) == 1 and min([w.numel() for w in ws]) >= cluster_dim
            and {w.layout for w in ws} == _STRIDED)


def _check_each(ws, single, cluster_dim, called):
    names = [called if single else f"{called}[{i}]" for i in range(len(ws))]
    dtype, device = getattr(ws[0], "dtype", None), getattr(ws[0], "device", None)
    for i, w in enumerate(ws):
        if type(w) not in _PLAIN:
            _check_kind(w, names[i])
        if w.dtype != dtype or w.device != device or w.dtype not in DTYPES or w.numel() < cluster_dim or w.layout != torch.strided:
            _reject(w, names[i], ws[0], f"{called}[0]", cluster_dim)


def _check_kind(w, name):
    if not isinstance(w, Tensor):
        raise TypeError(f"{name} must be a floating-point tensor, got {type(w).__name__}")
    if isinstance(w, torch.nn.parameter.UninitializedTensorMixin):
        raise TypeError(f"{name} is an uninitialized parameter; run the model once before its weights are used")
    if not isinstance(w, torch._subclasses.fake_tensor.FakeTensor):
        raise TypeError(f"{name} is a {type(w).__name__}; only plain tensors and parameters are supported (of a sharded tensor pass the local shard)")


def _reject(w, name, first, first_name, cluster_dim):
    if w.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {w.dtype}; allowed are float64, float32, bfloat16 and float16")
    if w.layout != torch.strided:
        raise TypeError(f"{name} has layout {w.layout}; only dense (strided) tensors are supported")
    if w.dtype != first.dtype:
        raise TypeError(f"{name} has dtype {w.dtype} but {first_name} has {first.dtype}; a sequence must have one dtype")
    if w.device != first.device:
        raise ValueError(f"{name} is on {w.device} but {first_name} is on {first.device}; a sequence must be on one device")
    if w.numel() == 0:
        raise ValueError(f"{name} is empty (shape {tuple(w.shape)}); it must have at least one element")
    raise ValueError(f"{name} has {w.numel()} elements, fewer than cluster_dim={cluster_dim}")


def count(name, value):
    """An int >= 1, or an error that names it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int >= 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be an int >= 1, got {value}")
    return value


def is_finite(v):
    return -math.inf < v < math.inf         # math.isfinite cannot be traced for a symbolic number


def number(name, value, allowed="a finite number", ok=is_finite):
    """A Python number as a float, or an error that names it."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
    value = float(value)
    if not ok(value):
        raise ValueError(f"{name} must be {allowed}, got {value:g}")
    return value


def parameter(name, value, count, single, d, like, *, differentiable=True, allowed="a finite number", ok=is_finite):
    """One number per tensor and column, as a contiguous (count, d) tensor of the accumulator's dtype on the device of `like`.

    Accepts a number; a 0-dim tensor; for a tensor W also shape (d,); for a sequence also (L,), (L, d) or a sequence of L numbers.
    Under autograd the result is connected to `value`.
    """
    dtype = accumulator(like.dtype)
    if isinstance(value, Tensor):
        check_parameter(name, value, count, single, d, like, differentiable)
        if value.dtype != dtype:
            value = value.to(dtype)
        if value.dim() == 1:
            value = value.unsqueeze(0 if single else 1)
        return value.expand(count, d).contiguous()
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
    return parameter("k", k, len(ws), single, d, ws[0], differentiable=False, allowed="an int >= 1, or a fraction in (0, 1)",
                     ok=lambda v: 0 < v < 1 or (v >= 1 and v % 1 == 0))


class WeightStats(NamedTuple):
    """0-dim tensors for a tensor, (L,) tensors for a sequence; `numel` an int, or a tuple of ints."""
    min: Tensor
    max: Tensor
    mean: Tensor
    std: Tensor
    kurtosis: Tensor
    abs_max: Tensor
    numel: int | tuple

    @classmethod
    def of(cls, table, ws, single):
        numel = tuple([w.numel() for w in ws])
        return cls(*(table[0] if single else table).unbind(-1), numel[0] if single else numel)


def check_parameter(name, value, count, single, d, like, differentiable=True):
    """A tensor given for a parameter has an allowed shape, dtype and device; its values are never read."""
    if not differentiable and value.requires_grad:
        raise ValueError(f"{name} requires grad, but no gradient is defined for it; pass {name}.detach() or a number")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {value.dtype}; allowed are float64, float32, bfloat16 and float16")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device} but W is on {like.device}")
    shapes = [(), (d,)] if single else [(), (count,), (count, d)]
    if tuple(value.shape) not in shapes:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; allowed are " + ", ".join(map(str, shapes)))


def parameter_gradient(grad, value, single):
    """The (count, d) gradient summed back to the shape and dtype of the `value` that `parameter` expanded."""
    if value.dim() == 0:
        grad = grad.sum() if grad.numel() > 1 else grad.reshape(())
    elif value.dim() == 1 and not single:
        grad = grad.sum(1) if grad.shape[1] > 1 else grad.reshape(-1)
    return grad.reshape(value.shape).to(value.dtype)


def _constant(key, count, d, dtype, device):
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():       # what a FakeTensorMode makes is fake
        return _fill(key, count, d, dtype, device)
    # Kept for good: a captured CUDA graph may read it at every replay.
    full = (key, count, d, dtype, device)
    value = _constants.get(full)
    if value is None:
        with torch.inference_mode(False):       # a tensor of inference mode could not be saved for backward later
            value = _fill(key, count, d, dtype, device)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if len(_constants) < _MOST_CONSTANTS and not capturing:
            _constants[full] = value
    return value


def _fill(key, count, d, dtype, device):
    if isinstance(key, tuple):
        return torch.tensor(key, dtype=dtype, device=device).unsqueeze(1).expand(count, d).contiguous()
    return torch.full((count, d), key, dtype=dtype, device=device)


METRICS = ("euclidean", "sqeuclidean")
GRADIENTS = ("unrolled", "last", "implicit")


def centroids(value, ws, single, d):
    """(list of centroid tensors as given, tuple of how many each has): (K,) for d = 1, else (K, d), one for each tensor of W."""
    if single != isinstance(value, Tensor):
        wanted = "a tensor" if single else f"a sequence of {len(ws)} tensors, one for each tensor of W"
        raise TypeError(f"centroids must be {wanted}, got {type(value).__name__}")
    given = [value] if single else list(value)
    if len(given) != len(ws):
        raise ValueError(f"centroids has {len(given)} tensors; W has {len(ws)}")
    dtype, shape = accumulator(ws[0].dtype), "(K,)" if d == 1 else f"(K, {d})"
    for i, (c, w) in enumerate(zip(given, ws, strict=True)):
        name = "centroids" if single else f"centroids[{i}]"
        if not isinstance(c, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(c).__name__}")
        if c.dim() != (1 if d == 1 else 2) or c.shape[0] < 1 or (d > 1 and c.shape[1] != d):
            raise ValueError(f"{name} has shape {tuple(c.shape)}; allowed is {shape} with K >= 1 for cluster_dim={d}")
        if c.dtype != dtype:
            raise TypeError(f"{name} has dtype {c.dtype}; allowed is {dtype} for W of {w.dtype}")
        if c.device != w.device:
            raise ValueError(f"{name} is on {c.device} but W is on {w.device}")
        if c.shape[0] > w.numel() // d:
            warnings.warn(f"{name} has {c.shape[0]} clusters for {w.numel() // d} rows of W: some will be empty or equal", stacklevel=4)
    return given, tuple([c.shape[0] for c in given])


def padded(given, d):
    """(L, K, d): the centroids of all tensors, filled up with zeros."""
    most = max([c.shape[0] for c in given])
    rows = [c.reshape(-1, d) for c in given]
    if any([c.shape[0] != most for c in rows]):
        rows = [torch.cat([c, c.new_zeros(most - c.shape[0], d)]) for c in rows]
    return torch.stack(rows)


def temperature(tau, ws, single):
    """tau as an (L,) tensor."""
    return parameter("tau", tau, len(ws), single, 1, ws[0], differentiable=False, allowed="a finite number > 0", ok=lambda v: 0 < v < math.inf)[:, 0]


def dkm_options(iterations, metric, gradient, tol, max_passes):
    """ValueError or TypeError for an option of `dkm` that is not allowed."""
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {METRICS}, got {metric!r}")
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be one of {GRADIENTS}, got {gradient!r}")
    for name, value, also in (("iterations", iterations, ' or "converge"'), ("max_passes", max_passes, "")):
        if name == "iterations" and value == "converge":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int >= 1{also}, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be an int >= 1{also}, got {value}")
    if tol is not None:
        if iterations != "converge":
            raise ValueError(f'tol={tol!r} is only used with iterations="converge", got iterations={iterations!r}')
        number("tol", tol, "a finite number > 0", lambda v: 0 < v < math.inf)


def tolerance(tol, ws):
    """(L,) float64: `tol`, by default 1e-6 of the range of each tensor."""
    if tol is not None:
        return torch.full((len(ws),), float(tol), dtype=torch.float64, device=ws[0].device)
    return torch.stack([1e-6 * (w.amax().double() - w.amin().double()) for w in ws])



def levels(bits, signed):
    """(QN, QP) of LSQ: codes run from -QN to QP; those of one signed bit are -1 and 1."""
    if not signed:
        return 0, 2**bits - 1
    return (1, 1) if bits == 1 else (2 ** (bits - 1), 2 ** (bits - 1) - 1)


def bit_width(bits, name="bits"):
    """An int in 1..8, or an error that names it."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"{name} must be an int in 1..8, got {bits!r}")
    if not 1 <= bits <= 8:
        raise ValueError(f"{name} must be an int in 1..8, got {bits}")
    return bits


def channel_axis(axis, xs, single, name="x"):
    """None, or an int that is an axis of every tensor."""
    if axis is None:
        return None
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise TypeError(f"axis must be an int or None, got {axis!r}")
    for i, x in enumerate(xs):
        if not -x.dim() <= axis < x.dim():
            raise ValueError(f"axis={axis} does not exist: {name if single else f'{name}[{i}]'} has shape {tuple(x.shape)}")
    return axis


def channels(name, value, xs, single, axis=None, allowed="a finite number > 0", ok=lambda v: 0 < v < math.inf, differentiable=True):
    """The numbers of a quantizer's parameter as a flat tensor of the accumulator's dtype: one for each tensor, or with `axis` one for each channel of
    each tensor, one tensor's after the other's. Connected to `value` under autograd.

    Accepts what `parameter` does for d = 1; with `axis` also (C,) for a single tensor, and for a sequence a sequence with a number, a 0-dim or a
    (C,) tensor for each.
    """
    if axis is None:
        if not single and isinstance(value, (list, tuple)) and any([isinstance(v, Tensor) for v in value]):
            value = torch.stack([_numbers(f"{name}[{i}]", v, (), xs[0], allowed, ok, differentiable) for i, v in enumerate(value)])
        return parameter(name, value, len(xs), single, 1, xs[0], differentiable=differentiable, allowed=allowed, ok=ok).reshape(-1)
    sizes = [x.shape[axis] for x in xs]
    if isinstance(value, (list, tuple)):
        if single or len(value) != len(xs):
            raise ValueError(f"{name} has {len(value)} values; allowed is " + ("a number or a tensor" if single else f"one for each of the {len(xs)} tensors"))
        names = [f"{name}[{i}]" for i in range(len(xs))]
    else:
        value, names = [value] * len(xs), [name] * len(xs)
    return torch.cat([_numbers(n, v, (C,), xs[0], allowed, ok, differentiable).expand(C) for n, v, C in zip(names, value, sizes, strict=True)])


def _numbers(name, value, shape, like, allowed, ok, differentiable):
    """A number, a 0-dim tensor or one of `shape` as a tensor of the accumulator's dtype."""
    dtype = accumulator(like.dtype)
    if not isinstance(value, Tensor):
        return _constant(number(name, value, allowed, ok), 1, 1, dtype, like.device).reshape(())
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
    flat = [channels(name, value, xs, single, None, "a finite number", is_finite) for name, value in (("lower", lower), ("upper", upper))]
    pairs = [([v] * len(xs) if isinstance(v, numbers.Real) else list(v) if isinstance(v, (list, tuple)) else [None] * len(xs)) for v in (lower, upper)]
    for low, high in zip(*pairs, strict=True):
        if isinstance(low, numbers.Real) and isinstance(high, numbers.Real) and low >= high:
            raise ValueError(f"lower must be below upper, got lower={low:g} and upper={high:g}")
    return *flat, channels("delta", delta, xs, single, None, "a finite number >= 0", lambda v: 0 <= v < math.inf, False)


def step(name, value, ws, single, differentiable=True):
    """A step size > 0 as an (L, 1) tensor."""
    return parameter(name, value, len(ws), single, 1, ws[0], differentiable=differentiable, allowed="a finite number > 0", ok=lambda v: 0 < v < math.inf)


def rank(fraction, ws, single):
    """ceil(fraction N), at least 1, for each tensor: (L,) int64; 0 where a tensor holds a fraction that is not in (0, 1]."""
    like = torch.empty(0, dtype=torch.float64, device=ws[0].device)
    given = parameter("fraction", fraction, len(ws), single, 1, like, differentiable=False, allowed="a number in (0, 1]", ok=lambda v: 0 < v <= 1)
    numels = _constant(tuple([float(w.numel()) for w in ws]), len(ws), 1, torch.float64, like.device)
    found = (given * numels * (1 - 1e-12)).ceil().clamp(min=1)[:, 0]        # 0.07 * 100 is a rounding above 7
    return torch.where((given[:, 0] > 0) & (given[:, 0] <= 1), found, 0).long()


TERMS = {"l_inf": 0, "margin": 2, "soft_min_max": 1, "kure": 1, "bin_reg": 1, "msqe": 1, "partial_l2": 1}       # name -> tensors that its op takes
_OPTIONS = {"l_inf": (), "margin": ("M", "k"), "soft_min_max": ("alpha",), "kure": ("target",), "bin_reg": ("step", "bits"), "msqe": ("step", "bits"),
            "partial_l2": ("fraction",)}
_OPTIONAL = ("k", "target")


def terms(value):
    """The mapping that `weight_terms` is given, checked: names, and which options each has."""
    if not isinstance(value, dict):
        raise TypeError(f"terms must be a dict of name -> keyword arguments, got {type(value).__name__}")
    if not value:
        raise ValueError(f"terms is empty; allowed are {tuple(TERMS)}")
    for name, options in value.items():
        if name not in TERMS:
            raise ValueError(f"terms has {name!r}; allowed are {tuple(TERMS)}")
        if not isinstance(options, dict):
            raise TypeError(f"terms[{name!r}] must be a dict of keyword arguments, got {type(options).__name__}")
        needed = [o for o in _OPTIONS[name] if o not in _OPTIONAL]
        if not {*needed} <= {*options} <= {*_OPTIONS[name]}:
            raise ValueError(f"terms[{name!r}] has {tuple(options)}; it needs {tuple(needed)} and allows {_OPTIONS[name]} (all terms read W in one column)")
    return value
