"""Where the inputs of layers are quantized: which layers, and the hook before each."""

from torch import nn

from .select import is_conv1d


def module_name(key):
    """The name of the module whose input has this key; of the model itself ""."""
    return key.replace("/", ".").strip(".")


def input_places(model, layers):
    """(key, number of the layer, module) of every conv and linear layer whose input is quantized."""
    names = {module: name for name, module in model.named_modules()}
    return [
        (names[place.module].replace(".", "/") or "/", i, place.module)
        for i, layer in enumerate(layers)
        if layer.options.activation_bits is not None
        for place in layer.places
        if place.attribute == "weight"
        and (isinstance(place.module, (nn.Linear, nn.modules.conv._ConvNd)) or is_conv1d(place.module))
        and not _is_read_by_another(model, place.module)
    ]


def input_name(key):
    """The name of the module whose input has this key, for a sentence."""
    return module_name(key) or "the model"


def _is_read_by_another(model, module):
    """Whether an attention reads the weight of this module without calling it."""
    return any(isinstance(m, nn.MultiheadAttention) and m.out_proj is module for m in model.modules())


class InputHook:
    """A hook before a layer: its input becomes `owner._input(key, number of the layer, module, input)`."""

    def __init__(self, owner, key, i):
        self.owner, self.key, self.i = owner, key, i

    def __call__(self, module, args, kwargs):
        if args:
            return (self.owner._input(self.key, self.i, module, args[0]), *args[1:]), kwargs
        for name in ("input", "x"):
            if name in kwargs:
                return args, {**kwargs, name: self.owner._input(self.key, self.i, module, kwargs[name])}
        return None


def mean_output(place, w, x):
    """mean|output| of the module at a place with this weight and no bias."""
    module, stood = place.module, getattr(place.module, place.attribute)
    kept = module.__dict__.get("bias")
    place.put(w)
    object.__setattr__(module, "bias", None)
    try:
        return module.forward(x).float().abs().mean()
    finally:
        place.put(stood)
        object.__delattr__(module, "bias")
        if kept is not None:
            object.__setattr__(module, "bias", kept)
