"""The benchmark of calibration runs on a tiny model and adds up; its figures mean nothing."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import calibration

STEPS = [
    "build", "plain forwards", "to the host", "export", "normalize", "unobserved forwards",
    "observed forwards", "statistics", "smooth", "quantize", "fuse", "lower", "first call",
    "second call",
]  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("weights", ["host", "device"])
def test_calibration(tmp_path, capsys, weights):
    given = ["--preset", "t2v-1.3b", "--layers", "1", "--tiny", "--device", "cpu"]
    size = ["--frames", "3", "--height", "4", "--width", "6", "--calls", "4", "--plain-calls", "2"]
    calibration.main([*given, *size, "--weights", weights, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "calibration.json").read_text())["results"]
    expected = STEPS if weights == "host" else [one for one in STEPS if one != "to the host"]
    assert [one["step"] for one in found["steps"]] == expected
    times = {one["step"]: one for one in found["steps"]}
    assert len(times["observed forwards"]["each"]) == 4
    assert len(times["plain forwards"]["each"]) == 3  # one of them warms up
    assert all(one["seconds"] > 0 for one in found["steps"])
    summary = found["summary"]
    counted = {*STEPS[3:5], *STEPS[6:13]}
    assert summary["seconds"] == pytest.approx(sum(times[one]["seconds"] for one in counted))
    beyond = summary["seconds"] - 4 * summary["plain_forward_s"]
    assert summary["seconds_beyond_forwards"] == pytest.approx(beyond)
    assert summary["host_gib"] < 2
    assert 0 < found["compiled_gib"] < found["weights_gib"]
    shown = capsys.readouterr().out
    assert "first call" in shown
    assert "seconds_beyond_forwards" in shown
