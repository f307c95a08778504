"""What was measured, a line of JSON each, kept as soon as it is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def keep(path: Path, **row: Any) -> None:
    """Print a row and append it to a file, where it survives an interrupted run."""
    line = json.dumps(row)
    print(line, flush=True)
    with path.open("a") as file:
        file.write(line + "\n")
