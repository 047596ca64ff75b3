"""The cases of DKM's benchmark: who clusters what, and how far each is from the truth."""

import functools
import gc
from typing import NamedTuple

import cases
import peers
import torch
from measure import Contender
from torch.utils.checkpoint import checkpoint

import r2kernels
from r2kernels import reference, use_backend
from r2kernels.reference.dkm import attention, iterate

ITERATIONS = 5
CHECKED = 40_000  # weights on which the numbers of every contender are compared with float64
DKM, ASSIGN, KMEANS, STEP = "dkm", "assign", "kmeans", "step"


class Case(NamedTuple):
    weights: int | str  # a number of them, or a model's name
    clusters: int
    d: int = 1
    metric: str = "euclidean"
    dtype: torch.dtype = torch.float32
    work: str = DKM
    peers: tuple = ()  # contenders beside ours
    device: str = "cpu"

    @property
    def table(self):
        what = {
            DKM: f"forward + backward, T = {ITERATIONS}",
            ASSIGN: "hard assignment",
            KMEANS: "k-means",
            STEP: f"Palettizer's step, T = {ITERATIONS}",
        }[self.work]
        dtype = "" if self.dtype == torch.float32 else f", {str(self.dtype).removeprefix('torch.')}"
        return f"{what}, {'scalars' if self.d == 1 else f'rows of {self.d}'}, {self.metric}{dtype}"

    @property
    def label(self):
        count = self.weights if isinstance(self.weights, str) else f"{self.weights:,}"
        return f"{count}, K = {self.clusters}"


