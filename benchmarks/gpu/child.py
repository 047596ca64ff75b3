"""One item of a stage: its cases one after the other, each noted when it begins and when it has ended.

    python -m gpu.child gpu.STAGE ITEM --device cuda --backend triton [--records FILE] [--start INDEX]

A case that takes too long ends the process with a traceback; whoever started it goes on with the next case. Exit code 1
where a case failed, LOST where the device can no longer be used.
"""

import argparse
import contextlib
import faulthandler
import importlib
import json
import sys
import time
import traceback
from typing import NamedTuple

from .processes import LOST


class Case(NamedTuple):
    """`run()` gives what is to be known beside its name, or None; it raises where something is wrong."""

    name: str
    run: object
    seconds: float = 60


class Records:
    """A line of JSON for each record, in the file at once."""

    def __init__(self, path):
        self.path = path

    def add(self, **record):
        if self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")


def is_lost(device):
    """Whether an earlier error has made the device unusable for this process."""
    if device != "cuda":
        return False
    import torch

    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return True
    return False


def run(case, device):
    """The row of a case."""
    start = time.monotonic()
    faulthandler.dump_traceback_later(case.seconds, exit=True)
    try:
        found = {"ok": True, **(case.run() or {})}
    except Exception as error:
        traceback.print_exc()
        found = {"ok": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"}
    found["lost"] = is_lost(device)
    faulthandler.cancel_dump_traceback_later()
    return {"case": case.name, "seconds": round(time.monotonic() - start, 2), **found}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", help="the module whose cases(item, device, backend) are run")
    parser.add_argument("item")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend")
    parser.add_argument("--records")
    parser.add_argument("--start", type=int, default=0, metavar="INDEX")
    parser.add_argument("--only", help="the cases whose names contain this")
    args = parser.parse_args(argv)
    records, failed = Records(args.records), 0
    made = importlib.import_module(args.stage).cases(args.item, args.device, args.backend)
    chosen = contextlib.nullcontext()
    if args.backend:
        from r2kernels import use_backend

        chosen = use_backend(args.backend)
    with chosen:
        for index, case in enumerate(made):
            if index < args.start or (args.only and args.only not in case.name):
                continue
            records.add(begun=case.name, index=index)
            row = run(case, args.device)
            lost = row.pop("lost")
            if lost:
                print(f"{case.name}: the device is lost to this process", file=sys.stderr)
                return LOST  # the case stays begun: a fresh process goes on behind it
            records.add(**row)
            failed += not row["ok"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
