"""Train a model with quantized weights and activations: LSQ, EWGS, or PACT with DoReFa."""

import contextlib
import math
from typing import NamedTuple

import torch
from torch import nn

from ..reference import checks
from .attach import Attached, layers_of
from .hessian import ratios
from .inputs import ROOT, InputHook, input_places, mean_output
from .ranks import average_gradients, broadcast, is_distributed
from .scales import METHODS, Input, positive


class QuantizationOptions(NamedTuple):
    """How a layer is quantized; the fields are the arguments of `Quantizer`, and those that `overrides` alone have."""

    method: str
    weight_bits: int
    activation_bits: int | None = None
    axis: int | None = None
    delta: float | str = 1e-3
    plus: bool = False
    detach_max: bool = False

    def checked(self, name):
        """These options, or an error that says which of them is not allowed for layer `name`."""
        if self.method not in METHODS:
            raise ValueError(f"method of {name} must be one of {tuple(METHODS)}, got {self.method!r}")
        checks.bit_width(self.weight_bits, f"weight_bits of {name}")
        if self.activation_bits is not None:
            checks.bit_width(self.activation_bits, f"activation_bits of {name}")
        if self.axis is not None and (isinstance(self.axis, bool) or not isinstance(self.axis, int)):
            raise TypeError(f"axis of {name} must be an int or None, got {self.axis!r}")
        if self.axis is not None and self.method != "lsq":
            raise ValueError(
                f"axis of {name} must be None for method {self.method!r}, which has one range for each tensor, "
                f"got {self.axis}"
            )
        if self.delta != "hessian":
            checks.number(
                f"delta of {name}", self.delta, 'a finite number >= 0 or "hessian"', lambda v: 0 <= v < math.inf
            )
        for option in ("plus", "detach_max"):
            if not isinstance(getattr(self, option), bool):
                raise TypeError(f"{option} of {name} must be True or False, got {getattr(self, option)!r}")
        return self


