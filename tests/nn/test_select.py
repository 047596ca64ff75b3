"""Which weights of a model RangeRegularizer takes, and the arguments that it refuses."""

import pytest
import torch
from torch import nn

import r2kernels as r2
from r2kernels.nn import select_weights

pytestmark = pytest.mark.usefixtures("nan_filled", "one_thread")


class Block(nn.Module):
    """Every kind of module that matters to the selection."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(2, 3, 3), nn.Conv2d(2, 4, 3, groups=2), nn.Conv3d(1, 2, 2)
        self.up = nn.ConvTranspose2d(2, 3, 2)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.LayerNorm([4, 5]), nn.GroupNorm(2, 4)])
        self.same, self.separate = (
            nn.MultiheadAttention(4, 2),
            nn.MultiheadAttention(4, 2, kdim=6, vdim=8, add_bias_kv=True),
        )
        self.embedding = nn.Embedding(7, 4)
        self.head, self.tied, self.bilinear = nn.Linear(4, 7), nn.Linear(4, 7), nn.Bilinear(2, 3, 4)
        self.tied.weight = self.head.weight
        self.lstm, self.scale = nn.LSTM(3, 4), nn.Parameter(torch.ones(4, 4))


USUAL = [
    "conv1.weight",
    "conv2.weight",
    "conv3.weight",
    "up.weight",
    "same.in_proj_weight",
    "same.out_proj.weight",
    "separate.q_proj_weight",
    "separate.k_proj_weight",
    "separate.v_proj_weight",
    "separate.out_proj.weight",
    "head.weight",
    "bilinear.weight",
]


RULES = [
    ({}, USUAL),
    ({"include": "embedding"}, [*USUAL[:10], "embedding.weight", *USUAL[10:]]),
    ({"include": "*.weight_?h_l0"}, [*USUAL, "lstm.weight_ih_l0", "lstm.weight_hh_l0"]),
    ({"include": ["scale", "embedding.weight"]}, ["scale", *USUAL[:10], "embedding.weight", *USUAL[10:]]),
    ({"include": lambda name, p: p.shape == (7, 4) and "emb" in name}, [*USUAL[:10], "embedding.weight", *USUAL[10:]]),
    ({"exclude": "conv*"}, USUAL[3:]),
    ({"exclude": ["*attention*", "head", "s*"]}, [*USUAL[:4], "bilinear.weight"]),  # tied.weight is head.weight
    ({"exclude": ["tied", "s*"]}, [*USUAL[:4], "bilinear.weight"]),
    ({"exclude": lambda name, p: p.dim() > 2}, [name for name in USUAL[4:] if name != "bilinear.weight"]),
    ({"include": "embedding", "exclude": ["*.weight", "*_weight"], "only": True}, None),
]


@pytest.mark.parametrize(("rule", "expected"), RULES, ids=lambda x: None)
def test_selection(rule, expected):
    if expected is None:
        with pytest.raises(
            ValueError, match=r"Block has no conv, linear or attention weight left after exclude=.*; use include="
        ):
            select_weights(Block(), include=rule["include"], exclude=rule["exclude"])
    else:
        assert r2.RangeRegularizer(Block(), **rule).names == expected


def test_a_lone_layer():
    assert r2.RangeRegularizer(nn.Linear(3, 2)).names == ["weight"]


BAD = [
    ({"loss": "l2"}, ValueError, r"loss must be one of .*'soft_min_max'.*, got 'l2'"),
    ({"alpha_unit": "var"}, ValueError, "alpha_unit must be 'raw' or 'std', got 'var'"),
    ({"weight": "big"}, TypeError, "weight must be a number"),
    ({"weight": float("nan")}, ValueError, "weight must be a finite number, got nan"),
    ({"loss": "kure", "cluster_dim": 2}, ValueError, "cluster_dim must be 1 for loss='kure', got 2"),
    ({"cluster_dim": 0}, ValueError, "cluster_dim must be an int >= 1, got 0"),
    ({"cluster_dim": 100}, ValueError, "fewer than cluster_dim=100"),
    ({"layout": "x"}, ValueError, "layout must be one of"),
    ({"loss": "margin", "k": 0}, ValueError, "k must be an int >= 1, or a fraction in"),
    ({"loss": "margin", "margin_std": 0}, ValueError, "margin_std must be a number > 0, got 0"),
    ({"alpha": "x"}, TypeError, "alpha must be a number"),
    ({"alpha": [0.1, 0.2]}, ValueError, "alpha has 2 values, the model has 12 weights"),
    ({"alpha": torch.ones(2)}, ValueError, r"alpha has shape \(2,\); allowed are \(\) and \(12,\)"),
    ({"include": "nothing*"}, ValueError, r"include='nothing\*' matches no parameter of two or more dimensions"),
    ({"include": [3]}, TypeError, r"include must be a name pattern, a list of them, or a predicate .*, got \[3\]"),
    ({"exclude": 3}, TypeError, "exclude must be a name pattern, a list of them, or a predicate .*, got 3"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[str(options) for options, _, _ in BAD])
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        r2.RangeRegularizer(Block(), **options)


def test_an_exclude_that_matches_nothing_warns():
    with pytest.warns(UserWarning, match=r"exclude='classifier' matches none of the model's weights"):
        r2.RangeRegularizer(Block(), exclude="classifier")
    with pytest.raises(ValueError, match="ReLU has no conv, linear or attention weight; use include="):
        r2.RangeRegularizer(nn.ReLU())
