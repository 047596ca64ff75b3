"""The commands: each is a function of its parsed arguments, and a row of `COMMANDS`."""

import json
import platform

import torch

from .. import __version__
from ..backends import backends, select, versions
from . import arguments
from .console import count, print_json, progress, show, table
from .outputs import BadInput, checkpoint_path, figure_path, output_path, save_figure, writable, write


def run_info(args):
    found = {"r2kernels": __version__, "python": platform.python_version(), **versions()}
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_name(i) for i in range(count)]
    usable = backends()
    if args.json:
        return print_json({"versions": found, "backends": usable, "gpus": gpus})
    show(table(("", "version"), [(name, version or "not installed") for name, version in found.items()], left=2))
    show(table(("backend", "state"), [(name, reason or "usable") for name, reason in usable.items()], left=2))
    show(f"GPU: {', '.join(gpus) or 'none'}")


def run_report(args):
    from ..files.loading import opened
    from . import report

    if args.sizes:
        return _sizes(args)
    plot = args.plot and figure_path(args.plot, args.force)
    _check_backend(torch.device("cpu"))
    checkpoint = opened(args.checkpoint, args.key)
    with progress("reading weights", sum(entry.numel for entry in checkpoint.weights), quiet=args.json) as advance:
        rows = list(report.layers(checkpoint, histograms=bool(plot), advance=advance))
    if plot:
        save_figure(report.layer_figure(rows, checkpoint.path.name), plot, args.force)
    if args.json:
        return print_json(report.as_json(checkpoint, rows))
    show(report.layer_table(rows))
    show(report.summary(checkpoint, rows))
    for line in report.unread_lines(checkpoint.unread):
        show(line)
    if plot:
        show(f"histograms: {plot}")


def _sizes(args):
    from ..files.loading import opened
    from . import sizes

    if args.plot:
        raise BadInput("--plot draws no sizes")
    _check_backend(torch.device("cpu"))
    checkpoint = opened(args.checkpoint, args.key)
    with progress("clustering weights", sum(entry.numel for entry in checkpoint.weights), quiet=args.json) as advance:
        found = sizes.measure(checkpoint, ends=args.ends, advance=advance)
    if args.json:
        return print_json({"checkpoint": args.checkpoint, "unread": checkpoint.unread, **found})
    show(sizes.size_table(found))
    for line in sizes.size_lines(checkpoint, found):
        show(line)


def run_compress(args):
    from ..files.clustered import Form
    from ..files.tiles import check_granularity
    from . import compress

    try:
        check_granularity(args.granularity, args.group_size, args.checkpoint)
    except ValueError as error:
        raise BadInput(str(error)) from None
    for option in ("cluster_dim", "layout", "group_size", "granularity", "per_channel_scale", "lut_dtype"):
        if args.budget is not None and getattr(args, option) != Form._field_defaults[option]:
            raise BadInput(f"--budget chooses how weights are clustered; --{option.replace('_', '-')} says it too")
    options = {"preserve_zeros": args.preserve_zeros, "importance": args.importance, "budget": args.budget}
    _code(args, "clustering weights", compress.compress, Form.of(args), options, entropy=args.entropy)


def run_quantize(args):
    from ..files.uniform import Grid
    from . import compress

    options = {"method": args.method, "symmetric": not args.asymmetric}
    _code(args, "quantizing weights", compress.quantize, Grid(args.bits, args.axis), options)


