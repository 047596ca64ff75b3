"""The command line `r2kernels`. A command is one function and one parser, listed in `COMMANDS`.

Exit codes: 0; 1 where the work fails or the output is cut off; 2, with one line on stderr, for bad input or a missing package; 130 for Ctrl-C.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import sys
import warnings
from pathlib import Path

import torch

from .. import __version__
from ..backends import backends, select, versions
from ..files.checkpoint import CheckpointError
from ..reference.checks import LAYOUTS

EXTRAS = ("matplotlib", "rich", "safetensors", "sklearn")
DEMO_PLOT = "r2kernels_demo.png"


class BadInput(Exception):
    """What the user asked for cannot be done. One line."""


def main(argv=None):
    """Runs one command and returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"r2kernels: warning: {message}", file=sys.stderr)
            args.run(args)
        sys.stdout.flush()
    except (BadInput, CheckpointError) as error:
        return _fail(error)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        return _fail(f"this command needs {error.name}, which is not installed: pip install 'r2kernels[cli]'")
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit is quiet too
        return 1
    return 0


def _fail(message, code=2):
    print("r2kernels:", " ".join(str(message).split()), file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser():
    parser = _Parser(prog="r2kernels", description="Fused range losses for models that quantize and compress well.")
    parser.add_argument("--version", action="version", version=f"r2kernels {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (run, fill, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.set_defaults(run=run)
        fill(command)
    return parser


def _info_arguments(parser):
    parser.add_argument("--json", action="store_true", help="print JSON")


def _info(args):
    found = {"r2kernels": __version__, "python": platform.python_version(), **versions()}
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    usable = backends()
    if args.json:
        return _print_json({"versions": found, "backends": usable, "gpus": gpus})
    from .report import table

    _print(table(("", "version"), [(name, version or "not installed") for name, version in found.items()], left=2))
    _print(table(("backend", "state"), [(name, reason or "usable") for name, reason in usable.items()], left=2))
    _print(f"GPU: {', '.join(gpus) or 'none'}")


def _report_arguments(parser):
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help=".safetensors, .pt or .pth; a nested state_dict or model is found"
    )
    parser.add_argument("--plot", metavar="FILE", help="write histograms of the weights (.png, .pdf, .svg, ...)")
    parser.add_argument(
        "--sizes",
        action="store_true",
        help="print what it would take at 4, 2 and 1 bits instead, with and without first and last layers",
    )
    parser.add_argument(
        "--ends",
        metavar="PATTERN",
        nargs="+",
        action="extend",
        default=[],
        help="names of the first and last layers (default: first, last)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON; a number that is not finite is null")
    _add_force(parser)


def _report(args):
    from ..files.loading import opened
    from . import report

    if args.sizes:
        return _sizes(args)
    plot = args.plot and _figure_path(args.plot, args.force)
    _check_backend(torch.device("cpu"))
    checkpoint = opened(args.checkpoint)
    with _progress("reading weights", sum(entry.numel for entry in checkpoint.weights), quiet=args.json) as advance:
        rows = list(report.layers(checkpoint, histograms=bool(plot), advance=advance))
    if plot:
        _save_figure(report.layer_figure(rows, checkpoint.path.name), plot, args.force)
    if args.json:
        return _print_json(report.as_json(checkpoint, rows))
    _print(report.layer_table(rows))
    _print(report.summary(checkpoint, rows))
    if plot:
        _print(f"histograms: {plot}")


def _sizes(args):
    from ..files.loading import opened
    from . import sizes

    if args.plot:
        raise BadInput("--plot draws no sizes")
    _check_backend(torch.device("cpu"))
    checkpoint = opened(args.checkpoint)
    with _progress("clustering weights", sum(entry.numel for entry in checkpoint.weights), quiet=args.json) as advance:
        found = sizes.measure(checkpoint, ends=args.ends, advance=advance)
    if args.json:
        return _print_json({"checkpoint": args.checkpoint, **found})
    _print(sizes.size_table(found))
    for line in sizes.size_lines(checkpoint, found):
        _print(line)


def _compress_arguments(parser):
    _add_in_and_out(parser, "the palettized file (.safetensors)")
    parser.add_argument("--bits", type=_bits, required=True, metavar="N", help="bits of a code, 1 to 8: 2**N centroids")
    parser.add_argument(
        "--cluster-dim",
        type=_positive,
        default=1,
        metavar="D",
        help="weights that share a code (default 1): N/D bits per weight",
    )
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="output", help="whether those lie along the output channels or in memory"
    )
    parser.add_argument(
        "--group-size", type=_positive, metavar="N", help="output channels that share centroids (default: all)"
    )
    parser.add_argument(
        "--per-channel-scale", action="store_true", help="divide each output channel by its largest weight first"
    )
    parser.add_argument(
        "--lut-dtype", choices=("fp32", "fp16", "int8"), default="fp32", help="how centroids are stored"
    )
    parser.add_argument("--entropy", choices=("huffman",), help="code those weights that become smaller by it")
    _add_coding(parser)


