"""One call for every integer scheme."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cpm_edge.quant.errors import QuantError
from cpm_edge.quant.formats import Quantized, Scheme, WeightFormat
from cpm_edge.quant.int4 import quantize_int4
from cpm_edge.quant.int8 import quantize_int8
from cpm_edge.quant.ternary import quantize_ternary


def quantize(weight: npt.NDArray[np.float32], scheme: Scheme) -> Quantized:
    """Round a block of rows, float32 (rows, cols), to an integer scheme; ternary is taken as it is.

    The result's group size is a number even when an int4 scheme says None: the row's columns.

    Raises:
        QuantError: a float scheme, or as quantize_int4, quantize_int8 and quantize_ternary.
    """
    if scheme.format is WeightFormat.INT4:
        width = scheme.group_size if scheme.group_size is not None else int(weight.shape[-1])
        return quantize_int4(weight, width, scheme.symmetric)
    if scheme.format is WeightFormat.INT8:
        return quantize_int8(weight, scheme.group_size)
    if scheme.format is WeightFormat.TERNARY:
        return quantize_ternary(weight, scheme.group_size, scheme.wide_scales)
    raise QuantError(
        f"{scheme.format.value} is not an integer format",
        hint="to_fp16() and to_bf16_bits() convert to 16-bit floats",
    )
