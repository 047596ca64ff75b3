"""The cases of the benchmark of k-means: groups of single numbers, who clusters them, how well, and at what cost."""

import contextlib
import time
from typing import NamedTuple

import torch

import r2kernels

CUT, ROWS, TILES, AGAINST_N, AGAINST_K, AGAINST_GROUPS, MEMORY = (
    "the same 2,097,152 weights cut into groups",
    "rows of 4,096 weights",
    "tiles of 512 weights",
    "one group, cost against N",
    "rows of 4,096 weights, cost against K",
    "tiles of 512 weights, cost against groups",
    "memory",
)
ITERATIONS = 100


class GroupsCase(NamedTuple):
    table: str
    groups: int
    n: int
    clusters: int
    dtype: torch.dtype = torch.float32
    peers: tuple = ()  # (contender, how many of the groups it is given)

    @property
    def label(self):
        return f"{self.groups:,} x {self.n:,}, K = {self.clusters}, {str(self.dtype).removeprefix('torch.')}"

    def weights(self):
        """(groups, n) normal numbers with sigma 0.02, and one in 4,096 eight times as large."""
        w = torch.randn(self.groups, self.n, generator=torch.Generator().manual_seed(0)) * 0.02
        w.view(-1)[::4096] *= 8
        return w.to(self.dtype)


def ours(w, clusters):
    return torch.stack(r2kernels.kmeans(list(w.unbind()), clusters))


def scikit_learn(restarts):
    def run(w, clusters):
        from sklearn.cluster import KMeans

        models = [KMeans(clusters, n_init=restarts, random_state=0).fit(x[:, None]) for x in w.float().numpy()]
        return torch.stack([torch.from_numpy(model.cluster_centers_[:, 0]) for model in models])

    return run


def coremltools(w, clusters):
    """What its palettization after training calls for a weight of float16: the exact programme on distinct values."""
    from coremltools.models.neural_network.quantization_utils import _get_kmeans_lookup_table_and_weight as palettize

    bits = clusters.bit_length() - 1
    return torch.stack([torch.from_numpy(palettize(bits, x, force_kmeans1d=True)[0]) for x in w.float().numpy()])


def flash_formula(w, clusters):
    """The formula of flash-kmeans in eager PyTorch: distances by a product of matrices, argmin, means by a scatter, for
    all groups at once, from random rows."""
    x = w.float()[..., None]
    order = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(0)).argsort(1)[:, :clusters]
    c = x.gather(1, order[..., None])
    for _ in range(ITERATIONS):
        code = ((c * c).sum(-1)[:, None] - 2 * x @ c.transpose(1, 2)).argmin(-1)
        count = torch.zeros(c.shape[:2]).scatter_add_(1, code, torch.ones_like(x[..., 0]))
        total = torch.zeros(c.shape[:2]).scatter_add_(1, code, x[..., 0])
        new = torch.where(count > 0, total / count, c[..., 0])[..., None]
        if torch.equal(new, c):
            break
        c = new
    return c[..., 0]


def faiss(w, clusters):
    import faiss

    found = []
    for x in w.float().numpy():
        made = faiss.Kmeans(1, clusters, niter=25, seed=0, max_points_per_centroid=len(x))
        made.train(x[:, None])
        found.append(torch.from_numpy(made.centroids[:, 0].copy()))
    return torch.stack(found)


CONTENDERS = {
    "r2kernels": ours,
    "scikit-learn, 10 restarts": scikit_learn(10),
    "scikit-learn": scikit_learn(1),
    "coremltools": coremltools,
    "flash-kmeans' formula": flash_formula,
    "faiss": faiss,
}


def inertia(w, centroids):
    """(groups,) in float64."""
    found = []
    for x, c in zip(w.double(), centroids.double().sort(1).values, strict=True):
        at = torch.searchsorted((c[1:] + c[:-1]) / 2, x)
        found.append((x - c[at]).square().sum())
    return torch.stack(found)


def timed(call, *args):
    """(seconds, CPU seconds of all threads, what it gives)"""
    wall, cpu = time.perf_counter(), time.process_time()
    found = call(*args)
    return time.perf_counter() - wall, time.process_time() - cpu, found


def resident(field):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def peak_beyond(call, *args):
    """Most resident memory during a call beyond that before it, in bytes: of all allocators."""
    with contextlib.suppress(OSError):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak is what is resident now
        before = resident("VmRSS")
        call(*args)
        return resident("VmHWM") - before
    return None
