"""What the extension and r2kernels/contract.py both say of an op, and what the calls between them are made of."""

import importlib

import pytest
import torch

from r2kernels import contract, lists
from r2kernels.backends import backends


@pytest.fixture
def extension():
    reason = backends()["cpu"]
    return importlib.import_module("r2kernels._C") if reason is None else pytest.skip(reason)


def test_the_contract_is_that_of_the_ops(extension):
    told = extension.contract()
    losses = {op.name: op.saved for op in contract.OPS if "Tensor saved" in (op.backward or "")}
    assert told["saved"] == losses
    assert told["terms"] == {name: i for i, name in enumerate(contract.TERMS)}
    assert told["statistics"] == contract.STATISTICS and told["radix"] == contract.RADIX
    assert told["floor"] == contract.FLOOR
    assert told["fields"] == lists.FIELDS


def test_every_op_has_its_functions(extension):
    """Both halves, where there are two; terms serve bin_reg, msqe and partial_l2."""
    served = {"bin_reg", "msqe", "partial_l2"}
    passes = {"update", "output", "upstream", "recur", "gradient", "jacobian", "assign"}
    expected = {f"dkm_{name}" for name in passes} | {"dkm_scratch", "rank"}
    for op in contract.OPS:
        if op not in (contract.DKM, contract.ASSIGN) and op.name not in served:
            expected |= {f"{op.name}_fwd"} | ({f"{op.name}_bwd"} if op.backward else set())
    for half in ("cpu", "cuda"):
        if hasattr(extension, half):
            assert expected <= set(dir(getattr(extension, half)))


def test_fields_are_given_by_name_alone(extension):
    some = dict(tensors=0, owner=0, count=0, chunks=0, chunk=1, d=1, alone=extension.Tensor(0, 0, 0, 0, 0, 0))
    listed = extension.List(**some, dtype=extension.Dtype.f32)
    rank = extension.cpu.rank
    rank(listed, 0, 0, 1, rank=0, theta=0, scratch=0)
    for call in (
        lambda: extension.List(**some),
        lambda: extension.List(*some.values(), extension.Dtype.f32),
        lambda: extension.List(**some, dtype=1),
        lambda: rank(listed, 0, 0, 1, 0, 0, 0),
        lambda: rank(listed, 0, 0, 1, rank=0, theta=0),
        lambda: rank(listed, 0, 0, 1, rank=0, theta=0, scratch=0, other=0),
        lambda: rank(listed, 0, 0, 1, rank=None, theta=0, scratch=0),
        lambda: rank((0,) * 8, 0, 0, 1, rank=0, theta=0, scratch=0),
    ):
        with pytest.raises(TypeError):
            call()


def test_no_more_terms_than_there_are(extension):
    forward = extension.Forward(first=0, second=0, flag=False, partial=0, out=0, saved=0, bits=0)
    listed = extension.List(
        tensors=0,
        owner=0,
        count=0,
        chunks=0,
        chunk=1,
        d=1,
        dtype=extension.Dtype.f32,
        alone=extension.Tensor(0, 0, 0, 0, 0, 0),
    )
    most = len(contract.TERMS)
    extension.cpu.terms_fwd(listed, 0, 0, 1, term=[0] * most, of=[forward] * most)
    for terms, arguments in ((most + 1, most + 1), (2, 1)):
        with pytest.raises(ValueError, match="terms"):
            extension.cpu.terms_fwd(listed, 0, 0, 1, term=[0] * terms, of=[forward] * arguments)


def test_a_list_is_described_once_for_each_plan_and_dtype(extension):
    native = importlib.import_module("r2kernels.backends.native.extension")
    shapes = [(30,), (5, 7)]
    cpu, found = torch.device("cpu"), {}
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        tensors = [torch.zeros(shape, dtype=dtype) for shape in shapes]
        plan = lists.plan(tensors, None, 1, cpu)
        made = native.described(extension, plan, dtype)
        assert found.setdefault(dtype, made) is made
    assert len(set(map(id, found.values()))) == 2


def test_lists_described_are_bounded(extension):
    native = importlib.import_module("r2kernels.backends.native.extension")
    for n in range(1, native.MOST_LISTS + 10):
        native.described(extension, lists.plan([torch.zeros(n)], None, 1, torch.device("cpu")), torch.float32)
    assert len(native._lists) <= native.MOST_LISTS
