"""Which layers TensorRT has fast integer kernels for, by their channels; asked by the scheme and by the lint."""

from __future__ import annotations

from collections.abc import Sequence

FEW = 16  # channels below which INT8 is not worth its conversions


def convolution_is_worth_integer(
    outputs: int, inputs: int, kernel: Sequence[int], groups: int, *, reads_image: bool
) -> bool:
    """NVIDIA's rule, as Model-Optimizer places Q/DQ in ONNX graphs.

    Args:
        inputs: channels of one group, as the weight counts them.
        reads_image: the layer's input is the model's.
    """
    if outputs >= FEW and inputs >= FEW:
        return True
    if groups > 1:  # depthwise
        return outputs % 8 == 0 and min(kernel) >= 3
    is_square = len(set(kernel)) == 1
    return is_square and (outputs % 8 == 0 or inputs % 8 == 0) and (reads_image or max(outputs, inputs) >= FEW)


def product_is_worth_integer(outputs: int, inputs: int) -> bool:
    """The same for a matrix product."""
    return outputs >= FEW and inputs >= FEW
