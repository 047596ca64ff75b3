"""What a call may be given: errors that name the argument, what it was and what is allowed, before any work."""

import math
import numbers
import sys
import warnings

import torch
from torch import Tensor

from .columns import accumulator

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("output", "contiguous")
_DTYPES, _STRIDED, _PLAIN = {*DTYPES}, {torch.strided}, {Tensor, torch.nn.Parameter, torch.nn.Buffer}


def weights(W, cluster_dim=1, layout="output", name="W", empty=True, sharded=None):
    """(list of tensors, whether W was a single tensor); TypeError or ValueError says what is wrong with which one.
    `name` is what the caller calls W. empty: whether tensors of a list may be, as shards are. sharded(weights, names):
    says what is wrong with the DTensors among them; without, they are."""
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
        _check_each(ws, single, cluster_dim, name, empty and not single, sharded)
    return ws, single


def _uniform(ws, cluster_dim):
    """Whether all is well, for long lists in a fraction of the time that it takes to say what is not."""
    if not _PLAIN.issuperset(map(type, ws)):
        return False
    dtypes = {w.dtype for w in ws}
    return (
        len(dtypes) == 1
        and dtypes <= _DTYPES
        and len({w.device for w in ws}) == 1
        and min([w.numel() for w in ws]) >= cluster_dim
        and {w.layout for w in ws} == _STRIDED
    )


def _check_each(ws, single, cluster_dim, called, empty, sharded):
    names = [called if single else f"{called}[{i}]" for i in range(len(ws))]
    are_sharded = [sharded is not None and is_dtensor(w) for w in ws]
    dtype, device = getattr(ws[0], "dtype", None), getattr(ws[0], "device", None)
    for i, w in enumerate(ws):
        if type(w) not in _PLAIN and not are_sharded[i]:
            _check_kind(w, names[i])
        if (
            w.dtype != dtype
            or w.device != device
            or w.dtype not in DTYPES
            or (w.numel() < cluster_dim and not (empty and w.numel() == 0))
            or w.layout != torch.strided
        ):
            _reject(w, names[i], ws[0], f"{called}[0]", cluster_dim)
    if any(are_sharded):
        sharded(ws, names)


def is_dtensor(w):
    """Whether w is sharded, or replicated, over a mesh of torch.distributed."""
    module = sys.modules.get("torch.distributed.tensor")  # there is none where nobody has imported it
    return module is not None and isinstance(w, module.DTensor)


def _check_kind(w, name):
    if not isinstance(w, Tensor):
        raise TypeError(f"{name} must be a floating-point tensor, got {type(w).__name__}")
    if isinstance(w, torch.nn.parameter.UninitializedTensorMixin):
        raise TypeError(f"{name} is an uninitialized parameter; run the model once before its weights are used")
    if not isinstance(w, torch._subclasses.fake_tensor.FakeTensor):
        raise TypeError(
            f"{name} is a {type(w).__name__}; only plain tensors and parameters are supported "
            "(of a sharded tensor pass the local shard)"
        )


def _reject(w, name, first, first_name, cluster_dim):
    if w.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {w.dtype}; allowed are float64, float32, bfloat16 and float16")
    if w.layout != torch.strided:
        raise TypeError(f"{name} has layout {w.layout}; only dense (strided) tensors are supported")
    if w.dtype != first.dtype:
        raise TypeError(
            f"{name} has dtype {w.dtype} but {first_name} has {first.dtype}; a sequence must have one dtype"
        )
    if w.device != first.device:
        raise ValueError(
            f"{name} is on {w.device} but {first_name} is on {first.device}; a sequence must be on one device"
        )
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
    return -math.inf < v < math.inf  # math.isfinite cannot be traced for a symbolic number


def number(name, value, allowed="a finite number", ok=is_finite):
    """A Python number as a float, or an error that names it."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
    value = float(value)
    if not ok(value):
        raise ValueError(f"{name} must be {allowed}, got {value:g}")
    return value


def not_sharded(name, value):
    """TypeError for a DTensor among what belongs to the weights, which every rank has to have whole."""
    if is_dtensor(value):
        raise TypeError(
            f"{name} is a DTensor; of parameters every rank needs all numbers: pass {name}.full_tensor(), and keep "
            "learned ones out of fully_shard (ignored_params=)"
        )


def check_parameter(name, value, count, single, d, like, differentiable=True):
    """A tensor given for a parameter has an allowed shape, dtype and device; its values are never read."""
    not_sharded(name, value)
    if not differentiable and value.requires_grad:
        raise ValueError(f"{name} requires grad, but no gradient is defined for it; pass {name}.detach() or a number")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {value.dtype}; allowed are float64, float32, bfloat16 and float16")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device} but W is on {like.device}")
    shapes = [(), (d,)] if single else [(), (count,), (count, d)]
    if tuple(value.shape) not in shapes:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; allowed are " + ", ".join(map(str, shapes)))


METRICS = ("euclidean", "sqeuclidean")
GRADIENTS = ("unrolled", "last", "implicit")


def centroids(value, ws, single, d):
    """(list of centroid tensors as given, tuple of how many each has): (K,) for d = 1, else (K, d), one for each
    tensor of W."""
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
        not_sharded(name, c)
        if c.dim() != (1 if d == 1 else 2) or c.shape[0] < 1 or (d > 1 and c.shape[1] != d):
            raise ValueError(f"{name} has shape {tuple(c.shape)}; allowed is {shape} with K >= 1 for cluster_dim={d}")
        if c.dtype != dtype:
            raise TypeError(f"{name} has dtype {c.dtype}; allowed is {dtype} for W of {w.dtype}")
        if c.device != w.device:
            raise ValueError(f"{name} is on {c.device} but W is on {w.device}")
        if c.shape[0] > w.numel() // d and w.numel():
            warnings.warn(
                f"{name} has {c.shape[0]} clusters for {w.numel() // d} rows of W: some will be empty or equal",
                stacklevel=4,
            )
    return given, tuple([c.shape[0] for c in given])


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


def preserved(preserve_zeros, iterations, gradient):
    """ValueError or TypeError for a `preserve_zeros` of `dkm` that is not allowed."""
    if not isinstance(preserve_zeros, bool):
        raise TypeError(f"preserve_zeros must be True or False, got {preserve_zeros!r}")
    if preserve_zeros and (iterations == "converge" or gradient == "implicit"):
        raise ValueError(
            "preserve_zeros=True needs a number of iterations and gradient='unrolled' or 'last', got "
            f"iterations={iterations!r}, gradient={gradient!r}: the fixed point is that of free centroids"
        )


def clusters_with_zero(preserve_zeros, counts):
    """ValueError or TypeError for a `preserve_zeros` of `kmeans` that is not allowed."""
    if not isinstance(preserve_zeros, bool):
        raise TypeError(f"preserve_zeros must be True or False, got {preserve_zeros!r}")
    if preserve_zeros and min(counts) < 2:
        raise ValueError("clusters must be >= 2 with preserve_zeros=True, of which one is 0, got 1")


def bit_width(bits, name="bits"):
    """An int in 1..8, or an error that names it."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"{name} must be an int in 1..8, got {bits!r}")
    if not 1 <= bits <= 8:
        raise ValueError(f"{name} must be an int in 1..8, got {bits}")
    return bits


