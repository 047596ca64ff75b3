"""When and from what the ranges of a quantizer start."""

import contextlib
import warnings

import torch

from ..sharding.shards import beside, whole
from . import tracing
from .attach import in_backward
from .inputs import InputHook, input_name, mean_output, module_name
from .ranks import first_started, is_distributed
from .scales import positive
from .synchronised import Synchronised


class Starting(Synchronised):
    """An attached module whose ranges start from the weights and the inputs of a forward in train().

    `started` and `waited` hold for every layer whether its range has started, and how many forwards in train() it was
    part of before. A subclass has `weights` and `inputs` and says what a layer's weight is quantized by:
    `_weight_quantizer(layer)`.
    """

    def _hold_starts(self, device, count, started, delay, observe):
        self.register_buffer("started", torch.full((count,), started, device=device))
        self.register_buffer("waited", torch.zeros(count, dtype=torch.int64, device=device))
        self.register_load_state_dict_post_hook(_read_again)
        self._delay, self._observe, self._warned = delay, observe, set()
        self._starting, self._observing, self._late, self._open = None, (), set(), ()
        self._read()

    def _read(self):
        """The flags, where Python can branch on them. They may have been copied from another module's."""
        self._is_started, self._has_waited = self.started.tolist(), self.waited.tolist()
        for q in self.inputs.children():
            q.read()
        self._all_started = all(self._is_started) and all(q.is_started for q in self.inputs.children())

    def levels(self):
        """Layer's name -> `IntegerInput` of every quantized input whose range has a value."""
        return {module_name(key): q.integers() for key, q in self.inputs._modules.items() if q.is_started}

    def has_started(self):
        return all(self._is_started)

    def _begin(self, module, inside, args, kwargs):
        if tracing.is_recorded():
            self._refuse_late(inside)
            return
        if torch.compiler.is_compiling():
            self._by_parameters = True
        else:
            self._meet(module.training or (not self._all_started and self._trains(inside)))
        if not self._all_started:
            self._prepare(module, inside, args, kwargs)

    def _trains(self, inside):
        return any(self.layers[i].module.training for i in inside)

    def _refuse_late(self, some):
        """An error where ranges of some layers have no values."""
        late = [self.layers[i].name for i in some if not self._is_started[i]]
        if late:
            raise RuntimeError(
                f"the ranges of {late[0]} have no values before the first forward in train(); call `initialize` with "
                "a batch"
            )

    @torch._disable_dynamo
    @torch.no_grad()
    def _prepare(self, module, inside, args, kwargs):
        """Starts what is due of the layers inside an entry."""
        if self._by_parameters:  # called by a compiled forward
            self._meet(self._trains(inside))
            self._by_parameters = True
        self._read()
        waiting = [i for i in inside if not self._is_started[i]]
        trains = [i for i in waiting if self.layers[i].module.training and self._may_start]
        self._start_due(module, inside, trains, args, kwargs)
        started = [
            i
            for i in inside
            if self._may_start and self.layers[i].module.training and (self._is_started[i] or i in self._observing)
        ]
        self._open = [key for key, i in self._input_keys if i in started and not self.inputs._modules[key].is_started]

    def _start_due(self, module, inside, trains, args, kwargs):
        if self._delay == self._observe == 0:
            late = [i for i in inside if not self._is_started[i] and not self.layers[i].module.training]
            self._warn_of_full_precision(late)
        if self._delay or self._observe:
            for i in trains:
                self._has_waited[i] += 1
                self.waited[i] = self._has_waited[i]
        due = [i for i in trains if self._has_waited[i] > self._delay or not self._delay]
        if self._observe:
            self._observing = due
        elif due:
            self._start(module, inside, due, module.forward, args, kwargs)
            if self._ranks is not None:
                self._broadcast(self._ranks.groups)
            self._read()

    def _warn_of_full_precision(self, some):
        new = [self.layers[i].name for i in some if self.layers[i].name not in self._warned]
        self._warned.update(new)
        if new:
            warnings.warn(
                f"{new[0]}{f' and {len(new) - 1} more' if len(new) > 1 else ''} run in full precision: their ranges "
                "have no values before the first forward in train(); call `initialize` with a batch",
                stacklevel=9,
            )

    @torch._disable_dynamo
    @torch.no_grad()
    def initialize(self, *args, **kwargs):
        """Sets steps, bounds, alpha and scales from the weights, and from what the layers are given in one forward.

        The model is called with these arguments; nothing else changes. What has started starts anew. Under
        torch.distributed all ranks call this.
        """
        model, every = self._model[0], list(range(len(self.layers)))
        self._entry, self._entered = (model,), 1
        try:  # what `fully_shard` was called with gathers its parameters when it is called as a module
            self._start(model, every, every, model if self._units.find() else model.forward, args, kwargs)
            if is_distributed():
                self._broadcast(self._all_ranks())
            self._read()
        finally:
            self._end()
            self._units.reshard()

    def _start(self, module, inside, due, run, args, kwargs):
        """Runs a module once more, as an entry, with the ranges of the layers that are due starting on the way."""
        before = {name: value.clone() for name, value in self.state_dict().items()}
        self._starting = {"layers": set(due), "inputs": set(), "scales": set()}
        try:
            with unchanged(module, self):
                if run == module.forward:
                    self._place_more(module, self._units.whole_at(module, inside))
                    for hook in module._forward_pre_hooks.values():
                        if isinstance(hook, InputHook) and hook.owner is self:
                            args, kwargs = hook(module, args, kwargs) or (args, kwargs)
                run(*args, **kwargs)
        except BaseException:
            self.load_state_dict(before)
            raise
        finally:
            self._starting = None
            self._take()
            self._forget_seen()

    def _place_more(self, unit, some):
        if self._starting is None:
            super()._place_more(unit, some)
            return
        for i in self._starting["layers"].intersection(some):
            self._start_weight(i)
        some = self._weighted([i for i in some if self._is_started[i]])
        self._put(dict(zip(some, self._soft([self.layers[i] for i in some]), strict=True)))

    def _weighted(self, some):
        """Those of the layers whose weights are quantized."""
        return [i for i in some if self.layers[i].options.weight_bits is not None]

    def _start_weight(self, i):
        layer = self.layers[i]
        if layer.options.weight_bits is not None:
            w = layer.gathered().weight()
            if not w.isfinite().all():
                raise ValueError(f"{layer.name} has a NaN or an infinity; its range cannot start from it")
            self._weight_quantizer(layer).start(w)
        self._is_started[i] = True
        self.started[i] = True

    @torch._disable_dynamo
    @torch.no_grad()
    def _see(self, key, i, module, x):
        """Takes an input of a layer into the range that starts in this forward, of all its calls."""
        q, layer = self.inputs._modules[key], self.layers[i]
        seen = self._late if self._starting is None else self._starting["inputs"]
        if key not in seen:
            q.seen = type(q.seen)()
        seen.add(key)
        x = whole(x)
        q.seen.add(x)
        q.start(input_name(key))
        if self._starting is None or not q.is_started or layer.name in self._starting["scales"]:
            return
        self._starting["scales"].add(layer.name)
        quantizer = self.weights._modules.get(layer.key)
        if hasattr(quantizer, "scale"):
            self._fit_scale(quantizer, layer, module, x, q(x))

    def _fit_scale(self, quantizer, layer, module, x, quantized):
        """Has the quantized layer's outputs as large as those of the layer in full precision."""
        place = next(place for place in layer.places if place.module is module)
        hat = getattr(module, place.attribute)
        size, wanted = mean_output(place, whole(hat), quantized), mean_output(place, layer.gathered().weight(), x)
        if size > 0 and wanted > 0:
            quantizer.scale.copy_(positive(quantizer.scale) * (wanted / size))
            place.put(hat * beside(wanted / size, hat))

    def _starts_now(self, key, i, module):
        """Whether an input that a layer is given belongs to those that its range starts from."""
        if self._starting is not None:
            return i in self._starting["layers"]
        if key in self._late:
            return True
        waits = module.training and self._is_started[i] and not self.inputs._modules[key].is_started
        return waits and self._may_start and not in_backward()

    def _end(self):
        super()._end()
        if self._observing or self._late or self._open:
            self._finish()

    @torch._disable_dynamo
    @torch.no_grad()
    def _finish(self):
        """After a forward in which ranges were observed or may have started late."""
        for i in self._observing:
            if self._has_waited[i] >= self._delay + self._observe:
                self._start_weight(i)
                for key in [key for key, j in self._input_keys if j == i]:
                    q = self.inputs._modules[key]
                    if q.seen.count:
                        q.start(input_name(key))
        open_inputs = [self.inputs._modules[key] for key in self._open]
        self._observing, self._late, self._open = (), set(), ()
        if open_inputs and self._ranks is not None:
            first_started(open_inputs, self._ranks.groups)
        self._read()
        self._forget_seen()

    def _forget_seen(self):
        for q in self.inputs.children():
            if q.is_started:
                q.seen = type(q.seen)()

    def __getstate__(self):
        empty = {"_starting": None, "_observing": (), "_late": set(), "_open": ()}
        return {**super().__getstate__(), **empty}


def _read_again(module, incompatible):
    """After `load_state_dict` of a module and its parts."""
    module._forget()
    module._read()


@contextlib.contextmanager
def unchanged(model, attached):
    """Random numbers and the model's buffers are after the block what they were before, but not those of `attached`,
    which may be a part of the model."""
    own = {id(b) for b in attached.buffers()}
    buffers = [(b, b.clone()) for b in model.buffers() if id(b) not in own]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for b, value in buffers:
                    b.copy_(value)
