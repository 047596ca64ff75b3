"""Palettizer on models of transformers and peft: LoRA's zeros, experts, output channels in the second dimension."""

import pytest
import torch

import r2kernels as r2
from r2kernels import Palettizer
from r2kernels.files.loading import load_palettized

transformers = pytest.importorskip("transformers")

SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)


def test_lora_leaves_zero():
    """The matrices B that start at 0 train, and have centroids that differ."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2))
    lora = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(base, lora)
    palettizer = Palettizer(model, 2)
    zero = [layer for layer in palettizer.layers if "lora_B" in layer.name]
    assert len(zero) == 2 and not any(layer.weight().any() for layer in zero)
    tokens = torch.randint(32, (4, 12), generator=torch.Generator().manual_seed(1))
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
    losses = []
    for _ in range(16):
        opt.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        opt.step()
        palettizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    for layer in zero:
        hard = palettizer._hard([layer])[0]
        assert palettizer.centroids._buffers[layer.key].unique().numel() == 4 and hard.unique().numel() == 4


def test_channels_in_the_second_dimension(tmp_path):
    """GPT-2's weights are (in, out): groups and scales of the outputs."""
    torch.manual_seed(0)
    model = transformers.GPT2Model(
        transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
    )
    w = model.h[0].mlp.c_fc.weight
    palettizer = Palettizer(model, 2, group_size=16, per_channel_scale=True)
    made = palettizer.clustered()["h.0.mlp.c_fc.weight"]
    assert w.shape == (16, 64) and made.entries.shape == (4, 4, 1) and made.form.axis == 1
    torch.testing.assert_close(made.scales, w.detach().abs().mean(0))
    hat = r2.nn.Palettizer(torch.nn.Linear(16, 64), 2, group_size=16, per_channel_scale=True)
    with torch.no_grad():
        hat.layers[0].weight().copy_(w.t())
    hat.centroids._buffers["weight"].copy_(palettizer.centroids._buffers["h/0/mlp/c_fc/weight"])
    assert torch.equal(made.decoded(), hat.clustered()["weight"].decoded().t())
    soft = dict(zip([layer.name for layer in palettizer.layers], palettizer._soft(palettizer.layers), strict=True))
    assert soft["h.0.mlp.c_fc.weight"][0].shape == w.shape
    r2.save_palettized(palettizer, tmp_path / "f")
    assert torch.equal(load_palettized(tmp_path / "f")["h.0.mlp.c_fc.weight"], made.decoded())


def test_each_expert_has_its_own_centroids():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
    model = transformers.MixtralForCausalLM(config)
    palettizer = Palettizer(model, 2)
    experts = [layer for layer in palettizer.layers if layer.experts]
    assert experts and all(len(palettizer.centroids._buffers[layer.key]) == 4 for layer in experts)
    first = experts[0].weight()
    torch.testing.assert_close(palettizer.centroids._buffers[experts[0].key][2, :, 0], r2.kmeans(first[2], 4))
    shared = Palettizer(model, 2, group_size=2, replace=True)
    assert len(shared.centroids._buffers[experts[0].key]) == 2


def test_rows_and_tiles_of_experts(tmp_path):
    """Those of each expert's matrix; a channel is an expert."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
    model = transformers.MixtralForCausalLM(config)
    for granularity, place in (
        ("channel", lambda w: w[1]),
        ("row", lambda w: w[0, 1]),
        ((8, 4), lambda w: w[0, :8, 4:8]),
        ((8, None), lambda w: w[0, 8:16]),
    ):
        palettizer = Palettizer(
            model, 2, granularity=granularity, lut_dtype="bf16", include=["*experts*"], replace=True
        )
        layer = next(layer for layer in palettizer.layers if layer.experts)
        c = palettizer.centroids._buffers[layer.key]
        torch.testing.assert_close(c[1, :, 0], r2.kmeans(place(layer.weight()), 4))
        assert all(hat.shape == layer.weight().shape for hat in palettizer._soft_weights([layer]))
        r2.save_palettized(palettizer, tmp_path / "f")
        hard = palettizer.clustered()[layer.name].decoded()
        assert torch.equal(load_palettized(tmp_path / "f")[layer.name], hard)
        assert len(place(hard).unique()) <= 4
