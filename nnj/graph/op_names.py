"""What autograd's nodes do, by their names (without Backward and a number): for the owners of rows,
and for vmap.
"""

from __future__ import annotations

# Every entry of the result depends on the entry at the same place, or on one that is broadcast
# there.
ELEMENTWISE = set(
    """
    Abs Acos Add Addcdiv Addcmul Alias Asin Atan Atan2 Celu Clamp ClampMax ClampMin Clone Copy
    Cos Cosh Div Elu Erf Erfc Erfinv Exp Expm1 Exp2 Gelu Hardsigmoid Hardswish Hardtanh
    LeakyRelu Lerp Log Log1P Log2 Log10 LogSigmoid Logaddexp MaskedFill Maximum Minimum Mish
    Mul NanToNum NativeDropout Neg Pow Prelu Reciprocal Relu Rsqrt Rsub Sigmoid Silu Sin
    Sinh Softplus Softshrink Hardshrink Sqrt Square Sub Tan Tanh Threshold ToCopy Where XLogY
    """.split()
)
# Operands of these may be broadcast, and the node's result is then not yet summed to the operand's
# shape.
BROADCASTING = set(
    "Add Addcdiv Addcmul Atan2 Div Lerp Logaddexp Maximum Minimum Mul Pow Rsub Sub Where "
    "XLogY".split()
)
# They work along the axes that they have saved, and leave the others alone.
ALONG = set(
    """
    Softmax LogSoftmax Sum Mean Cat Split SplitWithSizes Select Slice Unbind Max Min Amax Amin
    Logsumexp Cumsum Flip LinalgVectorNorm Norm Std Var StdMean VarMean Gather Prod Sort
    Topk
    """.split()
)
# The batch of their first operand is axis 0, whatever else they do
# (their other operands are weights).
BATCHED = {
    name: 0
    for name in """
    Convolution ConvolutionOverrideable MkldnnConvolution MaxPool2DWithIndices
    MaxPool3DWithIndices AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D
    MkldnnAdaptiveAvgPool2D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D
    UpsampleBilinear2D UpsampleBicubic2D UpsampleLinear1D UpsampleTrilinear3D PixelShuffle
    PixelUnshuffle NativeGroupNorm Im2Col Col2Im Mm
    """.split()
} | {"Addmm": 1}
ATTENTION = "ScaledDotProduct"
# They leave the entries in their order, and only the axes are others.
FLAT = {"View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze"}
# Others are checked against a call without vmap: a wrong batching rule would be a wrong number.
TRUSTED = (
    ELEMENTWISE
    | ALONG
    | set(BATCHED)
    | FLAT
    | set(
        """
    Transpose Permute T Stack Expand ConstantPadNd Bmm Addmm NativeLayerNorm NativeBatchNorm
    Index IndexSelect Repeat Roll UnsafeSplit
    """.split()
    )
)
