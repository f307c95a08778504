"""Every test draws the same numbers, whatever ran before it and in whichever process."""

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - of libraries that draw from the global generator
    torch.manual_seed(0)
