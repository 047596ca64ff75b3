"""The arguments of the commands: a function for each adds them to its parser."""

import argparse
import re

from .. import __version__
from ..reference.checks import LAYOUTS

DEMO_PLOT = "r2kernels_demo.png"


class Parser(argparse.ArgumentParser):
    """Bad arguments: one line on stderr and exit code 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def command_line(commands):
    """The parser of a table like `commands.COMMANDS`."""
    parser = Parser(prog="r2kernels", description="Fused range losses for models that quantize and compress well.")
    parser.add_argument("--version", action="version", version=f"r2kernels {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (run, fill, text) in commands.items():
        command = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.set_defaults(run=run)
        fill(command)
    return parser


def info(parser):
    parser.add_argument("--json", action="store_true", help="print JSON")


def report(parser):
    add_checkpoint(parser)
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
    add_force(parser)


def compress(parser):
    add_in_and_out(parser, "the palettized file (.safetensors); or FOLDER/, a new folder with shards and their index")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--bits", type=bits, metavar="N", help="bits of a code, 1 to 8: 2**N centroids")
    size.add_argument(
        "--budget",
        type=float,
        metavar="BITS",
        help="bits per weight in the file, with codes, tables and scales: of 1 to 8 bits and tables of several "
        "granularities each weight has those of the least error in all",
    )
    parser.add_argument(
        "--importance",
        metavar="FILE",
        help="what an error of each number counts: a .safetensors file of tensors with names and shapes of the "
        "checkpoint's, as `r2kernels.sensitivity` gives them",
    )
    parser.add_argument(
        "--cluster-dim",
        type=positive,
        default=1,
        metavar="D",
        help="weights that share a code (default 1): N/D bits per weight",
    )
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="output", help="whether those lie along the output channels or in memory"
    )
    parser.add_argument(
        "--group-size", type=positive, metavar="N", help="output channels that share centroids (default: all)"
    )
    parser.add_argument(
        "--granularity",
        type=granularity,
        metavar="WHAT",
        help="what has centroids of its own: tensor, channel, group (of --group-size), row, or tiles such as 8x64: 8 "
        "output channels by 64 inputs",
    )
    parser.add_argument(
        "--per-channel-scale",
        action="store_true",
        help="divide each output channel by a scale of its own first, where that lowers the error",
    )
    parser.add_argument(
        "--preserve-zeros", action="store_true", help="keep zeros exactly 0: one centroid is 0, the others fit the rest"
    )
    parser.add_argument(
        "--lut-dtype",
        choices=("fp32", "fp16", "bf16", "int8", "fp8"),
        default="fp32",
        help="how centroids are stored (default fp32; fp8 is e4m3)",
    )
    parser.add_argument("--entropy", choices=("huffman",), help="code those weights that become smaller by it")
    add_coding(parser)


def quantize(parser):
    add_in_and_out(parser, "the quantized file (.safetensors); or FOLDER/, a new folder with shards and their index")
    parser.add_argument("--bits", type=bits, required=True, metavar="N", help="bits of a code, 1 to 8")
    parser.add_argument(
        "--method",
        choices=("mse", "minmax"),
        default="mse",
        help="clip for the least mean squared error (default), or from min to max",
    )
    parser.add_argument(
        "--axis",
        type=axis,
        default=0,
        metavar="0|none",
        help="a range for each output channel (0, default) or for each tensor (none)",
    )
    parser.add_argument(
        "--asymmetric",
        action="store_true",
        help="levels from min to max with a zero point, in place of levels around 0",
    )
    add_coding(parser)


def expand(parser):
    parser.add_argument(
        "file",
        metavar="IN",
        help="a file that `r2kernels compress` or `quantize`, `save_palettized` or `save_quantized` wrote",
    )
    parser.add_argument(
        "-o",
        "--out",
        metavar="OUT",
        required=True,
        help="the dense checkpoint (.safetensors, .pt, .pth); or FOLDER/, a new folder with shards and their index, "
        "as transformers reads it",
    )
    add_shard_size(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_force(parser)


def demo(parser):
    parser.add_argument(
        "--seeds", type=positive, default=1, metavar="N", help="train with N seeds and give the mean (default 1)"
    )
    parser.add_argument("--epochs", type=positive, default=40, metavar="N", help="epochs of each training (default 40)")
    parser.add_argument(
        "--out", metavar="FILE", help=f"the histograms (default {DEMO_PLOT}, which is replaced if it exists)"
    )
    parser.add_argument("--json", metavar="FILE", help="write all results as JSON too")
    add_force(parser)


def add_checkpoint(parser):
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help=".safetensors, .pt, .pth, .bin, .ckpt or .pth.tar, in which a nested state_dict or model is found; "
        "or a folder of Hugging Face, or the .index.json of its shards",
    )
    parser.add_argument(
        "--key", metavar="NAME", help="which state dict of a file of torch.save, such as ema or ema.module"
    )


def add_in_and_out(parser, out):
    add_checkpoint(parser)
    parser.add_argument("-o", "--out", metavar="OUT", required=True, help=out)


def add_shard_size(parser):
    parser.add_argument(
        "--shard-size",
        type=size,
        metavar="SIZE",
        help="write a folder, with shards of at most this size, such as 500MB (default for FOLDER/: 5GB)",
    )


def add_coding(parser):
    add_shard_size(parser)
    parser.add_argument(
        "--jobs",
        type=positive,
        metavar="N",
        help="threads that code weights (default: one for each core, at most 8); the file is the same for any number",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with what an interrupted run of the same arguments left in OUT.partial, if there is any",
    )
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
    add_force(parser)


def add_force(parser):
    parser.add_argument(
        "--force",
        action="store_true",
        help="overwrite files that exist: they keep their mode, and a symlink stays: what it leads to is overwritten",
    )


def size(text):
    """Bytes, from a number with a unit."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B", text, re.IGNORECASE)
    value = found and int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))
    if not value:
        raise argparse.ArgumentTypeError(f"must be a size such as 5GB, 500MB or 2GiB, got {text}")
    return value


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def granularity(text):
    """A name, or the rows and columns of a tile."""
    if re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        return tuple(int(n) for n in text.split("x"))
    if text not in ("tensor", "channel", "group", "row"):
        raise argparse.ArgumentTypeError(f"must be tensor, channel, group, row or ROWSxCOLUMNS, got {text}")
    return text


def bits(text):
    value = int(text)
    if not 1 <= value <= 8:
        raise argparse.ArgumentTypeError(f"must be 1 to 8, got {value}")
    return value


def axis(text):
    if text not in ("0", "none"):
        raise argparse.ArgumentTypeError(f"must be 0 or none, got {text}")
    return None if text == "none" else 0
