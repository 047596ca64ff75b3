"""The cases of the range losses' benchmark: what each contender does, what it may not avoid (the floor), and whether
its numbers are right."""

import contextlib
import functools
import gc
from typing import NamedTuple

import budget
import cases
import torch
from measure import Contender
from torch import nn

import r2kernels
from r2kernels import RangeRegularizer, reference, use_backend
from r2kernels.functional.regularizers import sampled_std


class Op(NamedTuple):
    label: str
    case: str  # its row in tests/cases.py
    learn: bool = False  # the parameter (alpha) has a gradient too


OPS = (
    Op("soft_min_max", "soft_min_max"),
    Op("l_inf", "l_inf"),
    Op("margin", "margin"),
    Op("soft_min_max, alpha learned", "soft_min_max", learn=True),
    Op("kure", "kure"),
)
FORWARD, BOTH, ACCUMULATE, BACKWARD = "forward", "forward + backward", "accumulate_grad_", "backward"
IN_STD = "accumulate_grad_, alpha in std"
MOVES = {FORWARD: 1, BOTH: 3, ACCUMULATE: 4, BACKWARD: 2}  # times every weight or gradient is read or written, at least


class Case(NamedTuple):
    op: Op
    shape: str
    work: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    cached: bool = False  # on a GPU: one set of inputs, which stays in the L2 cache as far as it fits

    @property
    def table(self):
        """The name of its table: one for each shape."""
        dtype = "" if self.dtype == torch.float32 else f", {str(self.dtype).removeprefix('torch.')}"
        return self.shape + dtype + (", one set of inputs (L2 stays warm)" if self.cached else "")


class Inputs:
    """Weights of a model's shapes, and the regularizer that owns their alpha or M."""

    def __init__(self, case, seed=0):
        self.device = torch.device(case.device)
        self.draw = functools.partial(cases.model_weights, case.shape, case.dtype, case.device)
        # The regularizer takes matrices and kernels: a vector becomes one row.
        self.weights = [nn.Parameter(w if w.dim() > 1 else w[None]) for w in self.draw(seed=seed)]
        self.bytes = sum(w.nbytes for w in self.weights)
        self.op, self.learn, self.single = cases.BY_LABEL[case.op.case], case.op.learn, len(self.weights) == 1
        options = {}
        if self.op.parameter == "alpha":
            options["alpha"] = [self.op.value / w.std().item() for w in self.draw(seed=0)]
        if self.op.parameter == "M":
            options["margin_std"] = self.op.value
        self.regularizer = RangeRegularizer(
            nn.ParameterList(self.weights), self.op.function, 1.0, learn=self.learn, include="*", **options
        )
        self.parameter = None if self.op.parameter is None else getattr(self.regularizer, self.op.parameter)
        self.W = self.weights[0] if self.single else self.weights
        self.arguments = {}
        if self.parameter is not None:
            fixed_number = self.single and not self.learn
            self.arguments[self.op.parameter] = self.parameter.item() if fixed_number else self.parameter

    def fill(self, seed):
        for w, new in zip(self.weights, self.draw(seed=seed), strict=True):
            w.data.copy_(new.reshape(w.shape))

    def no_gradients(self):
        for w in self.weights:
            w.grad = None
        if self.learn:
            self.parameter.grad = None

    def zero_gradients(self):
        for w in [*self.weights, *([self.parameter] if self.learn else [])]:
            w.grad = torch.zeros_like(w) if w.grad is None else w.grad.zero_()

    def some_gradients(self):
        if self.weights[0].grad is None:
            self.zero_gradients()


