"""Where the inputs of layers are quantized: which layers, and the hook before each."""

from torch import nn

from .attach import readers

ROOT = "/"  # the key of an input of the model itself


def input_places(model, layers):
    """(key, number of the layer, module) of every conv and linear layer whose input is quantized."""
    names = {module: name for name, module in model.named_modules()}
    return [
        (names[module].replace(".", "/") or ROOT, i, module)
        for i, layer in enumerate(layers)
        if layer.options.activation_bits is not None
        for module, attribute in layer.places
        if attribute == "weight"
        and isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
        and not readers(model, module)
    ]


class InputHook:
    """A hook before a layer: its input becomes `owner._input(key, number of the layer, module, input)`."""

    def __init__(self, owner, key, i):
        self.owner, self.key, self.i = owner, key, i

    def __call__(self, module, args, kwargs):
        if args:
            return (self.owner._input(self.key, self.i, module, args[0]), *args[1:]), kwargs
        if "input" in kwargs:
            return args, {**kwargs, "input": self.owner._input(self.key, self.i, module, kwargs["input"])}
        return None


def mean_output(module, w, x):
    """mean|output| of a layer with this weight and no bias."""
    kept = {name: module.__dict__[name] for name in ("weight", "bias") if name in module.__dict__}
    object.__setattr__(module, "weight", w)
    object.__setattr__(module, "bias", None)
    try:
        return module.forward(x).float().abs().mean()
    finally:
        for name in ("weight", "bias"):
            object.__delattr__(module, name)
            if name in kept:
                object.__setattr__(module, name, kept[name])
