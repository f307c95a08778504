"""Reading a Vela-compiled file back: that the trained codes are the codes the NPU reads."""

from torchclust.export.compiled.errors import CompiledFileError, NotVerifiedError
from torchclust.export.compiled.rows import CompiledInspection, CompiledRow
from torchclust.export.compiled.verification import verify_compiled

__all__ = [
    "CompiledFileError",
    "CompiledInspection",
    "CompiledRow",
    "NotVerifiedError",
    "verify_compiled",
]
