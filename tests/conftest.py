"""Every test draws the same numbers, whatever ran before it and in whichever process."""

import functools
import random

import numpy as np
import pytest
import torch
from torch._export import utils

# Torch 2.13 looks its own operators up anew for every namespace of every export, a fifth of a
# conversion's time. They are the same each time, and there are hundreds of conversions here.
utils._materialize_cpp_cia_ops = functools.cache(utils._materialize_cpp_cia_ops)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - of libraries that draw from the global generator
    torch.manual_seed(0)
