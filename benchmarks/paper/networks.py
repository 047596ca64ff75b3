"""ResNet, MobileNet-V1 and MobileNet-V2: the published networks for ImageNet, and small ones of the same blocks for
8x8 digits."""

from collections import OrderedDict

from torch import nn


def convolution(inputs, outputs, size, stride=1, groups=1, activation=nn.ReLU):
    parts = OrderedDict(
        conv=nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False),
        norm=nn.BatchNorm2d(outputs),
    )
    if activation:
        parts["act"] = activation()
    return nn.Sequential(parts)


class Residual(nn.Module):
    """shortcut(x) + branch(x), then ReLU where `last`."""

    def __init__(self, branch, shortcut, last):
        super().__init__()
        self.branch, self.shortcut, self.last = branch, shortcut, nn.ReLU() if last else nn.Identity()

    def forward(self, x):
        return self.last(self.shortcut(x) + self.branch(x))


def basic_block(inputs, outputs, stride):
    same = inputs == outputs and stride == 1
    branch = nn.Sequential(
        OrderedDict(
            conv1=convolution(inputs, outputs, 3, stride), conv2=convolution(outputs, outputs, 3, activation=None)
        )
    )
    return Residual(branch, nn.Identity() if same else convolution(inputs, outputs, 1, stride, activation=None), True)


def separable(inputs, outputs, stride):
    return nn.Sequential(
        OrderedDict(depthwise=convolution(inputs, inputs, 3, stride, inputs), pointwise=convolution(inputs, outputs, 1))
    )


def inverted(inputs, outputs, stride, factor):
    hidden, parts = inputs * factor, OrderedDict()
    if factor > 1:
        parts["expand"] = convolution(inputs, hidden, 1, activation=nn.ReLU6)
    parts["depthwise"] = convolution(hidden, hidden, 3, stride, hidden, activation=nn.ReLU6)
    parts["project"] = convolution(hidden, outputs, 1, activation=None)
    branch = nn.Sequential(parts)
    return Residual(branch, nn.Identity(), False) if inputs == outputs and stride == 1 else branch


def network(stem, blocks, width, classes):
    named = {f"block{i}": block for i, block in enumerate(blocks)}
    return nn.Sequential(
        OrderedDict(
            stem=stem, **named, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), head=nn.Linear(width, classes)
        )
    )


def chain(make, inputs, plan):
    """Blocks `make(inputs, outputs, stride)` for a plan of (outputs, stride)."""
    blocks = []
    for outputs, stride, *rest in plan:
        blocks.append(make(inputs, outputs, stride, *rest))
        inputs = outputs
    return blocks


def resnet(small, channels, classes):
    if small:
        return network(
            convolution(channels, 32, 3), chain(basic_block, 32, [(32, 1), (64, 2), (64, 1), (128, 2)]), 128, classes
        )
    stem = nn.Sequential(OrderedDict(conv=convolution(channels, 64, 7, 2), pool=nn.MaxPool2d(3, 2, 1)))
    return network(
        stem,
        chain(basic_block, 64, [(64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)]),
        512,
        classes,
    )


def mobilenet_v1(small, channels, classes):
    if small:
        return network(
            convolution(channels, 32, 3), chain(separable, 32, [(64, 1), (64, 2), (128, 1), (128, 2)]), 128, classes
        )
    plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    return network(convolution(channels, 32, 3, 2), chain(separable, 32, plan), 1024, classes)


def mobilenet_v2(small, channels, classes):
    if small:
        plan, first, last = (
            [(24, 1, 1), (32, 2, 4), (32, 1, 4), (64, 2, 4), (64, 1, 4)],
            convolution(channels, 24, 3, activation=nn.ReLU6),
            128,
        )
    else:
        stages = [
            (16, 1, 1, 1),
            (24, 2, 2, 6),
            (32, 3, 2, 6),
            (64, 4, 2, 6),
            (96, 3, 1, 6),
            (160, 3, 2, 6),
            (320, 1, 1, 6),
        ]
        plan = [
            (width, stride if i == 0 else 1, factor) for width, count, stride, factor in stages for i in range(count)
        ]
        first, last = convolution(channels, 32, 3, 2, activation=nn.ReLU6), 1280
    blocks = chain(inverted, first.conv.out_channels, plan)
    return network(first, [*blocks, convolution(plan[-1][0], last, 1, activation=nn.ReLU6)], last, classes)


NETWORKS = {"ResNet-18": resnet, "MobileNet-V1": mobilenet_v1, "MobileNet-V2": mobilenet_v2}
