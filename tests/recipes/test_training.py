"""How training ends, and what the accuracy of a file is."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchclust.export import to_tflite
from torchclust.export.file_network import of_tflite
from torchclust.recipes.classifier import Classifier, Distillation, accuracy
from torchclust.recipes.loaders import of_loaders
from torchclust.recipes.training import Phase, fit

BATCHES = DataLoader(TensorDataset(torch.randn(16, 6), torch.arange(16) % 3), batch_size=8)


@pytest.mark.parametrize(
    ("raised", "seen"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (SystemExit(3), SystemExit), (OSError(), OSError)],
)
def test_what_ends_training_is_what_the_caller_sees(
    raised: BaseException, seen: type[BaseException]
) -> None:
    class Ending(pl.Callback):
        def on_train_batch_end(self, *_: object) -> None:
            raise raised

    with pytest.raises(seen) as found:
        fit(Classifier(nn.Linear(6, 3)), of_loaders(pl, train=BATCHES), epochs=1, seed=0,
            callbacks=[Ending()], progress=False)  # fmt: skip
    if seen is not KeyboardInterrupt:
        assert found.value is raised


def test_a_teacher_is_a_part_of_the_loss_and_stays_as_it_is() -> None:
    """Hinton et al. (2015), equation 2: soft targets count by the square of their temperature."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = Classifier(nn.Linear(6, 3), 0.05)
    names = set(student.state_dict())
    student.distillation = Distillation(teacher, 0.75)
    losses = []
    student.log = lambda name, loss, **rest: losses.append(loss.detach())
    for inputs, labels in BATCHES:
        student.training_step((inputs, labels), 0).backward()
        logits, wanted = student(inputs), teacher(inputs).softmax(1)
        soft = nn.functional.kl_div(
            (logits / 2).log_softmax(1),
            (wanted.log() / 2).log_softmax(1),
            reduction="batchmean",
            log_target=True,
        )
        hard = nn.functional.cross_entropy(logits, labels)
        torch.testing.assert_close(losses.pop(), (0.25 * hard + 0.75 * 4 * soft).detach())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    del student.log
    fit(student, of_loaders(pl, train=BATCHES), epochs=20, seed=0, progress=False)
    assert set(student.state_dict()) == names
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    inputs = torch.cat([inputs for inputs, _ in BATCHES])
    wrong = (student(inputs).softmax(1) - teacher(inputs).softmax(1)).abs().mean()
    assert wrong < 0.1


class Validated(Classifier):
    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        assert not any(module.training for module in self.modules())


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_batch_norms_keep_their_statistics(frozen: bool) -> None:
    """Their factors train; between epochs Lightning evaluates, and puts modes back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    norm, modes = model[1], []

    class Watching(pl.Callback):
        def on_train_batch_start(self, *_: object) -> None:
            modes.append((norm.training, model[2].training))

    before = {name: value.clone() for name, value in norm.state_dict().items()}
    phase = Phase(3, lr_scale=10.0, freeze_batch_norm=frozen)
    data = of_loaders(pl, train=BATCHES, val=BATCHES)
    fit(Validated(model), data, epochs=3, seed=0,
        callbacks=[*phase.callbacks(), Watching()], progress=False)  # fmt: skip
    assert modes == [(not frozen, True)] * 6
    after = norm.state_dict()
    assert all(
        torch.equal(after[name], before[name]) == frozen
        for name in ("running_mean", "running_var", "num_batches_tracked")
    )
    assert not torch.equal(after["weight"], before["weight"])


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_files_accuracy_is_the_models(channels_last: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)).eval()
    images = torch.randn(40, 3, 6, 6)
    labels = model(images).argmax(1)
    labels[:10] = (labels[:10] + 1) % 4
    path = tmp_path / "a.tflite"
    done = to_tflite(
        model, images[:1], path, calibration=None, float=True, channels_last=channels_last
    )
    batches = list(zip(images.split(16), labels.split(16), strict=True))
    assert accuracy(of_tflite(done, model, [images]), batches) == accuracy(model, batches) == 75
