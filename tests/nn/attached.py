"""Models for what attaches to a model, and their inputs."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Net(nn.Module):
    """Convolutions, an embedding tied to the head, attention; `checkpointed` computes the body again in backward."""

    def __init__(self, checkpointed=False, dropout=0.0):
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight
        self.drop, self.checkpointed = nn.Dropout(dropout), checkpointed

    def body(self, x):
        x = self.conv(input=x.transpose(1, 2)).transpose(1, 2).relu()
        return self.drop(x + self.attention(x, x, x, need_weights=False)[0])

    def forward(self, tokens):
        x = self.embed(tokens)
        x = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        return self.head(x)


def net(seed=0, **options):
    torch.manual_seed(seed)
    return Net(**options)


def images(seed=1, count=8):
    """(images, labels) for the convolutional networks."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 6, 6, generator=g), torch.randint(10, (count,), generator=g)


def tokens():
    """A batch for `Net`."""
    return torch.randint(40, (3, 7), generator=torch.Generator().manual_seed(2))
