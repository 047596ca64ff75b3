"""What is made on a device once and then read for good, by every stream and by CUDA graphs."""

import threading

import torch


def lasting(make, device, what):
    """make(), ready for every stream. On a GPU another thread makes it and waits for it: so it lies outside the memory
    pool of a CUDA graph that this thread may be warming up, and is under none of its modes. RuntimeError while a graph
    is captured, where nothing can be waited for; `what` is told there."""
    if device.type != "cuda":
        return make()
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"r2kernels met {what} for the first time during CUDA-graph capture; "
            "run one step with it before the capture"
        )
    made = []
    thread = threading.Thread(target=lambda: made.append(_finished(make, device)))
    thread.start()
    thread.join()
    if isinstance(made[0], Exception):
        raise made[0]
    return made[0]


def _finished(make, device):
    try:
        value = make()
        torch.cuda.current_stream(device).synchronize()
        return value
    except Exception as error:  # goes on in the thread that waits
        return error