LEVELS = ("lsq", "ternary", "seq")


def level_kind(levels, bits, signed=True, of=""):
    """One of `LEVELS` that goes with these bits, or an error that names it."""
    if levels not in LEVELS:
        raise ValueError(f"levels{of} must be one of {LEVELS}, got {levels!r}")
    if levels == "ternary" and bits != 2:
        raise ValueError(f'levels="ternary"{of} has the codes -1, 0, 1, which take 2 bits; got {bits}')
    if levels != "lsq" and not signed:
        raise ValueError(f"levels={levels!r}{of} has codes below 0 and needs signed=True, got signed=False")
    return levels


def channel_axis(axis, xs, single, name="x"):
    """None, or an int that is an axis of every tensor."""
    if axis is None:
        return None
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise TypeError(f"axis must be an int or None, got {axis!r}")
    for i, x in enumerate(xs):
        if not -x.dim() <= axis < x.dim():
            raise ValueError(
                f"axis={axis} does not exist: {name if single else f'{name}[{i}]'} has shape {tuple(x.shape)}"
            )
    return axis


def groups(group_size, w, axis, name):
    """ValueError where the numbers of a channel do not fall into groups of this size."""
    inputs = w.numel() // w.shape[axis] if group_size is not None else 0
    if group_size is not None and group_size < inputs and inputs % group_size:
        raise ValueError(
            f"group_size={group_size} of {name} does not divide the {inputs} inputs of a channel: it has shape "
            f"{tuple(w.shape)} and its channels lie along axis {axis}"
        )


# name -> options, in the order in which the term's op takes them as tensors (all but bits)
TERMS = {
    "l_inf": (),
    "margin": ("M", "k"),
    "soft_min_max": ("alpha",),
    "kure": ("target",),
    "bin_reg": ("step", "bits"),
    "msqe": ("step", "bits"),
    "partial_l2": ("fraction",),
}
_OPTIONAL = ("k", "target")


def tensors_of_term(name):
    """How many tensors the op of a term takes beside the weights."""
    return len([option for option in TERMS[name] if option != "bits"])


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
        needed = [o for o in TERMS[name] if o not in _OPTIONAL]
        if not {*needed} <= {*options} <= {*TERMS[name]}:
            raise ValueError(
                f"terms[{name!r}] has {tuple(options)}; it needs {tuple(needed)} and allows {TERMS[name]} "
                "(all terms read W in one column)"
            )
    return value


def clusters(value, ws, single):
    """How many clusters each tensor gets: of an int >= 1, or for a sequence also of one for each."""
    if single or not isinstance(value, (list, tuple)):
        return [count("clusters", value)] * len(ws)
    if len(value) != len(ws):
        raise ValueError(
            f"clusters has {len(value)} values; allowed is an int >= 1, or {len(ws)} of them, one for each tensor of W"
        )
    return [count(f"clusters[{i}]", c) for i, c in enumerate(value)]


def row_weights(name, mass, w, d):
    """A tensor of one floating-point number for each row of w; its values are not read here."""
    if not isinstance(mass, Tensor):
        raise TypeError(f"{name} must be a tensor of one non-negative number per row, got {type(mass).__name__}")
    if mass.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {mass.dtype}; allowed are float64, float32, bfloat16 and float16")
    if mass.device != w.device:
        raise ValueError(f"{name} is on {mass.device} but W is on {w.device}")
    if mass.numel() != w.numel() // d:
        raise ValueError(
            f"{name} has {mass.numel()} numbers (shape {tuple(mass.shape)}); "
            f"allowed are {w.numel() // d}, one for each row"
        )


def warn_of_repeated_centroids(count, rows, mass, name, stacklevel):
    """UserWarning where there are fewer rows that count than clusters."""
    n = rows if mass is None else int(mass.count_nonzero())
    if count > n:
        message = f"kmeans: {count} clusters, but {name} has {n} rows{'' if mass is None else ' of positive weight'}"
        warnings.warn(f"{message}; centroids will be repeated", UserWarning, stacklevel=stacklevel + 1)
