"""The operators that tflite-micro has, and the call that registers each on a board.

A board links only the kernels that its ``MicroMutableOpResolver`` names. The names here are those
of tflite-micro's ``micro_mutable_op_resolver.h``.
"""

from __future__ import annotations

from collections.abc import Iterable

from torchclust.export.backends import ExportError

DECODE = "TFLM_DECODE"
ETHOS_U = "ethos-u"

# Written as TFLite's names in title case, but for those below.
_REGULAR = """
ABS ADD ADD_N ARG_MAX ARG_MIN ASSIGN_VARIABLE BATCH_TO_SPACE_ND BROADCAST_ARGS BROADCAST_TO
CALL_ONCE CAST CEIL CIRCULAR_BUFFER CONCATENATION COS DEPTH_TO_SPACE DEQUANTIZE DIV
DYNAMIC_UPDATE_SLICE ELU EMBEDDING_LOOKUP EQUAL EXP EXPAND_DIMS FILL FLOOR FLOOR_DIV FLOOR_MOD
FULLY_CONNECTED GATHER GATHER_ND GREATER GREATER_EQUAL HARD_SWISH IF L2_NORMALIZATION LEAKY_RELU
LESS LESS_EQUAL LOG LOGICAL_AND LOGICAL_NOT LOGICAL_OR LOGISTIC LOG_SOFTMAX MAXIMUM MEAN MINIMUM
MIRROR_PAD MUL NEG NOT_EQUAL PACK PAD PRELU QUANTIZE READ_VARIABLE REDUCE_ALL REDUCE_MAX REDUCE_MIN
RELU RELU6 RESHAPE RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR REVERSE_V2 ROUND RSQRT SELECT_V2 SHAPE
SIN SLICE SOFTMAX SPACE_TO_BATCH_ND SPACE_TO_DEPTH SPLIT SPLIT_V SQRT SQUARE SQUARED_DIFFERENCE
SQUEEZE STRIDED_SLICE SUB SUM SVDF TANH TRANSPOSE TRANSPOSE_CONV UNPACK VAR_HANDLE WHILE ZEROS_LIKE
"""
_METHODS = {
    **{name: "Add" + name.title().replace("_", "") for name in _REGULAR.split()},
    "AVERAGE_POOL_2D": "AddAveragePool2D",
    "BATCH_MATMUL": "AddBatchMatMul",
    "CONV_2D": "AddConv2D",
    "CUMSUM": "AddCumSum",
    "DEPTHWISE_CONV_2D": "AddDepthwiseConv2D",
    "L2_POOL_2D": "AddL2Pool2D",
    "MAX_POOL_2D": "AddMaxPool2D",
    "PADV2": "AddPadV2",
    "TFLite_Detection_PostProcess": "AddDetectionPostprocess",
    "UNIDIRECTIONAL_SEQUENCE_LSTM": "AddUnidirectionalSequenceLSTM",
    DECODE: "AddDecode",
    ETHOS_U: "AddEthosU",
}


def registrations(operators: Iterable[str]) -> dict[str, str]:
    """The methods of `MicroMutableOpResolver` that these operators need: {operator: method}.

    Raises:
        ExportError: tflite-micro has no such operator.
    """
    names = list(dict.fromkeys(operators))
    unknown = [name for name in names if name not in _METHODS]
    if unknown:
        raise ExportError(
            f"tflite-micro has no operator {', '.join(unknown)}: leave that part of the model to "
            "the board's own code, and export the part before it"
        )
    return {name: _METHODS[name] for name in names}
