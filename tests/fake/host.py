"""Host time of soft_min_max of 10,000 weights through the Triton backend, under the fake driver, beside that of an
autograd Function that does nothing; prints as JSON the microseconds of a usual call (the fastest tenth takes less)."""

import importlib
import json
import time

import torch
from fake import driver

driver.steer()

import r2kernels  # noqa: E402


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w.new_empty(())

    @staticmethod
    def backward(ctx, grad):
        (w,) = ctx.saved_tensors
        return torch.empty_like(w)


def microseconds(call, times=1000):
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return 1e6 * sorted(taken)[times // 10]


def measured():
    w = torch.randn(100, 100).requires_grad_()

    def differentiated(function):
        w.grad = None
        function(w).backward()

    def loss(x):
        return r2kernels.soft_min_max(x, 0.1)

    return {
        "nothing": microseconds(lambda: differentiated(Nothing.apply)),
        "forward": microseconds(lambda: loss(w)),
        "forward and backward": microseconds(lambda: differentiated(loss)),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    importlib.import_module("r2kernels.backends")._DEFAULTS["cpu"] = ("triton",)
    print(json.dumps(measured()))
