"""Times contenders side by side: one call of each in turn, round after round, so that a machine that drifts drifts for
all alike."""

import contextlib
import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

LEAST_SAMPLE = 1e-3  # seconds: a call shorter than this is repeated within a sample
LEAST_ROUNDS, MOST_ROUNDS = 5, 200


class Contender(NamedTuple):
    """`call(inputs)` is what is timed; `prepare(inputs)` puts the gradients into their state before it, and is the same
    for all of a case."""

    call: Callable
    prepare: Callable
    active: Callable = contextlib.nullcontext  # the context in which it runs: a backend chosen, gradients off


def run(contender, inputs, calls):
    """Calls on one set of inputs after another. What a call returned is dropped before the next, as its gradients
    are."""
    for i in range(calls):
        kept = None
        contender.prepare(inputs[i % len(inputs)])
        kept = contender.call(inputs[i % len(inputs)])
    return kept


def sample(contender, inputs, calls, synchronize):
    """Seconds per call. `prepare` is timed only where a sample holds several calls."""
    with contender.active():
        if calls == 1:
            contender.prepare(inputs[0])
            synchronize()
            start = time.perf_counter()
            kept = contender.call(inputs[0])
        else:
            synchronize()
            start = time.perf_counter()
            kept = run(contender, inputs, calls)
        synchronize()
        elapsed = time.perf_counter() - start
    del kept
    return elapsed / calls


def interleave(
    contenders, inputs, seconds, synchronize=lambda: None, *, least_rounds=LEAST_ROUNDS, tries=3, settle=False
):
    """name -> (samples in seconds per call, one for each round; calls per sample), in about `seconds` altogether.

    `settle`: before each sample one call that is not timed, as in a loop of training: in a virtual machine the first
    one after another contender may have to wait for memory that the host took back, ten times as long as the call.
    """
    calls, cost = {}, 0.0
    for name, contender in contenders.items():
        with contender.active():
            run(contender, inputs, len(inputs))
        once = min(sample(contender, inputs, 1, synchronize) for _ in range(tries))
        fits = max(int(LEAST_SAMPLE / max(once, 1e-7)), 1)
        calls[name] = fits if len(inputs) == 1 else -(-fits // len(inputs)) * len(inputs)
        cost += once * (calls[name] + settle)
    rounds = min(max(int(seconds / cost), least_rounds), MOST_ROUNDS)
    samples = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in order:
                if settle:
                    with contenders[name].active():
                        run(contenders[name], inputs, 1)
                samples[name].append(sample(contenders[name], inputs, calls[name], synchronize))
            shuffle(order)  # nobody always follows the same neighbour
    finally:
        gc.enable()
    return {name: (samples[name], calls[name]) for name in contenders}


def ratios(timed, a, b, times=1.0):
    """The quartiles of the rounds' ratios: how many times longer a took than `times` b."""
    if a not in timed or b not in timed:
        return None
    return statistics.quantiles([x / (times * y) for x, y in zip(timed[a][0], timed[b][0], strict=True)], n=4)


class Clock:
    """Time that passes only as samples are replayed."""

    __name__ = "interleaved_clock"

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def replay(self, samples):
        samples = iter(samples)

        def advance():
            self.now += next(samples)

        return advance


def extra_memory(contender, inputs):
    """Most bytes of torch's allocator in use during a call beyond those in use before it."""
    with contender.active():
        contender.prepare(inputs)
        if inputs.device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            kept = contender.call(inputs)
            torch.cuda.synchronize()
            del kept
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            kept = contender.call(inputs)
            del kept
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    in_use = most = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        in_use += event["args"]["Bytes"]
        most = max(most, in_use)
    return most


def launches(contender, inputs):
    """Kernels, copies and fills that one call puts on the GPU; None where the profiler sees none."""
    with contender.active():
        contender.prepare(inputs)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            kept = contender.call(inputs)
            torch.cuda.synchronize()
        del kept
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events()) or None
