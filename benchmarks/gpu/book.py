"""What has been found so far, in files that are whole at any time: STAGE.json for each stage, gpu-check.txt for all of
them, gpu-check.tar.gz with what the processes printed and what they wrote beside it."""

import io
import json
import tarfile
import threading
from pathlib import Path

from report import replace

SHOWN, LINES = 12, 25  # failed cases of a task, last lines of a failed process in the text


class Book:
    """The outcomes of a stage. `extra`: a folder whose files go into the tar."""

    def __init__(self, folder, stage, table, about, extra):
        self.folder, self.stage, self.table, self.extra = Path(folder), stage, table, extra
        self.data = {"stage": stage, **about, "tasks": []}
        self.lock = threading.Lock()
        self.save()

    @property
    def tasks(self):
        return self.data["tasks"]

    def add(self, outcome):
        with self.lock:
            self.tasks.append(outcome)
            self.save()

    def save(self):
        self.data["text"] = self.text()
        replace(self.folder / f"{self.stage}.json", json.dumps(self.data, indent=1))
        replace(self.folder / "gpu-check.txt", "\n\n".join(stored(self.folder)) + "\n")
        self.save_tar()

    def save_tar(self):
        path = self.folder / "gpu-check.tar.gz"
        part = path.with_name(path.name + ".part")
        with tarfile.open(part, "w:gz", compresslevel=1) as tar:
            for name in ("gpu-check.txt", *(f"{stage}.json" for stage in written(self.folder))):
                tar.add(self.folder / name, name)
            for stage in written(self.folder):
                for task in json.loads((self.folder / f"{stage}.json").read_text())["tasks"]:
                    text = task["printed"].encode()
                    entry = tarfile.TarInfo(f"printed/{stage}/{task['task'].replace('/', '-')}.txt")
                    entry.size = len(text)
                    tar.addfile(entry, io.BytesIO(text))
            if self.extra.exists():
                tar.add(self.extra, "bench")
        part.replace(path)

    def text(self):
        """The stage in words: the machine, a line for each task, what failed, the stage's own tables."""
        lines = [f"# {self.stage}", ""]
        lines += [f"{name}: {value}" for name, value in self.data.items() if name not in ("stage", "tasks", "text")]
        lines += ["", *map(line, self.tasks), ""]
        for task in self.tasks:
            if task["state"] != "passed":
                lines += [f"## {task['task']}: {task['state']}", *failures(task), ""]
        return "\n".join(lines) + "\n" + self.table(self.tasks)


def line(task):
    """A task in a line."""
    good = sum(row["ok"] for row in task["rows"])
    count = f", {good} of {len(task['rows'])} cases passed" if task["rows"] else ""
    return f"{task['state']:>8}  {task['task']}: {task['seconds']} s of {task['allowed']}{count}"


def failures(task):
    """Its first failed cases, or the last lines that it printed."""
    failed = [f"  {row['case']}: {row['error']}" for row in task["rows"] if not row["ok"]]
    if failed:
        return failed[:SHOWN] + [f"  and {len(failed) - SHOWN} more"] * (len(failed) > SHOWN)
    return ["  " + text for text in task["printed"].splitlines()[-LINES:]]


def written(folder):
    """The stages that have results there, in the order in which they are run."""
    return [stage for stage in ("smoke", "tests", "graphs", "kernels", "bench") if (folder / f"{stage}.json").exists()]


def stored(folder):
    return [json.loads((folder / f"{stage}.json").read_text())["text"] for stage in written(folder)]
