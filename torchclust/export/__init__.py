"""From a clustered PyTorch model to an int8 TFLite file, and what Vela makes of it.

Importing this costs nothing; LiteRT, its quantizer and Vela are imported when a function needs them
(``pip install "torchclust[export]"``).

Example:
    >>> import pathlib, tempfile, torch
    >>> from torchclust import cluster_
    >>> conv = torch.nn.Conv2d(8, 32, 3)
    >>> model = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(32), torch.nn.ReLU()).eval()
    >>> model = cluster_(model, 8, codebook_dtype="int8")
    >>> path, images = pathlib.Path(tempfile.mkdtemp()) / "model.tflite", torch.rand(4, 8, 8, 8)
    >>> export = to_tflite(model, images, path, calibration=[images])
    >>> export.tensors[0].parameter, export.tensors[0].int8_codes
    ('0.weight', 7)
    >>> [(row.operator, row.codes, row.scales) for row in inspect_tflite(path)]
    [('CONV_2D', 7, 32)]
    >>> report = vela(path, accelerator="ethos-u55-128")
    >>> report.cpu_ops, report.encoded_weight_bytes < report.original_weight_bytes
    (0, True)
"""

from torchclust.export.backends import ExportError
from torchclust.export.compiled import (
    CompiledFileError,
    CompiledInspection,
    CompiledRow,
    NotVerifiedError,
    verify_compiled,
)
from torchclust.export.executorch.program import PTEExport, to_pte
from torchclust.export.inspect import Inspection, Port, WeightRow, inspect_tflite
from torchclust.export.kit import BoardKit, board_kit
from torchclust.export.table_plan import TableRow
from torchclust.export.tflite import OperatorRow, TFLiteExport, to_tflite
from torchclust.export.tflm import TFLMReport, tflm
from torchclust.export.vela import VelaError, vela
from torchclust.export.vela_log import CpuOperator
from torchclust.export.vela_report import VelaLayer, VelaReport
from torchclust.export.verify import TensorRow

__all__ = [
    "BoardKit",
    "CompiledFileError",
    "CompiledInspection",
    "CompiledRow",
    "CpuOperator",
    "ExportError",
    "Inspection",
    "NotVerifiedError",
    "OperatorRow",
    "PTEExport",
    "Port",
    "TFLMReport",
    "TFLiteExport",
    "TableRow",
    "TensorRow",
    "VelaError",
    "VelaLayer",
    "VelaReport",
    "WeightRow",
    "board_kit",
    "inspect_tflite",
    "tflm",
    "to_pte",
    "to_tflite",
    "vela",
    "verify_compiled",
]
