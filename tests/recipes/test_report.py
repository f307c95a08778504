"""What a report says in words and tables, for figures that few runs have."""

import copy
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from torchclust.recipes.load import parse_recipe
from torchclust.recipes.metric import Metric
from torchclust.recipes.plot import _plot_accuracies
from torchclust.recipes.report import _programs, gains, markdown, show

REPORT: dict[str, Any] = {
    "name": "made up",
    "seed": 0,
    "metric": {"name": "accuracy", "mode": "max", "unit": "%"},
    "accuracy": {"float": 91.0, "control": 92.0, "pruned": None, "before_finetune": 80.0,
                 "clustered": 91.5, "int8": 91.25, "baseline_int8": 92.0},
    "bytes": {"float_tflite": 4096, "float_tflite_zip": 4000, "clustered_float_tflite_zip": 1000,
              "int8_tflite": 2048, "int8_tflite_zip": 512, "baseline_int8_tflite_zip": 1024,
              "packed": 400, "packed_entropy_bound": 390},
    "tensors": [
        {"name": "a.weight", "shape": [4, 8], "n_clusters": 16, "distinct_weights": 15,
         "int8_codes": 15, "entropy_bits": 3.5,
         "baseline_entropy_bits": 6.5, "skipped": None},
        {"name": "a.bias", "shape": [4], "n_clusters": None, "distinct_weights": 4,
         "int8_codes": None, "entropy_bits": None,
         "baseline_entropy_bits": None, "skipped": "a bias"},
    ],
    "vela": {"version": "5.2.0", "accelerator": "ethos-u55-128", "encoded_weight_bytes": 100,
             "baseline_encoded_weight_bytes": 400, "flash_bytes": 2048,
             "baseline_flash_bytes": 1024, "sram_bytes": 10, "cycles": 300,
             "baseline_cycles": 200, "cpu_ops": 0, "cpu_operators": []},
    "tflm": {"version": "0.dev1", "flash_bytes": 2048, "arena_bytes": 1536, "time_ratio": 1.1,
             "compared": 132, "baseline_flash_bytes": 4096, "baseline_arena_bytes": 1024},
    "chosen": None,
    "versions": {"torch": "2.13.0"},
    "seconds": {"train": 1.0},
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "name": "made_up",
    "data": {"name": "mnist5k"},
    "model": "arm_mlp",
    "train": {"epochs": 0},
}


def changed(**sections: dict[str, Any]) -> dict[str, Any]:
    report = copy.deepcopy(REPORT)
    for name, values in sections.items():
        report[name].update(values)
    return report


def test_what_grew_is_called_larger_and_what_slowed_down_more() -> None:
    found = {row[0]: row[1:] for row in gains(REPORT)}
    assert found["flash"] == ("1.0 KiB", "2.0 KiB", "2.00x larger")
    assert found["cycles"] == ("200", "300", "1.50x more")
    assert found["flash, tflite-micro"] == ("4.0 KiB", "2.0 KiB", "2.00x smaller")
    assert found["arena, tflite-micro"] == ("1.0 KiB", "1.5 KiB", "1.50x larger")
    assert found["int8 .tflite, zipped"] == ("1.0 KiB", "0.5 KiB", "2.00x smaller")
    assert found["int8 accuracy"] == ("92.00 %", "91.25 %", "-0.75 points")
    faster = {row[0]: row[3] for row in gains(changed(vela={"cycles": 100}))}
    assert faster["cycles"] == "2.00x fewer"


def test_operators_left_to_the_cpu_stand_in_the_headline() -> None:
    assert "left to the CPU" not in markdown(REPORT)
    reasons = ["LEAKY_RELU: not int8", "SORT: unknown"]
    text = markdown(changed(vela={"cpu_ops": 2, "cpu_operators": reasons}))
    assert "**2 operators are left to the CPU**: LEAKY_RELU: not int8; SORT: unknown." in text


def test_a_tensor_that_got_larger_is_marked() -> None:
    assert "| 3.50 | 6.50 |" in markdown(REPORT)
    report = changed()
    report["tensors"][0]["baseline_entropy_bits"] = 3.25
    assert "| 3.50 (**larger**) | 3.25 |" in markdown(report)


