"""Train a model with quantized weights and activations: LSQ, EWGS, or PACT with DoReFa."""

import math
import warnings

import torch
from torch import nn

from ..files.integers import Integers, integer_weight
from ..reference import checks
from ..reference.checks import is_dtensor
from ..sharding.shards import arrived, local, placed, whole
from . import tracing
from .attach import Attached, in_backward, switch
from .hessian import ratios
from .inputs import InputHook, input_name, input_places
from .options import METHODS, QuantizationOptions, quantizable
from .ranks import is_distributed
from .restoring import restored
from .select import matches
from .sharded import refuse_options
from .starting import Starting, unchanged


class Quantizer(Starting):
    """Trains `model` with quantized weights, and with `activation_bits` quantized inputs of its layers.

        quantizer = Quantizer(model, "lsq", weight_bits=4, activation_bits=4)
        optimizer = SGD([{"params": model.parameters()}, *quantizer.param_groups()], lr=0.01)
        loss(model(x)).backward()           # the first batch in train() sets steps and bounds
        optimizer.step()
        model.eval(); model(x)              # the same levels
        quantizer.remove()                  # a plain model with quantized weights; its activations no longer are

    method: "lsq" (learned steps), "ewgs" (learned bounds, element-wise scaled gradients) or "pact" (learned clipping of
        activations, DoReFa weights).
    weight_bits, activation_bits: an int in 1..8; activation_bits=None leaves activations alone.
    axis: of the weights' channels, each with its own step ("lsq"); None for one step for each tensor.
    group_size: how many numbers of a channel, one after the other, share a step ("lsq"); it divides their number, or
        is larger and gives each channel one. With axis=None the channels are the output channels.
    levels: of the weights ("lsq"): "lsq", "ternary" (weight_bits=2) or "seq" (half-integers), see `lsq`.
    overrides: name pattern (of the parameter or its module) -> dict of options, or "skip"; of several that match the
        last one counts. Options: those above, `delta` (EWGS: a number or "hessian", see `estimate_delta`), `plus`
        (PACT+), `detach_max` (DoReFa).

    All conv, linear and attention weights, first and last layers too, in batched launches, once per forward;
    activations at the input of each conv and linear layer (not inside attention). The parameters stay dense and keep
    their names. Parts of the model may be called alone. TypeError or ValueError names the option and the layer.

    Steps, bounds and alpha start from the first forward in train(), which runs the model once more without gradients
    (random numbers and buffers are restored), or from `initialize(batch)`, which torch.compile(fullgraph=True) needs;
    until then the model runs in full precision. LSQ: step 2 mean|x| / sqrt(QP). EWGS: weights -+3 std, activations min
    and 3 std / sqrt(1 - 2/pi). PACT: alpha the smaller of the maximum and 3 std / sqrt(1 - 2/pi). Activations without
    negative values in that batch are unsigned.

    Ranks of torch.distributed share the ranges inside DistributedDataParallel and under `fully_shard`, attached before
    or after it, or in every forward where `process_group` is given: they start from the values of the first rank, and
    at the end of a backward that is synchronised (not under `no_sync`, `set_requires_gradient_sync(False)`) their
    gradients are averaged once, in one message, whatever layers a rank used. Any other forward communicates nothing,
    and no shared range starts in it. Under `fully_shard` weights are quantized unit by unit while they are whole.
    What needs whole weights outside a forward (`coded`, `errors`, `remove`, saving) then gathers layer by layer, and
    all ranks call it.

    EWGS and DoReFa weights lie in [-1, 1]: they are multiplied by a learned |scale| for each layer, which starts at
    mean|output| / mean|quantized output| (of layers without quantized activations the same of the weight). EWGS's
    activations come back on the scale of x, lower + (upper - lower) q, with the bounds held constant there. PACT takes
    inputs with negative values by LSQ. Steps, scales, alpha and upper - lower are used as |p| + 1e-8.
    """

    def __init__(
        self,
        model,
        method,
        weight_bits,
        activation_bits=None,
        *,
        axis=None,
        group_size=None,
        levels="lsq",
        delay=0,
        observe=0,
        include=None,
        exclude=None,
        overrides=None,
        replace=False,
        process_group=None,
    ):
        super().__init__()
        usual = QuantizationOptions(method, weight_bits, activation_bits, axis, group_size, levels)
        usual = usual.checked("the model")
        for name, value in (("delay", delay), ("observe", observe)):
            checks.number(name, value, "an int >= 0", lambda v: v >= 0 and v % 1 == 0)
        layers = quantizable(model, usual, overrides, include, exclude)
        weights, inputs = {}, {}
        for layer in layers:
            if layer.options.weight_bits is not None:
                weights[layer.key] = METHODS[layer.options.method][0](layer.weight(), layer.options)
        for key, i, _ in input_places(model, layers):
            inputs[key] = METHODS[layers[i].options.method][1](layers[i].weight(), layers[i].options)
        self._share(process_group)
        self._hold(model, layers, weights, inputs, delay=delay, observe=observe, replace=replace)
        self._hook_gradients()

    def _hold(self, model, layers, weights, inputs, started=False, delay=0, observe=0, replace=False):
        """Attaches: a quantizer of each weight by the layer's key, and of each input by the key of its module."""
        self.weights, self.inputs = nn.Module(), nn.Module()
        for group, quantizers in ((self.weights, weights), (self.inputs, inputs)):
            for key, quantizer in quantizers.items():
                group.add_module(key, quantizer)
        self._probe, self._activations_on = None, True
        self._hold_starts(layers[0].weight().device, len(layers), started, delay, observe)
        places = [place for place in input_places(model, layers) if place[0] in inputs]
        self._input_keys = [(key, i) for key, i, _ in places]
        self._input_of = [(module, key) for key, _, module in places]
        self._attach(model, layers, [module for _, _, module in places], replace)
        for key, i, module in places:
            self._handles.append(module.register_forward_pre_hook(InputHook(self, key, i), with_kwargs=True))

    @classmethod
    def _frozen(cls, model, layers, weights, inputs, replace=False, process_group=None):
        """One whose quantizers of weights and inputs are these for good."""
        self = cls.__new__(cls)
        Attached.__init__(self)
        self._share(process_group)
        self._hold(model, layers, weights, inputs, started=True, replace=replace)
        return self

    @classmethod
    @torch.no_grad()
    def from_state(cls, model, state, *, replace=False):
        """The quantizer that `calibrate` made, from its `state_dict()`, without a loader and without calibrating.

        model: as that one, with the same names and shapes; with the same weights its outputs are the same bits. Which
        layers, bits, axes, steps and zero points, all is in the state. ValueError names the layer where the state does
        not fit the model, is not complete, or is of a trained `Quantizer` (make that with the options it had, and call
        `load_state_dict`).
        """
        return cls._frozen(model, *restored(model, state), replace=replace)

    def _input_modules(self):
        return [(module, input_name(key)) for module, key in self._input_of]

    def _own_layers(self):
        return [layer for layer in self.layers if layer.options.weight_bits is not None]

    def _replaced(self, some):
        return [i for i in self._weighted(some) if self._is_started[i]]

    def _bakeable(self):
        some = self._weighted(range(len(self.layers)))
        self._warn_of_full_precision([i for i in some if not self._is_started[i]])
        return [self.layers[i] for i in some if self._is_started[i]]

    def _weight_quantizer(self, layer):
        """What quantizes a layer's weight: one of `scales`."""
        return self.weights._modules[layer.key]

    def _soft(self, layers):
        """Quantized weights of some layers: one batch for all that share their options."""
        batches, results = {}, {}
        for layer in layers:
            q, w = self._weight_quantizer(layer), layer.weight()
            if is_dtensor(w):
                refuse_options(layer.name, group_size=layer.options.group_size)
            batches.setdefault((type(q), w.dtype, w.device, *q.key()), []).append((layer, w))
        for (kind, *_), some in batches.items():
            ys = kind.soft([self._weight_quantizer(layer) for layer, _ in some], [w for _, w in some])
            results.update(zip([layer.name for layer, _ in some], ys, strict=True))
        return [results[layer.name] for layer in layers]

    def _soft_weights(self, layers):
        hats = self._soft(layers)
        if self._probe is None:
            return hats
        numbers = {layer.name: i for i, layer in enumerate(self.layers)}
        return [self._probe.moved(numbers[layer.name], hat) for layer, hat in zip(layers, hats, strict=True)]

    @torch.no_grad()
    def _hard(self, layers):
        """LSQ's are the soft ones but for the sign of zeros, and come from one pass."""
        same = [layer for layer in layers if self._weight_quantizer(layer).is_hard]
        others = [layer for layer in layers if not self._weight_quantizer(layer).is_hard]
        hards = dict(zip([layer.name for layer in same + others], self._soft(same) + self._stored(others), strict=True))
        return [hards[layer.name] for layer in layers]

    def _stored(self, layers):
        return [self._stored_one(layer) for layer in layers]

    def _stored_one(self, layer):
        w = layer.weight()
        hard = self._weight_quantizer(layer).coded(layer.gathered().weight()).decoded()
        return placed(hard, w)

    @torch.no_grad()
    def coded(self):
        """name -> `Uniform`: codes, scale and zero point of every weight, as they are stored."""
        self._refuse_late(range(len(self.layers)))
        return {l.name: self._weight_quantizer(l).coded(l.gathered().weight()) for l in self._own_layers()}

    def export(self):
        """`Integers` of all weights and quantized inputs; RuntimeError before the ranges have values."""
        return Integers({name: integer_weight(c) for name, c in self.coded().items()}, self.levels())

    def errors(self):
        """name -> ||W - W_hat|| / ||W|| of every weight."""
        found = {}
        for layer, c in zip(self._own_layers(), self.coded().values(), strict=True):
            w = layer.gathered().weight().detach().double()
            found[layer.name] = ((w - c.decoded().double()).norm() / w.norm().clamp(min=1e-300)).item()
        return found

    def sizes(self):
        """name -> `Size`: bytes of the layer dense, packed, and with its codes at their entropy.

        Packed are codes, scales and zero points.
        """
        return {name: c.size() for name, c in self.coded().items()}

    def enable(self, weights=None, activations=None):
        """Switches the quantization of weights and of activations on (True) or off (False); None leaves it as it is.

        What is switched off runs in full precision; ranges keep their values, and start while they are off too.
        """
        activations = switch("activations", activations, self._activations_on)
        super().enable(weights)
        self._activations_on = activations

    def freeze(self, *patterns, frozen=True):
        """Holds the ranges of some layers as they are (`frozen=False`: lets them learn again).

        patterns: names of weights or modules; without, all. ValueError where one matches nothing.
        """
        held = [(layer.name, self._weight_quantizer(layer)) for layer in self._own_layers()]
        held += [(input_name(key), q) for key, q in self.inputs._modules.items()]
        for pattern in patterns or ("*",):
            some = [q for name, q in held if matches(name, pattern)]
            if not some:
                raise ValueError(f"{pattern!r} matches no quantized weight or input of the model")
            for p in (p for q in some for p in q.parameters()):
                p.requires_grad_(not frozen)

    def _input(self, key, i, module, x):
        """A layer's quantized input."""
        q = self.inputs._modules[key]
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        if tracing.is_recorded():
            return tracing.quantized(self, key, x) if q.is_started and self._activations_on else x
        x = arrived(x)
        if x.numel() == 0:
            return x
        if i in self._observing:
            q.seen.add(whole(x))
            return x
        if self._starts_now(key, i, module):
            self._see(key, i, module, x)
        if not q.is_started or not self._activations_on:
            return x
        if q.clips_negative and self._starting is None and not torch.compiler.is_compiling():
            self._watch(q, key, x)
        y = q(x)
        return y if self._probe is None else self._probe.moved(key, y)

    def _watch(self, q, key, x):
        """Warns once of negative numbers at an input without levels for them. Looks at the first 16 calls and at every
        doubling of their number: a read-back in every step would cost more than it finds."""
        q.calls += 1
        if (q.calls > 16 and q.calls & (q.calls - 1)) or in_backward() or key in self._warned:
            return
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        shard = local(x.detach())
        low = shard.amin().item() if shard.numel() else 0
        if low < 0:
            self._warned.add(key)
            warnings.warn(
                f"the input of {input_name(key)} has negative values (down to {low:g}), but its range started from a "
                "batch without: they become 0. Call `initialize` with a batch that has them",
                stacklevel=2,
            )

    def estimate_delta(self, loss_closure, *, probes=4, epsilon=1e-2):
        """Sets EWGS's delta where the option is "hessian" (until then 1e-3): max(0, (Tr H / N) / (3 std(g))).

        g and H: of the loss with regard to the quantized weight or activation in [0, 1] (N numbers), by Hutchinson's
        method with `probes` probes and finite differences of gradients, epsilon * mean|y| to either side.
        loss_closure: runs the model, in train(), on the same batch every time and returns the loss. It is called
        1 + 2 * probes times and changes nothing else. RuntimeError for a model in eval() or before its first batch.
        """
        checks.count("probes", probes)
        checks.number("epsilon", epsilon, "a finite number > 0", lambda v: 0 < v < math.inf)
        model = self._model[0]
        if not model.training or not all(self._is_started):
            raise RuntimeError(
                "estimate_delta needs a model in train() whose ranges have values; "
                "call model.train() and `initialize` first"
            )
        chosen = {
            i: self._weight_quantizer(layer)
            for i, layer in enumerate(self.layers)
            if (layer.options.method, layer.options.delta) == ("ewgs", "hessian")
        }
        chosen |= {key: self.inputs._modules[key] for key, i, _ in input_places(model, self.layers) if i in chosen}
        if not chosen:
            raise ValueError(
                'no layer has method "ewgs" and delta "hessian"; ask for it by overrides={"*": {"delta": "hessian"}}'
            )

        def evaluate(probe):
            self._probe = probe
            with torch.enable_grad(), unchanged(model, self):
                return probe.gradients(loss_closure())

        try:
            found = ratios(evaluate, list(chosen), probes, epsilon)
        finally:
            self._probe = None
        with torch.no_grad():
            for key, ratio in found.items():
                chosen[key].delta.copy_((ratio * chosen[key].span()).clamp(min=0))
        if is_distributed():
            self._broadcast(self._all_ranks())

    def param_groups(self, *, alpha_decay=0.0, bounds_lr=None, **options):
        """The learned steps, bounds, scales and alpha as a list of parameter groups for an optimizer.

        With `weight_decay=0` unless `options` say otherwise; PACT's alpha, where there are any, have
        weight_decay=alpha_decay (its L2 penalty). EWGS's bounds, whose gradients are sums over all numbers between
        them, have a learning rate of their own: bounds_lr, by default lr / 100 where `options` give lr, else 1e-4 (the
        paper trains them at 1e-5).
        """
        alpha_decay = checks.number("alpha_decay", alpha_decay, "a finite number >= 0", lambda v: 0 <= v < math.inf)
        if bounds_lr is None:
            bounds_lr = options["lr"] / 100 if "lr" in options else 1e-4
        bounds_lr = checks.number("bounds_lr", bounds_lr, "a finite number >= 0", lambda v: 0 <= v < math.inf)
        own = {"alpha": {"weight_decay": alpha_decay}, "lower": {"lr": bounds_lr}, "upper": {"lr": bounds_lr}}
        groups = {}
        for name, p in self.named_parameters():
            special = own.get(name.rpartition(".")[2], {})
            groups.setdefault(tuple(special), ([], special))[0].append(p)
        return [{"params": some, "weight_decay": 0.0, **options, **special} for some, special in groups.values()]

    def __getstate__(self):
        return {**super().__getstate__(), "_probe": None}

    def extra_repr(self):
        started = sum(self._is_started)
        return f"layers={len(self.layers)}, inputs={len(self.inputs._modules)}, started={started}"
