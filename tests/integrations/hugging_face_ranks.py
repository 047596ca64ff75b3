"""Hugging Face's Trainer with DistributedDataParallel."""

import sys

import ranks
import torch
from integrations.transformer import Gradients, gpt2, trainer
from torch import distributed
from torch.testing import assert_close
from transformers import Trainer

from r2kernels import Palettizer, Quantizer, RangeRegularizer
from r2kernels.integrations import hf

R2Trainer = hf(Trainer)
ACCUMULATED = dict(gradient_accumulation_steps=2, per_device_train_batch_size=2, ddp_backend="gloo")


def with_palettizer(model):
    return [RangeRegularizer(model), Palettizer(model, 2)]


def with_quantizer(model):
    return [RangeRegularizer(model, "margin"), Quantizer(model, "lsq", 4, 4)]


def made(name, attach, **options):
    model = gpt2()
    folder = f"{sys.argv[1]}/{name}"
    return trainer(model, folder, R2Trainer, more={"r2": attach(model)}, **ACCUMULATED, **options)


def state(some):
    return {**some.model.state_dict(), **some.r2.state_dict()}


def assert_equal_on_all_ranks(tensors):
    for name, tensor in tensors.items():
        others = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
        distributed.all_gather(others, tensor.contiguous())
        assert all(torch.equal(other, tensor) for other in others), name


def assert_replicas(name, attach):
    some = made(name, attach)
    before = {key: value.clone() for key, value in some.r2.state_dict().items()}
    some.train()
    assert type(some.model_wrapped).__name__ == "DistributedDataParallel"
    assert_equal_on_all_ranks(state(some))
    assert any(not torch.equal(before[key], value) for key, value in some.r2.state_dict().items())


def check_replicas_with_a_palettizer(mesh):
    assert_replicas("palettizer", with_palettizer)


def check_replicas_with_a_quantizer(mesh):
    assert_replicas("quantizer", with_quantizer)


def check_the_regularizer_counts_once(mesh):
    found = []
    for kind in (Trainer, R2Trainer):
        model, seen = gpt2(), Gradients()
        reg = RangeRegularizer(model, weight=1.0, alpha=8.0, alpha_unit="std", learn=False)
        more = {"r2": reg} if kind is R2Trainer else None
        options = dict(max_steps=1, max_grad_norm=0.0)
        trainer(model, f"{sys.argv[1]}/once", kind, [seen], more=more, **ACCUMULATED, **options).train()
        found.append(seen.steps[0])
    alone = gpt2()
    RangeRegularizer(alone, weight=1.0, alpha=8.0, alpha_unit="std", learn=False).accumulate_grad_()
    for name, p in alone.named_parameters():
        if p.grad is not None:
            plain, regularized = (some[name] for some in found)
            assert_close(regularized - plain, p.grad, rtol=1e-4, atol=1e-6)


def check_resume_is_bitwise(mesh):
    whole = made("resume", with_palettizer, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = made("resume", with_palettizer)
    resumed.train(resume_from_checkpoint=f"{sys.argv[1]}/resume/checkpoint-3")
    wanted = state(whole)
    for name, value in state(resumed).items():
        assert torch.equal(value, wanted[name]), name


if __name__ == "__main__":
    ranks.main(globals())
