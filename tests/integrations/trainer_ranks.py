"""The three trainers with DistributedDataParallel."""

import sys
import warnings

import lightning.pytorch as pl
import ranks
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from integrations.transformer import Gradients, gpt2, trainer
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers import Trainer

from r2kernels import Palettizer, Quantizer, RangeRegularizer
from r2kernels.integrations import LightningCallback, attach, hf
from r2kernels.integrations.modules import TrainedModules

R2Trainer = hf(Trainer)
ACCUMULATED = dict(gradient_accumulation_steps=2, per_device_train_batch_size=2, ddp_backend="gloo")


def fixed(model):
    return [RangeRegularizer(model, weight=1.0, alpha=8.0, alpha_unit="std", learn=False)]


def palettized(model):
    return [RangeRegularizer(model), Palettizer(model, 2)]


def quantized(model):
    return [RangeRegularizer(model, "margin"), Quantizer(model, "lsq", 4, 4)]


def state(model, r2):
    return {**model.state_dict(), **{f"r2.{name}": value for name, value in r2.state_dict().items()}}


def assert_replicas(before, after):
    """The same bits on all ranks, and something was learned beside the weights."""
    for name, tensor in after.items():
        others = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
        distributed.all_gather(others, tensor.contiguous())
        assert all(torch.equal(other, tensor) for other in others), name
    assert any(name.startswith("r2.") and not torch.equal(before[name], value) for name, value in after.items())


def copied(tensors):
    return {name: value.clone() for name, value in tensors.items()}


def assert_once(make, plain, regularized):
    """The regularizer's gradient is the difference."""
    alone = make()
    fixed(alone)[0].accumulate_grad_()
    for name, p in alone.named_parameters():
        if p.grad is not None:
            assert_close(regularized[name] - plain[name], p.grad, rtol=1e-4, atol=1e-6)


# Hugging Face


def hugging_face(name, make, **options):
    model = gpt2()
    return trainer(model, f"{sys.argv[1]}/{name}", R2Trainer, more={"r2": make(model)}, **ACCUMULATED, **options)


def hugging_face_replicas(name, make):
    some = hugging_face(name, make)
    before = copied(state(some.model, some.r2))
    some.train()
    assert isinstance(some.model_wrapped, nn.parallel.DistributedDataParallel)
    assert_replicas(before, state(some.model, some.r2))


def check_hugging_face_with_a_palettizer(mesh):
    hugging_face_replicas("palettizer", palettized)


def check_hugging_face_with_a_quantizer(mesh):
    hugging_face_replicas("quantizer", quantized)


def check_hugging_face_counts_once(mesh):
    found = []
    for kind in (Trainer, R2Trainer):
        model, seen = gpt2(), Gradients()
        more = {"r2": fixed(model)} if kind is R2Trainer else None
        options = dict(max_steps=1, max_grad_norm=0.0)
        trainer(model, f"{sys.argv[1]}/once", kind, [seen], more=more, **ACCUMULATED, **options).train()
        found.append(seen.steps[0])
    assert_once(gpt2, *found)


def check_hugging_face_resumes_bitwise(mesh):
    whole = hugging_face("resume", palettized, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = hugging_face("resume", palettized)
    resumed.train(resume_from_checkpoint=f"{sys.argv[1]}/resume/checkpoint-3")
    wanted = state(whole.model, whole.r2)
    for name, value in state(resumed.model, resumed.r2).items():
        assert torch.equal(value, wanted[name]), name


# Lightning and accelerate


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))


def data():
    g = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(64, 8, generator=g), torch.randint(4, (64,), generator=g))


class Net(pl.LightningModule):
    """`first`: the gradients that the first step of the optimizer is given."""

    def __init__(self):
        super().__init__()
        self.net, self.first = network(), None

    def training_step(self, batch, index):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.first = self.first or {n: p.grad.clone() for n, p in self.net.named_parameters()}


def lightning(make=None):
    """(module, what is attached, state before)"""
    model = Net()
    callback = LightningCallback(*make(model.net)) if make else None
    before = copied(state(model, callback.r2)) if make else None
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    strategy = pl.strategies.DDPStrategy(process_group_backend="gloo")
    options = dict(accelerator="cpu", devices=distributed.get_world_size(), strategy=strategy, max_epochs=1)
    made = pl.Trainer(callbacks=[callback] if make else [], accumulate_grad_batches=2, **options, **quiet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.fit(model, DataLoader(data(), 4))
    return model, callback and callback.r2, before


def lightning_replicas(make):
    model, r2, before = lightning(make)
    assert_replicas(before, state(model, r2))


def check_lightning_with_a_palettizer(mesh):
    lightning_replicas(palettized)


def check_lightning_with_a_quantizer(mesh):
    lightning_replicas(quantized)


def check_lightning_counts_once(mesh):
    assert_once(network, lightning()[0].first, lightning(fixed)[0].first)


def accelerated(make=None, fsdp2=False):
    """(model, what is attached, state before, the first step's gradients)"""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, model = Accelerator(cpu=True, gradient_accumulation_steps=2), network()
    if fsdp2:  # what accelerate sets up on GPUs
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=1)
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    optimizer, first = torch.optim.AdamW(model.parameters(), lr=1e-2), {}
    modules = make(model) if make else []
    r2 = attach(accelerator, *modules, optimizer=optimizer) if make and not fsdp2 else TrainedModules(modules)
    before = copied(state(model, r2)) if make else None

    def see(*args):
        if not first:
            first.update({n: p.grad.clone() for n, p in model.named_parameters()})

    optimizer.register_step_pre_hook(see)
    loader = DataLoader(data(), 4, sampler=DistributedSampler(data(), shuffle=False))
    wrapped, prepared = accelerator.prepare(model, optimizer)
    assert isinstance(wrapped, FSDPModule if fsdp2 else nn.parallel.DistributedDataParallel)
    if fsdp2:
        r2 = attach(accelerator, *modules, optimizer=prepared)
    for x, y in loader:
        with accelerator.accumulate(wrapped):
            accelerator.backward(cross_entropy(wrapped(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped.parameters(), 1e6)
            prepared.step()
            prepared.zero_grad()
    return model, r2, before, first


def accelerated_replicas(make):
    model, r2, before, _ = accelerated(make)
    assert_replicas(before, state(model, r2))


def check_accelerate_with_a_palettizer(mesh):
    accelerated_replicas(palettized)


def check_accelerate_with_a_quantizer(mesh):
    accelerated_replicas(quantized)


def check_accelerate_with_fsdp2(mesh):
    """The weights of DistributedDataParallel, sharded."""
    for make in (palettized, quantized):
        model, r2, *_ = accelerated(make)
        sharded, sharded_r2, *_ = accelerated(make, fsdp2=True)
        wanted = state(model, r2)
        for name, value in state(sharded, sharded_r2).items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            assert_close(full, wanted[name], rtol=1e-4, atol=1e-5)
        assert all(isinstance(p, DTensor) for p in sharded.parameters())


def check_accelerate_counts_once(mesh):
    assert_once(network, accelerated()[3], accelerated(fixed)[3])


if __name__ == "__main__":
    ranks.main(globals())
