"""How a module stands before the weights of a model.

Every module of the model that holds layers is an entry: the first of them that is called puts the weights of all
layers inside it in place, in batched launches, and takes them away when it returns. Under `fully_shard` a unit that is
called inside it does so for the layers that it alone makes whole.
"""

import contextlib

import torch
from torch import nn

from ..reference.checks import is_dtensor
from ..sharding.shards import whole
from . import tracing
from .sharded import Units, has_ranks


class Attached(nn.Module):
    """A module that gives the layers of a model other weights.

    A subclass says which: `_soft_weights(layers)` for layers in train(), `_hard(layers)` for those in eval(). The
    parameters stay where and what they are. `_placers` holds which entry gave a layer its weight in the last forward,
    and `_hats` that weight, for a part of the forward that is computed again in backward. Of layers that a unit makes
    whole it is computed again too, and `_graphs` holds those that had a graph.
    """

    def _attach(self, model, layers, modules=(), replace=False):
        """layers: whose weights are replaced; modules: others that are entries."""
        self.layers = layers
        self._model = (model,)  # in a tuple, so that it does not become a part of this module
        self._hats, self._placers, self._graphs, self._reentrant = [None] * len(layers), {}, set(), set()
        self._entry, self._entered, self._kept, self._on = (), 0, None, True  # the entry in a tuple too
        self._nested, self._placed = [], []  # (unit, how many weights were placed before) of the entries inside it
        self._handles, self._guards = [], []
        self._refuse_others(model, {id(module) for module in modules}, replace)
        entries = _entries(model, layers, modules)
        self._units = Units(model, layers, list(entries))
        for module, inside in entries.items():
            self._handles.append(module.register_forward_pre_hook(EntryHook(self, inside), with_kwargs=True))
            self._handles.append(module.register_forward_hook(_Leave(self), always_call=True))
            guard = _Guard.of(module)
            guard.owners.append(self)
            self._guards.append(guard)
        for layer in self._own_layers():
            for place in layer.places:
                self._handles += place.hook()

    def has_started(self):
        """Whether all that is learned has values from the data."""
        return True

    def _own_layers(self):
        """The layers whose weights are replaced, sooner or later."""
        return self.layers

    def _replaced(self, some):
        """Those of the layers (by number) whose weights are replaced now."""
        return some

    def _refuse_others(self, model, modules, replace):
        """An error where another of these attaches to a weight or an input already; with `replace` that is removed."""
        mine = {(id(place.module), place.attribute) for layer in self._own_layers() for place in layer.places}
        for other in attached(model):
            names = [
                layer.name
                for layer in other._own_layers()
                for place in layer.places
                if (id(place.module), place.attribute) in mine
            ]
            names += [f"the input of {name}" for module, name in other._input_modules() if id(module) in modules]
            if names and not replace:
                raise ValueError(
                    f"{names[0]} is already replaced by a {type(other).__name__}; call its remove() first, or pass "
                    "replace=True"
                )
            if names:
                other.remove(bake=False)

    def _input_modules(self):
        """(module, name) of the modules whose inputs are replaced."""
        return []

    def _enter(self, module, inside, args, kwargs):
        if self._entry:
            if module is self._entry[0]:
                self._entered += 1
            if self._units.layers:
                self._enter_unit(module)
            if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self._reentrant.update(inside)  # as CheckpointFunction does, which runs the part again in backward
            return
        if not torch.compiler.is_compiling():
            self._units.find()
        elif has_ranks():
            tracing.find_units(self)
        self._entry, self._entered = (module,), 1
        try:
            self._begin(module, inside, args, kwargs)
            self._place(module, self._units.whole_at(module, inside))
        except BaseException:
            self._end()
            raise

    def _enter_unit(self, module):
        """A unit, if it is one, that is called inside an entry."""
        if module in self._units.layers:
            self._nested.append((module, len(self._placed)))
            self._place_more(module, [i for i in self._units.layers[module] if i not in self._placed])

    def _begin(self, module, inside, args, kwargs):
        """Before the layers `inside` an entry get their weights."""

    def _place_more(self, unit, some):
        """As `_place`, of the layers that a unit makes whole inside another entry."""
        self._place(unit, some)

    def _place(self, module, some):
        """Gives these layers their soft or hard weights at an entry."""
        if not self._on:
            return
        some, again = self._replaced(some), in_backward()
        if not again:
            self._reentrant.difference_update(some)
        before = [i for i in some if again and self._placers.get(i, module) is not module and i not in self._reentrant]
        hats = {i: self._hats[i] for i in before if self._hats[i] is not None}
        numbers = [i for i in before if i in self._graphs]
        if numbers:  # the gradient goes through the graph of the forward
            with torch.no_grad():
                hats.update({i: hat.detach().requires_grad_() for i, hat in self._made(numbers).items()})
        hats.update(self._made([i for i in some if i not in hats]))
        if not tracing.is_recorded():
            self._remember(module, hats, again)
        self._put(hats)

    def _remember(self, module, hats, again):
        """What a part asks for that is computed again in backward, whose layers had their weights before it."""
        if not again:
            self._placers.update(dict.fromkeys(hats, module))
        for i, hat in hats.items():
            if i in self._units.numbers:
                if hat.requires_grad:
                    self._graphs.add(i)
                elif not again:
                    self._graphs.discard(i)
            elif hat.requires_grad or self.layers[i].module.training:
                self._hats[i] = hat if hat.requires_grad else None

    def _made(self, some):
        """number of the layer -> its soft or hard weight."""
        soft = [i for i in some if self.layers[i].module.training]
        hard = [i for i in some if not self.layers[i].module.training]
        if soft:
            tracing.refuse_train(self.layers[soft[0]].name)
        hats = dict(zip(soft, self._soft_weights([self.layers[i] for i in soft]) if soft else [], strict=True))
        hats.update(zip(hard, self._straight_through(hard), strict=True))
        return hats

    def _put(self, hats):
        """Puts weights in place: number of the layer -> tensor."""
        self._placed.extend(hats)  # a module takes 2 us to set an attribute
        for i, hat in hats.items():
            for place in self.layers[i].places:
                place.put(hat)

    def _straight_through(self, some):
        """The hard weights of some layers; their gradients pass to the dense ones as they are."""
        if not some:
            return []
        if tracing.is_recorded():
            return [tracing.weight(self, i) for i in some]
        hards = self._hard_once([self.layers[i] for i in some])
        if not torch.is_grad_enabled():
            return hards
        ws = [self.layers[i].weight() for i in some]
        learned = [n for n, w in enumerate(ws) if w.requires_grad]
        if learned:
            given = _HardWeights.apply(len(learned), *[hards[n] for n in learned], *[ws[n] for n in learned])
            hards = list({**dict(enumerate(hards)), **dict(zip(learned, given, strict=True))}.values())
        return hards

    def _hard_once(self, layers):
        """Hard weights; inside `frozen` those of the first forward."""
        if self._kept is None or self._units.layers or torch.compiler.is_compiling():
            return self._hard(layers)
        missing = [layer for layer in layers if layer.name not in self._kept]
        if missing:
            with torch.inference_mode(False):  # a tensor of inference mode could not be saved for backward later
                self._kept.update(zip([layer.name for layer in missing], self._hard(missing), strict=True))
        return [self._kept[layer.name] for layer in layers]

    def enable(self, weights=None):
        """Switches the replacement of weights on (True) or off (False): the model then runs on its dense weights."""
        self._on = switch("weights", weights, self._on)

    @contextlib.contextmanager
    def frozen(self):
        """Inside this block the hard weights are made once and kept, so that a forward in eval() costs what the plain
        model's does. What changes weights, centroids, ranges, dtype or device in the block is not seen. Under
        `fully_shard` nothing is kept."""
        before, self._kept = self._kept, {} if self._kept is None else self._kept
        try:
            yield self
        finally:
            self._kept = before

    def _left(self, module, output):
        if self._nested and self._nested[-1][0] is module:
            self._take(self._nested.pop()[1])
        if not self._entry or module is not self._entry[0]:
            return
        self._entered -= 1
        if self._entered == 0:
            self._returned(output)
            self._end()

    def _returned(self, output):
        """After the forward of an entry that gave this output, None after an exception."""

    def _take(self, start=0):
        """Takes away what `_put` gave, from a number of weights on."""
        for i in self._placed[start:]:
            for place in self.layers[i].places:
                place.take()
        del self._placed[start:]

    def _end(self):
        """After the forward of an entry."""
        self._take()
        self._nested.clear()
        self._entry, self._entered = (), 0

    def model_state(self):
        """The model's `state_dict` without the weights of the layers, under whatever names they have, and without what
        is attached as a part of the model; whole tensors (what is divided is gathered, so all ranks call this)."""
        model = self._model[0]
        places = {}
        for layer in self._own_layers():
            for place in layer.places:
                places.setdefault(id(place.module), []).append(place)
        dropped = []
        for path, module in model.named_modules(remove_duplicate=False):
            prefix = f"{path}." if path else ""
            if isinstance(module, Attached):
                dropped.append((prefix, lambda key: True))
            dropped += [(prefix, place.is_stored_as) for place in places.get(id(module), [])]
        return {
            name: whole(value)
            for name, value in model.state_dict().items()
            if not any(name.startswith(prefix) and is_own(name[len(prefix) :]) for prefix, is_own in dropped)
        }

    @torch.no_grad()
    def remove(self, bake=True):
        """Detaches from the model; with `bake` its weights become the hard ones, else they stay dense.

        A parametrization, or a hook that computes a weight, is removed by `bake`: the weight is a plain parameter then.
        Under `fully_shard` layers are gathered one by one (all ranks call this), and each rank writes its shards.
        """
        layers = self._bakeable() if bake else []
        self._units.reshard()
        sharded = [layer for layer in layers if is_dtensor(layer.weight())]
        others = [layer for layer in layers if not is_dtensor(layer.weight())]
        hards = self._stored(others)
        for handle in self._handles:
            handle.remove()
        for layer, hard in zip(others, hards, strict=True):
            layer.places[0].bake(hard)
        for layer in sharded:
            layer.places[0].bake(self._stored([layer.gathered()])[0])
        self._end()
        for guard in self._guards:
            guard.release(self)
        self._handles, self._guards, self._kept = [], [], None
        self._forget()

    def _apply(self, fn, recurse=True):
        """As of any module, but what is learned keeps its precision: `model.bfloat16()` moves it alone."""

        def moved(t):
            new = fn(t)
            return new if new.dtype == t.dtype else t.to(new.device)

        return super()._apply(moved, recurse)

    def _bakeable(self):
        """The layers that have hard weights."""
        return self._own_layers()

    def _stored(self, layers):
        """Their hard weights as a file gives them back."""
        return self._hard(layers)

    def _forget(self):
        """Drops what is known of the last forward."""
        self._hats, self._placers = [None] * len(self.layers), {}

    def __getstate__(self):
        empty = {"_hats": [None] * len(self.layers), "_placers": {}, "_kept": None, "_entry": (), "_entered": 0}
        return {**self.__dict__, **empty, "_placed": [], "_nested": []}


