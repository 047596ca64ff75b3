"""Which weights are attached to: other kinds of modules, computed weights, language models, and what is left out."""

import warnings

import pytest
import torch
from nn.quantized import plain
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

import r2kernels as r2
from r2kernels import Palettizer, Quantizer
from r2kernels.nn import select_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def palettize(model, **options):
    return Palettizer(model, 2, **options)


def quantize(model, **options):
    return Quantizer(model, "lsq", 4, **options)


ATTACH = (palettize, quantize)


def names(owner):
    return [layer.name for layer in owner.layers]


@pytest.mark.parametrize("attach", ATTACH)
def test_include_and_exclude(attach):
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "free": nn.Module()})
    model["free"].w = nn.Parameter(torch.randn(64, 64))
    with pytest.warns(UserWarning, match=r"^67 % of the numbers .* left out: free\.w\. include= adds them \(include="):
        assert names(attach(model)) == ["a.weight", "b.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        owner = attach(model, include="free.w", exclude="b", replace=True)
        assert names(owner) == ["a.weight", "free.w"]
        assert names(attach(model, exclude=["free.w", "b"], replace=True)) == ["a.weight"]
        with pytest.raises(ValueError, match="include='nothing' matches no parameter"):
            attach(model, include="nothing", replace=True)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 16, padding_idx=0)
        self.net, self.head = kind(16, 24, num_layers=2, bidirectional=True, batch_first=True), nn.Linear(48, 20)

    def forward(self, tokens):
        return self.head(self.net(self.embed(tokens))[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("attach", ATTACH)
def test_recurrent_layers(attach, kind):
    """They run on their soft and hard weights, and stand as they were afterwards."""
    model, tokens = Recurrent(kind), torch.randint(20, (3, 7), generator=torch.Generator().manual_seed(0))
    dense = model(tokens)
    owner = attach(model, include="embed")
    if attach is quantize:
        owner.initialize(tokens)
    assert len(owner.layers) == 10
    out = model(tokens)
    assert 0 < (out - dense).norm() / dense.norm() < 0.6
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.net.parameters())
    kept = dict(zip(model.net._flat_weights_names, model.net._flat_weights, strict=True))
    assert all(w is getattr(model.net, name) for name, w in kept.items())
    hard = model.eval()(tokens)
    owner.remove()
    assert_close(model(tokens), hard, rtol=1e-5, atol=1e-6)


def test_a_quantizer_tells_of_embeddings():
    with pytest.warns(UserWarning, match=r"left out: embed\.weight"):
        quantize(nn.ModuleDict({"embed": nn.Embedding(100, 64), "head": nn.Linear(64, 64)}))


def parametrized():
    model = plain()
    parametrizations.weight_norm(model[4])
    return model, ["4.parametrizations.weight.original0", "4.parametrizations.weight.original1"]


def pruned():
    model = plain()
    prune.l1_unstructured(model[4], "weight", 0.6)
    return model, ["4.weight_orig", "4.weight_mask"]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
def old_weight_norm():
    model = plain()
    nn.utils.weight_norm(model[4])
    return model, ["4.weight_g", "4.weight_v"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("make", [parametrized, pruned, old_weight_norm])
@pytest.mark.parametrize("attach", ATTACH)
def test_computed_weights(attach, make, tmp_path):
    """The value that a parametrization or a hook gives is replaced, and trains what it is made of."""
    model, own = make()
    x = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    dense = model(x)
    owner = attach(model)
    assert names(owner) == ["0.weight", "4.weight"]
    if attach is quantize:
        owner.initialize(x)
    seen = []
    model[4].register_forward_hook(lambda module, args, out: seen.append((args[0], out - module.bias)))
    for part in (model, lambda x: model[4](model[:4](x))):
        part(x).square().sum().backward()
        hat = owner._soft_weights(owner.layers[1:])[0]
        assert_close(seen[-1][1], nn.functional.linear(seen[-1][0], hat), rtol=1e-4, atol=1e-5)
        trained = [p for name, p in model.named_parameters() if name in own]
        assert trained and all(p.grad.abs().max() > 0 for p in trained)
    model.eval()
    hard = model(x)
    assert not torch.equal(hard, dense) and owner.model_state().keys().isdisjoint([*own, "4.weight"])
    r2.save_quantized(owner, tmp_path / "f") if attach is quantize else r2.save_palettized(owner, tmp_path / "f")
    loaded = plain()
    loaded.load_state_dict(r2.load_palettized(tmp_path / "f"))
    owner.remove()
    assert isinstance(model[4].weight, nn.Parameter)
    assert torch.equal(model(x), hard) and torch.equal(loaded.eval()(x), hard)


def test_pruned_zeros_stay_zero():
    model, _ = pruned()
    zeros = model[4].weight == 0
    owner = quantize(model)
    owner.initialize(torch.randn(8, 2, 6, 6))
    assert zeros.sum() == 768 and (owner._hard(owner.layers[1:])[0][zeros] == 0).all()


@pytest.mark.parametrize("method, options", [("ewgs", {}), ("pact", {}), ("lsq", {"levels": "seq"})])
def test_pruned_weights_need_a_level_0(method, options):
    model, _ = pruned()
    with pytest.raises(ValueError, match=r'4\.weight is pruned, but method ".*" with weight_bits=2 .* has no level 0'):
        Quantizer(model, method, 2, **options)
    owner = Quantizer(model, method, 2, overrides={"4": {"method": "lsq", "levels": "ternary"}}, **options)
    owner.initialize(torch.randn(8, 2, 6, 6))
    assert (owner._hard(owner.layers[1:])[0][model[4].weight_mask == 0] == 0).all()


def test_pruning_after_the_attachment_is_an_error():
    model = plain()
    palettize(model)
    prune.l1_unstructured(model[4], "weight", 0.5)
    with pytest.raises(RuntimeError, match=r"weight of a Linear is no longer its parameter .*attach again"):
        model(torch.randn(8, 2, 6, 6))


transformers = pytest.importorskip("transformers")


def language_model(kind):
    torch.manual_seed(0)
    small = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    moe = dict(num_experts_per_tok=2, num_key_value_heads=2)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    elif kind == "bert":
        config = transformers.BertConfig(**small, max_position_embeddings=16)
    elif kind == "llama":
        config = transformers.LlamaConfig(**small, num_key_value_heads=2)
    elif kind == "mixtral":
        config = transformers.MixtralConfig(**small, **moe, num_local_experts=4)
    else:
        config = transformers.Qwen3MoeConfig(**small, **moe, num_experts=4, moe_intermediate_size=64, head_dim=16)
    return transformers.AutoModel.from_config(config)


@pytest.mark.filterwarnings("ignore:.*of the numbers in the model's matrices")
@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("attach", ATTACH)
def test_language_models(attach, kind):
    """All of the matrices but the embeddings (Quantizer) and what is smaller than a palette; all experts by groups."""
    model, tokens = language_model(kind), torch.arange(12).reshape(2, 6)
    dense = model(tokens).last_hidden_state
    owner = attach(model)
    taken = sum(layer.weight().numel() for layer in owner.layers)
    every = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.dim() >= 2 and "embed" not in name and "wte" not in name and "wpe" not in name
    )
    embeddings = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    assert taken >= 0.98 * (every + (embeddings if attach is palettize else 0))
    out = model(tokens).last_hidden_state
    assert 0 < (out - dense).norm() / dense.norm() < 1
    out.square().sum().backward()
    assert all(layer.weight().grad is not None for layer in owner.layers)
    hard = model.eval()(tokens).last_hidden_state
    for layer, w in zip(owner.layers, owner._hard(owner.layers), strict=True):
        pieces = w if layer.experts else [w]
        assert all(len(piece.unique()) <= (4 if attach is palettize else 16) for piece in pieces)
        if layer.experts:
            assert len(w.unique()) > len(w[0].unique())
    owner.remove()
    assert_close(model(tokens).last_hidden_state, hard, rtol=1e-4, atol=1e-5)


def test_conv1d_has_its_output_channels_last():
    model = language_model("gpt2")
    owner = Quantizer(model, "lsq", 4, 8, axis="output", include="wte")
    layer = next(layer for layer in owner.layers if layer.name == "h.0.attn.c_attn.weight")
    assert layer.output_axis == 1 and layer.weight().shape == (32, 96)
    assert owner.weights._modules[layer.key].step.shape == (96,)
    assert "h/0/attn/c_attn" in owner.inputs._modules and len(select_weights(model)) == 4
