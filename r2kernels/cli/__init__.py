"""The command line `r2kernels`.

A command is a function in `commands`, its arguments in `arguments`, and a row of `COMMANDS`. Exit codes: 0; 1 where the
work fails or the output is cut off; 2, with one line on stderr, for bad input or a missing package; 130 for Ctrl-C and
143 for SIGTERM. A file is there as a whole or not at all, whichever of these it is.
"""

import contextlib
import io
import os
import signal
import sys
import threading
import warnings

from ..files.checkpoint import CheckpointError
from .arguments import command_line
from .commands import COMMANDS
from .outputs import BadInput

EXTRAS = ("matplotlib", "rich", "safetensors", "sklearn")


def main(argv=None):
    """Runs one command and returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = command_line(COMMANDS).parse_args(argv)
    try:
        with warnings.catch_warnings(), terminable():
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
    except Terminated:
        return _fail("terminated", 143)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit is quiet too
        return 1
    return 0


class Terminated(BaseException):
    """SIGTERM."""


@contextlib.contextmanager
def terminable():
    """Within the block SIGTERM raises `Terminated`, so that nothing is left behind; a second one waits for that."""

    def stop(number, _):
        signal.signal(number, signal.SIG_IGN)
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # which alone is told of signals
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message, code=2):
    print("r2kernels:", " ".join(str(message).split()), file=sys.stderr)
    return code