class _HardWeights(torch.autograd.Function):
    """Inputs: how many; hard weights; dense weights. Gives the hard ones; their gradients are those of the dense."""

    @staticmethod
    def forward(ctx, count, *tensors):
        ctx.count = count
        ctx.set_materialize_grads(False)
        return tuple(hard.view_as(hard) for hard in tensors[:count])

    @staticmethod
    def backward(ctx, *gs):
        return None, *[None] * ctx.count, *gs


class EntryHook:
    """A hook before a module that holds the layers `inside`."""

    def __init__(self, owner, inside):
        self.owner, self.inside = owner, inside

    def __call__(self, module, args, kwargs):
        if tracing.is_strict():
            tracing.visit(module)
        self.owner._enter(module, self.inside, args, kwargs)


class _Leave:
    """A hook after a module that holds layers."""

    def __init__(self, owner):
        self.owner = owner

    def __call__(self, module, args, output):
        self.owner._left(module, output)


class _Guard:
    """Calls a module; an exception that hooks do not hear of, as Ctrl-C, also makes the owners leave it."""

    def __init__(self, module):
        self.module, self.owners = module, []

    @classmethod
    def of(cls, module):
        return module.__dict__.setdefault("_call_impl", cls(module))

    def release(self, owner):
        self.owners.remove(owner)
        if not self.owners:
            del self.module.__dict__["_call_impl"]

    def __call__(self, *args, **kwargs):
        try:
            return type(self.module)._call_impl(self.module, *args, **kwargs)
        except Exception:
            raise
        except BaseException:
            for owner in self.owners:
                if owner._entry and owner._entry[0] is self.module:
                    owner._end()
            raise