@pytest.mark.parametrize("measured", [True, False])
def test_a_person_sees_the_gains_and_where_to_look(
    measured: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    none = {
        section: dict.fromkeys(REPORT[section]) for section in ("accuracy", "bytes", "vela", "tflm")
    }
    show(REPORT if measured else changed(**none), Path("runs/x"))
    text = capsys.readouterr().out
    assert ("2.00x larger" in text) == measured
    assert text.endswith("Everything is in runs/x; begin with runs/x/report.md\n")


@pytest.mark.parametrize(
    ("metric", "title", "below"),
    [
        (Metric("accuracy", "max", "%"), "Accuracy on the test data, %", ""),
        (Metric("AUC", "max"), "AUC on the test data", "larger is better"),
        (Metric("test_mse", "min"), "test_mse on the test data", "smaller is better"),
    ],
)
def test_the_plot_says_which_way_is_better(metric: Metric, title: str, below: str) -> None:
    axes = Figure().subplots()
    _plot_accuracies(axes, {"float": 0.75, "int8": 0.5}, metric)
    assert (axes.get_title(loc="left"), axes.get_xlabel()) == (title, below)


def test_an_executorch_programs_figures_stand_beside_the_controls() -> None:
    recipe = parse_recipe({**RECIPE, "executorch": {"target": "ethos-u85-256"}})
    ours = {"accuracy": 91.0, "bytes": 1024, "encoded_weight_bytes": 512, "cycles": 90,
            "codes": {"a.weight": 15}, "cpu_operators": ["SORT"]}  # fmt: skip
    control = {"accuracy": 92.0, "bytes": 2048, "encoded_weight_bytes": 2048, "cycles": 100,
               "vela_version": "5.2.0"}  # fmt: skip
    found = _programs(recipe, {"model.pte": ours, "baseline.pte": control})
    assert found == {
        "target": "ethos-u85-256", "vela_version": "5.2.0", "codes": {"a.weight": 15},
        "cpu_operators": ["SORT"], "accuracy": 91.0, "baseline_accuracy": 92.0, "bytes": 1024,
        "baseline_bytes": 2048, "encoded_weight_bytes": 512, "baseline_encoded_weight_bytes": 2048,
        "cycles": 90, "baseline_cycles": 100,
    }  # fmt: skip
    rows = {row[0]: row[1:] for row in gains({**REPORT, "executorch": found})}
    assert rows["ExecuTorch program's accuracy"] == ("92.00 %", "91.00 %", "-1.00 points")
    assert rows["ExecuTorch program (.pte)"] == ("2.0 KiB", "1.0 KiB", "2.00x smaller")
    chip = "its encoded weights (Vela 5.2.0, ethos-u85-256)"
    assert rows[chip] == ("2.0 KiB", "0.5 KiB", "4.00x smaller")


def test_no_row_for_an_executorch_program_that_was_not_made() -> None:
    assert _programs(parse_recipe(RECIPE), {}) is None
    recipe = parse_recipe({**RECIPE, "executorch": {"target": "ethos-u85-256"}})
    left_out = {**REPORT, "executorch": _programs(recipe, {})}
    assert gains(left_out) == gains({**REPORT, "executorch": None}) == gains(REPORT)


def test_a_choice_is_listed_with_the_rules_that_repeat_it() -> None:
    tensors = {
        "a.weight": {"n_clusters": 8, "codebook_dtype": "int8", "n_bytes": 2048, "loss": 0.03125},
        "a.bias": {"n_clusters": None, "codebook_dtype": None, "n_bytes": 512, "loss": 0.0},
    }
    chosen = {"tensors": tensors, "encoded_bytes": 2560, "rules": {"a.weight": 8, "*": None}}
    text = markdown({**REPORT, "chosen": chosen})
    assert "| `a.weight` | 8, int8 | 2.0 KiB | 0.0312 |" in text
    assert "| `a.bias` | - | 0.5 KiB | 0.0000 |" in text
    assert "| together |  | 2.5 KiB |  |" in text
    assert 'rules: {"a.weight": 8, "*": null}' in text
    assert "chosen" not in markdown(REPORT)


def test_a_report_of_no_clustered_tensor_says_so() -> None:
    report = changed()
    report["tensors"] = report["tensors"][1:]
    text = markdown(report)
    assert "\n\nNothing was clustered.\n" in text
    assert "fine-tuned" in markdown(REPORT)
    assert "fine-tuned" not in text  # what pruning left is in the table once
    assert "Not clustered (a bias): `a.bias`" in text
    assert "entropy" not in text
