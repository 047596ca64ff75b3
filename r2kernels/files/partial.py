"""Files that are written in hours: what is done of them is kept where the work is interrupted, and gone on with.

The work on OUT lies in the folder OUT.partial: the files as far as they are written, and a journal. Its first line says
of what and how they are made; each line after it, of what was complete when it was written.
"""

import contextlib
import fcntl
import json
import os
import shutil
import stat
import warnings
import zlib
from pathlib import Path

from .checkpoint import CheckpointError
from .paths import mode_of, put, sync

JOURNAL = "journal.jsonl"


def _name(of):
    """Of the folder of the work on a file or folder: a checksum of a name that is too long for a suffix."""
    return f"{of}.partial" if len(os.fsencode(of)) < 248 else f"{zlib.crc32(os.fsencode(of)):08x}.partial"


class Partial:
    """The folder of the work on `path`. `records`: what was noted before, of the work that is gone on with.

    identity: name -> value of all that decides what is written. CheckpointError where there is work of another process,
    of an interrupted one and neither `resume` nor `overwrite` (which removes it), or of another identity.
    """

    def __init__(self, path, identity, *, resume=False, overwrite=False):
        self.path = Path(os.path.realpath(path))
        self.folder = self.path.with_name(_name(self.path.name))
        self.records, self.resumed, identity = [], False, json.loads(json.dumps(identity))
        known = (self.folder / JOURNAL).exists()
        if known and not resume and not overwrite:
            reason = "holds the work of an interrupted run; --resume goes on with it, --force begins anew"
            raise CheckpointError(f"{self.folder}: {reason}")
        self.folder.mkdir(exist_ok=True)
        self.journal = (self.folder / JOURNAL).open("a+b")
        try:
            fcntl.flock(self.journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.journal.close()
            raise CheckpointError(f"{self.folder}: another process writes it") from error
        if known and resume:
            try:
                self._read(identity)
                self.resumed = True
                return
            except BaseException:
                self.journal.close()
                raise
        try:
            self._begin(identity)
        except BaseException:
            self.remove()
            raise

    def _begin(self, identity):
        self.journal.truncate(0)
        for file in self.folder.iterdir():
            if file.name != JOURNAL:
                file.unlink()
        self._write(identity)

    def _read(self, identity):
        self.journal.seek(0)
        lines = self.journal.read().split(b"\n")
        whole = lines[:-1]  # a line that was cut off has no end
        try:
            before, *self.records = [json.loads(line) for line in whole]
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: its journal is corrupt; --force begins anew") from error
        differ = [key for key in {**before, **identity} if before.get(key) != identity.get(key)]
        if differ:
            raise CheckpointError(
                f"{self.folder}: was begun with another {', '.join(differ)} ({before.get(differ[0])!r:.60}, not "
                f"{identity.get(differ[0])!r:.60}); --force begins anew"
            )
        self.journal.truncate(sum(len(line) + 1 for line in whole))

    def _write(self, line):
        self.journal.write(json.dumps(line).encode() + b"\n")
        self.journal.flush()

    def note(self, record):
        """Keeps a record of what is complete. What it is of has been given to the operating system before."""
        self._write(record)
        self.records.append(record)

    @contextlib.contextmanager
    def file(self, name):
        """The file of that name, where it is new from its begin on, opened to be written."""
        with open(os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            yield file
            sync(file)

    def finish_file(self, name, overwrite):
        """Puts the only file in the place of `path`, as `replacing` does."""
        with contextlib.suppress(FileNotFoundError):
            os.chmod(self.folder / name, stat.S_IMODE(mode_of(self.path)))
        put(self.folder / name, self.path, overwrite)
        self.remove()

    def finish_folder(self):
        """Puts the folder of all files in the place of `path`, which does not exist."""
        (self.folder / JOURNAL).unlink()
        self.journal.close()
        os.rename(self.folder, self.path)

    def remove(self):
        shutil.rmtree(self.folder)
        with contextlib.suppress(OSError):  # a line for which the disk had no room
            self.journal.close()


@contextlib.contextmanager
def keeping(path, identity, **options):
    """A `Partial` that stays where the block is interrupted and something is complete. On an error a new one vanishes,
    and one that was gone on with stays."""
    partial = Partial(path, identity, **options)
    try:
        yield partial
    except BaseException as error:
        interrupted = not isinstance(error, Exception)
        if partial.resumed or (partial.records and interrupted):
            partial.journal.close()
            if interrupted:
                warnings.warn(f"{partial.folder}: keeps what is done; --resume goes on with it", stacklevel=2)
        else:
            partial.remove()
        raise