def attached(model):
    """The Palettizers and Quantizers that stand before the weights of a model, or of a copy of one (`deepcopy`,
    `AveragedModel`), which has its own."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return list({id(hook.owner): hook.owner for hook in hooks if isinstance(hook, EntryHook)}.values())


def switch(name, value, before):
    """True, False, or for None what it was before."""
    if value not in (None, True, False):
        raise TypeError(f"{name} must be True, False or None, got {value!r}")
    return before if value is None else bool(value)


def in_backward():
    """Whether autograd runs a backward in this thread, as when checkpointing computes a part again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _entries(model, layers, modules):
    """module -> numbers of the layers inside it, for every module that holds a layer or one of `modules`."""
    direct = {id(module): [] for module in modules}
    for i, layer in enumerate(layers):
        for place in layer.places:
            direct.setdefault(id(place.module), []).append(i)
    by_path, inside = {}, {}
    for path, module in model.named_modules(remove_duplicate=False):
        by_path[path] = module
        if id(module) not in direct:
            continue
        parts = path.split(".") if path else []
        for depth in range(len(parts) + 1):
            holder = by_path[".".join(parts[:depth])]
            inside.setdefault(holder, {}).update(dict.fromkeys(direct[id(module)]))
    return {module: sorted(found) for module, found in inside.items()}
