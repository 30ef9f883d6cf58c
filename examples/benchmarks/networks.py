"""The networks of the comparison: each a row of its table, always with the same weights and
data.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

GROWN = re.compile(r"([a-z]+)-(\d+)")


@dataclass(frozen=True)
class Row:
    """One network with its batch; the loss is cross entropy, mean over the batch."""

    text: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int

    def make(
        self, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> tuple[nn.Module, Tensor, Tensor]:
        """(model, x, y), the same in every process: drawn in float64 on the CPU, then rounded and
        moved.
        """
        torch.manual_seed(0)
        model = self.build().double()
        x, y = (
            torch.randn(self.shape, dtype=torch.float64),
            torch.randint(0, self.classes, self.shape[:1]),
        )
        return model.to(device, dtype), x.to(device, dtype), y.to(device)


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def net_2c2d(classes: int = 10) -> nn.Sequential:
    """2C2D of DeepOBS (Schneider et al. 2019), for images of 28 x 28."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3136, 1024),
        nn.ReLU(),
        nn.Linear(1024, classes),
    )


def net_3c3d(classes: int = 10) -> nn.Sequential:
    """3C3D of DeepOBS, for images of 32 x 32."""
    pool = lambda: nn.MaxPool2d(3, 2, ceil_mode=True)
    return nn.Sequential(
        nn.Conv2d(3, 64, 5),
        nn.ReLU(),
        pool(),
        nn.Conv2d(64, 96, 3),
        nn.ReLU(),
        pool(),
        nn.Conv2d(96, 128, 3, padding=1),
        nn.ReLU(),
        pool(),
        nn.Flatten(),
        nn.Linear(1152, 512),
        nn.ReLU(),
        nn.Linear(512, 256),
        nn.ReLU(),
        nn.Linear(256, classes),
    )


def all_cnn_c(classes: int = 100) -> nn.Sequential:
    """All-CNN-C (Springenberg et al. 2015), as in DeepOBS."""
    layers: list[nn.Module] = []
    before = 3
    for after, kernel, stride, padding in (
        (96, 3, 1, 1),
        (96, 3, 1, 1),
        (96, 3, 2, 1),
        (192, 3, 1, 1),
        (192, 3, 1, 1),
        (192, 3, 2, 1),
        (192, 3, 1, 0),
        (192, 1, 1, 0),
        (classes, 1, 1, 0),
    ):
        layers += [nn.Conv2d(before, after, kernel, stride, padding), nn.ReLU()]
        before = after
    return nn.Sequential(*layers, nn.AvgPool2d(6), nn.Flatten())


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut (He et al. 2016), with additions and ReLU in place."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and before == after
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        out += self.shortcut(x)
        return self.relu(out)


def resnet18(classes: int = 1000) -> nn.Module:
    """ResNet-18 in eval mode, its running statistics not those of a fresh network."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]
    before = 64
    for after, stride in (
        (64, 1),
        (64, 1),
        (128, 2),
        (128, 1),
        (256, 2),
        (256, 1),
        (512, 2),
        (512, 1),
    ):
        layers.append(BasicBlock(before, after, stride))
        before = after
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-0.1, 0.1)
            m.running_var.uniform_(0.8, 1.2)
    return model.eval()


class Connected(nn.Module):
    """Layers of ReLU that are given more than what is right before them.

    Args:
        depth: how many layers.
        how: "residual": each adds to what it is given; "sums": each is given the sum of all before
            it; "concatenated": all before it, side by side, to which it adds 16 features.
    """

    def __init__(self, depth: int, how: str, width: int = 64, classes: int = 10):
        super().__init__()
        self.how, more = how, 16 if how == "concatenated" else 0
        ends = [(width + i * more, more or width) for i in range(depth)]
        self.layers = nn.ModuleList(nn.Linear(*end) for end in ends)
        self.head = nn.Linear(width + depth * more, classes)

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.layers:
            found.append(torch.relu(layer(self.join(found))))
            if self.how == "residual":
                found = [found[0] + found[1]]
        return self.head(self.join(found))

    def join(self, found: list[Tensor]) -> Tensor:
        """What a layer is given."""
        return torch.cat(found, 1) if self.how == "concatenated" else sum(found[1:], found[0])


def convolutions(depth: int, channels: int = 128, classes: int = 100) -> nn.Sequential:
    """Convolutions of as many channels, for images of 8 x 8."""
    layers = [nn.Conv2d(3, channels, 3, padding=1), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    )


class Transformer(nn.Module):
    """A transformer encoder on sequences of vectors, pooled over the sequence."""

    def __init__(self, width: int = 128, layers: int = 4, classes: int = 100):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def lenet(classes: int = 10) -> nn.Sequential:
    """LeNet-5 with max pooling (LeCun et al. 1998), for images of 28 x 28."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        *mlp(400, 120, 84, classes),
    )


