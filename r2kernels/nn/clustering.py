"""How the layers of a Palettizer are clustered: options, temperatures, where centroids start and which are spare."""

import math
import warnings
from typing import NamedTuple

import torch
from torch import nn

from ..files.clustered import Clustered, Form, along_channels, channel_scales, divided, nearest_codes, rows_of, scaled
from ..files.tables import LUT_DTYPES, quantized_lut, values_lost
from ..files.tiles import Geometry, check_granularity
from ..functional.kmeans import grouped, kmeans
from ..reference import checks
from ..reference.columns import accumulator, columns
from ..reference.zeros import zeros_of
from ..sharding.shards import like, local
from .layers import layers_of
from .sharded import refuse_options

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
    granularity: str | tuple | None = None

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
        check_granularity(self.granularity, self.group_size, name)
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
    """How a layer's weight is stored. Each expert of a mixture is a group, unless `group_size` says otherwise; rows and
    tiles are those of each expert."""
    form, granularity = Form.of(layer.options), layer.options.granularity
    if not layer.experts:
        return form._replace(axis=layer.output_axis)
    if granularity == "row" or isinstance(granularity, (tuple, list)):
        rows = (1, None) if granularity == "row" else granularity
        return form._replace(granularity=(1, *rows), group_size=None)
    return form._replace(group_size=form.group_size or 1)


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
    """What an error of each number of w / scales counts, the output channels first: the squared scale of its channel
    times that of `weight`, shaped like w, where there is one. None where all count alike."""
    if scales is None and weight is None:
        return None
    wide = torch.ones_like(w, dtype=accumulator(w.dtype)) if weight is None else weight.to(accumulator(w.dtype))
    if scales is not None:
        squares = (scales.to(wide.dtype) / scales.max()).square().nan_to_num(1, 1)  # of a NaN k-means tells itself
        wide = wide * along_channels(squares, w.dim(), form.axis)
    return scaled(wide, form._replace(per_channel_scale=False))[0]


def centroids_of(w, form, preserve_zeros=False, weight=None, scales=None, groups=None):
    """(groups, K, d) centroids of k-means of a weight, of which `weight`, shaped like it, says what an error counts.

    scales: of the channels, by default `channel_scales`. groups: which of them, by default all. NaN in a group with a
    NaN or an infinity.
    """
    first, scales = scaled(w, form, scales)
    counts, geometry = importances(w, form, scales, weight), Geometry(w.shape, form)
    if form.cluster_dim == 1 and groups is None:
        masses = [None] * len(geometry.blocks) if counts is None else geometry.cut(counts)
        stacks = zip(geometry.cut(first), masses, strict=True)
        return torch.cat([_of_stack(stack, 2**form.bits, mass, preserve_zeros) for stack, mass in stacks])
    pieces, counts = geometry.pieces(first), None if counts is None else geometry.pieces(counts)
    if groups is not None:
        pieces, counts = [pieces[g] for g in groups], counts and [counts[g] for g in groups]
    return fitted(pieces, form, preserve_zeros, counts)


def _of_stack(stack, clusters, mass, preserve_zeros):
    """`fitted` of the single numbers of a stack of groups."""
    rows = stack.reshape(len(stack), -1)
    if mass is not None:
        mass = mass.reshape(rows.shape)
        mass = torch.where(mass.any(1, keepdim=True), mass, 1)
    return grouped(rows, clusters, weight=mass, preserve_zeros=preserve_zeros).unsqueeze(-1)


def clustered_weight(w, form, preserve_zeros=False, weight=None):
    """(centroids of k-means, `Clustered`); None for the latter where w is not finite.

    With `per_channel_scale` channels are divided by their `channel_scales`, by their RMS or by 1, whichever errs least.
    """
    choices, found, least = [None], None, torch.inf
    if form.per_channel_scale:
        scales = channel_scales(w, form.axis)
        rows = w.detach().movedim(form.axis, 0).flatten(1)
        rms = rows.to(accumulator(w.dtype)).norm(dim=1).div(math.sqrt(rows.shape[1])).to(w.dtype)
        choices = [scales, torch.where(scales == 0, scales, torch.maximum(rms, scales)), (scales != 0).to(w.dtype)]
    for some in choices:
        centroids = centroids_of(w, form, preserve_zeros, weight, some)
        if not centroids.isfinite().all():
            return centroids, None
        made = Clustered.of(w, centroids, form, some)
        error = 0 if some is None else weighted_error(w, made, weight)
        if found is None or error < least:
            found, least = (centroids, made), error
    return found


