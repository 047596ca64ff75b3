"""Tables of arguments that many tests share."""

import cases
import pytest


def short(dtype):
    return str(dtype)[6:]


def first(argument, chosen, values, ids=str):
    """Parametrizes a test over the values; those beside the chosen ones are marked as exhaustive."""
    values = [v if v in chosen else pytest.param(v, marks=pytest.mark.exhaustive) for v in values]
    return pytest.mark.parametrize(argument, values, ids=ids)


def first_dtypes(*chosen):
    return first("dtype", chosen, cases.DTYPES, short)


def first_ops(*chosen, among):
    return first("op", [op for op in among if op.function in chosen], among, lambda op: op.function)


every_dtype = pytest.mark.parametrize("dtype", cases.DTYPES, ids=short)
every_loss = pytest.mark.parametrize("op", cases.LOSSES, ids=lambda op: op.label)

ELSEWHERE = ("bin_reg", "msqe", "partial_l2")  # are in the interpreter too, by quantizers/interpreted.py


def of_one_each(among):
    return first_ops(*[op.function for op in among if op.function not in ELSEWHERE], among=among)


one_each = of_one_each(cases.ONE_EACH)
learned_each = of_one_each([op for op in cases.ONE_EACH if op.parameter])
