"""What a run amounts to: report.json for scripts, report.md and the terminal's table for a person.

`assemble` makes report.json's content and everything else is drawn from that, so no two of them
can tell different stories.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from torchclust.fitting.worth import plain_int8_bits
from torchclust.model.slots import Slot, slots_of
from torchclust.model.summary import summary
from torchclust.recipes.metric import Metric
from torchclust.recipes.schema import Recipe
from torchclust.recipes.stages import Networks

Report = dict[str, Any]
_TABLES = ("version", "flash_bytes", "arena_bytes", "time_ratio", "compared",
           "baseline_flash_bytes", "baseline_arena_bytes")  # fmt: skip
_FILES = ("float", "clustered_float", "int8", "baseline_int8")
_STAGES = {
    "float": "trained, float",
    "control": "control: trained on, never clustered, float",
    "pruned": "pruned, float",
    "before_finetune": "clustered, not trained since, float",
    "clustered": "clustered and fine-tuned, float",
    "int8": "**clustered, int8 file**",
    "baseline_int8": "control, int8 file",
    "packed": "packed file, biases and norms rounded, float",
}


@dataclass(frozen=True)
class Files:
    """What a run wrote: .tflite by name, Vela's, .pte, lookup tables; and the packed model."""

    exported: Mapping[str, Any]
    compiled: Mapping[str, Any]
    programs: Mapping[str, Any]
    tables: Mapping[str, Any]
    packed: Mapping[str, Any]


def assemble(
    recipe: Recipe,
    networks: Networks,
    written: Files,
    seconds: Mapping[str, float],
    versions: Mapping[str, str],
) -> Report:
    """Return report.json's content. What was not run is null.

    What stands under ``accuracy`` is the task's metric: of a built-in model a percentage.
    """
    files = {name: written.exported.get(f"{name}.tflite", {}) for name in _FILES}
    packed = written.packed
    return {
        "name": recipe.name,
        "recipe": recipe.to_dict(),
        "seed": recipe.seed,
        "versions": dict(versions),
        "seconds": dict(seconds),
        "metric": asdict(networks.task.metric),
        "accuracy": {
            **networks.accuracy,
            "int8": files["int8"].get("accuracy"),
            "baseline_int8": files["baseline_int8"].get("accuracy"),
            "packed": packed.get("accuracy"),
        },
        "bytes": {
            "float_tflite": files["float"].get("bytes"),
            "float_tflite_zip": files["float"].get("zip"),
            "clustered_float_tflite_zip": files["clustered_float"].get("zip"),
            "int8_tflite": files["int8"].get("bytes"),
            "int8_tflite_zip": files["int8"].get("zip"),
            "baseline_int8_tflite_zip": files["baseline_int8"].get("zip"),
            "packed": packed.get("bytes"),
            "packed_entropy_bound": packed.get("entropy_bound"),
        },
        "tensors": _tensors(networks, files["int8"].get("codes", {})),
        "chosen": networks.chosen.to_dict() if networks.chosen else None,
        "vela": _vela(written.compiled),
        "executorch": _programs(recipe, written.programs),
        "tflm": {key: written.tables.get(key) for key in _TABLES},
        "pack": {"mantissa_bits": packed.get("mantissa_bits")},
        "export": {
            "sqnr_db": files["int8"].get("sqnr_db"),
            "top1_agreement": files["int8"].get("top1_agreement"),
            "float_operators": files["int8"].get("float_operators"),
        },
    }


