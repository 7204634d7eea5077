"""The benchmarks run on small settings and write what they promise; their figures mean nothing."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import WanTransformer3DModel

from benchmarks import planning, recognition, record, sensitivity, smoothing, subjects
from training.train import CONFIGS
from wancompile.demo.sampler import Request
from wancompile.sensitivity import Sensitivity, SiteSensitivity


@pytest.fixture
def one_block(monkeypatch):
    """Untrained models of one block in the place of the trained ones, for speed."""

    def load(name):
        small = {"num_layers": 1, "num_attention_heads": 2, "ffn_dim": 96}
        if name == "i2v":
            small["added_kv_proj_dim"] = 128
        return WanTransformer3DModel(**{**CONFIGS[name], **small}).eval()

    monkeypatch.setattr(subjects, "load", load)


def results(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_planning(tmp_path, capsys):
    options = ["--preset", "t2v-1.3b", "--layers", "1", "2", "--repeats", "1"]
    planning.main([*options, "--out", str(tmp_path)])
    written = results(tmp_path, "planning")
    planned, grown = written["results"]
    assert 0 < planned["peak_gib"] < 4
    assert planned["seconds"] > 1
    assert grown["seconds"]["2"] > grown["seconds"]["1"] > 0
    assert grown["ratio"]["1"] == 1
    assert written["settings"]["repeats"] == 1
    assert "t2v-1.3b" in capsys.readouterr().out


def test_smoothing(one_block, tmp_path, capsys):
    options = ["--videos", "1", "--steps", "2", "--held-out-videos", "1", "--held-out-steps", "2"]
    smoothing.main(["i2v", *options, "--out", str(tmp_path)])
    (found,) = results(tmp_path, "smoothing")["results"]
    errors = found["errors"]
    assert errors["outliers"]["fp32"] < 1e-4
    assert errors["outliers"]["int8"]["plain"] > 5 * errors["original"]["int8"]["plain"]
    assert found["won_back"] > 0.9
    roles = {one["role"] for one in errors["outliers"]["fp8"]["roles"]}
    assert {"attn_qkv_proj", "attn_add_kv_proj", "ffn_down_proj"} <= roles
    assert "ffn_up_proj" in capsys.readouterr().out


def test_sensitivity(one_block, tmp_path, capsys):
    options = ["--videos", "1", "--steps", "2", "--kinds", "original"]
    sensitivity.main(["t2v", *options, "--out", str(tmp_path)])
    found = results(tmp_path, "sensitivity")["results"]
    (one,) = found["checkpoints"]
    assert one["trials"] == len(one["sites"]) == 2 * 8  # seven groups and an attention, two types
    assert [each["dtype"] for each in one["together"]] == ["int8", "fp8"]
    assert all(0.5 < each["ratio"] < 2 and -1 <= each["rank"] <= 1 for each in one["together"])
    assert found["estimate"]["trials"] == 40 * one["trials"]
    assert "t2v-14b, 8,190 tokens, 640 trials" in capsys.readouterr().out


def test_ranks_are_compared_not_sizes():
    def found(errors):
        sites = [
            SiteSensitivity(str(at), "", "int8", 0.0, error, float(at) ** 3)
            for at, error in enumerate(errors)
        ]
        other = SiteSensitivity("x", "", "fp8", 0.0, 9.0, 0.0)
        return Sensitivity((*sites, other), (), 1, 0.0, 0.0)

    assert sensitivity.rank_correlation(found([0.1, 0.2, 0.9]), "int8") == pytest.approx(1)
    assert sensitivity.rank_correlation(found([0.9, 0.2, 0.1]), "int8") == pytest.approx(-1)


def test_the_share_won_back():
    errors = {
        "original": {"int8": {"plain": 0.01, "smoothed": 0.01}},
        "outliers": {"int8": {"plain": 0.11, "smoothed": 0.02}},
    }
    assert smoothing.won_back(errors) == pytest.approx(0.9)


def test_errors_of_calls_count_by_their_size():
    expected = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    actual = [torch.tensor([3.0, 0.5]), torch.tensor([4.0])]
    assert smoothing.relative_error(actual, expected) == pytest.approx(0.1)


def test_recognition(one_block, tmp_path, capsys):
    options = ["--count", "2", "--batch", "1", "--steps", "2", "--recipes", "int8-attention"]
    calibration = ["--calibration-videos", "1", "--calibration-steps", "2"]
    recognition.main(["t2v", *options, *calibration, "--out", str(tmp_path)])
    (found,) = results(tmp_path, "recognition")["results"]
    compiled = found["recipes"]["int8-attention"]
    assert found["asked"] == [0, 1]
    assert len(found["original"]["named"]) == len(compiled["named"]) == 2
    assert compiled["psnr"]["worst"] == min(compiled["psnr"]["each"]) > 10
    assert compiled["ssim"]["worst"] < compiled["ssim"]["mean"] <= 1
    assert "int8-attention" in capsys.readouterr().out


def test_a_video_does_not_depend_on_its_batch():
    whole = Request(("one", "two", "three"), torch.rand(3, 1, 24, 24), steps=7, seed=5)
    first, last = subjects.part(whole, 0, 2), subjects.part(whole, 2, 2)
    assert first.prompts + last.prompts == whole.prompts
    assert (first.steps, last.steps) == (7, 7)
    assert torch.equal(torch.cat([first.first_frames, last.first_frames]), whole.first_frames)
    assert torch.equal(torch.cat([first.noise(), last.noise()]), whole.noise())


def test_the_worst_are_a_twentieth():
    values = torch.arange(40.0).flip(0)
    found = recognition.spread(values)
    assert found["mean"] == pytest.approx(19.5)
    assert found["worst"] == pytest.approx(0.5)
    assert recognition.spread(values[-3:])["worst"] == 0


def test_what_is_no_number_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        record.write(tmp_path, "broken", {}, float("nan"))