def late_convolutions(classes: int = 100) -> nn.Sequential:
    """Most channels where images are small, and a global average."""
    layers: list[nn.Module] = []
    for before, after, stride in ((3, 32, 2), (32, 64, 2), (64, 256, 2), (256, 256, 1)):
        layers += [nn.Conv2d(before, after, 3, stride, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, classes))


ROWS = {
    "mlp-small": Row("MLP 10-32-32-3", lambda: mlp(10, 32, 32, 3), (32, 10), 3),
    "mlp-digits": Row("MLP 784-128-10", lambda: mlp(784, 128, 10), (64, 784), 10),
    "mlp-tanh": Row(
        "MLP 100-100-100-100, tanh",
        lambda: mlp(100, 100, 100, 100, activation=nn.Tanh),
        (128, 100),
        100,
    ),
    "mlp-wide": Row("MLP 784-512-512-1000", lambda: mlp(784, 512, 512, 1000), (32, 784), 1000),
    "mlp-narrow": Row("MLP 784-256-64-1000", lambda: mlp(784, 256, 64, 1000), (32, 784), 1000),
    "lenet": Row("LeNet-5, 28 x 28", lenet, (32, 1, 28, 28), 10),
    "2c2d": Row("2C2D, 28 x 28", net_2c2d, (32, 1, 28, 28), 10),
    "3c3d": Row("3C3D, 32 x 32", net_3c3d, (32, 3, 32, 32), 10),
    "allcnn": Row("All-CNN-C, 32 x 32", all_cnn_c, (8, 3, 32, 32), 100),
    "late": Row("4 late convolutions, 32 x 32", late_convolutions, (16, 3, 32, 32), 100),
    "resnet18": Row("ResNet-18, 64 x 64, additions in place", resnet18, (4, 3, 64, 64), 1000),
    "transformer": Row("transformer, 4 layers, 64 tokens", Transformer, (16, 64, 128), 100),
    "tiny": Row("MLP 8-8-5, for tests of this script", lambda: mlp(8, 8, 5), (4, 8), 5),
}


def sized(classes: int = 16, n: int = 32, width: int = 128, depth: int = 4) -> Row:
    """An MLP with inputs as wide as its layers."""
    build = lambda: mlp(*[width] * depth, classes)
    return Row(f"MLP, {depth} layers of {width}", build, (n, width), classes)


def connected(how: str) -> Callable[[int], Row]:
    return lambda depth: Row(f"{depth} layers, {how}", lambda: Connected(depth, how), (16, 64), 10)


# networks of any size: how each is made
GROWING: dict[str, Callable[[int], Row]] = {
    "classes": lambda size: sized(classes=size),
    "samples": lambda size: sized(n=size),
    "width": lambda size: sized(width=size),
    "chain": lambda size: sized(depth=size),
    **{how: connected(how) for how in ("residual", "sums", "concatenated")},
    "convolutions": lambda size: Row(
        f"{size} convolutions", lambda: convolutions(size), (4, 3, 8, 8), 100
    ),
    "tokens": lambda size: Row(
        f"transformer, 2 layers, {size} tokens",
        lambda: Transformer(64, 2, 10),
        (2, size, 64),
        10,
    ),
}


def find(name: str) -> Row:
    """The row of that name; `width-256` is the network of GROWING of that size."""
    if name in ROWS:
        return ROWS[name]
    match = GROWN.fullmatch(name)
    if match is None or match[1] not in GROWING:
        raise KeyError(
            f"no row {name!r}; there are {', '.join(ROWS)}, and of any size {', '.join(GROWING)}"
        )
    return GROWING[match[1]](int(match[2]))
