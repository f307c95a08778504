"""The command line."""

from torchclust.cli.parser import main

__all__ = ["main"]
