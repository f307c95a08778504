"""Every notebook runs from top to bottom and says what it said when its outputs were kept.

After a change, ``python tests/test_notebooks.py [NAME ...]`` writes the outputs anew.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
from nbformat import NotebookNode

FOLDER = Path(__file__).parent.parent / "notebooks"
SENTENCES = {
    "1_what_is_weight_clustering": "160 bits instead of 512, 3.2 times fewer",
    "2_cluster_a_model": "times smaller for",
    "3_lightning_and_recipes": "At most 7 codes per tensor in the int8 file, 0 operators left",
    "4_int8_and_ethos_u": "At most 15 codes per layer, from clustering to the file",
}
LARGEST = 300_000  # bytes of a file, outputs included
LONGEST = 30  # lines of a cell


def read(name: str) -> NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def executed(name: str) -> NotebookNode:
    """The notebook with the outputs of a run in its own folder, and nothing that changes by run."""
    notebook = read(name)
    where = {"metadata": {"path": str(FOLDER)}}
    client = nbclient.NotebookClient(
        notebook, timeout=600, record_timing=False, coalesce_streams=True, resources=where
    )
    client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def printed(notebook: NotebookNode, stream: str = "stdout") -> str:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == stream)


def test_every_notebook_has_its_sentence() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SENTENCES)


@pytest.mark.parametrize("name", SENTENCES)
def test_kept_outputs_are_those_of_one_run(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert SENTENCES[name] in printed(notebook)
    assert printed(notebook, "stderr") == ""


@pytest.mark.parametrize("name", SENTENCES)
def test_prose_comes_first_and_cells_are_short(name: str) -> None:
    notebook = read(name)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    assert max(len(cell.source.splitlines()) for cell in code_cells(notebook)) <= LONGEST
    assert (FOLDER / f"{name}.ipynb").stat().st_size < LARGEST


@pytest.mark.parametrize("name", SENTENCES)
def test_links_lead_somewhere(name: str) -> None:
    prose = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        assert (FOLDER / target).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("name", SENTENCES)
def test_runs_from_top_to_bottom(name: str) -> None:
    notebook = executed(name)
    text = printed(notebook)
    assert SENTENCES[name] in text
    assert printed(notebook, "stderr") == ""
    if found := re.search(r"(\S+) times smaller for (\S+) points of accuracy", text):
        assert float(found[1]) > 12
        assert float(found[2]) < 3


if __name__ == "__main__":
    for name in sys.argv[1:] or SENTENCES:
        nbformat.write(executed(name), FOLDER / f"{name}.ipynb")
