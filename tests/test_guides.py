"""The guides for other people's training loops, really run where their packages are installed.

    pip install transformers accelerate timm

Neither is a dependency: without them these tests are skipped, and docs/own-loop.md is still parsed.
"""

import re
from pathlib import Path

import pytest
import torch

import torchclust

PAGE = Path(__file__).parents[1] / "docs/own-loop.md"

pytestmark = [
    pytest.mark.slow,
    # Those packages' own, 2026-11.
    pytest.mark.filterwarnings("ignore"),
]


def function_of_the_guide(name: str) -> object:
    """A function as the page prints it."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (code,) = [block for block in blocks if f"def {name}(" in block]
    scope = {"torch": torch, "torchclust": torchclust}
    exec(code, scope)
    return scope[name]


def test_hugging_face_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = BertConfig(vocab_size=64, num_hidden_layers=2, num_labels=2, **sizes)
    tokens = torch.randint(64, (64, 16))
    dataset = [{"input_ids": row, "labels": (row[0] > 31).long()} for row in tokens]
    model = BertForSequenceClassification(config)
    before = {name: value.clone() for name, value in model.named_parameters()}
    function_of_the_guide("fine_tune")(model, dataset, str(tmp_path))
    saved = BertForSequenceClassification.from_pretrained(tmp_path)
    assert not torchclust.is_clustered(saved)
    weight = saved.bert.encoder.layer[0].attention.self.query.weight
    assert 8 < len(weight.unique()) <= 16
    assert not torch.equal(weight, before["bert.encoder.layer.0.attention.self.query.weight"])


def test_timm_s_optimizer_average_and_checkpoint(tmp_path: Path) -> None:
    """What train.py does with a model, in its order."""
    timm = pytest.importorskip("timm")
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3

    model = timm.create_model("test_resnet", num_classes=10)
    torchclust.cluster_(model, 16, assignment="nearest")
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    average = ModelEmaV3(model, decay=0.9)
    for step in range(3):
        loss = model(torch.randn(4, 3, 64, 64)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model, step=step)
    for state in (model.state_dict(), average.module.state_dict()):
        torch.save({"state_dict": state}, tmp_path / "last.pth.tar")
        plain = function_of_the_guide("result")("test_resnet", tmp_path / "last.pth.tar")
        wide = [p for p in plain.parameters() if p.dim() > 1 and p.numel() > 16]
        assert all(len(p.unique()) <= 16 for p in wide)
