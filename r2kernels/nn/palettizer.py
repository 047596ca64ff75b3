"""Train a model through DKM: every weight a soft mixture of a few centroids, then hard codes."""

import warnings
from typing import NamedTuple

import torch
from torch import nn

from ..files.clustered import (
    LUT_DTYPES,
    Clustered,
    Form,
    along_channels,
    assembled,
    channel_scales,
    divided,
    quantized_lut,
)
from ..functional.dkm import assign, dkm
from ..functional.kmeans import kmeans
from ..reference import checks
from ..reference.columns import accumulator
from .attach import Attached
from .layers import layers_of

# tau="auto": this part of the distance of neighbouring centroids (for "sqeuclidean" squared). In the demo's five
# palettes and four trainings 0.25 leaves a soft-to-hard gap of 25 % and loses up to 40 points, 0.02 hardly lets a
# weight change its centroid.
SOFT = 0.1


class ClusteringOptions(NamedTuple):
    """How a layer is clustered; the fields are the arguments of `Palettizer`."""

    bits: int
    cluster_dim: int = 1
    layout: str = "output"
    tau: object = "auto"
    iterations: int | str = 5
    metric: str = "euclidean"
    gradient: str = "unrolled"
    group_size: int | None = None
    per_channel_scale: bool = False
    lut_dtype: str = "fp32"

    def checked(self, name):
        """These options, or an error that says which of them is not allowed for layer `name`."""
        for option, value, least, most in (
            ("bits", self.bits, 1, 8),
            ("cluster_dim", self.cluster_dim, 1, None),
            ("group_size", self.group_size, 1, None),
        ):
            if option == "group_size" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{option} of {name} must be an int, got {value!r}")
            if value < least or (most and value > most):
                raise ValueError(
                    f"{option} of {name} must be an int {f'in {least}..{most}' if most else f'>= {least}'}, got {value}"
                )
        if self.layout not in checks.LAYOUTS:
            raise ValueError(f"layout of {name} must be one of {checks.LAYOUTS}, got {self.layout!r}")
        if self.lut_dtype not in LUT_DTYPES:
            raise ValueError(f"lut_dtype of {name} must be one of {tuple(LUT_DTYPES)}, got {self.lut_dtype!r}")
        if not isinstance(self.per_channel_scale, bool):
            raise TypeError(f"per_channel_scale of {name} must be True or False, got {self.per_channel_scale!r}")
        checks.dkm_options(self.iterations, self.metric, self.gradient, None, 1)
        if self.tau != "auto" and not callable(self.tau):
            values = self.tau if isinstance(self.tau, (tuple, list)) else (self.tau,)
            if len(values) not in (1, 3):
                raise ValueError(
                    f'tau of {name} must be "auto", a number, (start, end, steps) or a function of the step, '
                    f"got {self.tau!r}"
                )
            for value in values:
                checks.number(f"tau of {name}", value, "a finite number > 0", lambda v: 0 < v < float("inf"))
        return self

    def temperature(self, step, centroids):
        """tau of every group (G,) after `step` steps, for centroids (G, K, d)."""
        if self.tau == "auto":
            return _spacing(centroids, self.metric) * SOFT ** (2 if self.metric == "sqeuclidean" else 1)
        if callable(self.tau):
            value = checks.number("tau(step)", self.tau(step), "a finite number > 0", lambda v: 0 < v < float("inf"))
        elif isinstance(self.tau, (tuple, list)):
            first, last, steps = self.tau
            value = first * (last / first) ** min(step / steps, 1.0)
        else:
            value = self.tau
        return torch.full((len(centroids),), float(value), dtype=centroids.dtype, device=centroids.device)


def _spacing(centroids, metric):
    """(G,) mean distance of a centroid to the nearest other one, or its square; 1 where all are equal."""
    if centroids.shape[1] == 1:
        return torch.ones_like(centroids[:, 0, 0])
    if centroids.shape[2] == 1:
        gaps = centroids[..., 0].sort(1).values.diff(dim=1)
        nearest = torch.minimum(torch.cat([gaps[:, :1], gaps], 1), torch.cat([gaps, gaps[:, -1:]], 1))
    else:  # of differences: cdist's product of matrices errs by more than small distances
        D = torch.cdist(centroids, centroids, compute_mode="donot_use_mm_for_euclid_dist")
        itself = torch.eye(D.shape[-1], dtype=torch.bool, device=D.device)
        nearest = D.masked_fill(itself, torch.inf).amin(-1)
    mean = nearest.mean(-1)
    mean = torch.where((mean > 0) & mean.isfinite(), mean, 1)
    return mean.square() if metric == "sqeuclidean" else mean


