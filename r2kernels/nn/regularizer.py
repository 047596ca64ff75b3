"""The range losses of a whole model, as a module."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..functional import differentiable
from ..functional.loss import add_gradients_
from ..functional.regularizers import sampled_std
from ..lists import memory_order, resident
from ..reference import checks, parameters
from ..sharding.shards import local, with_zeros
from .select import select_weights
from .sharded import refuse_any_flattened

LOSSES = ("soft_min_max", "margin", "l_inf", "kure")


class _Group(NamedTuple):
    """The weights of one dtype and device: their places in the regularizer's order, and themselves."""

    places: list
    weights: list


class RangeRegularizer(nn.Module):
    """`reg()` = weight * (sum of a range loss over the layers of `model`), a scalar to add to the training loss.

    R2, arXiv 2303.08253.

    loss: "soft_min_max" (eq. 3), "margin" (eq. 2), "l_inf" (eq. 1) or "kure".
    weight: the coefficient; `reg.weight` may be changed at any time.
    alpha: of soft_min_max, a number or one for each layer; learned unless `learn=False`. `alpha_unit="raw"` is the
        paper's alpha; with "std" the exponents use alpha / std(W) (std without gradient) and the penalty stays
        exp(-alpha), so that one alpha fits layers of every scale. The std of a layer of 32,768 weights or more is
        that of a sample of 16,384 (reference/sample.py), right to about 0.6 %, so that the weights are read once
        all the same.
    margin_std: M of margin starts at margin_std * std(W); learned unless `learn=False`.
    k: the divisor of margin, an int >= 1 or a fraction of each layer.
    cluster_dim, layout: as in `r2kernels.soft_min_max`. include, exclude: as in `select_weights`.

    Weights are looked up at every call, so `.to()`, `load_state_dict` and replaced parameters are followed. Several
    dtypes or devices are grouped. Alpha or M are in `state_dict`; give them to the optimizer by `param_groups()`,
    without weight decay. TypeError or ValueError names the argument.
    """

    def __init__(
        self,
        model,
        loss="soft_min_max",
        weight=0.01,
        *,
        alpha=0.1,
        margin_std=2.0,
        k=1,
        alpha_unit="raw",
        learn=True,
        cluster_dim=1,
        layout="output",
        include=None,
        exclude=None,
    ):
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {LOSSES}, got {loss!r}")
        if alpha_unit not in ("raw", "std"):
            raise ValueError(f"alpha_unit must be 'raw' or 'std', got {alpha_unit!r}")
        if loss == "kure" and cluster_dim != 1:
            raise ValueError(f"cluster_dim must be 1 for loss='kure', got {cluster_dim}")
        self.loss, self.alpha_unit, self.k = loss, alpha_unit, k
        self.weight = checks.number("weight", weight)
        self.cluster_dim, self.layout = cluster_dim, layout
        found = select_weights(model, include, exclude)
        self.names = [name for name, _, _ in found]
        self._places = [(module, attribute) for _, module, attribute in found]
        weights = [w for group in self._groups() for w in self._checked(group)]
        if loss == "margin":
            parameters.margin_k(k, weights, False, cluster_dim)
            margin_std = checks.number("margin_std", margin_std, "a number > 0", lambda v: v > 0)
            self._own("M", self._initial_margins(margin_std), learn)
        elif loss == "soft_min_max":
            self._own("alpha", self._initial_alphas(alpha, weights[0].device), learn)

    def _checked(self, group):
        return differentiable.weights("RangeRegularizer", group.weights, self.cluster_dim, self.layout)[0]

    def _own(self, name, value, learn):
        if learn:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def _initial_alphas(self, alpha, device):
        count = len(self.names)
        if not isinstance(alpha, Tensor):
            if isinstance(alpha, (list, tuple)) and len(alpha) != count:
                raise ValueError(f"alpha has {len(alpha)} values, the model has {count} weights")
            values = alpha if isinstance(alpha, (list, tuple)) else [alpha] * count
            alpha = torch.tensor([checks.number("alpha", a) for a in values], dtype=torch.float32, device=device)
        elif tuple(alpha.shape) not in ((), (count,)):
            raise ValueError(f"alpha has shape {tuple(alpha.shape)}; allowed are () and ({count},)")
        return alpha.detach().to(device, torch.float32).expand(count).clone()

    @torch.no_grad()
    def _initial_margins(self, margin_std):
        groups = self._groups()
        device = groups[0].weights[0].device
        values = torch.empty(len(self.names), dtype=torch.float32, device=device)
        for places, weights in groups:
            values[places] = (margin_std * functional.weight_stats(weights).std).to(device, torch.float32)
        return values

    def _groups(self):
        """The weights as they are now, by dtype and device."""
        weights = [module._parameters.get(attribute) for module, attribute in self._places]
        if None in [w if w is None else 0 for w in weights]:
            weights = [
                getattr(module, attribute) if w is None else w
                for w, (module, attribute) in zip(weights, self._places, strict=True)
            ]
        refuse_any_flattened(self.names, weights)
        if len({w.dtype for w in weights}) == 1 and len({w.device for w in weights}) == 1:
            return [_Group(list(range(len(weights))), weights)]
        groups = {}
        for i, w in enumerate(weights):
            group = groups.setdefault((w.dtype, w.device), _Group([], []))
            group.places.append(i)
            group.weights.append(w)
        return list(groups.values())

    def _parameter(self, group):
        """Alpha or M of a group, on its device."""
        value = self.alpha if self.loss == "soft_min_max" else self.M
        if len(group.places) < len(self.names):
            value = value.index_select(0, resident(tuple(group.places), torch.int64, value.device))
        return value.to(group.weights[0].device)

    def _scaled(self, alpha, weights):
        """alpha / std(W), and 0 for a constant weight, whose range is 0 with any alpha."""
        with torch.no_grad():
            std = sampled_std(weights)
            scale = torch.where(std == 0, 0, 1 / std)
        return alpha * scale, scale

    def _losses(self, group):
        """(L,) losses of one group."""
        columns = dict(cluster_dim=self.cluster_dim, layout=self.layout)
        if self.loss == "l_inf":
            return functional.l_inf(group.weights, **columns)
        if self.loss == "kure":
            return functional.kure(group.weights)
        parameter = self._parameter(group)
        if self.loss == "margin":
            return functional.margin(group.weights, parameter, k=self.k, **columns)
        if self.alpha_unit == "raw":
            return functional.soft_min_max(group.weights, parameter, **columns)
        low, high = functional.soft_extrema(group.weights, self._scaled(parameter, group.weights)[0], **columns)
        return (high - low).reshape(len(group.weights), -1).sum(1) + self.cluster_dim * (-parameter).exp()

    def forward(self):
        groups = self._groups()
        device = groups[0].weights[0].device
        total = self._losses(groups[0]).sum()
        for group in groups[1:]:
            total = total + self._losses(group).sum().to(device)
        return self.weight * total

    @torch.no_grad()
    def losses(self):
        """name -> loss of that layer (not times `weight`), 0-dim tensors without gradient."""
        values = [None] * len(self.names)
        for group in self._groups():
            for place, value in zip(group.places, self._losses(group).unbind(), strict=True):
                values[place] = value
        return dict(zip(self.names, values, strict=True))

    def param_groups(self, **options):
        """The learned alpha or M as a list of parameter groups for an optimizer.

        With `weight_decay=0` unless `options` say otherwise; an empty list where nothing is learned.
        """
        own = list(self.parameters())
        return [{"params": own, "weight_decay": 0.0, **options}] if own else []

    @torch._disable_dynamo  # torch.compiler.disable would import torch._dynamo now, 1 s before anyone compiles
    @torch.no_grad()
    def accumulate_grad_(self, scale=1.0):
        """Adds scale * weight * dL/dW to the `.grad` of the weights, and of alpha or M, and returns `reg()`'s value.

        In place and without a graph. Call it between `loss.backward()` and `optimizer.step()`; with a GradScaler pass
        its scale. `scale`: a number or a 0-dim tensor. A `.grad` that is None is made first. Frozen weights are left
        alone. RuntimeError where a weight has no `.grad` of its own (a parametrization).
        """
        groups = self._groups()
        device = groups[0].weights[0].device
        factor = scale * self.weight if isinstance(scale, Tensor) else checks.number("scale", scale) * self.weight
        total = None
        for group in groups:
            loss = self._accumulate(group, factor).sum().to(device)
            total = loss if total is None else total + loss
        return self.weight * total

    def _accumulate(self, group, factor):
        weights = self._checked(group)
        targets, late = self._targets(group)
        shape = (len(weights), False, self.cluster_dim, weights[0])
        grad = parameters.parameter("scale", factor, len(weights), False, 1, weights[0])[:, 0]
        op, value, scale, given = self.loss, None, None, []
        if op in ("soft_min_max", "margin"):
            value = self._parameter(group)
            if op == "soft_min_max" and self.alpha_unit == "std":
                op = "soft_extrema"
                scaled, scale = self._scaled(value, weights)
                grad = torch.stack([-grad, grad]).unsqueeze(2).expand(2, len(weights), self.cluster_dim).contiguous()
            given = [parameters.parameter("alpha", value if scale is None else scaled, *shape)]
        if op == "margin":
            given.append(parameters.margin_k(self.k, weights, False, self.cluster_dim))
        if op == "kure":
            given.append(parameters.parameter("target", 1.8, *shape))
        learned = value is not None and bool(list(self.parameters()))
        loss, g = add_gradients_(
            op, weights, targets, grad, given, alpha_grad=learned, geometry=(self.cluster_dim, self.layout)
        )
        for p, target in late:
            p.grad.add_(target)
        if scale is not None:
            loss = (loss[1] - loss[0]).sum(1) + self.cluster_dim * (-value).exp()
            g = g * scale[:, None] if learned else None
        if learned:
            g = g.sum(1)
            if scale is not None:
                g = g - factor * self.cluster_dim * (-value).exp()
            self._add_own_gradient(group, g)
        return loss

    def _targets(self, group):
        """(what the kernel adds to, [(weight, its zeros to be added to `.grad` afterwards)]).

        The kernel adds to each weight's `.grad`, or to zeros where that lies in another order of memory or the weight
        is frozen.
        """
        if self._all_in_place(group.weights):
            return [w.grad for w in group.weights], []
        targets, late = [], []
        for place, w in zip(group.places, group.weights, strict=True):
            g = w.grad if w.requires_grad and isinstance(w, nn.Parameter) else None
            if g is None or type(g) is not Tensor or g.layout != torch.strided:
                g = self._gradient_of(w, self.names[place])
            if g.dtype == w.dtype and self._lie_alike(local(g), local(w)):
                targets.append(g)
            else:
                targets.append(*with_zeros([None], [w], self.cluster_dim, self.layout))
                if w.requires_grad:
                    late.append((w, targets[-1]))
        return targets, late

    def _all_in_place(self, weights):
        """Whether nothing but contiguous parameters with dense gradients is there.

        Asked of a long list at once, in a third of the time.
        """
        grads = [w.grad for w in weights]
        return (
            {*map(type, weights)} == {nn.Parameter}
            and {*map(type, grads)} == {Tensor}
            and {g.layout for g in grads} == {torch.strided}
            and {g.dtype for g in grads} == {weights[0].dtype}
            and all([w.requires_grad for w in weights])
            and self.cluster_dim == 1
            and all([w.is_contiguous() for w in weights])
            and all([g.is_contiguous() for g in grads])
            and not any([g.is_neg() for g in grads])
        )

    @staticmethod
    def _gradient_of(w, name):
        if not isinstance(w, nn.Parameter):
            raise RuntimeError(
                f"{name} is computed from other parameters (a parametrization) and has no .grad; "
                "use reg() and backward() instead"
            )
        if not w.requires_grad:
            return torch.zeros_like(w)
        if w.grad is None:
            w.grad = torch.zeros_like(w)
        if type(w.grad) not in (Tensor, type(w)) or w.grad.layout != torch.strided:
            kind = f"{w.grad.layout} of type {type(w.grad).__name__}"
            raise RuntimeError(f"the gradient of {name} is {kind}; accumulate_grad_ adds to plain dense gradients only")
        return w.grad

    def _lie_alike(self, g, w):
        """Whether a kernel that reads w in place can add to g in place."""
        if g.is_neg():
            return False
        if self.cluster_dim == 1 and w.is_contiguous():
            return g.is_contiguous()
        return g.stride() == w.stride() == memory_order(w, self.cluster_dim, self.layout)[0]

    def _add_own_gradient(self, group, g):
        p = next(self.parameters())
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        g = g.to(p.device, p.dtype)
        if len(group.places) == len(self.names):
            p.grad.add_(g)
        else:
            p.grad.index_add_(0, resident(tuple(group.places), torch.int64, p.device), g)

    def extra_repr(self):
        unit = f", alpha_unit={self.alpha_unit!r}" if self.loss == "soft_min_max" else ""
        layers = f"layers={len(self.names)}, cluster_dim={self.cluster_dim}"
        return f"loss={self.loss!r}, weight={self.weight:g}, {layers}{unit}"
