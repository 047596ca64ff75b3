"""What the kernels of a call take on the device, apart from the host that launches them."""

import collections
import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile

ROUNDS = 7


def by_profiler(calls):
    """kernel -> (microseconds, launches) for each call; empty where the profiler sees no kernels."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for call in calls:
            call()
        torch.cuda.synchronize()
    found = collections.defaultdict(lambda: [0.0, 0.0])
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name][0] += event.time_range.elapsed_us() / len(calls)
            found[event.name][1] += 1 / len(calls)
    return dict(found)


def by_events(calls):
    """The same for all kernels together, with what lies between them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for call in calls:
        call()
    end.record()
    torch.cuda.synchronize()
    return {"all, with the gaps": [1e3 * start.elapsed_time(end) / len(calls), None]}


def by_clock(calls):
    """On the CPU."""
    start = time.perf_counter()
    for call in calls:
        call()
    return {"all, by the clock": [1e6 * (time.perf_counter() - start) / len(calls), None]}


def method(calls, device):
    """(how times are taken here, its name)"""
    if device == "cpu":
        return by_clock, "clock"
    return (by_profiler, "profiler") if by_profiler(calls[:1]) else (by_events, "events")


def total(found):
    return sum(us for us, _ in found.values())


def side_by_side(named, device, rounds=ROUNDS):
    """(name -> its rounds as microseconds for each call, name -> kernels of its median round, how they were taken).

    `named`: name -> calls, one for each set of inputs. All are measured in every round.
    """
    for calls in named.values():
        for call in calls:
            call()
    take, how = method(next(iter(named.values())), device)
    samples, kernels = {name: [] for name in named}, {name: [] for name in named}
    for _ in range(rounds):
        for name, calls in named.items():
            found = take(calls)
            samples[name].append(total(found))
            kernels[name].append(found)
    middle = {}
    for name, values in samples.items():
        at = values.index(statistics.median_low(values))
        middle[name] = kernels[name][at]
    return samples, middle, how


def replays(replay, rounds=50):
    """Microseconds of a replay, between two events; median of the rounds. Between replays there is no gap to speak
    of: so many are put on the stream that the host is ahead."""
    for _ in range(3):
        replay()
    return statistics.median(total(by_events([replay] * 20)) for _ in range(rounds))
