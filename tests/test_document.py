"""BENCHMARKS.md says what the raw results say."""

from __future__ import annotations

from pathlib import Path

from benchmarks import document, record

ROOT = Path(__file__).parent.parent


def test_the_document_is_what_the_results_say():
    written = (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")
    assert written == document.document(record.RESULTS), (
        "run `python -m benchmarks.document > BENCHMARKS.md`"
    )


def test_what_was_not_measured_is_left_out(tmp_path):
    text = document.document(tmp_path)
    assert "## Speed" in text
    for title in ("## Quality", "## Search", "## What compiling costs", "## Saved models"):
        assert title not in text
