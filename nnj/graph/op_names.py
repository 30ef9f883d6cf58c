"""What autograd's nodes do, by their names (without "Backward" and the number behind it).

What is known here is which rows an operation mixes, and whether it can be called under vmap."""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Each entry of the result depends on the entry at the same place of each operand, or on the one
# that is broadcast there.
ELEMENTWISE = _names(
    """
    Abs Acos Add Addcdiv Addcmul Alias Asin Atan Atan2 Celu Clamp ClampMax ClampMin Clone Copy Cos
    Cosh Div Elu Erf Erfc Erfinv Exp Exp2 Expm1 Gelu Hardshrink Hardsigmoid Hardswish Hardtanh
    LeakyRelu Lerp Log Log10 Log1P Log2 LogSigmoid Logaddexp MaskedFill Maximum Minimum Mish Mul
    NanToNum NativeDropout Neg Pow Prelu Reciprocal Relu Rsqrt Rsub Sigmoid Silu Sin Sinh Softplus
    Softshrink Sqrt Square Sub Tan Tanh Threshold ToCopy Where XLogY
    """
)
# Their operands may be broadcast; what the node gives for one is then not yet summed to its shape.
BROADCASTING = _names(
    """
    Add Addcdiv Addcmul Atan2 Div Lerp Logaddexp Maximum Minimum Mul Pow Rsub Sub Where XLogY
    """
)
# They work along the axes that they have saved; other axes are only carried along.
ALONG = _names(
    """
    Amax Amin Cat Cumsum Flip Gather LinalgVectorNorm LogSoftmax Logsumexp Max Mean Min Norm Prod
    Select Slice Softmax Sort Split SplitWithSizes Std StdMean Sum Topk Unbind Var VarMean
    """
)
# They keep apart the rows of one operand, in axis 0: the number of that operand. The others are
# weights.
BATCHED = dict.fromkeys(
    _names(
        """
        AdaptiveAvgPool2D AdaptiveAvgPool3D AvgPool2D AvgPool3D Col2Im Convolution
        ConvolutionOverrideable Im2Col MaxPool2DWithIndices MaxPool3DWithIndices
        MkldnnAdaptiveAvgPool2D MkldnnConvolution Mm NativeGroupNorm PixelShuffle PixelUnshuffle
        UpsampleBicubic2D UpsampleBilinear2D UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D
        UpsampleNearest3D UpsampleTrilinear3D
        """
    ),
    0,
) | {"Addmm": 1}
# What they give their operand is memory of its own, which nothing else uses.
NEW = _names("Convolution MaxPool2DWithIndices")
# The names of torch's fused attention begin with this.
ATTENTION = "ScaledDotProduct"
# They leave the entries in their flat order, and change only the axes.
FLAT = _names("ReshapeAlias Squeeze UnsafeView Unsqueeze View")
# What vmap makes of these is right. Of others it is compared with a call without vmap, since torch
# has batching rules that are wrong.
TRUSTED = (
    ELEMENTWISE
    | ALONG
    | BATCHED.keys()
    | FLAT
    | _names(
        """
        Bmm ConstantPadNd Expand Index IndexSelect NativeBatchNorm NativeLayerNorm Permute Repeat
        Roll Stack T Transpose UnsafeSplit
        """
    )
)
# Linear in all operands together, choices among entries included; in the second set, in each of
# them where the others are fixed.
LINEAR = _names(
    """
    Add Alias Amax Amin AsStrided Cat Clone CopySlices Expand Gather Index IndexSelect MaskedFill
    Max Mean Min Nansum Neg Permute Repeat ReshapeAlias Rsub Select Slice Split Squeeze Stack Sub
    Sum T ToCopy Transpose Unbind UnsafeView Unsqueeze View Where
    """
)
BILINEAR = _names("Addcmul Bmm Dot Mm Mul Mv")
# The Jacobian consists of zeros and ones: the same ones at every point, or (second set) those that
# the operands choose.
COPIES = _names(
    """
    Alias AsStrided Cat Clone ConstantPadNd CopySlices Expand Flip Permute PixelShuffle
    PixelUnshuffle Repeat ReshapeAlias Roll Select Slice Split SplitWithSizes Squeeze Stack Swapaxes
    T Transpose Unbind UnsafeSplit UnsafeView Unsqueeze UpsampleNearest1D UpsampleNearest2D
    UpsampleNearest3D View
    """
)
CHOICES = _names("Embedding Gather Index IndexSelect Max MaxPool2DWithIndices Min")