def _tensors(networks: Networks, codes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return one row per parameter tensor of the compressed (else the trained) model."""
    model = networks.trained if networks.compressed is None else networks.compressed
    plain = {slot.candidate.name: slot for slot in slots_of(networks.control)}
    return [
        {
            "name": row.name,
            "shape": list(row.shape),
            "n_clusters": row.n_clusters,
            "distinct_weights": row.distinct,
            "int8_codes": codes.get(row.name),
            "entropy_bits": row.entropy_bits,
            "baseline_entropy_bits": _plain_bits(plain[row.name]) if row.n_clusters else None,
            "skipped": row.skipped,
        }
        for row in summary(model).rows
    ]


def _plain_bits(slot: Slot) -> float:
    return plain_int8_bits(slot.value().transpose(0, slot.channel_dim))


def _vela(compiled: Mapping[str, Any]) -> dict[str, Any]:
    """Return Vela's figures of the compressed file, and the baseline's beside them."""
    ours, baseline = compiled.get("int8.tflite", {}), compiled.get("baseline_int8.tflite", {})
    either = ours or baseline
    found = {key: either.get(key) for key in ("accelerator", "system_config", "memory_mode")}
    found["version"] = either.get("vela_version")
    for key in ("encoded_weight_bytes", "flash_bytes", "sram_bytes", "cycles", "cpu_ops"):
        found[key] = ours.get(key)
    for key in ("encoded_weight_bytes", "flash_bytes", "cycles"):
        found[f"baseline_{key}"] = baseline.get(key)
    return {**found, "cpu_operators": ours.get("cpu_operators", [])}


def _programs(recipe: Recipe, programs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the figures of the ExecuTorch program, and the baseline's beside them."""
    if recipe.executorch is None:
        return None
    ours, baseline = programs.get("model.pte", {}), programs.get("baseline.pte", {})
    found = {"target": recipe.executorch.target, "vela_version": baseline.get("vela_version")}
    for key in ("accuracy", "bytes", "encoded_weight_bytes", "cycles"):
        found |= {key: ours.get(key), f"baseline_{key}": baseline.get(key)}
    return {**found, "codes": ours.get("codes"), "cpu_operators": ours.get("cpu_operators")}


def gains(report: Report) -> list[tuple[str, str, str, str]]:
    """Return the rows (what, not clustered, clustered, gain) of whatever the run measured."""
    accuracy, size, vela = report["accuracy"], report["bytes"], report["vela"]
    metric = Metric(**report["metric"])
    tables = report["tflm"]
    chip = f"Vela {vela['version']}, {vela['accelerator']}"
    sizes = [
        ("float .tflite, zipped", size["float_tflite_zip"], size["clustered_float_tflite_zip"]),
        ("int8 .tflite, zipped", size["baseline_int8_tflite_zip"], size["int8_tflite_zip"]),
        ("packed model, from float32", size["float_tflite"], size["packed"]),
        (
            f"encoded weights ({chip})",
            vela["baseline_encoded_weight_bytes"],
            vela["encoded_weight_bytes"],
        ),
        ("flash", vela["baseline_flash_bytes"], vela["flash_bytes"]),
        ("flash, tflite-micro", tables["baseline_flash_bytes"], tables["flash_bytes"]),
        ("arena, tflite-micro", tables["baseline_arena_bytes"], tables["arena_bytes"]),
    ]
    program = report.get("executorch")
    if program:
        chip = f"Vela {program['vela_version']}, {program['target']}"
        for what, key in (
            ("ExecuTorch program (.pte)", "bytes"),
            (f"its encoded weights ({chip})", "encoded_weight_bytes"),
        ):
            sizes.append((what, program[f"baseline_{key}"], program[key]))
    found = []
    before, after = accuracy["baseline_int8"], accuracy["int8"]
    if before is not None and after is not None:
        cells = metric.text(before), metric.text(after), metric.change(before, after)
        found.append((f"int8 {metric.name}", *cells))
    if program and program["accuracy"] is not None:
        before, after = program["baseline_accuracy"], program["accuracy"]
        cells = metric.text(before), metric.text(after), metric.change(before, after)
        found.append((f"ExecuTorch program's {metric.name}", *cells))
    for what, before, after in sizes:
        if before and after:
            found.append((what, _kib(before), _kib(after), _factor(before, after)))
    before, after = vela["baseline_cycles"], vela["cycles"]
    if before and after:
        found.append(("cycles", f"{before:,}", f"{after:,}", _factor(before, after, "fewer")))
    return found


def markdown(report: Report) -> str:
    """Return report.md."""
    lines = [f"# {report['name']}", "", *_headline(report)]
    table = gains(report)
    if table:
        lines += ["", "## What was gained", ""]
        lines += _table(("", "not clustered", "clustered", "gain"), table)
        lines += ["", "*Not clustered* is the control: the same trained model, trained on for as "]
        lines[-1] += "many epochs at the same rate as the clustered one. 1 KiB is 1,024 bytes."
    lines += ["", "![sizes, accuracies, weights and centroids](report.png)"]
    accuracy, metric = report["accuracy"], Metric(**report["metric"])
    clustered = any(row["n_clusters"] for row in report["tensors"])  # else pruned is all there is
    stages = [
        (label, metric.text(accuracy[key]))
        for key, label in _STAGES.items()
        if accuracy.get(key) is not None and (clustered or key != "clustered")
    ]
    lines += ["", f"## {metric.title} on the test data", ""]
    lines += _table(("model", metric.name), stages)
    lines += ["", "## Tensors", "", *_tensor_table(report)]
    if report["chosen"]:
        priced = "rate" in report["chosen"]
        what = "Price of a bit that was" if priced else "Numbers of clusters that were"
        lines += ["", f"## {what} chosen", "", *_chosen(report["chosen"])]
    lines += ["", "## How this was made", "", *_provenance(report)]
    return "\n".join(lines) + "\n"


def _headline(report: Report) -> list[str]:
    """Return one sentence for those who read no further, and what needs attention, if anything."""
    accuracy, vela, metric = report["accuracy"], report["vela"], Metric(**report["metric"])
    clustered = [row for row in report["tensors"] if row["n_clusters"]]
    if not clustered:
        return ["Nothing was clustered."]
    most = max(row["distinct_weights"] for row in clustered)
    text = f"{len(clustered)} weight tensors hold at most {most} values each"
    codes = [row["int8_codes"] for row in clustered if row["int8_codes"] is not None]
    if codes:
        text += f", and at most {max(codes)} codes in the int8 file"
    if accuracy["int8"] is not None and accuracy["baseline_int8"] is not None:
        change = metric.change(accuracy["baseline_int8"], accuracy["int8"])
        text += f". {metric.title}: {metric.text(accuracy['int8'])} ({change})"
    if vela["cpu_ops"]:
        text += f". **{vela['cpu_ops']} operators are left to the CPU**: "
        text += "; ".join(vela["cpu_operators"])
    return [text + "."]


def _tensor_table(report: Report) -> list[str]:
    """Return the clustered tensors as a table, then the others by the reason why they are not."""
    rows: list[tuple[str, ...]] = []
    reasons: dict[str, list[str]] = {}
    for row in report["tensors"]:
        name, entropy = f"`{row['name']}`", row["entropy_bits"]
        if row["n_clusters"] is None:
            reasons.setdefault(row["skipped"], []).append(name)
            continue
        counts = [row[key] for key in ("n_clusters", "distinct_weights", "int8_codes")]
        cells = ["-" if count is None else str(count) for count in counts]
        plain = row["baseline_entropy_bits"]
        bits = f"{entropy:.2f}{' (**larger**)' if entropy > plain else ''}"
        rows.append((name, " x ".join(map(str, row["shape"])), *cells, bits, f"{plain:.2f}"))
    head = ("tensor", "shape", "clusters", "distinct", "codes in int8 file")
    lines = _table((*head, "entropy, bits", "not clustered"), rows) if rows else []
    for reason, names in reasons.items():
        lines += ["", f"Not clustered ({reason}): {', '.join(names)}"]
    return lines


def _chosen(chosen: dict[str, Any]) -> list[str]:
    """Return what the choice costs tensor by tensor, and how to run with it."""
    if "rate" in chosen:
        sizes = [(f"`{name}`", _kib(c["n_bytes"])) for name, c in chosen["tensors"].items()]
        sizes.append(("together", _kib(chosen["encoded_bytes"])))
        how = "`torchclust run chosen.yaml` runs with it and chooses nothing."
        return [f"`rate: {chosen['rate']:.4g}`; {how}", "", *_table(("tensor", "encoded"), sizes)]
    rows = [
        (f"`{name}`", _clusters(c), _kib(c["n_bytes"]), f"{c['loss']:.4f}")
        for name, c in chosen["tensors"].items()
    ]
    rows.append(("together", "", _kib(chosen["encoded_bytes"]), ""))
    return [
        *_table(("tensor", "clusters", "encoded", "loss alone"), rows),
        "",
        "The loss is what it costs to cluster this tensor alone, before fine-tuning, in outputs on "
        "training data: the divergence of class probabilities in nats, or for a module of one's "
        "own the squared error over the outputs' variance. `torchclust run chosen.yaml` runs with "
        "these rules and chooses nothing:",
        "",
        "```yaml",
        f"rules: {json.dumps(chosen['rules'])}",
        "```",
    ]


def _clusters(chosen: Mapping[str, Any]) -> str:
    return f"{chosen['n_clusters']}, {chosen['codebook_dtype']}" if chosen["n_clusters"] else "-"


def _provenance(report: Report) -> list[str]:
    names = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report["seconds"].items())
    return [
        "`torchclust run report.json --output AGAIN` repeats it: the recipe is in there, and in "
        f"recipe.yaml. Seed {report['seed']}; {names}. Time: {spent}.",
    ]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    rule = ("---", *["---:"] * (len(head) - 1))
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]


def _kib(value: float) -> str:
    return f"{value / 1024:,.1f} KiB"


def _factor(before: float, after: float, less: str = "smaller") -> str:
    if after > before:
        return f"{after / before:.2f}x {'more' if less == 'fewer' else 'larger'}"
    return f"{before / after:.2f}x {less}"


def show(report: Report, output: Path) -> None:
    """Print the gains as a table, and where everything is."""
    console = Console(highlight=False)
    table = Table("", "not clustered", "clustered", "gain", title=report["name"])
    for column in table.columns[1:]:
        column.justify = "right"
    for row in gains(report):
        table.add_row(*row)
    if table.row_count:
        console.print(table)
    console.print(f"Everything is in {output}; begin with {output / 'report.md'}", markup=False)
