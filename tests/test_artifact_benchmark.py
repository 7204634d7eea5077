"""The benchmark of artifacts runs on a tiny model; its figures mean nothing."""

from __future__ import annotations

import json

import pytest

from benchmarks import artifact


def test_artifact(tmp_path, capsys):
    given = ["--preset", "t2v-1.3b", "--layers", "1", "--tiny", "--recipe", "fp8"]
    artifact.main([*given, "--device", "cpu", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "artifact.json").read_text())["results"]
    assert found["disk_gib"] == pytest.approx(found["disk_over_bf16"] * found["bf16_gib"])
    assert 0 < found["weights_gib"] < found["disk_gib"]  # the graph is on disk, too
    for name in ("compile_s", "save_s", "import_s", "load_s", "first_call_s", "second_call_s"):
        assert found[name] > 0, name
    assert "disk_over_bf16" in capsys.readouterr().out
