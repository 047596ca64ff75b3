"""How the layers of a Palettizer are clustered: options, temperatures, where centroids start and which are spare."""

import warnings
from typing import NamedTuple

import torch
from torch import nn

from ..files.clustered import LUT_DTYPES, Form, Geometry, along_channels, divided, nearest_codes, values_lost
from ..functional.kmeans import kmeans
from ..reference import checks
from ..reference.columns import accumulator, columns
from ..reference.zeros import zeros_of

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
    preserve_zeros: bool = False

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
        for option in ("per_channel_scale", "preserve_zeros"):
            if not isinstance(getattr(self, option), bool):
                raise TypeError(f"{option} of {name} must be True or False, got {getattr(self, option)!r}")
        checks.dkm_options(self.iterations, self.metric, self.gradient, None, 1)
        if self.preserve_zeros and (self.iterations == "converge" or self.gradient == "implicit"):
            raise ValueError(
                f"preserve_zeros of {name} (also of a pruned weight, or one with a padding row) needs a number of "
                f'iterations and gradient="unrolled" or "last", got {self.iterations!r}, {self.gradient!r}'
            )
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

    @property
    def is_squared(self):
        """Whether tau has the units of squared weights."""
        return self.metric == "sqeuclidean"

    def temperature(self, step, spacings):
        """tau of every group (G,) after `step` steps, where centroids are so far apart (`spacing`, squared for
        "sqeuclidean"); float64, which holds squares of small weights."""
        if self.tau == "auto":
            return spacings * SOFT ** (2 if self.is_squared else 1)
        if callable(self.tau):
            value = checks.number("tau(step)", self.tau(step), "a finite number > 0", lambda v: 0 < v < float("inf"))
        elif isinstance(self.tau, (tuple, list)):
            first, last, steps = self.tau
            value = first * (last / first) ** min(step / steps, 1.0)
        else:
            value = self.tau
        return torch.full((len(spacings),), float(value), dtype=torch.float64, device=spacings.device)


def form_of(layer):
    """How a layer's weight is stored. Each expert of a mixture is a group, unless `group_size` says otherwise."""
    form = Form.of(layer.options)
    return form._replace(group_size=form.group_size or 1) if layer.experts else form._replace(axis=layer.output_axis)


def fitted(pieces, form, preserve_zeros=False, weight=None):
    """(groups, K, d) centroids of k-means of the groups of a weight; NaN where one has a NaN or an infinity.

    weight: tensors of numbers >= 0 shaped like the groups, or None: what an error there counts; of a row the mean. In
    a group where all are 0 all count alike.
    """
    options = {"cluster_dim": form.cluster_dim, "layout": form.layout, "preserve_zeros": preserve_zeros}
    if weight is not None:
        masses = [columns(v, form.cluster_dim, form.layout).mean(0) for v in weight]
        options["weight"] = [torch.where(m.any(), m, 1) for m in masses]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "kmeans: .* centroids will be repeated")
        return torch.stack(kmeans(pieces, 2**form.bits, **options)).reshape(len(pieces), -1, form.cluster_dim)


def importances(w, form, scales, weight=None):
    """What an error of each number in the groups of w / scales counts, as `fitted` takes it: the squared scale of its
    channel times that of `weight`, shaped like w, where there is one. None where all count alike."""
    if scales is None and weight is None:
        return None
    wide = torch.ones_like(w, dtype=accumulator(w.dtype)) if weight is None else weight.to(accumulator(w.dtype))
    if scales is not None:
        squares = (scales.to(wide.dtype) / scales.max()).square().nan_to_num(1, 1)  # of a NaN k-means tells itself
        wide = wide * along_channels(squares, w.dim(), form.axis)
    return divided(wide, form._replace(per_channel_scale=False))[0]


def centroids_of(w, form, preserve_zeros=False, weight=None, scales=None):
    """(groups, K, d) centroids of k-means of a weight, of which `weight`, shaped like it, says what an error counts.

    scales: of the channels, by default `channel_scales`. NaN in a group with a NaN or an infinity.
    """
    pieces, scales = divided(w, form, scales)
    return fitted(pieces, form, preserve_zeros, importances(w, form, scales, weight))


def few_rows(shape, form):
    """The fewest rows that a group of a weight of this shape has, where these are fewer than its centroids."""
    geometry = Geometry(shape, form)
    rows = min(geometry.each, geometry.each_of_last) if geometry.last and not geometry.each_of_last else geometry.each
    return rows if rows < 2**form.bits else None


def with_zeros_kept(layer):
    """The layer with `preserve_zeros` where it is pruned, or an embedding with zeros for padding."""
    w, options = layer.gathered().weight(), layer.options
    if options.preserve_zeros or not (layer.is_pruned or _has_padding(layer, w)):
        return layer
    return layer._replace(options=options._replace(preserve_zeros=True).checked(layer.name))


def _has_padding(layer, w):
    tables = [p.module for p in layer.places if isinstance(p.module, (nn.Embedding, nn.EmbeddingBag))]
    return bool(w.any()) and any(t.padding_idx is not None and not w[t.padding_idx].any() for t in tables)


def lost(w, form, centroids, preserve_zeros):
    """What is lost that the options promise, texts for warnings: values of the tables, zeros in rows with others."""
    texts = [values_lost(centroids, form.lut_dtype)]
    if preserve_zeros and form.cluster_dim > 1:
        kept = sum(int(zeros_of(p, form.cluster_dim, form.layout).sum()) for p in divided(w.detach(), form)[0])
        zeros = int((w == 0).sum())
        if zeros > kept:
            d = form.cluster_dim
            texts.append(f"{zeros - kept} of its {zeros} zeros do not stay: they share a row of {d} with other weights")
    return [text for text in texts if text]


# a centroid this near to another, in units of the largest error, is no other one
SAME = 1e-3


def spare_and_error(problems, device):
    """For each (weight, form, centroids, wide) and each of its groups (how many centroids no row needs, the largest
    error); the host reads once. The problems may come one after the other, as weights that are gathered do.

    A centroid is spare that is nearest to no row, or where another one is. wide: as for `nearest_codes`.
    """
    found, counts = [], []
    for w, form, centroids, wide in problems:
        d, pieces = form.cluster_dim, divided(w, form)[0]
        counts.append(len(pieces))
        for piece, codes, c in zip(pieces, nearest_codes(pieces, centroids, form, wide), centroids, strict=True):
            error = (columns(piece, d, form.layout).t() - c[codes.long()]).abs().amax()
            near = (c[:, None] - c).abs().amax(-1).le(SAME * error).tril(-1).any(1)
            used = torch.zeros_like(near).index_fill_(0, codes.long(), True)
            found.append(torch.stack([(near | ~used).sum().double(), error.double()]).to(device))
    values = iter(torch.stack(found).tolist())
    return [[next(values) for _ in range(count)] for count in counts]