class Palettizer(Attached):
    """Trains `model` with its weights clustered by DKM (Cho et al. 2022): soft in train(), hard codes in eval().

    K = 2**bits centroids for rows of `cluster_dim` weights, so bits / cluster_dim bits per weight.

        palettizer = Palettizer(model, bits=2)          # centroids start from `kmeans` of the weights
        loss(model(x)).backward()                       # in train() the model runs on the soft W_hat
        optimizer.step()
        palettizer.step()                               # the next forward starts from the centroids of this one
        model.eval(); model(x)                          # runs on hard codes
        palettizer.remove()                             # a plain model with hard weights

    All conv, linear, embedding and attention weights, first and last layers too, in batched launches, once per forward.
    The parameters stay what they are: `state_dict`, optimizers, DDP and range losses see the dense weights. A forward
    changes nothing. Parts of the model may be called alone; their layers are then clustered one by one. Layers with
    fewer rows than centroids are left dense, with a warning. The palettizer's own `state_dict` holds centroids,
    temperatures and the step.

    bits: an int in 1..8. cluster_dim, layout, iterations, metric, gradient: as in `r2kernels.dkm`.
    tau: a number; (start, end, steps), geometric from soft to hard; a function of the step; or "auto": a tenth of the
        mean distance of neighbouring centroids (for "sqeuclidean" squared), followed as they move.
    group_size: output channels that share centroids (None: all).
    per_channel_scale: each output channel is divided by its max|W| first.
    lut_dtype: "fp32", "fp16" or "int8" (with one scale per group): how centroids are stored; training sees the rounding
        of the nearest centroid (straight-through).
    include, exclude: as in `select_weights`; embeddings and recurrent weights are there without.
    overrides: name pattern (of the parameter or its module) -> dict of options, or "skip"; of several that match the
        last one counts.
    replace: removes what is attached to the same weights already, which else is an error.

    Hard weights are made anew in every forward in eval(), from the weights and centroids as they are then; inside
    `with palettizer.frozen():` once. Backward in eval() gives the dense weights the gradient of the hard ones. A
    submodule in eval() runs on hard weights inside a model in train(). TypeError or ValueError names the option and
    the layer.
    """

    def __init__(
        self,
        model,
        bits,
        *,
        cluster_dim=1,
        layout="output",
        tau="auto",
        iterations=5,
        metric="euclidean",
        gradient="unrolled",
        group_size=None,
        per_channel_scale=False,
        lut_dtype="fp32",
        include=None,
        exclude=None,
        overrides=None,
        replace=False,
    ):
        super().__init__()
        usual = ClusteringOptions(
            bits, cluster_dim, layout, tau, iterations, metric, gradient, group_size, per_channel_scale, lut_dtype
        ).checked("the model")
        layers = _layers(model, usual, overrides, include, exclude)
        self.centroids, self.taus = nn.Module(), nn.Module()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._count = 0
        with torch.no_grad():
            for layer in layers:
                o = layer.options
                found = kmeans(self._pieces(layer), 2**o.bits, cluster_dim=o.cluster_dim, layout=o.layout)
                centroids = torch.stack(found).reshape(len(found), -1, o.cluster_dim)
                self.centroids.register_buffer(layer.key, centroids)
                self.taus.register_buffer(layer.key, o.temperature(0, centroids))
        self._fresh = {}
        self._attach(model, layers, replace=replace)

    @staticmethod
    def _pieces(layer):
        """The groups of a weight, scaled, as `dkm` takes them."""
        return divided(layer.weight(), layer.options)[0]

    def _centroids(self, layer):
        """(G, K, d), as precise as the weight asks for: `model.double()` does not convert them."""
        return self.centroids._buffers[layer.key].to(accumulator(layer.weight().dtype))

    def _whole(self, layer, pieces):
        """A weight made of the numbers of its groups."""
        w = layer.weight()
        out = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return out * along_channels(channel_scales(w), w.dim()) if layer.options.per_channel_scale else out

    def _soft(self, layers):
        """[(W_hat, new centroids (G, K, d))] of some layers: one batch for all that share their options."""
        batches, results = {}, {}
        for layer in layers:
            o, w = layer.options, layer.weight()
            key = (w.dtype, w.device, o.cluster_dim, o.layout, o.iterations, o.metric, o.gradient)
            batches.setdefault(key, []).append(layer)
        for (_, _, d, layout, iterations, metric, gradient), some in batches.items():
            pieces = [self._pieces(layer) for layer in some]
            starts = [c.squeeze(-1) if d == 1 else c for layer in some for c in self._centroids(layer).unbind()]
            tau = torch.cat([self.taus._buffers[layer.key] for layer in some])
            flat = [p for group in pieces for p in group]
            hats, moved = dkm(
                flat, starts, tau, iterations=iterations, metric=metric, gradient=gradient, cluster_dim=d, layout=layout
            )
            at = 0
            for layer, group in zip(some, pieces, strict=True):
                mine, c = hats[at : at + len(group)], [c.reshape(-1, d) for c in moved[at : at + len(group)]]
                at += len(group)
                if layer.options.lut_dtype != "fp32":
                    mine = [self._rounded(h, p, c_, layer.options) for h, p, c_ in zip(mine, group, c, strict=True)]
                results[layer.name] = self._whole(layer, mine), torch.stack(c).detach()
        return [results[layer.name] for layer in layers]

    @staticmethod
    def _rounded(hat, w, c, o):
        """W_hat as if the nearest centroid's entry of the table were rounded; the gradient passes through."""
        with torch.no_grad():
            table = c[:, 0].contiguous() if o.cluster_dim == 1 else c
            codes = assign(w, table, cluster_dim=o.cluster_dim, layout=o.layout)
            error = (quantized_lut(c, o.lut_dtype) - c)[codes.long()].to(w.dtype)
            form = Form(o.bits, o.cluster_dim, o.layout)
        return hat + assembled(error, w.new_zeros(w.numel() % o.cluster_dim), w.shape, form)

    @torch.no_grad()
    def clustered(self):
        """name -> `Clustered`: codes and look-up tables of every weight, as they are stored."""
        return {layer.name: self._clustered(layer) for layer in self.layers}

    def _clustered(self, layer):
        return Clustered.of(layer.weight(), self._centroids(layer), layer.options)

    @torch.no_grad()
    def _hard(self, layers):
        return [self._clustered(layer).decoded() for layer in layers]

    def _soft_weights(self, layers):
        found = self._soft(layers)
        if torch.is_grad_enabled():
            self._fresh.update(zip([layer.name for layer in layers], [c for _, c in found], strict=True))
        return [hat for hat, _ in found]

    @torch.no_grad()
    def step(self):
        """Adopts the centroids of the last forward in train() with gradients enabled, and moves the temperatures on.

        To be called after `optimizer.step()`.
        """
        self._count += 1
        self.steps.fill_(self._count)
        for layer in self.layers:
            if layer.name in self._fresh:
                self.centroids._buffers[layer.key].copy_(self._fresh[layer.name])
        self._forget()
        self._warm_up()

    def _warm_up(self):
        for layer in self.layers:
            self.taus._buffers[layer.key].copy_(
                layer.options.temperature(self._count, self.centroids._buffers[layer.key])
            )

    @torch.no_grad()
    def gap(self):
        """name -> ||W_soft - W_hard|| / ||W||: what a layer loses when it is snapped to its centroids."""
        gaps = {}
        for layer, (hat, _), hard in zip(self.layers, self._soft(self.layers), self._hard(self.layers), strict=True):
            gaps[layer.name] = ((hat - hard).double().norm() / layer.weight().double().norm()).item()
        return gaps

    def sizes(self):
        """name -> `Size`: bytes of the layer dense, packed (codes, tables, scales), and with codes at their entropy."""
        return {name: c.size() for name, c in self.clustered().items()}

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._count = int(self.steps)
        self._forget()

    def _forget(self):
        super()._forget()
        self._fresh = {}

    def __getstate__(self):
        return {**super().__getstate__(), "_fresh": {}}

    def extra_repr(self):
        return f"layers={len(self.layers)}, steps={self._count}"


def _layers(model, usual, overrides, include, exclude):
    """The layers to cluster, with their options."""
    layers = []
    for layer in layers_of(model, usual, overrides, include, exclude, embeddings=True, stacklevel=5):
        p, options = layer.weight(), layer.options
        rows = min(len(p), options.group_size or len(p)) * (p.numel() // len(p)) // options.cluster_dim
        if rows < 2**options.bits:
            few = f"{rows} rows of {options.cluster_dim} for {2**options.bits} centroids"
            warnings.warn(f"{layer.name} stays dense: it has {few}", stacklevel=3)
        else:
            layers.append(layer)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no weight left to cluster")
    return layers
