"""Look-up tables as they are stored."""

import torch

LUT_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}


def quantized_lut(lut, dtype):
    """The tables as they come back from storage in `dtype`."""
    return restored_lut(*stored_lut(lut, dtype), lut.dtype)


def stored_lut(lut, dtype):
    """(entries, scale or None) of the tables (groups, K, d) of a weight.

    "int8" has a scale max|lut| / 127 for each table, (groups, 1, 1); "fp8", which is e4m3, one for all, (1, 1, 1): the
    least power of two that keeps them within its 448. Of "fp16" and "bf16" numbers beyond their range are cut off.
    """
    if dtype == "fp32":
        return lut, None
    kind = LUT_DTYPES[dtype]
    if dtype == "int8":
        scale = lut.abs().amax((-2, -1), keepdim=True) / 127
        return (lut / torch.where(scale == 0, 1, scale)).round().to(kind), scale
    most = torch.finfo(kind).max
    if dtype == "fp8":
        part, power = torch.frexp(lut.abs().amax().reshape(1, 1, 1) / most)
        scale = torch.ldexp(torch.ones_like(part), power - (part == 0.5).int())
        return (lut / torch.where(scale == 0, 1, scale)).clamp(-most, most).to(kind), scale
    return lut.clamp(-most, most).to(kind), None


def restored_lut(entries, scale, dtype):
    """The table of numbers of `dtype` that `stored_lut` stored."""
    return entries.to(dtype) if scale is None else entries.to(dtype) * scale


def scales_of_lut(dtype, groups):
    """The shape of the scales of so many tables, or None."""
    return {"int8": (groups, 1, 1), "fp8": (1, 1, 1)}.get(dtype)


def values_lost(lut, dtype):
    """What (groups, K, d) tables lose in `dtype` that is worth a warning, or None."""
    if dtype == "fp32":
        return None
    before, left = different(lut), different(quantized_lut(lut, dtype))
    worst = (left / before).argmin()
    cut = int((lut.abs() > torch.finfo(torch.float16).max).sum()) if dtype == "fp16" else 0
    lost = [f"leaves {left[worst]} of {before[worst]} different values"] * bool(4 * left[worst] <= 3 * before[worst])
    lost += [f"cuts off {cut} numbers above 65504"] * bool(cut)
    return f"lut_dtype={dtype!r} {' and '.join(lost)}" if lost else None


def different(lut):
    """(groups,) how many different entries each table has."""
    groups, entries, d = lut.shape
    if d == 1:
        return (lut[..., 0].double().sort().values.diff() != 0).sum(1) + 1
    index = torch.arange(groups, device=lut.device).double()[:, None, None].expand(-1, entries, 1)
    rows = torch.cat([index, lut.double()], -1).flatten(0, 1).unique(dim=0)
    return torch.bincount(rows[:, 0].long(), minlength=groups)