def contenders(case, inputs, compiling=None):
    """(name -> Contender, name -> why it is absent). `compiling`: why torch.compile is left out, or None."""
    found, absent = {}, {}
    function = cases.BY_LABEL[case.op.case].function
    found["eager"] = _loss(case, getattr(reference, function))
    if compiling is None:
        # Another shape is another graph: start afresh rather than run into the limit on recompilations.
        found["torch.compile"] = _loss(case, _compiled(function, case.op, case.shape, case.device, case.dtype))
    else:
        absent["torch.compile"] = compiling
    ours = []
    for name, reason in r2kernels.backends().items():
        if name == "reference" or (name == "cpu") != (case.device == "cpu"):
            continue
        if reason is None:
            reason = _unusable(name, inputs[0])
        if reason is not None:
            absent[name] = reason
            continue
        ours.append(name)
        # The first is the default, and is used as a user would: without choosing it.
        active = functools.partial(use_backend, name) if ours[1:] else contextlib.nullcontext
        found[name] = (
            _regularizer(case, active) if case.work == ACCUMULATE else _loss(case, getattr(r2kernels, function), active)
        )
    if ours and case.device == "cuda" and case.work != BACKWARD:
        try:
            found["CUDA graph"] = _graph(found[ours[0]], inputs)
        except RuntimeError as error:
            absent["CUDA graph"] = line(error)
    return found, absent


def _unusable(name, inputs):
    try:
        with use_backend(name):
            r2kernels.l_inf(inputs.weights[-1].detach())
    except Exception as error:
        return line(error)


def line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@functools.lru_cache(maxsize=1)
def _compiled(function, *_):
    torch._dynamo.reset()
    gc.collect()
    return torch.compile(getattr(reference, function), fullgraph=True, dynamic=False)


def _total(loss):
    return loss.sum() if loss.dim() else loss


def _prepare(case):
    return Inputs.some_gradients if case.work == ACCUMULATE else Inputs.no_gradients


def _loss(case, function, active=contextlib.nullcontext):
    """A loss through autograd."""
    prepare = _prepare(case)
    if case.work == FORWARD:

        def context():
            stack = contextlib.ExitStack()
            stack.enter_context(torch.no_grad())
            stack.enter_context(active())
            return stack

        return Contender(lambda inputs: function(inputs.W, **inputs.arguments), prepare, context)
    if case.work == BACKWARD:
        graphs = {}

        def backward(inputs):
            if id(inputs) not in graphs:
                graphs[id(inputs)] = _total(function(inputs.W, **inputs.arguments))
            graphs[id(inputs)].backward(retain_graph=True)

        return Contender(backward, prepare, active)

    def both(inputs):
        loss = _total(function(inputs.W, **inputs.arguments))
        loss.backward()
        return loss

    return Contender(both, prepare, active)


def _regularizer(case, active):
    return Contender(lambda inputs: inputs.regularizer.accumulate_grad_(), _prepare(case), active)


def in_std(inputs):
    """The default backend's accumulate_grad_ with alpha in units of the deviation, which adds the same as the one that
    is given alpha over the deviation; AssertionError where it does not."""
    model, value = nn.ParameterList(inputs.weights), inputs.op.value
    alphas = (value / sampled_std(inputs.weights)).tolist()
    given = dict(learn=False, include="*")
    raw = RangeRegularizer(model, weight=1.0, alpha=alphas, **given)
    own = RangeRegularizer(model, weight=1.0, alpha=value, alpha_unit="std", **given)
    inputs.zero_gradients()
    raw.accumulate_grad_()
    expected = [w.grad.clone() for w in inputs.weights]
    inputs.zero_gradients()
    own.accumulate_grad_()
    torch.testing.assert_close([w.grad for w in inputs.weights], expected)
    return Contender(lambda _: own.accumulate_grad_(), Inputs.some_gradients, contextlib.nullcontext)


def _graph(contender, inputs):
    """The call of the default backend as the replay of a CUDA graph."""
    graphs = {}
    for one in inputs:
        with contender.active():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    contender.prepare(one)
                    contender.call(one)
            torch.cuda.current_stream().wait_stream(side)
            contender.prepare(one)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = contender.call(one)
        # What the replay writes: the same memory every time.
        graphs[id(one)] = graph, result, [w.grad for w in one.weights], one.parameter.grad if one.learn else None

    def call(one):
        graph, result, gradients, own = graphs[id(one)]
        graph.replay()
        return Replayed(result, gradients, own)

    return Contender(call, contender.prepare, contender.active)


class Replayed(NamedTuple):
    loss: torch.Tensor
    gradients: list
    own: torch.Tensor | None