class Inputs:
    """Weights with sigma = 0.05, centroids from `kmeans` of a part of them, a temperature of a quarter of their mean
    distance, a gradient of W_hat."""

    def __init__(self, case, count=None):
        g = torch.Generator().manual_seed(0)
        if isinstance(case.weights, str) and count is None:
            ws = cases.model_weights(case.weights, torch.float32)
        else:
            n = min(count or case.weights, case.weights if isinstance(case.weights, int) else count)
            ws = [torch.randn(n // 64, 64, generator=g) * 0.05]
        self.device, self.case = torch.device(case.device), case
        self.weights = [torch.nn.Parameter(w.to(case.dtype).to(self.device)) for w in ws]
        self.gradients = [torch.randn(w.shape, generator=g).to(case.dtype).to(self.device) for w in ws]
        self.bytes = sum(w.nbytes for w in self.weights)
        self.numel = sum(w.numel() for w in self.weights)
        part = self.weights[-1].detach().float()[:1000]
        start = r2kernels.kmeans(part, case.clusters, cluster_dim=case.d)
        self.centroids = [start.clone() for _ in self.weights]
        spacing = (
            (start[1:] - start[:-1]).norm(dim=-1).mean()
            if case.d > 1
            else (start[-1] - start[0]) / max(case.clusters - 1, 1)
        )
        self.tau = max(spacing.item() if case.clusters > 1 else 0.05, 1e-3) / 4
        if case.metric == "sqeuclidean":
            self.tau = self.tau**2

    @functools.cached_property
    def model(self):
        """A model of layers with these weights under a Palettizer; gives the weights that its layers compute with."""
        model = Layers(self.weights)
        r2kernels.Palettizer(
            model,
            self.case.clusters.bit_length() - 1,
            cluster_dim=self.case.d,
            metric=self.case.metric,
            iterations=ITERATIONS,
        )
        return model.train()

    def double(self):
        """The same numbers in float64."""
        wide = Inputs.__new__(Inputs)
        wide.__dict__.update(self.__dict__)
        wide.weights = [w.detach().double().requires_grad_() for w in self.weights]
        wide.gradients, wide.centroids = [g.double() for g in self.gradients], [c.double() for c in self.centroids]
        return wide

    def no_gradients(self):
        for w in self.weights:
            w.grad = None


class Layers(torch.nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.layers = torch.nn.ModuleList()
        for w in weights:
            made = torch.nn.Linear(1, 1, bias=False) if w.dim() == 2 else torch.nn.Conv2d(1, 1, 1, bias=False)
            made.weight = w
            self.layers.append(made)

    def forward(self):
        return [layer.weight for layer in self.layers]


def _through(cluster):
    """Forward and backward of cluster(w, c, tau, case) for each weight."""

    def call(inputs):
        outputs = [
            cluster(w, c, inputs.tau, inputs.case) for w, c in zip(inputs.weights, inputs.centroids, strict=True)
        ]
        torch.autograd.backward(outputs, inputs.gradients)
        return outputs

    return call


def _eager(w, c, tau, case):
    return reference.dkm(w, c, tau, iterations=ITERATIONS, metric=case.metric, cluster_dim=case.d)[0]


def _checkpointed(w, c, tau, case):
    """Eager that keeps no attention: every iteration is computed again in backward."""
    rows, tau = reference.columns(w, case.d).t(), torch.tensor(tau)
    c = c.reshape(-1, case.d)

    def last(x, c):
        a, _, c = iterate(x, c, tau, case.metric)
        return a @ c

    for _ in range(ITERATIONS - 1):
        c = checkpoint(lambda x, c: iterate(x, c, tau, case.metric)[2], rows, c, use_reentrant=False)
    return reference.from_columns(checkpoint(last, rows, c, use_reentrant=False).t(), w, case.d)


def _peer(w, c, tau, case):
    return peers.palettizer(w, c, tau, ITERATIONS, case.d)(w)


def _ours(inputs):
    case = inputs.case
    outputs, _ = r2kernels.dkm(
        inputs.weights, inputs.centroids, inputs.tau, iterations=ITERATIONS, metric=case.metric, cluster_dim=case.d
    )
    torch.autograd.backward(outputs, inputs.gradients)
    return outputs


@functools.lru_cache(maxsize=1)
def _compiled(*_):
    torch._dynamo.reset()
    gc.collect()
    return torch.compile(_eager, fullgraph=True, dynamic=False)


def _eager_assign(inputs):
    """In blocks of rows, as little memory as the fused kernel has."""
    codes = []
    with torch.no_grad():
        for w, c in zip(inputs.weights, inputs.centroids, strict=True):
            rows, c = reference.columns(w, inputs.case.d).t(), c.reshape(-1, inputs.case.d)
            codes.append(torch.cat([torch.cdist(x, c).argmin(1) for x in rows.split(max(2**22 // len(c), 1))]))
    return codes


def _sklearn(inputs):
    from sklearn.cluster import KMeans

    rows = reference.columns(inputs.weights[0].detach(), inputs.case.d).t().cpu()
    return torch.from_numpy(KMeans(inputs.case.clusters, n_init=1, random_state=0).fit(rows.numpy()).cluster_centers_)


def _peer_kmeans(inputs):
    made = peers.palettizer(inputs.weights[0], None, inputs.tau, 1, inputs.case.d, clusters=inputs.case.clusters)
    made.init_partitions(inputs.weights[0].detach())
    return made.centroids[0]


CALLS = {
    DKM: {
        "eager": _through(_eager),
        "torch.compile": lambda inputs: _through(_compiled(inputs.case))(inputs),
        "checkpointing": _through(_checkpointed),
        "coremltools": _through(_peer),
    },
    ASSIGN: {"eager": _eager_assign},
    STEP: {"coremltools": _through(_peer)},
    KMEANS: {"scikit-learn": _sklearn, "coremltools": _peer_kmeans},
}


def _step(inputs):
    outputs = inputs.model()
    torch.autograd.backward(outputs, inputs.gradients)
    return outputs


def _call(work):
    if work in (DKM, STEP):
        return _ours if work == DKM else _step
    if work == ASSIGN:
        return lambda inputs: r2kernels.assign(inputs.weights, inputs.centroids, cluster_dim=inputs.case.d)
    return lambda inputs: r2kernels.kmeans(inputs.weights[0], inputs.case.clusters, cluster_dim=inputs.case.d)


def contenders(case):
    """(name -> Contender, name -> why it is absent); ours come first, the default at the top."""
    found, absent = {}, {}
    for name, reason in r2kernels.backends().items():
        if name == "reference" or (name == "cpu") != (case.device == "cpu"):
            continue
        if reason is None:
            found[name] = Contender(_call(case.work), Inputs.no_gradients, functools.partial(use_backend, name))
        else:
            absent[name] = reason
    for name in case.peers:
        if name == "coremltools":
            try:
                peers.load()
            except ImportError as error:
                absent[name] = f"ImportError: {error}"
                continue
        found[name] = Contender(CALLS[case.work][name], Inputs.no_gradients)
    return found, absent


def saved_bytes(contender, inputs):
    """Bytes that a forward keeps for its backward, per weight."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with contender.active(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        contender.prepare(inputs)
        contender.call(inputs)
    return sum(storages.values()) / inputs.numel


def errors(case, found):
    """name -> (RMS error of W_hat, of dL/dW) against float64, relative to the RMS of W and of dL/dW, on CHECKED
    weights."""
    inputs = Inputs(case, CHECKED)
    wide = inputs.double()
    exact = _rows(_through(_eager), wide)
    _, scale = (x.square().mean().sqrt() for x in exact)
    measured = {}
    for name, contender in found.items():
        with contender.active():
            result = _rows(contender.call, inputs)
        size = wide.weights[0].detach().square().mean().sqrt(), scale
        measured[name] = [
            ((a.double() - b).square().mean().sqrt() / s).item() for a, b, s in zip(result, exact, size, strict=True)
        ]
    return measured


def _rows(call, inputs):
    inputs.no_gradients()
    output = call(inputs)[0]
    return output.detach(), inputs.weights[0].grad


@functools.lru_cache(maxsize=4)
def attention_unit(case):
    """How sharp the case is: the mean largest attention of a weight at its start."""
    inputs = Inputs(case, CHECKED)
    rows = reference.columns(inputs.weights[0].detach(), case.d).t()
    return (
        attention(rows, inputs.centroids[0].reshape(-1, case.d), torch.tensor(inputs.tau), case.metric)
        .amax(1)
        .mean()
        .item()
    )
