"""coremltools' differentiable k-means (`FakePalettize`), brought to the inputs and outputs of `r2kernels.dkm`.

Also used by the benchmarks.
"""

import contextlib
import io
import logging

import torch

FLOOR = 1e-7  # coremltools clamps attention from below at this, without normalising again


def load():
    """The class, without what its import prints about other packages.

    ImportError where coremltools is not installed.
    """
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        from coremltools.optimize.torch.palettization import FakePalettize
    return FakePalettize


def palettizer(w, centroids, tau, iterations, cluster_dim=1, floor=FLOOR, clusters=None):
    """A FakePalettize in training that starts from `centroids`.

    Where they are None it starts from its own initialisation of `clusters`. It always takes all `iterations` (on its
    own it stops early where the inertia moves less than epsilon), and has no -1e-7 on the distance to the first
    centroid.
    """
    bits = (clusters or len(centroids)).bit_length() - 1
    made = load()(
        observer=torch.ao.quantization.MovingAverageMinMaxObserver,
        dtype=torch.qint8,
        n_bits=bits,
        cluster_dim=cluster_dim,
        advanced_options={
            "palett_tau": tau,
            "kmeans_max_iter": iterations,
            "palett_epsilon": -1.0,
            "prune_threshold": 0.0,
            "zero_threshold": floor,
        },
    )
    made.enable_fake_palett()
    made.train()
    made.create_partitions(w.detach())
    if centroids is not None:
        made.centroids = [centroids.detach().reshape(-1, cluster_dim).clone()]
    return made
