"""What commands print: lines, rich tables, JSON, and progress bars."""

import contextlib
import json
import sys


def table(headers, rows, footer=None, title=None, left=1):
    """A rich table of strings: the first `left` columns to the left, the others are numbers and never wrapped."""
    from rich import box
    from rich.table import Table

    drawn = Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        show_footer=footer is not None,
        show_edge=False,
        pad_edge=False,
    )
    for i, header in enumerate(headers):
        drawn.add_column(
            _plain(header),
            _plain(footer[i]) if footer else "",
            justify="left" if i < left else "right",
            no_wrap=i >= left,
        )
    for row in rows:
        drawn.add_row(*map(_plain, row))
    return drawn


def _plain(text):
    """Text for rich that is never read as markup."""
    from rich.text import Text

    return Text(text)


def number(value):
    """Four significant digits."""
    return f"{value:#.4g}"


def count(n, word):
    """A number of things: "1 seed", "2 seeds"."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def show(content):
    """Prints a line or a rich table.

    A table is never cut: where it does not go to a terminal it has the width it needs.
    """
    if isinstance(content, str):
        return print(content)
    from rich.console import Console
    from rich.measure import Measurement

    endless = Console(width=100_000)
    needed = Measurement.get(endless, endless.options, content)
    console = Console()
    console.width = max(console.width, needed.minimum) if console.is_terminal else needed.maximum
    console.print(content)


def print_json(data):
    print(json.dumps(data, indent=2, allow_nan=False))


@contextlib.contextmanager
def progress(description, total, quiet=False, in_bytes=False):
    """A progress bar on stderr, as a function that advances it; nothing is drawn where stderr is not a terminal.

    With the time that is left, and of bytes how many are done and their rate.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich import progress as rich
    from rich.console import Console

    columns = [rich.TextColumn("{task.description}"), rich.BarColumn(), rich.TaskProgressColumn()]
    columns += [rich.DownloadColumn(), rich.TransferSpeedColumn()] * in_bytes
    columns.append(rich.TimeRemainingColumn())
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.advance(task, done)
