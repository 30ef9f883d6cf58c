"""The table of layers, (name, module, input), with options that are easily got wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nnj import L2Norm, Reshape, Sinusoidal, SkipConnection, TruncExp
from tests.support import layers_shape


def away(*shape: int) -> Tensor:
    """Random numbers, none of them within 0.05 of the usual kinks -3, -1, -0.5, 0, 0.5, 1, 3, 6."""
    x = 2.5 * torch.randn(*shape, dtype=torch.float64)
    for kink in (-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0):
        near = (x - kink).abs() < 0.05
        x = torch.where(near, kink + 0.1 * torch.where(x < kink, -1.0, 1.0), x)
    return x


def settled(module: nn.Module) -> nn.Module:
    """The module in eval with parameters and running statistics that are not zeros and ones."""
    for t in (*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())):
        t.data.copy_(torch.rand_like(t) + 0.5)
    return module.eval()


class Residual(nn.Module):
    """No plugin knows it: the fallback's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.gain = nn.Parameter(torch.randn(3))
        self.register_buffer("shift", torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + torch.sin(self.inner(x)) * self.inner.weight.sum() + self.shift


class Attention(nn.Module):
    """Its kernels for speed cannot be differentiated forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(*(x @ self.weight)[:, None].chunk(3, -1))[
            :, 0
        ]


Case = tuple[str, Callable[[], nn.Module], Callable[[], Tensor]]
r = torch.randn
CLASS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

AFFINE: list[Case] = [
    ("linear", lambda: nn.Linear(3, 4), lambda: r(4, 3)),
    ("linear-sequence", lambda: nn.Linear(3, 2), lambda: r(2, 2, 3)),
    ("linear-two-axes", lambda: nn.Linear(2, 3, bias=False), lambda: r(2, 2, 2, 2)),
    ("conv1d", lambda: nn.Conv1d(2, 3, 3, padding=1, stride=2), lambda: r(3, 2, 6)),
    (
        "conv1d-circular-uneven",
        lambda: nn.Conv1d(2, 2, 4, padding="same", padding_mode="circular"),
        lambda: r(2, 2, 5),
    ),
    (
        "conv3d",
        lambda: nn.Conv3d(1, 2, (2, 1, 2), padding=(1, 0, 0), dilation=(1, 1, 2)),
        lambda: r(2, 1, 2, 2, 3),
    ),
    (
        "conv3d-replicate",
        lambda: nn.Conv3d(1, 1, 2, padding=(1, 0, 1), padding_mode="replicate"),
        lambda: r(2, 1, 2, 2, 2),
    ),
]
AFFINE += [
    (f"conv2d-{name}", lambda o=options: nn.Conv2d(*o[0], **o[1]), lambda s=shape: r(*s))
    for name, shape, *options in [
        ("plain", (4, 2, 4, 3), (2, 3, 2), {}),
        ("1x1", (2, 3, 2, 2), (3, 2, 1), {}),
        ("no-bias", (2, 2, 3, 4), (2, 3, (2, 3)), {"bias": False}),
        ("stride-does-not-divide", (2, 2, 6, 5), (2, 2, 3), {"stride": (2, 3), "padding": 1}),
        ("dilation", (2, 1, 5, 5), (1, 2, (2, 3)), {"dilation": (3, 2), "padding": (1, 2)}),
        ("grouped", (2, 4, 3, 3), (4, 6, 2), {"groups": 2, "padding": 1}),
        ("depthwise", (2, 3, 3, 3), (3, 6, 2), {"groups": 3, "stride": 2}),
        ("valid", (2, 2, 3, 3), (2, 2, 2), {"padding": "valid"}),
        ("same", (2, 2, 3, 3), (2, 2, 3), {"padding": "same"}),
        ("same-even", (2, 2, 3, 4), (2, 2, (2, 4)), {"padding": "same"}),
        (
            "same-even-dilated-grouped",
            (2, 2, 4, 4),
            (2, 4, 2),
            {"padding": "same", "dilation": (3, 1), "groups": 2},
        ),
        (
            "same-even-reflect",
            (2, 2, 4, 4),
            (2, 2, (2, 4)),
            {"padding": "same", "padding_mode": "reflect"},
        ),
        (
            "valid-circular",
            (2, 2, 3, 3),
            (2, 2, 2),
            {"padding": "valid", "padding_mode": "circular"},
        ),
        *[
            (
                mode,
                (2, 2, 4, 3),
                (2, 2, 3),
                {"padding": (2, 1), "padding_mode": mode, "stride": (2, 1)},
            )
            for mode in ("reflect", "replicate", "circular")
        ],
        *[
            (
                f"{mode}-grouped-dilated",
                (2, 2, 4, 4),
                (2, 2, 2),
                {"padding": 2, "padding_mode": mode, "groups": 2, "dilation": 2, "stride": 3},
            )
            for mode in ("reflect", "replicate", "circular")
        ],
    ]
]

AFFINE += [
    (
        f"convtranspose{name}",
        lambda o=options: CLASS[o[0][0]](*o[0][1:], **o[1]),
        lambda s=shape: r(*s),
    )
    for name, shape, *options in [
        ("1d", (2, 3, 4), (1, 3, 2, 3), {}),
        ("1d-stride", (2, 2, 3), (1, 2, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
        ("2d", (2, 2, 2, 3), (2, 2, 3, 2), {}),
        ("2d-no-bias", (2, 2, 2, 2), (2, 2, 3, (2, 3)), {"bias": False, "stride": (2, 1)}),
        (
            "2d-all",
            (2, 4, 3, 2),
            (2, 4, 6, (3, 2)),
            {
                "stride": (3, 2),
                "padding": (2, 0),
                "output_padding": (2, 1),
                "groups": 2,
                "dilation": (2, 3),
            },
        ),
        ("2d-more-than-a-stride", (2, 2, 2, 2), (2, 2, 2, 2), {"dilation": 3, "output_padding": 2}),
        ("2d-padding-beyond-reach", (2, 1, 4, 4), (2, 1, 2, 1), {"padding": 1}),
        ("2d-depthwise", (2, 3, 2, 2), (2, 3, 3, 2), {"groups": 3, "stride": 2}),
        ("2d-depthwise-wider", (2, 2, 2, 2), (2, 2, 4, 2), {"groups": 2}),
        ("3d", (2, 2, 2, 1, 2), (3, 2, 2, (2, 1, 2)), {"stride": (1, 1, 2), "padding": (1, 0, 0)}),
    ]
]

POOLING: list[Case] = [
    ("maxpool2d", lambda: nn.MaxPool2d(2), lambda: r(4, 2, 4, 5)),
    ("maxpool2d-overlap", lambda: nn.MaxPool2d(3, stride=(1, 2), padding=1), lambda: r(2, 2, 4, 4)),
    (
        "maxpool2d-dilation-ceil",
        lambda: nn.MaxPool2d((2, 3), stride=2, dilation=(2, 1), padding=(0, 1), ceil_mode=True),
        lambda: r(2, 2, 6, 4),
    ),
    ("maxpool1d", lambda: nn.MaxPool1d(2, padding=1), lambda: r(3, 2, 5)),
    ("maxpool3d", lambda: nn.MaxPool3d(2, stride=1), lambda: r(2, 1, 3, 2, 3)),
    ("adaptivemaxpool2d", lambda: nn.AdaptiveMaxPool2d((2, 3)), lambda: r(2, 2, 5, 4)),
    ("adaptivemaxpool1d", lambda: nn.AdaptiveMaxPool1d(3), lambda: r(2, 2, 5)),
    ("avgpool2d", lambda: nn.AvgPool2d(2), lambda: r(4, 2, 4, 5)),
    (
        "avgpool2d-overlap",
        lambda: nn.AvgPool2d((3, 2), stride=(1, 2), padding=1),
        lambda: r(2, 2, 4, 4),
    ),
    (
        "avgpool2d-ceil",
        lambda: nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True),
        lambda: r(2, 1, 6, 4),
    ),
    (
        "avgpool2d-ceil-exclude",
        lambda: nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
        lambda: r(2, 1, 6, 4),
    ),
    (
        "avgpool2d-exclude",
        lambda: nn.AvgPool2d(2, padding=1, count_include_pad=False),
        lambda: r(2, 2, 4, 3),
    ),
    (
        "avgpool2d-divisor",
        lambda: nn.AvgPool2d(2, padding=1, divisor_override=3, ceil_mode=True),
        lambda: r(2, 2, 4, 3),
    ),
    (
        "avgpool1d",
        lambda: nn.AvgPool1d(3, stride=2, padding=1, count_include_pad=False),
        lambda: r(2, 2, 5),
    ),
    (
        "avgpool3d",
        lambda: nn.AvgPool3d(2, stride=1, padding=(1, 0, 1), divisor_override=5),
        lambda: r(2, 1, 2, 2, 3),
    ),
    ("adaptiveavgpool2d", lambda: nn.AdaptiveAvgPool2d((2, 3)), lambda: r(4, 2, 5, 4)),
    ("adaptiveavgpool2d-one", lambda: nn.AdaptiveAvgPool2d(1), lambda: r(2, 3, 3, 4)),
    ("adaptiveavgpool2d-none", lambda: nn.AdaptiveAvgPool2d((None, 2)), lambda: r(2, 2, 3, 3)),
    ("adaptiveavgpool2d-grows", lambda: nn.AdaptiveAvgPool2d((5, 2)), lambda: r(2, 1, 3, 2)),
    ("adaptiveavgpool1d", lambda: nn.AdaptiveAvgPool1d(2), lambda: r(2, 2, 5)),
    ("lppool1d", lambda: nn.LPPool1d(3, 2, stride=1), lambda: r(2, 2, 5).abs() + 0.1),
    ("lppool2d", lambda: nn.LPPool2d(2, (2, 3), ceil_mode=True), lambda: r(2, 2, 3, 4)),
    ("lppool2d-one", lambda: nn.LPPool2d(1.0, 2, stride=(1, 2)), lambda: r(2, 1, 3, 4).abs() + 0.1),
    ("lppool3d", lambda: nn.LPPool3d(4, 2, stride=1), lambda: r(2, 1, 2, 3, 2)),
    ("adaptiveavgpool3d", lambda: nn.AdaptiveAvgPool3d((1, 2, 1)), lambda: r(2, 1, 2, 3, 2)),
]

SHAPE: list[Case] = [
    ("identity", lambda: nn.Identity(), lambda: r(4, 3)),
    ("flatten", lambda: nn.Flatten(), lambda: r(2, 2, 3, 2)),
    ("flatten-middle", lambda: nn.Flatten(1, 2), lambda: r(2, 2, 3, 2)),
    ("flatten-negative", lambda: nn.Flatten(-2, -1), lambda: r(2, 2, 3, 2)),
    ("unflatten", lambda: nn.Unflatten(1, (2, 3)), lambda: r(2, 6, 2)),
    ("unflatten-negative", lambda: nn.Unflatten(-1, (2, -1)), lambda: r(2, 2, 4)),
]
SHAPE += [
    (f"{cls.__name__.lower()}-eval", lambda cls=cls: cls().eval(), lambda s=shape: r(*s))
    for cls, shape in [
        (nn.Dropout, (4, 3)),
        (nn.Dropout1d, (2, 2, 3)),
        (nn.Dropout2d, (2, 2, 2, 2)),
        (nn.Dropout3d, (2, 1, 2, 2, 2)),
        (nn.AlphaDropout, (2, 4)),
        (nn.FeatureAlphaDropout, (2, 2, 3)),
    ]
]
SHAPE += [
    ("dropout-p0", lambda: nn.Dropout(0.0), lambda: r(2, 3)),
    ("dropout-inplace", lambda: nn.Dropout(inplace=True).eval(), lambda: r(2, 3)),
]

NORM: list[Case] = [
    ("batchnorm1d", lambda: settled(nn.BatchNorm1d(3)), lambda: r(4, 3)),
    ("batchnorm1d-places", lambda: settled(nn.BatchNorm1d(2)), lambda: r(2, 2, 3)),
    ("batchnorm2d", lambda: settled(nn.BatchNorm2d(3, eps=0.1)), lambda: r(2, 3, 2, 2)),
    ("batchnorm2d-plain", lambda: settled(nn.BatchNorm2d(3, affine=False)), lambda: r(2, 3, 2, 2)),
    ("batchnorm3d", lambda: settled(nn.BatchNorm3d(2)), lambda: r(2, 2, 1, 2, 2)),
    ("layernorm", lambda: settled(nn.LayerNorm(4)), lambda: r(4, 4)),
    ("layernorm-sequence", lambda: settled(nn.LayerNorm(3)), lambda: r(2, 2, 3)),
    ("layernorm-axes", lambda: settled(nn.LayerNorm((2, 3), eps=0.1)), lambda: r(2, 2, 2, 3)),
    ("layernorm-all", lambda: settled(nn.LayerNorm((2, 3))), lambda: r(2, 2, 3)),
    ("layernorm-no-bias", lambda: settled(nn.LayerNorm(3, bias=False)), lambda: r(2, 2, 3)),
    ("layernorm-plain", lambda: nn.LayerNorm(3, elementwise_affine=False), lambda: r(2, 2, 3)),
    ("rmsnorm", lambda: settled(nn.RMSNorm(3)), lambda: r(2, 2, 3)),
    ("rmsnorm-axes", lambda: settled(nn.RMSNorm((2, 3), eps=0.1)), lambda: r(2, 2, 3)),
    ("rmsnorm-plain", lambda: nn.RMSNorm(3, elementwise_affine=False), lambda: r(2, 2, 3)),
    ("groupnorm", lambda: settled(nn.GroupNorm(2, 4)), lambda: r(2, 4, 2, 2)),
    ("groupnorm-vector", lambda: settled(nn.GroupNorm(2, 6, eps=0.1)), lambda: r(4, 6)),
    ("groupnorm-plain", lambda: nn.GroupNorm(1, 4, affine=False), lambda: r(2, 4, 2)),
    ("syncbatchnorm", lambda: settled(nn.SyncBatchNorm(3)), lambda: r(2, 3, 2, 2)),
    ("localresponsenorm", lambda: nn.LocalResponseNorm(3, alpha=0.5), lambda: r(2, 4, 2)),
    (
        "localresponsenorm-even",
        lambda: nn.LocalResponseNorm(2, alpha=0.7, beta=0.4, k=2.0),
        lambda: r(2, 3, 2, 2),
    ),
    (
        "localresponsenorm-wide",
        lambda: nn.LocalResponseNorm(7, alpha=2.0),
        lambda: r(2, 3, 1, 2, 2),
    ),
    ("instancenorm1d", lambda: nn.InstanceNorm1d(2), lambda: r(2, 2, 4)),
    ("instancenorm2d", lambda: settled(nn.InstanceNorm2d(2, affine=True)), lambda: r(2, 2, 2, 3)),
    (
        "instancenorm2d-tracked",
        lambda: settled(nn.InstanceNorm2d(2, affine=True, track_running_stats=True)),
        lambda: r(2, 2, 2, 2),
    ),
    (
        "instancenorm3d-tracked",
        lambda: settled(nn.InstanceNorm3d(2, track_running_stats=True)),
        lambda: r(2, 2, 1, 2, 2),
    ),
]

EMBEDDING: list[Case] = [
    ("embedding", lambda: nn.Embedding(5, 3), lambda: torch.tensor([[0, 4, 4], [1, 2, 1]])),
    ("embedding-one-index", lambda: nn.Embedding(4, 2), lambda: torch.tensor([3, 0, 0, 1])),
    (
        "embedding-padding",
        lambda: nn.Embedding(4, 3, padding_idx=1),
        lambda: torch.tensor([[0, 1], [1, 3], [1, 1], [2, 2]]),
    ),
    ("embeddingbag", lambda: nn.EmbeddingBag(5, 3), lambda: torch.tensor([[0, 4, 4], [1, 2, 1]])),
    (
        "embeddingbag-sum-padding",
        lambda: nn.EmbeddingBag(5, 2, mode="sum", padding_idx=2),
        lambda: torch.tensor([[0, 2, 0], [2, 2, 2], [1, 3, 2]]),
    ),
    (
        "embeddingbag-mean-padding",
        lambda: nn.EmbeddingBag(5, 2, padding_idx=0),
        lambda: torch.tensor([[0, 2, 0], [3, 3, 1]]),
    ),
    (
        "embedding-int32-axes",
        lambda: nn.Embedding(4, 2),
        lambda: torch.tensor([[[0, 1], [3, 3]], [[1, 0], [2, 2]]]).int(),
    ),
]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardtanh": nn.Hardtanh,
    "hardtanh-bounds": lambda: nn.Hardtanh(-0.5, 3.0),
    "hardsigmoid": nn.Hardsigmoid,
    "leakyrelu": nn.LeakyReLU,
    "leakyrelu-0": lambda: nn.LeakyReLU(0.0),
    "rrelu-eval": lambda: nn.RReLU().eval(),
    "threshold": lambda: nn.Threshold(0.5, -1.0),
    "elu": nn.ELU,
    "elu-alpha": lambda: nn.ELU(0.3),
    "celu": nn.CELU,
    "celu-alpha": lambda: nn.CELU(2.0),
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "softplus": nn.Softplus,
    "softplus-options": lambda: nn.Softplus(2.0, 3.0),
    "logsigmoid": nn.LogSigmoid,
    "softsign": nn.Softsign,
    "hardshrink": nn.Hardshrink,
    "hardshrink-wide": lambda: nn.Hardshrink(1.0),
    "softshrink": nn.Softshrink,
    "tanhshrink": nn.Tanhshrink,
    "prelu": nn.PReLU,
    "prelu-negative": lambda: nn.PReLU(init=-0.5),
}
INPLACE: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "relu6": lambda: nn.ReLU6(inplace=True),
    "hardtanh": lambda: nn.Hardtanh(inplace=True),
    "hardsigmoid": lambda: nn.Hardsigmoid(inplace=True),
    "leakyrelu": lambda: nn.LeakyReLU(inplace=True),
    "rrelu-eval": lambda: nn.RReLU(inplace=True).eval(),
    "threshold": lambda: nn.Threshold(0.5, -1.0, inplace=True),
    "elu": lambda: nn.ELU(0.3, inplace=True),
    "celu": lambda: nn.CELU(2.0, inplace=True),
    "selu": lambda: nn.SELU(inplace=True),
}
ACTIVATION: list[Case] = [
    *[(name, make, lambda: away(4, 3)) for name, make in ACTIVATIONS.items()],
    *[(f"{name}-inplace", make, lambda: away(2, 2, 3)) for name, make in INPLACE.items()],
    ("relu-one-axis", nn.ReLU, lambda: away(4)),
    ("prelu-channels", lambda: nn.PReLU(3), lambda: away(2, 3, 2)),
    ("prelu-channels-vector", lambda: nn.PReLU(3), lambda: away(4, 3)),
    ("softmax", lambda: nn.Softmax(-1), lambda: r(4, 3)),
    ("softmax-middle", lambda: nn.Softmax(1), lambda: r(2, 3, 2)),
    ("softmin", lambda: nn.Softmin(2), lambda: r(2, 2, 3)),
    ("softmax2d", lambda: nn.Softmax2d(), lambda: r(2, 3, 2, 1)),
    ("logsoftmax", lambda: nn.LogSoftmax(1), lambda: r(2, 3, 2)),
]

FALLBACK: list[Case] = [
    ("fallback", Residual, lambda: r(4, 3)),
    (
        "fallback-skipconnection",
        lambda: SkipConnection(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)),
        lambda: r(4, 3),
    ),
    ("fallback-sequence", Residual, lambda: r(2, 2, 3)),
    ("fallback-attention", Attention, lambda: r(2, 3, 2)),
    (
        "fallback-batchnorm-eval",
        lambda: settled(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh())),
        lambda: r(4, 2),
    ),
]

OWN: list[Case] = [
    ("sinusoidal", Sinusoidal, lambda: r(2, 3, 2)),
    (
        "truncexp",
        TruncExp,
        lambda: torch.tensor([[-20.0, -1.0], [3.0, 17.0], [0.0, 1.0], [-15.5, 15.5]]),
    ),
    ("l2norm", L2Norm, lambda: r(4, 3)),
    ("l2norm-axes", lambda: L2Norm(0.1), lambda: r(2, 2, 3)),
    ("reshape", lambda: Reshape(3, 2), lambda: r(4, 2, 3)),
    ("reshape-rest", lambda: Reshape(2, -1, 1), lambda: r(2, 6)),
]

CASES: list[Case] = [
    *AFFINE,
    *POOLING,
    *SHAPE,
    *layers_shape.CASES,
    *NORM,
    *EMBEDDING,
    *ACTIVATION,
    *OWN,
    *FALLBACK,
]