def _code(args, doing, work, form, options, entropy=None):
    """Writes a checkpoint with its weights as codes, and says what that costs."""
    from ..files.loading import opened
    from . import report, results, shards

    folder = args.shard_size or args.out.endswith(shards.SLASHES)
    out = shards.folder_path(args.out) if folder else checkpoint_path(args.out, args.force, (".safetensors", "FOLDER/"))
    plot = args.plot and figure_path(args.plot, args.force)
    _check_backend(torch.device("cpu"))
    checkpoint = opened(args.checkpoint, args.key)
    total = sum(entry.nbytes for entry in checkpoint.entries if entry.name not in checkpoint.aliases)
    total *= 1 + (options.get("budget") is not None)
    with progress(doing, total, quiet=args.json, in_bytes=True) as advance, writable(out):
        result = work(
            checkpoint,
            out,
            form,
            **options,
            skip=args.skip,
            entropy=entropy,
            overwrite=args.force,
            plot=bool(plot),
            jobs=args.jobs,
            resume=args.resume,
            shard_size=(args.shard_size or shards.MOST) if folder else None,
            advance=advance,
        )
    if plot:
        save_figure(results.result_figure(result, checkpoint.path.name), plot, args.force)
    if args.json:
        found = results.result_json(result, checkpoint, out, form, **options, entropy=entropy)
        return print_json(report.finite(found))
    show(results.result_table(result))
    for line in results.result_lines(result, out) + [f"histograms: {plot}"] * bool(plot):
        show(line)


def run_expand(args):
    from ..files.loading import palettized
    from . import expand, results, shards

    folder = args.shard_size or args.out.endswith(shards.SLASHES)
    allowed = *expand.SUFFIXES, "FOLDER/"
    out = shards.folder_path(args.out) if folder else checkpoint_path(args.out, args.force, allowed)
    with palettized(args.file) as file:
        total = sum(entry.nbytes for entry in file.entries)
        with progress("decoding weights", total, quiet=args.json, in_bytes=True) as advance, writable(out):
            if folder:
                size, files = shards.expand(file, out, args.shard_size or shards.MOST, advance=advance)
            else:
                size, files = expand.expand(file, out, overwrite=args.force, advance=advance), None
        tensors = len(file.entries)
    if args.json:
        found = {"file": args.file, "out": str(out), "tensors": tensors, "bytes": size}
        return print_json(found | ({"files": files} if folder else {}))
    places = f" in {count(len(files), 'file')}" if folder else ""
    show(f"{out}: {tensors} tensors{places}, {results.size_text(size)}")


def run_demo(args):
    from . import demo, demo_results, report

    plot = figure_path(args.out or arguments.DEMO_PLOT, args.force or not args.out)
    data = args.json and output_path(args.json, args.force)
    if data == plot:
        raise BadInput(f"{plot}: --out and --json are the same file")
    _check_backend(demo.default_device())
    with progress("training", demo.steps(args.seeds, args.epochs)) as advance:
        result = demo.run(seeds=args.seeds, epochs=args.epochs, advance=advance)
    for part in demo_results.tables(result):
        show(part)
    save_figure(demo_results.histograms(result), plot, args.force or not args.out)
    show(f"histograms: {plot}")
    if data:
        found = report.finite(demo_results.as_json(result))
        write(data, json.dumps(found, indent=2, allow_nan=False).encode(), args.force)
        show(f"results: {data}")


def _check_backend(device):
    """A backend chosen by R2KERNELS_BACKEND that cannot be used is bad input."""
    try:
        select(device)
    except (ValueError, RuntimeError) as error:
        raise BadInput(str(error)) from error


# name -> (function, function that adds its arguments, help)
COMMANDS = {
    "info": (run_info, arguments.info, "versions, and which backends are usable or why not"),
    "report": (run_report, arguments.report, "range, std and kurtosis of every weight of a checkpoint"),
    "compress": (
        run_compress,
        arguments.compress,
        "cluster the weights of a checkpoint by k-means and write them as codes and look-up tables",
    ),
    "quantize": (
        run_quantize,
        arguments.quantize,
        "quantize the weights of a checkpoint and write them as packed integer codes",
    ),
    "expand": (run_expand, arguments.expand, "write the dense checkpoint of a palettized or quantized file"),
    "demo": (
        run_demo,
        arguments.demo,
        "train a small network with and without the range losses and round its weights to 4, 3 and 2 bits",
    ),
}
