"""From a clustered PyTorch model to an int8 TFLite file, and what Vela makes of it.

Importing this costs nothing; LiteRT, its quantizer and Vela are imported when a function needs them
(``pip install "torchclust[export]"``).
"""

from torchclust.export.backends import ExportError
from torchclust.export.inspect import Inspection, Port, WeightRow, inspect_tflite
from torchclust.export.tflite import OperatorRow, TFLiteExport, to_tflite
from torchclust.export.vela import CpuOperator, VelaError, VelaLayer, VelaReport, vela
from torchclust.export.verify import TensorRow

__all__ = [
    "CpuOperator",
    "ExportError",
    "Inspection",
    "OperatorRow",
    "Port",
    "TFLiteExport",
    "TensorRow",
    "VelaError",
    "VelaLayer",
    "VelaReport",
    "WeightRow",
    "inspect_tflite",
    "to_tflite",
    "vela",
]
