"""What the demo prints, draws and writes of its `DemoResult`."""

import statistics

from . import demo
from .console import count, number, table
from .report import figure, histogram


def mean_accuracy(result, case, bits):
    """The mean over the seeds, on weights of so many bits."""
    return statistics.fmean(one.accuracy[bits] for one in result.trained[case])


def _mean_layers(result, case, field):
    """The mean over the seeds, for every layer."""
    seeds = (getattr(one, field) for one in result.trained[case])
    return [statistics.fmean(values) for values in zip(*seeds, strict=True)]


def tables(result):
    """What to print: rich tables and lines."""
    cases = list(result.trained)
    ranges = {case: _mean_layers(result, case, "ranges") for case in cases}
    stds = {case: _mean_layers(result, case, "stds") for case in cases}
    rows = [(name, *(number(ranges[case][i]) for case in cases)) for i, name in enumerate(result.layers)]
    mean = ("mean", *(number(statistics.fmean(ranges[case])) for case in cases))
    yield table(("layer", *cases), rows, mean, title="range (max - min) of the weights after training")
    yield ""
    widths = ("fp32" if bits == 32 else f"{bits} bit" for bits in demo.BITS)
    yield table(
        ("loss", "weight", *widths, "mean range", "mean std", "alpha or M at the end"),
        [
            (
                case.name,
                f"{case.options['weight']:g}" if case.options else "-",
                *(f"{mean_accuracy(result, case.name, bits):.3f}" for bits in demo.BITS),
                number(statistics.fmean(ranges[case.name])),
                number(statistics.fmean(stds[case.name])),
                _parameter_range(result, case.name),
            )
            for case in demo.CASES
        ],
        title="test accuracy, all weights rounded by min-max",
    )
    yield verdict(result)
    steps = demo.TRAIN // demo.BATCH * result.setting["epochs"]
    yield (
        "a learned alpha starts at the paper's 0.1, where the loss is nearly flat (1 + 2 alpha Var); "
        f"{steps} steps take it to the value shown"
    )
    yield ""
    yield from _clustered_table(result)
    yield ""
    rows = [
        (case, f"{s.fused:.3f}", f"{s.eager:.3f}", f"{s.eager / s.fused:.1f}", f"{s.difference:.0e}")
        for case, s in result.speed.items()
    ]
    measured = f"{len(result.layers)} weights: median of {demo.TIMED_CALLS} calls"
    yield table(
        ("loss", "fused, ms", "eager, ms", "eager / fused", "gradients differ by"),
        rows,
        title=f"regularizer, forward and backward over {measured}",
    )
    setting = result.setting
    yield f"fused ran on backend {setting['backend']}, eager is plain PyTorch with autograd; {setting['device']}"
    yield f"{count(setting['seeds'], 'seed')}, {count(setting['epochs'], 'epoch')}, {setting['seconds']:.0f} s"


def _clustered_table(result):
    names = [f"{bits}/{d}" for bits, d in demo.PALETTES]
    rows = [(case, *(f"{one.accuracy:.3f}" for one in found)) for case, found in result.clustered.items()]
    first = result.clustered[demo.CASES[0].name]
    sizes = [
        (f"KB, {what}", *(f"{getattr(one, field) / 1e3:.1f}" for one in first))
        for what, field in (("packed", "packed"), ("entropy-coded", "coded"))
    ]
    epochs = count(demo.PALETTE_EPOCHS, "epoch")
    title = f"test accuracy after {epochs} of DKM, bits / cluster_dim, all weights on hard codes"
    yield table(("loss", *names), [*rows, *sizes], title=title)
    dense = f"{first[0].dense / 1e3:.0f} KB in float32"
    yield f"weights are {dense}; sizes are those without R2, tables of centroids included"


def verdict(result):
    """One line: whether the losses did in this run what they are for."""
    none, *others = (mean_accuracy(result, case.name, 2) for case in demo.CASES)
    line = f"2 bit: {none:.3f} without R2, {min(others):.3f} to {max(others):.3f} with"
    missed = [case.name for case, value in zip(demo.CASES[1:], others, strict=True) if value <= none]
    return f"{line}; in this run no gain from {', '.join(missed)}" if missed else line


def _parameter_range(result, case):
    found = [value for one in result.trained[case] for value in one.parameter or []]
    return f"{min(found):.2f} to {max(found):.2f}" if found else "-"


def as_json(result):
    """The result as plain data, without the weights."""

    def plain(case):
        speed = result.speed.get(case.name)
        clustered = zip(demo.PALETTES, result.clustered[case.name], strict=True)
        found = {f"{bits}/{d}": one._asdict() for (bits, d), one in clustered}
        seeds = [one._asdict() for one in result.trained[case.name]]
        return {"loss": case.options, "seeds": seeds, "clustered": found, "milliseconds": speed and speed._asdict()}

    return {**result.setting, "layers": result.layers, "cases": {case.name: plain(case) for case in demo.CASES}}


def histograms(result, most=3):
    """Figure 2: a row for each of the `most` layers with the largest range without R2, a column for each case.

    One scale of weights in a row.
    """
    plain = result.weights[demo.CASES[0].name]
    widest = sorted(sorted(range(len(plain)), key=lambda i: plain[i].max() - plain[i].min())[-most:])
    panels = []
    for i in widest:
        layer = {case: weights[i] for case, weights in result.weights.items()}
        low, high = min(w.min().item() for w in layer.values()), max(w.max().item() for w in layer.values())
        for case, w in layer.items():
            name = f"{case}\n{result.layers[i]}: range {w.max() - w.min():.2f}"
            panels.append((name, (low, high), histogram(w, low, high)))
    drawn = f"the {len(widest)} of {len(plain)} layers with the largest range without"
    return figure(f"Weights after training without and with R2: {drawn}", panels, columns=len(demo.CASES))
