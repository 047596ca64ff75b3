"""Files by their paths: opened to be read, and put in place as a whole or not at all."""

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path


def mode_of(path):
    """The mode of the regular file that a path leads to, over symlinks; OSError for anything else.

    Nothing is opened: to open a FIFO is to wait for whoever is at its other end.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a directory", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return mode


def open_regular(path):
    """A regular file, opened to be read; OSError for anything else."""
    mode_of(path)
    return open(path, "rb")


def beside(path):
    """A path in the same folder, for what is not complete yet."""
    return path.with_name(f".r2kernels-{secrets.token_hex(6)}.tmp")


@contextlib.contextmanager
def replacing(path, overwrite=True):
    """A new file that takes the place of `path` at the end of the block, or vanishes on an error.

    What is written lies beside it, in a file of another name, until it is complete. A file that is overwritten passes
    its mode on; a new one has that of the umask. A symlink stays, and what it leads to is written. FileExistsError
    where there is a file and not `overwrite`, also where it came about meanwhile; OSError where `path` leads to
    anything but a regular file.
    """
    path = Path(os.path.realpath(path))
    try:
        before = stat.S_IMODE(mode_of(path))
    except FileNotFoundError:
        before = None
    temporary = beside(path)
    try:
        made_with = 0o666 if before is None else before
        with open(temporary, "x+b", opener=lambda name, flags: os.open(name, flags, made_with)) as file:
            if before is not None:
                os.chmod(temporary, before)
            yield file
            sync(file)
        put(temporary, path, overwrite)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(file):
    """Has all that was written reach the disk."""
    file.flush()
    os.fsync(file.fileno())


def put(temporary, path, overwrite):
    """Gives a file its name; unless `overwrite`, FileExistsError where there is one of that name."""
    if overwrite:
        os.replace(temporary, path)
    else:
        _put(temporary, path)


def _put(temporary, path):
    """Gives a file its name unless there is one of that name: of several processes one does."""
    try:
        os.link(temporary, path)
        os.unlink(temporary)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        path.open("xb").close()
        os.replace(temporary, path)