def _compress(args):
    from ..files.clustered import Form
    from . import compress

    _code(args, "clustering weights", compress.compress, Form.of(args), {}, entropy=args.entropy)


def _quantize_arguments(parser):
    _add_in_and_out(parser, "the quantized file (.safetensors)")
    parser.add_argument("--bits", type=_bits, required=True, metavar="N", help="bits of a code, 1 to 8")
    parser.add_argument(
        "--method",
        choices=("mse", "minmax"),
        default="mse",
        help="clip for the least mean squared error (default), or from min to max",
    )
    parser.add_argument(
        "--axis",
        type=_axis,
        default=0,
        metavar="0|none",
        help="a range for each output channel (0, default) or for each tensor (none)",
    )
    parser.add_argument(
        "--asymmetric",
        action="store_true",
        help="levels from min to max with a zero point, in place of levels around 0",
    )
    _add_coding(parser)


def _quantize(args):
    from ..files.uniform import Grid
    from . import compress

    _code(
        args,
        "quantizing weights",
        compress.quantize,
        Grid(args.bits, args.axis),
        {"method": args.method, "symmetric": not args.asymmetric},
    )


def _add_in_and_out(parser, out):
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help=".safetensors, .pt or .pth; a nested state_dict or model is found"
    )
    parser.add_argument("-o", "--out", metavar="OUT", required=True, help=out)


def _add_coding(parser):
    parser.add_argument(
        "--skip",
        metavar="PATTERN",
        nargs="+",
        action="extend",
        default=[],
        help="weights or modules to leave as they are, such as 'fc.*'",
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="write histograms of the weights before and after (.png, .pdf, .svg, ...)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON; a number that is not finite is null")
    _add_force(parser)


def _code(args, doing, work, form, options, entropy=None):
    """Writes a checkpoint with its weights as codes, and says what that costs."""
    from ..files.loading import opened
    from . import compress, report

    out, plot = (
        _checkpoint_path(args.out, args.force, (".safetensors",)),
        args.plot and _figure_path(args.plot, args.force),
    )
    _check_backend(torch.device("cpu"))
    checkpoint = opened(args.checkpoint)
    with _progress(doing, sum(entry.numel for entry in checkpoint.weights), quiet=args.json) as advance, _writable(out):
        result = work(
            checkpoint,
            out,
            form,
            **options,
            skip=args.skip,
            entropy=entropy,
            overwrite=args.force,
            plot=bool(plot),
            advance=advance,
        )
    if plot:
        _save_figure(compress.result_figure(result, checkpoint.path.name), plot, args.force)
    if args.json:
        return _print_json(
            report.finite(compress.result_json(result, checkpoint, out, form, **options, entropy=entropy))
        )
    _print(compress.result_table(result))
    for line in compress.result_lines(result, out) + [f"histograms: {plot}"] * bool(plot):
        _print(line)


