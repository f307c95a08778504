"""Progress is for people who wait: on a terminal, after a second, and gone at the end."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest
import torch
from torch import nn

from torchclust import cluster_, progress


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("seconds", [-1.0, 60.0])
def test_shown_only_for_what_takes_long(
    seconds: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_PATIENCE", seconds)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress.track((i * i for i in range(3)), "Squaring", 3)) == [0, 1, 4]
    assert ("Squaring" in capsys.readouterr().err) == (seconds < 0)


@pytest.mark.parametrize("shown", [False, True])
def test_never_where_nobody_looks(
    shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_PATIENCE", -1.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: not shown, raising=False)
    with progress.progress("Waiting", 2, shown=shown) as advance:
        advance(2)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("terminal")
def test_fitting_a_model_shows_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_PATIENCE", -1.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    model = nn.Sequential(nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 30))
    cluster_(model, 4)
    assert "Fitting codebooks" in capsys.readouterr().err
    cluster_(model.requires_grad_(False), 3, inputs=torch.randn(8, 30))
    assert "Fitting codebooks" in capsys.readouterr().err


@pytest.mark.usefixtures("terminal")
def test_without_rich_the_work_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_rich(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("rich"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(progress, "_PATIENCE", -1.0)
    monkeypatch.setattr(builtins, "__import__", without_rich)
    assert list(progress.track([1, 2], "Counting")) == [1, 2]