def floors(case):
    """Ways to do nothing but move the bytes that must move; the quickest of them is the floor."""

    def fused_read(ws):
        return torch._foreach_max(ws)

    def plain_read(ws):
        return [w.sum() for w in ws]

    def fused_write(ws):
        return torch._foreach_mul(ws, 1.5)

    def plain_write(ws):
        return [w.clone() for w in ws]

    def add(inputs):
        torch._foreach_add_([w.grad for w in inputs.weights], inputs.weights)

    def of(read, write):
        call = {
            FORWARD: lambda inputs: read(inputs.weights),
            BOTH: lambda inputs: (read(inputs.weights), write(inputs.weights)),
            ACCUMULATE: lambda inputs: (read(inputs.weights), add(inputs)),
            BACKWARD: lambda inputs: write(inputs.weights),
        }[case.work]
        return Contender(call, _prepare(case), torch.no_grad)

    return {"fused": of(fused_read, fused_write), "plain": of(plain_read, plain_write)}


def copy(case, inputs):
    """Copies every weight once into memory that exists: moves `2 * inputs.bytes`."""
    flats = {id(one): torch.cat([w.detach().reshape(-1) for w in one.weights]) for one in inputs}
    targets = {key: torch.empty_like(flat) for key, flat in flats.items()}
    return Contender(lambda one: targets[id(one)].copy_(flats[id(one)]), _prepare(case), torch.no_grad)


def check(case, inputs, found):
    """name -> what is wrong with its numbers, for every contender that errs by more than twice the eager reference plus
    one ulp (tests/budget.py)."""
    pools = {name: budget.Pool() for name in found}
    for seed, exact, scale in _truths(case._replace(work="")):
        inputs.fill(seed)
        for name, contender in found.items():
            with contender.active():
                result = _outcome(case, inputs, contender, exact)
            pools[name].add(
                budget.errors(
                    result, exact if case.op.learn and case.work != FORWARD else exact._replace(parameter=None), scale
                )
            )
    inputs.fill(0)
    allowed = budget.limits(pools["eager"].rms(), case.dtype)
    wrong = {}
    for name, pool in pools.items():
        over = [
            f"{what} errs by {rms:.2g}, allowed is {allowed[what]:.2g}"
            for what, rms in pool.rms().items()
            if not rms <= allowed[what]
        ]
        if over:
            wrong[name] = "; ".join(over)
    return wrong


def _seeds(case):
    """Enough draws to pool over: the loss of one tensor is one number, which the reference may meet by luck."""
    if len(cases.MODELS[case.shape]()) > 1:
        return (0,)
    return range(3) if cases.MODELS[case.shape]()[0][0] > 1e6 else range(16)


@functools.lru_cache(maxsize=1)
def _truths(case):
    """[(seed, the result in float64, the natural scale of each quantity)]"""
    truths, inputs = [], Inputs(case)
    shape = () if inputs.single else (len(inputs.weights),)
    for seed in _seeds(case):
        inputs.fill(seed)
        parameter = None if inputs.parameter is None else inputs.parameter.detach().reshape(shape)
        ones = torch.ones(shape, device=inputs.device)
        exact, scale = budget.truth(
            budget.Draw(inputs.op, [w.detach() for w in inputs.weights], parameter, ones, single=inputs.single)
        )
        truths.append((seed, exact, scale))
    return truths


def _outcome(case, inputs, contender, exact):
    """What a contender computed. Adding twice into zeros gives twice the gradient, exactly."""
    twice = case.work == ACCUMULATE
    inputs.zero_gradients() if twice else inputs.no_gradients()
    if not twice:
        contender.prepare(inputs)
    for _ in range(2 if twice else 1):
        result = contender.call(inputs)
    gradients, own = [w.grad for w in inputs.weights], inputs.parameter.grad if inputs.learn else None
    if isinstance(result, Replayed):
        result, gradients, own = result.loss, gradients if twice else result.gradients, own if twice else result.own
    if case.work == FORWARD:
        return budget.Result(result, exact.weights, None)
    # The sum of the losses: its error, shared out. A backward alone has none.
    loss = (
        exact.loss if result is None else exact.loss + (result.detach() - exact.loss.sum()) / max(exact.loss.numel(), 1)
    )
    factor = 0.5 if twice else 1
    return budget.Result(
        loss, [g * factor for g in gradients], None if own is None else own.reshape(exact.loss.shape) * factor
    )