def _expand_arguments(parser):
    parser.add_argument(
        "file",
        metavar="IN",
        help="a file that `r2kernels compress` or `quantize`, `save_palettized` or `save_quantized` wrote",
    )
    parser.add_argument(
        "-o", "--out", metavar="OUT", required=True, help="the dense checkpoint (.safetensors, .pt, .pth)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    _add_force(parser)


def _expand(args):
    from ..files.loading import Palettized
    from . import compress

    out = _checkpoint_path(args.out, args.force, compress.SUFFIXES)
    with Palettized(args.file) as file:
        total = sum(entry.numel for entry in file.entries)
        with _progress("decoding weights", total, quiet=args.json) as advance, _writable(out):
            size = compress.expand(file, out, overwrite=args.force, advance=advance)
        if args.json:
            return _print_json({"file": args.file, "out": str(out), "tensors": len(file.entries), "bytes": size})
        _print(f"{out}: {len(file.entries)} tensors, {compress.size_text(size)}")


def _demo_arguments(parser):
    parser.add_argument(
        "--seeds", type=_positive, default=1, metavar="N", help="train with N seeds and give the mean (default 1)"
    )
    parser.add_argument(
        "--epochs", type=_positive, default=40, metavar="N", help="epochs of each training (default 40)"
    )
    parser.add_argument(
        "--out", metavar="FILE", help=f"the histograms (default {DEMO_PLOT}, which is replaced if it exists)"
    )
    parser.add_argument("--json", metavar="FILE", help="write all results as JSON too")
    _add_force(parser)


def _demo(args):
    from . import demo, report

    plot = _figure_path(args.out or DEMO_PLOT, args.force or not args.out)
    data = args.json and _output_path(args.json, args.force)
    _check_backend(demo.default_device())
    with _progress("training", demo.steps(args.seeds, args.epochs)) as advance:
        result = demo.run(seeds=args.seeds, epochs=args.epochs, advance=advance)
    for part in demo.tables(result):
        _print(part)
    _save_figure(demo.histograms(result), plot, args.force or not args.out)
    _print(f"histograms: {plot}")
    if data:
        _write(data, json.dumps(report.finite(demo.as_json(result)), indent=2, allow_nan=False).encode(), args.force)
        _print(f"results: {data}")


COMMANDS = {
    "info": (_info, _info_arguments, "versions, and which backends are usable or why not"),
    "report": (_report, _report_arguments, "range, std and kurtosis of every weight of a checkpoint"),
    "compress": (
        _compress,
        _compress_arguments,
        "cluster the weights of a checkpoint by k-means and write them as codes and look-up tables",
    ),
    "quantize": (
        _quantize,
        _quantize_arguments,
        "quantize the weights of a checkpoint and write them as packed integer codes",
    ),
    "expand": (_expand, _expand_arguments, "write the dense checkpoint of a palettized or quantized file"),
    "demo": (
        _demo,
        _demo_arguments,
        "train a small network with and without the range losses and round its weights to 4, 3 and 2 bits",
    ),
}


def _positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _bits(text):
    value = int(text)
    if not 1 <= value <= 8:
        raise argparse.ArgumentTypeError(f"must be 1 to 8, got {value}")
    return value


def _axis(text):
    if text not in ("0", "none"):
        raise argparse.ArgumentTypeError(f"must be 0 or none, got {text}")
    return None if text == "none" else 0


def _add_force(parser):
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")


def _check_backend(device):
    """A backend chosen by R2KERNELS_BACKEND that cannot be used is bad input."""
    try:
        select(device)
    except (ValueError, RuntimeError) as error:
        raise BadInput(str(error)) from error


def _output_path(name, force):
    """The path, checked before any work is done for it."""
    path = Path(name)
    if path.is_dir():
        raise BadInput(f"{path}: is a directory")
    if path.exists() and not path.is_file():
        raise BadInput(f"{path}: is not a regular file")
    if not path.parent.is_dir():
        raise BadInput(f"{path}: there is no directory {path.parent}")
    if path.exists() and not force:
        raise BadInput(f"{path}: exists already; --force overwrites it")
    return path


def _checkpoint_path(name, force, allowed):
    if Path(name).suffix.lower() not in allowed:
        raise BadInput(f"{name}: unknown kind of checkpoint {Path(name).suffix!r}; allowed are {', '.join(allowed)}")
    return _output_path(name, force)


@contextlib.contextmanager
def _writable(path):
    """Where `path` cannot be written, that is bad input."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error


def _figure_path(name, force):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kinds = FigureCanvasAgg.get_supported_filetypes()
    if Path(name).suffix.lower().lstrip(".") not in kinds:
        raise BadInput(
            f"{name}: unknown kind of image {Path(name).suffix!r}; allowed are {', '.join('.' + kind for kind in sorted(kinds))}"
        )
    return _output_path(name, force)


def _save_figure(figure, path, force):
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix.lower().lstrip("."), dpi=150)
    _write(path, image.getvalue(), force)


def _write(path, content, force):
    try:
        with path.open("wb" if force else "xb") as file:
            file.write(content)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error


def _print_json(data):
    print(json.dumps(data, indent=2, allow_nan=False))


def _print(content):
    """Prints a line or a rich table. A table is never cut: where it does not go to a terminal it has the width it needs."""
    if isinstance(content, str):
        return print(content)
    from rich.console import Console
    from rich.measure import Measurement

    endless = Console(width=100_000)
    needed = Measurement.get(endless, endless.options, content)
    console = Console()
    console.width = max(console.width, needed.minimum) if console.is_terminal else needed.maximum
    console.print(content)


@contextlib.contextmanager
def _progress(description, total, quiet=False):
    """A progress bar on stderr, as a function that advances it; nothing is drawn where stderr is not a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.advance(task, done)