def weighted_error(w, clustered, weight=None):
    """sum_i h_i (w_i - w_hat_i)^2 with importances h of `weight`, by default 1."""
    error = clustered.decoded().sub_(w).double().square_()
    return (error if weight is None else error.mul_(weight)).sum().item()


def rounding(w, centroids, form, scales):
    """What the entry nearest to each weight changes by when the tables (groups, K, d) are stored, like w but for the
    scales of its channels; None for tables that are stored as they are."""
    whole = local(w).detach()
    if form.lut_dtype == "fp32" or not whole.numel():
        return None
    with torch.no_grad():
        first, geometry = scaled(whole, form, scales)[0], Geometry(whole.shape, form)
        codes = nearest_codes(first, geometry, centroids, form)
        errors = quantized_lut(centroids, form.lut_dtype) - centroids
        form = form._replace(lut_dtype="fp32", per_channel_scale=False)
        leftovers = whole.new_zeros(geometry.leftovers)
        coded = Clustered(tuple(whole.shape), whole.dtype, form, codes, 8, errors, None, None, leftovers)
        return like(coded.decoded(), w)


def few_rows(shape, form):
    """The fewest rows that a group of a weight of this shape has, where these are fewer than its centroids."""
    rows = [block.each for block in Geometry(shape, form).blocks]
    rows = rows[0] if min(rows) else 0
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
AT_ONCE = 2**22  # differences of centroids of some groups


def spare_and_error(problems, device):
    """For each (weight, form, centroids, wide) and each of its groups (how many centroids no row needs, the largest
    error); the host reads once. The problems may come one after the other, as weights that are gathered do.

    A centroid is spare that is nearest to no row, or where another one is. wide: as for `nearest_codes`.
    """
    found, counts = [], []
    for w, form, centroids, wide in problems:
        first, geometry = scaled(w, form)[0], Geometry(w.shape, form)
        counts.append(geometry.groups)
        codes = nearest_codes(first, geometry, centroids, form, wide)
        codes = codes.split([block.count * block.each for block in geometry.blocks])
        most = max(AT_ONCE // centroids[0].numel() // centroids.shape[1], 1)
        for parts in zip(geometry.blocks, geometry.cut(first), codes, geometry.split(centroids), strict=True):
            block, stack, index, tables = parts
            some = stack.split(most), index.view(block.count, block.each).split(most), tables.split(most)
            for stack, index, c in zip(*some, strict=True):
                rows, index = rows_of(stack, form), index.long()
                nearest = c.gather(1, index[..., None].expand(-1, -1, form.cluster_dim))
                error = (rows - nearest).abs().amax((1, 2))
                near = (c[:, :, None] - c[:, None]).abs().amax(-1).le(SAME * error[:, None, None]).tril(-1).any(2)
                used = torch.zeros_like(near).scatter_(1, index, True)
                found.append(torch.stack([(near | ~used).sum(1).double(), error.double()], 1).to(device))
    values = iter(torch.cat(found).tolist())
    return [[next(values) for _ in range(count)] for count in counts]


def refuse_parts(layer):
    """An error for a weight that tensor parallelism has divided, where its options need it whole."""
    form = form_of(layer)
    refuse_options(
        layer.name,
        group_size=form.group_size,
        granularity=form.granularity,
        per_channel_scale=form.per_channel_scale or None,
    )


def clustered_layers(model, usual, overrides, include, exclude):
    """The layers to cluster, with their options."""
    layers = []
    for layer in layers_of(model, usual, overrides, include, exclude, embeddings=True, stacklevel=5):
        rows, options = few_rows(layer.weight().shape, form_of(layer)), layer.options
        if rows is None:
            layers.append(with_zeros_kept(layer))
        else:
            few = f"{rows} rows of {options.cluster_dim} for {2**options.bits} centroids"
            warnings.warn(f"{layer.name} stays dense: it has {few}", stacklevel=3)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no weight left to cluster")
    return layers
