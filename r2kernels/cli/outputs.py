"""Files that commands write: paths that are checked before any work is done for them, and figures."""

import contextlib
import io
import os
from pathlib import Path

from ..files.paths import mode_of, replacing


class BadInput(Exception):
    """What the user asked for cannot be done. One line."""


def output_path(name, force):
    """The path, checked before any work is done for it."""
    path = Path(name)
    with writable(path):
        folder = Path(os.path.realpath(path)).parent  # of what a symlink leads to
        if not folder.is_dir():
            raise BadInput(f"{path}: there is no directory {folder}")
        with contextlib.suppress(FileNotFoundError):
            mode_of(path)
            if not force:
                raise BadInput(f"{path}: exists already; --force overwrites it")
    return path


def checkpoint_path(name, force, allowed):
    """The path of a checkpoint with one of the suffixes allowed."""
    if Path(name).suffix.lower() not in allowed:
        raise BadInput(f"{name}: unknown kind of checkpoint {Path(name).suffix!r}; allowed are {', '.join(allowed)}")
    return output_path(name, force)


def figure_path(name, force):
    """The path of an image of a kind that matplotlib writes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kinds = sorted("." + kind for kind in FigureCanvasAgg.get_supported_filetypes())
    if Path(name).suffix.lower() not in kinds:
        raise BadInput(f"{name}: unknown kind of image {Path(name).suffix!r}; allowed are {', '.join(kinds)}")
    return output_path(name, force)


@contextlib.contextmanager
def writable(path):
    """Within the block an error of the operating system is bad input: `path` cannot be written."""
    try:
        yield
    except FileExistsError as error:
        reason = "exists already, written meanwhile by another process"
        raise BadInput(f"{path}: {reason}; --force overwrites it") from error
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error


def save_figure(figure, path, force):
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix.lower().lstrip("."), dpi=150)
    write(path, image.getvalue(), force)


def write(path, content, force):
    with writable(path), replacing(path, force) as file:
        file.write(content)
