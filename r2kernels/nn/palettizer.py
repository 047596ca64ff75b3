"""Train a model through DKM: every weight a soft mixture of a few centroids, then hard codes."""

import math
import warnings
from collections import defaultdict

import torch
from torch import nn

from ..files.clustered import Clustered, divided, joined
from ..files.integers import Integers, palette_weight
from ..files.tables import different
from ..functional.dkm import dkm
from ..lists import resident
from ..ops import settled
from ..reference.checks import is_dtensor
from ..reference.columns import accumulator
from ..reference.dkm import spacing
from ..reference.zeros import with_zero, zeros_of
from ..sharding.shards import like, local
from .attach import Attached
from .clustering import (
    ClusteringOptions,
    centroids_of,
    clustered_layers,
    form_of,
    lost,
    refuse_parts,
    rounding,
    spare_and_error,
)
from .importance import importances_of

CHECKED = 64  # steps between two searches for spare centroids; before these at every power of two
SPARE = 16  # centroids for each spare one from which on a group starts anew
SQUARED = 1e-16, 1e16  # distances of centroids whose squares float32 holds


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
    granularity: what has centroids of its own: the "tensor" (usual), each output "channel", each "group" of
        `group_size` of them, or each tile (rows, columns) of the matrix (output channels, all else), None for all of
        them: (None, 64) are groups of 64 inputs. Tiles at the ends may be smaller. A "row" of that matrix is a channel;
        but of a mixture of experts rows and tiles are those of each expert's matrix, and a channel is an expert.
    per_channel_scale: each output channel is divided by its mean |W| first; a channel of zeros stays zero.
    lut_dtype: "fp32", "fp16", "bf16", "int8" (with one scale per table) or "fp8" (e4m3, with a power of two for all
        tables of a weight): how centroids are stored; training sees the rounding of the nearest centroid
        (straight-through). Warns where a quarter of the values of a table is lost.
    preserve_zeros: zeros of a weight stay 0, soft and hard, and have no gradient; one centroid is always exactly 0, and
        other weights may take it too. Of rows of `cluster_dim` those stay that are 0 as a whole; a warning counts the
        other zeros. On by itself for pruned weights and for embeddings whose padding row is 0.
    weight: name -> importances of a weight, as `sensitivity` gives them: k-means, where groups start, counts errors by
        them. Those without are not weighted.
    include, exclude: as in `select_weights`; embeddings and recurrent weights are there without.
    overrides: name pattern (of the parameter or its module) -> dict of options, or "skip"; of several that match the
        last one counts.
    replace: removes what is attached to the same weights already, which else is an error.

    A group whose weights have fewer different values than there are centroids, as in a layer that starts at 0, runs on
    its dense weights, which are those values (its temperature is inf). `step()` number 1, 2, 4, ..., 64, 128, 192, ...
    looks for centroids that no weight is nearest to or that coincide; a group with one (of more than 16 centroids: a
    sixteenth) that is not exact starts anew from `kmeans`. A step that would make a centroid NaN or infinite leaves
    those of its group as they are, and warns once: on a GPU at the next step of that series, where alone values are
    read.

    Hard weights are made anew in every forward in eval(), from the weights and centroids as they are then; inside
    `with palettizer.frozen():` once. Backward in eval() gives the dense weights the gradient of the hard ones. A
    submodule in eval() runs on hard weights inside a model in train().

    Under `fully_shard`, attached before or after it, weights are clustered unit by unit while they are whole, without a
    message more; what needs whole weights outside a forward (this, `step`, `gap`, `clustered`, `remove`, saving)
    gathers layer by layer, and all ranks call it. Under tensor parallelism the ranks share centroids as in `dkm`.
    TypeError or ValueError names the option and the layer, also of a weight that is not finite.
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
        preserve_zeros=False,
        granularity=None,
        weight=None,
        include=None,
        exclude=None,
        overrides=None,
        replace=False,
    ):
        super().__init__()
        usual = ClusteringOptions(
            bits,
            cluster_dim,
            layout,
            tau,
            iterations,
            metric,
            gradient,
            group_size,
            per_channel_scale,
            lut_dtype,
            preserve_zeros,
            granularity,
        ).checked("the model")
        layers = clustered_layers(model, usual, overrides, include, exclude)
        self._importance = importances_of({layer.name: layer.weight().shape for layer in layers}, weight)
        self.centroids, self.taus = nn.Module(), nn.Module()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=layers[0].weight().device))
        self._count = 0
        with torch.no_grad():
            for layer in layers:
                o = layer.options
                form, w = form_of(layer), layer.gathered().weight()
                centroids = centroids_of(w, form, o.preserve_zeros, self._weight(layer, w))
                if not centroids.isfinite().all():
                    raise ValueError(f"{layer.name} has a NaN or an infinity; only finite weights can be clustered")
                self.centroids.register_buffer(layer.key, centroids)
                waits = different(centroids) < centroids.shape[1]
                tau = o.temperature(0, spacing(centroids.double(), o.is_squared))
                self.taus.register_buffer(layer.key, tau.masked_fill(waits, torch.inf))
        self._fresh = {}
        self._waiting, self._wide, self._sound, self._told = {}, {}, {}, set()
        self._read(layers)
        self._attach(model, layers, replace=replace)
        self.register_load_state_dict_post_hook(_loaded)

    def _weight(self, layer, w):
        """The importances of a layer with the weight w, or None."""
        h = self._importance.get(layer.name)
        return None if h is None else h.to(w.device)

    @torch.no_grad()
    def _read(self, layers):
        """Reads what the Python code has to know of the centroids of some layers, and warns once of what they lose."""
        taus = [self.taus._buffers[layer.key] for layer in layers]
        waits = iter(torch.cat([tau.isinf().to(self.steps.device) for tau in taus]).tolist())
        for layer, tau in zip(layers, taus, strict=True):
            c, o = self.centroids._buffers[layer.key], layer.options
            self._waiting[layer.key] = frozenset([g for g in range(len(tau)) if next(waits)])
            self._wide[layer.key] = False
            if accumulator(layer.weight().dtype) == torch.float32 and (o.is_squared or o.cluster_dim > 1):
                gaps = spacing(c.double()).tolist()
                self._wide[layer.key] = not SQUARED[0] <= min(gaps) <= max(gaps) <= SQUARED[1]
            if layer.name in self._told:
                continue
            w = layer.gathered().weight() if o.preserve_zeros else layer.weight()
            texts = lost(w, form_of(layer), c, o.preserve_zeros)
            texts += ["it is 0 everywhere, and preserve_zeros keeps it so"] * (o.preserve_zeros and not w.any())
            for text in texts:
                self._told.add(layer.name)
                warnings.warn(f"{layer.name}: {text}", stacklevel=4)

    def _centroids(self, layer):
        """(G, K, d), as precise as the weight asks for: `model.double()` does not convert them."""
        return self.centroids._buffers[layer.key].to(accumulator(layer.weight().dtype))

    def _soft(self, layers):
        """[(W_hat, new centroids (G, K, d))] of some layers: one batch for all that share their options."""
        batches, results = defaultdict(list), {}
        for layer in layers:
            w, o, wide = layer.weight(), layer.options, self._wide[layer.key]
            if is_dtensor(w):
                refuse_parts(layer)
            same = o.cluster_dim, o.layout, o.iterations, o.metric, o.gradient, o.preserve_zeros
            batches[w.dtype, w.device, wide, same].append((layer, w, *divided(w, form_of(layer))))
        for some in batches.values():
            for (layer, w, _, scales), (hats, c) in zip(some, self._mixtures(some), strict=True):
                own = w.detach() if layer.options.preserve_zeros else w  # of channels of zeros
                form = form_of(layer)
                results[layer.name] = joined(hats, own, form, scales, rounding(w, c, form, scales)), c.detach()
        return [results[layer.name] for layer in layers]

    def _mixtures(self, some):
        """[([W_hat] of the groups, new centroids)] of (layer, weight, groups, scales), all of the same options."""
        o, d = some[0][0].options, some[0][0].options.cluster_dim
        flat, starts, taus, places = [], [], [], []
        for layer, _, pieces, _ in some:
            centroids, waiting = self._centroids(layer), self._waiting[layer.key]
            live = [g for g in range(len(pieces)) if g not in waiting]
            if waiting and o.preserve_zeros:
                pieces = [p.masked_fill(zeros_of(p.detach(), d, o.layout), 0) for p in pieces]
            tau = self.taus._buffers[layer.key]
            index = resident(tuple(live), torch.int64, tau.device) if waiting else None
            first = (centroids if d > 1 else centroids[..., 0]).unbind()
            flat += [pieces[g] for g in live]
            starts += [first[g] for g in live]
            taus.append(tau if index is None else tau.index_select(0, index))
            places.append((list(pieces), centroids, live, index))
        if not flat:
            return [(pieces, centroids) for pieces, centroids, _, _ in places]
        if self._wide[some[0][0].key]:
            flat, starts = [p.double() for p in flat], [c.double() for c in starts]
        hats, moved = dkm(
            flat,
            starts,
            torch.cat(taus),
            iterations=o.iterations,
            metric=o.metric,
            gradient=o.gradient,
            cluster_dim=d,
            layout=o.layout,
            preserve_zeros=o.preserve_zeros,
        )
        found, hats, moved = [], iter(hats), iter(moved)
        for (pieces, centroids, live, index), (_, w, _, _) in zip(places, some, strict=True):
            for g in live:
                pieces[g] = next(hats).to(w.dtype)
            if live:
                new = [next(moved) for _ in live]
                new = new[0].unsqueeze(0) if len(new) == 1 else torch.stack(new)
                new = new.view(-1, *centroids.shape[1:]).to(centroids.dtype)
                centroids = new if index is None else centroids.index_copy(0, index, new.detach())
            found.append((pieces, centroids))
        return found

    @torch.no_grad()
    def clustered(self):
        """name -> `Clustered`: codes and look-up tables of every weight, as they are stored."""
        return {layer.name: self._clustered(layer.gathered()) for layer in self.layers}

    def export(self):
        """`Integers`: the codes and tables of every weight as `PaletteWeight`; no inputs."""
        return Integers({name: palette_weight(c) for name, c in self.clustered().items()}, {})

    def _clustered(self, layer):
        return Clustered.of(layer.weight(), self._centroids(layer), form_of(layer), wide=self._wide[layer.key])

    @torch.no_grad()
    def _hard(self, layers):
        hards = []
        for layer in layers:
            w = layer.weight()
            if is_dtensor(w):  # a code is of its own row alone
                refuse_parts(layer)
                shard = local(w)
                hard = self._clustered(layer.holding(shard)).decoded() if shard.numel() else shard
                hards.append(like(hard, w))
            else:
                hards.append(self._clustered(layer).decoded())
        return hards

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
        self._adopt([layer for layer in self.layers if layer.name in self._fresh])
        stayed = [layer for layer in self.layers if layer.name not in self._fresh]
        self._forget()
        due = self._count & (self._count - 1) == 0 or self._count % CHECKED == 0
        if due or self.steps.device.type == "cpu":
            self._warn_of_unsound()
        if due:
            wholes = ((layer, layer.gathered().weight()) for layer in self.layers)
            problems = ((w, form_of(l), self._centroids(l), self._wide[l.key]) for l, w in wholes)
            for layer, found in zip(self.layers, spare_and_error(problems, self.steps.device), strict=True):
                self._renew(layer, found)
        self._warm_up(self.layers if due else stayed)
        if due:
            self._read(self.layers)

    def _adopt(self, layers):
        """New centroids, but for groups where they are not finite, and the temperatures that go with them."""
        for some in self._alike(layers, [self._fresh[layer.name].dtype for layer in layers]):
            old = [self.centroids._buffers[layer.key] for layer in some]
            groups, new = [len(c) for c in old], torch.cat([self._fresh[layer.name] for layer in some])
            joint, spacings, sound = settled(torch.cat(old), new, some[0].options.is_squared)
            torch._foreach_copy_(old, list(joint.split(groups)))
            self._set_temperatures(some, groups, spacings)
            names = tuple(layer.name for layer, count in zip(some, groups, strict=True) for _ in range(count))
            self._sound.setdefault(names, []).append(sound)

    def _alike(self, layers, kinds):
        """The layers, of these kinds, in batches of which the centroids fit in one tensor and take one temperature."""
        batches = defaultdict(list)
        for layer, kind in zip(layers, kinds, strict=True):
            c, o = self.centroids._buffers[layer.key], layer.options
            tau = o.tau if o.tau == "auto" else id(o.tau)
            batches[c.shape[1:], c.dtype, c.device, o.metric, tau, kind].append(layer)
        return batches.values()

    def _set_temperatures(self, layers, groups, spacings):
        taus = [self.taus._buffers[layer.key] for layer in layers]
        torch._foreach_copy_(taus, list(layers[0].options.temperature(self._count, spacings).split(groups)))
        for layer, tau in zip(layers, taus, strict=True):
            if self._waiting[layer.key]:
                waiting = resident(tuple(sorted(self._waiting[layer.key])), torch.int64, tau.device)
                tau.index_fill_(0, waiting, torch.inf)

    def _warn_of_unsound(self):
        """Says once of a layer that its centroids were left as they were."""
        for names, steps in self._sound.items():
            sound = torch.stack(steps).all(0).tolist()
            for name in dict.fromkeys(n for n, fine in zip(names, sound, strict=True) if not fine):
                if (name, "step") not in self._told:
                    self._told.add((name, "step"))
                    warnings.warn(f"{name} is not finite; its centroids stay as they are", stacklevel=4)
        self._sound = {}

    def _renew(self, layer, found):
        """Starts groups anew that have spare centroids, and finds those that wait until their weights differ.

        found: what `spare_and_error` says of them."""
        form, c, key = form_of(layer), self.centroids._buffers[layer.key], layer.key
        most = max(2**form.bits // SPARE, 1)
        anew = [
            g
            for g, (spare, error) in enumerate(found)
            if 0 < error < torch.inf and (spare >= most or g in self._waiting[key])
        ]
        waiting = {g for g, (spare, error) in enumerate(found) if error == 0 and spare}
        if anew:
            w = layer.gathered().weight()
            given = self._weight(layer, w)
            c[anew] = centroids_of(w, form, layer.options.preserve_zeros, given, groups=anew).to(c.dtype)
            waiting |= {anew[i] for i in (different(c[anew]) < c.shape[1]).nonzero()[:, 0].tolist()}
        self._waiting[key] = frozenset(waiting)

    def _warm_up(self, layers):
        """The temperatures of these layers, of centroids as they are."""
        for some in self._alike(layers, [None] * len(layers)):
            centroids = [self.centroids._buffers[layer.key] for layer in some]
            spacings = spacing(torch.cat(centroids).double(), some[0].options.is_squared)
            self._set_temperatures(some, [len(c) for c in centroids], spacings)

    @torch.no_grad()
    def gap(self):
        """name -> ||W_soft - W_hard|| / ||W||: what a layer loses when it is snapped to its centroids."""
        gaps = {}
        for layer in self.layers:
            whole = layer.gathered()
            (hat, _), hard = self._soft([whole])[0], self._hard([whole])[0]
            error, norm = (hat - hard).double().norm().item(), whole.weight().double().norm().item()
            gaps[layer.name] = error / norm if norm else error and math.inf
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


def _loaded(palettizer, _):
    """After `load_state_dict`."""
    for layer in palettizer.layers:
        if layer.options.preserve_zeros:
            c = palettizer.centroids._buffers[layer.key]
            c.copy_(with_zero(c))
    palettizer._read(palettizer.layers)