class Quantizer(Attached):
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
    negative values in that batch are unsigned. Under torch.distributed all ranks take the values of rank 0, and their
    gradients are averaged at the end of each backward.

    EWGS and DoReFa weights lie in [-1, 1]: they are multiplied by a learned |scale| for each layer, which starts at
    mean|output| / mean|quantized output| (of layers without quantized activations the same of the weight). EWGS's
    activations come back on the scale of x, lower + (upper - lower) q, with the bounds held constant there. PACT takes
    inputs with negative values by LSQ. Steps, scales, alpha and upper - lower are used as |p| + 1e-8.
    """

    def __init__(self, model, method, weight_bits, activation_bits=None, *, axis=None, overrides=None):
        super().__init__()
        usual = QuantizationOptions(method, weight_bits, activation_bits, axis).checked("the model")
        layers = quantizable(model, usual, overrides)
        for layer in layers:
            checks.weights(layer.weight(), name=layer.name)
            checks.channel_axis(layer.options.axis, [layer.weight()], True, layer.name)
        weights, inputs = {}, {}
        for layer in layers:
            weights[layer.key] = METHODS[layer.options.method][0](layer.weight(), layer.options)
        for key, i, _ in input_places(model, layers):
            inputs[key] = METHODS[layers[i].options.method][1](layers[i].weight(), layers[i].options)
        self._hold(model, layers, weights, inputs)
        self._hook_gradients()

    def _hold(self, model, layers, weights, inputs, started=False):
        """Attaches: a quantizer of each weight by the layer's key, and of each input by the key of its module."""
        self.weights, self.inputs = nn.Module(), nn.Module()
        for group, quantizers in ((self.weights, weights), (self.inputs, inputs)):
            for key, quantizer in quantizers.items():
                group.add_module(key, quantizer)
        self.register_buffer("started", torch.tensor(started, device=layers[0].weight().device))
        self._started, self._starting, self._probe, self._averaging = started, None, None, False
        self._attach(model, layers)
        for key, i, module in input_places(model, layers):
            if key in inputs:
                self._handles.append(module.register_forward_pre_hook(InputHook(self, key, i), with_kwargs=True))

    @classmethod
    def _frozen(cls, model, layers, weights, inputs):
        """One whose quantizers of weights and inputs are these for good."""
        self = cls.__new__(cls)
        Attached.__init__(self)
        self._hold(model, layers, weights, inputs, started=True)
        return self

    def _weight_quantizer(self, layer):
        """What quantizes a layer's weight: one of `scales`."""
        return self.weights._modules[layer.key]

    def _soft(self, layers):
        """Quantized weights of some layers: one batch for all that share their options."""
        batches, results = {}, {}
        for layer in layers:
            q, w = self._weight_quantizer(layer), layer.weight()
            batches.setdefault((type(q), w.dtype, w.device, *q.key()), []).append(layer)
        for (kind, *_), some in batches.items():
            ys = kind.soft([self._weight_quantizer(layer) for layer in some], [layer.weight() for layer in some])
            results.update(zip([layer.name for layer in some], ys, strict=True))
        return [results[layer.name] for layer in layers]

    def _soft_all(self):
        hats = self._soft(self.layers)
        return hats if self._probe is None else [self._probe.moved(i, hat) for i, hat in enumerate(hats)]

    def _one_soft(self, i):
        return self._soft([self.layers[i]])[0] if self._started else self.layers[i].weight()

    def _tensors(self):
        return [
            t
            for layer in self.layers
            for t in (
                layer.weight(),
                *self._weight_quantizer(layer).parameters(),
                *self._weight_quantizer(layer).buffers(),
            )
        ]

    @torch.no_grad()
    def coded(self):
        """name -> `Uniform`: codes, scale and zero point of every weight, as they are stored."""
        if not self._started:
            raise RuntimeError(
                "the ranges have no values before the first forward in train(); call `initialize` with a batch"
            )
        return {layer.name: self._weight_quantizer(layer).coded(layer.weight()) for layer in self.layers}

    @torch.no_grad()
    def _hard(self, layers):
        return [
            self._weight_quantizer(layer).coded(layer.weight()).decoded() if self._started else layer.weight()
            for layer in layers
        ]

    def errors(self):
        """name -> ||W - W_hat|| / ||W|| of every weight."""
        pairs = [
            (layer.name, layer.weight().detach().double(), c.decoded().double())
            for layer, c in zip(self.layers, self.coded().values(), strict=True)
        ]
        return {name: ((w - hat).norm() / w.norm().clamp(min=1e-300)).item() for name, w, hat in pairs}

    def sizes(self):
        """name -> `Size`: bytes of the layer dense, packed, and with its codes at their entropy.

        Packed are codes, scales and zero points.
        """
        return {name: c.size() for name, c in self.coded().items()}

    def _enter(self, model, args, kwargs):
        if model.training and not self._started:
            self.initialize(*args, **kwargs)
        super()._enter(model, args, kwargs)

    @torch._disable_dynamo
    @torch.no_grad()
    def initialize(self, *args, **kwargs):
        """Sets steps, bounds, alpha and scales from the weights, and from what the layers are given in one forward.

        The model is called with these arguments; nothing else changes.
        """
        model = self._model[0]
        for layer in self.layers:
            self._weight_quantizer(layer).start(layer.weight())
        self._started, self._starting = True, set()
        try:
            with _unchanged(model):
                self._hats = self._soft(self.layers)
                self._shadow()
                for key, i, module in input_places(model, self.layers):
                    if key == ROOT and key in self.inputs._modules:
                        args, kwargs = InputHook(self, key, i)(module, args, kwargs)
                model.forward(*args, **kwargs)
        except BaseException:
            self._started = False
            raise
        finally:
            self._starting, self._hats = None, None
            self._leave(None, None, None)
        self.started.fill_(True)
        if is_distributed():
            self._broadcast()

    @torch._disable_dynamo
    @torch.no_grad()
    def _start_input(self, key, i, module, x):
        """The first batch that a layer is given; while all start, its scale too."""
        start, layer = self.inputs._modules[key], self.layers[i]
        start.start(x)
        q = self._weight_quantizer(layer)
        if self._starting is None:
            return
        self._starting.add(key)
        if layer.name in self._starting or not hasattr(q, "scale"):
            return
        self._starting.add(layer.name)
        hat = module.__dict__["weight"]
        quantized = mean_output(module, hat, start(x))
        if quantized > 0:
            ratio = mean_output(module, layer.weight(), x) / quantized
            q.scale.copy_(positive(q.scale) * ratio)
            object.__setattr__(module, "weight", hat * ratio)

    def _input(self, key, i, module, x):
        """A layer's quantized input."""
        q = self.inputs._modules[key]
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.numel() == 0 or not self._started:
            return x
        if not q.is_started and module.training if self._starting is None else key not in self._starting:
            self._start_input(key, i, module, x)
        if not q.is_started:
            return x
        y = q(x)
        return y if self._probe is None else self._probe.moved(key, y)

    def _broadcast(self):
        """Takes rank 0's state."""
        broadcast(list(self.state_dict().values()))
        self._started = bool(self.started)
        for q in self.inputs.children():
            if isinstance(q, Input):
                q.read()

    def _hook_gradients(self):
        """Has the gradients of all ranks averaged at the end of a backward that reaches a parameter."""
        for p in self.parameters():
            p.register_post_accumulate_grad_hook(self._at_end_of_backward)

    def _at_end_of_backward(self, p):
        if is_distributed() and not self._averaging:
            self._averaging = True
            torch.autograd.Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self):
        self._averaging = False
        average_gradients([p for p in self.parameters() if p.requires_grad])

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
        if not model.training or not self._started:
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
            with torch.enable_grad(), _unchanged(model):
                return loss_closure()

        try:
            found = ratios(evaluate, list(chosen), probes, epsilon)
        finally:
            self._probe = None
        with torch.no_grad():
            for key, ratio in found.items():
                chosen[key].delta.copy_((ratio * chosen[key].span()).clamp(min=0))
        if is_distributed():
            self._broadcast()

    def param_groups(self, *, alpha_decay=0.0, **options):
        """The learned steps, bounds, scales and alpha as a list of parameter groups for an optimizer.

        With `weight_decay=0` unless `options` say otherwise; PACT's alpha, where there are any, have
        weight_decay=alpha_decay (its L2 penalty).
        """
        alpha_decay = checks.number("alpha_decay", alpha_decay, "a finite number >= 0", lambda v: 0 <= v < math.inf)
        alphas = [p for name, p in self.named_parameters() if name.endswith(".alpha")]
        others = [p for name, p in self.named_parameters() if not name.endswith(".alpha")]
        groups = [{"params": others, "weight_decay": 0.0, **options}] if others else []
        return groups + ([{"params": alphas, **options, "weight_decay": alpha_decay}] if alphas else [])

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._started, self._hats, self._hard_of = bool(self.started), None, None

    def __getstate__(self):
        return {**super().__getstate__(), "_probe": None, "_starting": None, "_averaging": False}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._hook_gradients()  # hooks stay behind with the parameters that were copied

    def extra_repr(self):
        return f"layers={len(self.layers)}, inputs={len(self.inputs._modules)}, started={self._started}"


def quantizable(model, usual, overrides):
    """The layers to quantize; an error where there are none."""
    layers = layers_of(model, usual, overrides)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no weight left to quantize")
    return layers


@contextlib.contextmanager
def _unchanged(model):
    """Random numbers and the model's buffers are after the block what they were before."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for b, value in buffers:
                    b.copy_(value)
