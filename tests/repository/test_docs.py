"""Generated parts of the documents are current, and what they name exists."""
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import model_table

from scripts import generated

DOCUMENTS = sorted(ROOT.glob("docs/*.md"))


def test_table_of_models_is_current():
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert generated.with_part(text, "model_table.py", model_table.table()) == text, (
        "run: python scripts/model_table.py --write")


def test_counts_equal_the_official_totals():
    """Bytes of the official checkpoints, from the total_size of their indexes (52B without its mask scalars)."""
    counts = {name: model_table.count_parameters(variant) for name, variant in model_table.VARIANTS.items()}
    assert 2 * counts["telechat_7b"] == 14400036864
    assert 2 * counts["telechat_12b"] == 24772864000
    assert 0 <= 105665020032 - 2 * counts["telechat_52b"] <= 64 * 4
    assert 4 * counts["telechat2_115b"] == 453131665408


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_files_that_documents_name_exist(path):
    text = path.read_text(encoding="utf-8")
    folders = "research|scripts|configs|docs|tests|benchmarks|examples"
    named = re.findall(rf"(?<![\w/])((?:{folders})/[\w./-]+\.(?:py|yaml|sh|md|jsonl?))", text)
    missing = sorted({name for name in named if not (ROOT / name).exists()})
    assert not missing
