"""The benchmarks run on small settings and write what they promise; their figures mean nothing."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json

import pytest
import torch
from diffusers import WanTransformer3DModel

from benchmarks import (
    accuracy,
    accuracy_attention,
    accuracy_gate,
    accuracy_limits,
    accuracy_table,
    attention_accuracy,
    lora_accuracy,
    planning,
    record,
    sensitivity,
    smoothing,
    static_scales,
    subjects,
)
from benchmarks.accuracy_columns import COLUMNS, Column, Subject, Unavailable
from training.train import CONFIGS
from wancompile.demo import sampler
from wancompile.demo.sampler import Request, calls
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


@pytest.fixture
def small(one_block, monkeypatch):
    """The same on videos of three frames in the place of nine."""
    monkeypatch.setattr(sampler, "FRAMES", 3)


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


def test_static_scales(small, tmp_path, capsys):
    few = ["--videos", "1", "--steps", "1", "--held-out-videos", "1", "--held-out-steps", "1"]
    static_scales.main(["t2v", *few, "--out", str(tmp_path)])
    (one,) = results(tmp_path, "static_scales")["results"]
    for types in one["errors"].values():
        # The steps of a float grow with its value, so that e4m3 need not lose by it.
        assert types["int8"]["per token"] < types["int8"]["all static"]
        for errors in types.values():
            assert list(errors) == list(static_scales.COLUMNS)
            assert all(0 < error < 0.1 for error in errors.values())
            assert len(set(errors.values())) == 3
    assert "static behind GELU" in capsys.readouterr().out


def test_smoothing(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(smoothing, "DTYPES", ("int8",))  # the other one takes as long again
    options = ["--videos", "1", "--steps", "2", "--held-out-videos", "1", "--held-out-steps", "2"]
    smoothing.main(["i2v", *options, "--out", str(tmp_path)])
    (found,) = results(tmp_path, "smoothing")["results"]
    errors = found["errors"]
    assert errors["outliers"]["fp32"] < 1e-4
    assert errors["outliers"]["int8"]["plain"] > 5 * errors["original"]["int8"]["plain"]
    assert found["won_back"] > 0.9
    roles = {one["role"] for one in errors["outliers"]["int8"]["roles"]}
    assert {"attn_qkv_proj", "attn_add_kv_proj", "ffn_down_proj"} <= roles
    assert "ffn_up_proj" in capsys.readouterr().out


def test_sensitivity(small, tmp_path, capsys):
    options = ["--videos", "1", "--steps", "2", "--kinds", "original"]
    sensitivity.main(["t2v", *options, "--out", str(tmp_path)])
    found = results(tmp_path, "sensitivity")["results"]
    (one,) = found["checkpoints"]
    # Seven groups in two types, and an attention in three ways.
    assert one["trials"] == len(one["sites"]) == 2 * 7 + 3
    assert [each["dtype"] for each in one["together"]] == ["int8", "int8-fast", "fp8"]
    assert all(0.5 < each["ratio"] < 2 and -1 <= each["rank"] <= 1 for each in one["together"])
    assert found["estimate"]["trials"] == 40 * one["trials"]
    assert "t2v-14b, 8,190 tokens, 680 trials" in capsys.readouterr().out


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


FEW = ["--count", "3", "--batch", "2", "--steps", "2", "--every", "1"]
FEW += ["--calibration-videos", "1", "--calibration-steps", "2"]


def test_accuracy(small, tmp_path, capsys):
    columns = ["float", "bf16", "int8", "int8-rounded", "torchao-fp8"]
    accuracy.main(["t2v", *FEW, "--columns", *columns, "--out", str(tmp_path)])
    plain, outliers = (
        results(tmp_path, f"accuracy-t2v-{kind}")["results"] for kind in accuracy.KINDS
    )
    assert plain["asked"] == [0, 1, 2]
    assert "compared with" in plain["columns"]["float"]["left_out"]
    assert "GPU" in plain["columns"]["torchao-fp8"]["left_out"]
    assert min(outliers["columns"]["float"]["psnr"]["each"]) > 90
    assert 1e-3 < plain["columns"]["bf16"]["one_step"]["mean"] < 2e-2
    for found in (plain, outliers):
        int8, rounded = (found["columns"][one] for one in ("int8", "int8-rounded"))
        for name in ("one_step", "psnr", "ssim", "temporal"):
            assert len(int8[name]["each"]) == 3
        assert int8["one_step"]["worst"] == pytest.approx(max(int8["one_step"]["each"]))
        assert int8["psnr"]["worst"] == pytest.approx(min(int8["psnr"]["each"]))
        assert 0 < int8["one_step"]["mean"] <= int8["one_step"]["worst"] < 0.1
    assert rounded["one_step"]["mean"] > 5 * int8["one_step"]["mean"]
    assert rounded["psnr"]["mean"] < int8["psnr"]["mean"] - 10
    assert rounded["temporal"]["mean"] > int8["temporal"]["mean"]
    printed = capsys.readouterr().out
    assert "| ours int8 " in printed
    assert "### T2V, with outlier channels" in printed


def test_one_step_error_is_of_each_video(small):
    """Calls of several batches, of which the last is shorter, come back video by video."""
    options = argparse.Namespace(count=3, batch=2, steps=2, every=1)
    reference = accuracy.Reference("t2v", options)
    nudge = torch.tensor([0.1, 0.2, 0.3])

    def model(**call):
        (output,) = reference.model(**call)
        first = 0 if len(output) == 2 else 2
        return (output * (1 + nudge[first : first + len(output), None, None, None, None]),)

    model.dtype = torch.float32
    torch.testing.assert_close(reference._one_step(model).float(), nudge)


def test_columns_for_which_no_time_is_left_are_named(small, tmp_path, capsys):
    options = [*FEW, "--kinds", "plain", "--budget", "0", "--columns", "int8", "fp8"]
    accuracy.main(["t2v", *options, "--out", str(tmp_path)])
    found = results(tmp_path, "accuracy-t2v-plain")["results"]
    assert {one["left_out"] for one in found["columns"].values()} == {"no time was left"}
    assert capsys.readouterr().out.count("left out: no time was left") == 4


def test_columns_of_an_earlier_run_are_kept(small, tmp_path):
    options = ["t2v", *FEW, "--kinds", "plain", "--out", str(tmp_path)]
    accuracy.main([*options, "--columns", "int8", "fp8", "--budget", "0"])
    path = tmp_path / "accuracy-t2v-plain.json"
    path.write_text(path.read_text().replace("no time was left", "it was measured"))
    again = [*options, "--columns", "int8", "--budget", "0", "--keep"]
    accuracy.main(again)
    columns = results(tmp_path, "accuracy-t2v-plain")["results"]["columns"]
    assert columns["fp8"] == {"left_out": "it was measured"}
    assert columns["int8"] == {"left_out": "no time was left"}
    with pytest.raises(ValueError, match="other settings: every"):
        accuracy.main([*again, "--every", "2"])


def test_a_column_that_fails_stops_no_other(small, tmp_path, capsys, monkeypatch):
    def broken(subject):
        raise RuntimeError("dimensions of 64 are not for me\nand more")

    columns = (
        Column("peer", "a peer", broken),
        Column("black", "black videos", all_nan),
        Column("float", "not quantized", in_fp64),
    )
    monkeypatch.setattr(accuracy, "COLUMNS", columns)
    monkeypatch.setattr(accuracy_table, "COLUMNS", columns)
    names = [column.name for column in columns]
    with pytest.raises(SystemExit):
        accuracy.main(
            ["t2v", *FEW, "--kinds", "plain", "--columns", *names, "--out", str(tmp_path)]
        )
    found = results(tmp_path, "accuracy-t2v-plain")["results"]["columns"]
    assert found["peer"]["failed"] == "RuntimeError: dimensions of 64 are not for me\nand more"
    assert found["black"]["failed"].startswith("ValueError: one_step, psnr, ssim, temporal: not")
    assert found["float"]["psnr"]["worst"] > 90
    assert "failed: RuntimeError: dimensions of 64 are not for me" in capsys.readouterr().out


def all_nan(subject):
    model = subject.copy()
    model.proj_out.weight.data.fill_(torch.nan)
    return model


def in_fp64(subject):
    return subject.copy().double()


def test_no_column_changes_its_subject(small):
    model = subjects.load("t2v")
    subject = Subject(model, calls(model, [subjects.calibration("t2v", 1, 1)]))
    before = copy.deepcopy(model.state_dict())
    for column in COLUMNS:
        if column.name in ("bf16", "int8", "fp8-attention", "modelopt-int8", "auto-2"):
            with contextlib.suppress(Unavailable):
                column.make(subject)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_bf16_keeps_in_fp32_what_diffusers_keeps():
    model = subjects.in_bf16(subjects.load("t2v"))
    assert model.dtype == model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert model.scale_shift_table.dtype == model.blocks[0].norm2.weight.dtype == torch.float32


def goals_of(**psnr):
    columns = {name.replace("_", "-"): {"psnr": {"mean": value}} for name, value in psnr.items()}
    return {"checkpoint": "t2v", "kind": "plain", "columns": columns}


def test_goals():
    met = goals_of(int8=46.0, int8_attention=42.5, fp8=35.0, torchao_fp8=35.1,
                   modelopt_int8=40.0, modelopt_int8_half=44.5)  # fmt: skip
    short = goals_of(int8=44.0, torchao_fp8=36.0, modelopt_int8=43.9)
    lines = accuracy_table._goals([met, short]).splitlines()[2:]
    verdicts = [line.rsplit("|", 2)[1].strip() for line in lines]
    assert verdicts == ["yes"] * 5 + ["**no**", "**no**", "yes", "**no**"]
    assert "| 1.5" in lines[4]
    assert "| 0.8" in lines[-1]


def test_videos_beyond_a_budget_are_counted():
    found = goals_of(int8=46.0)
    worst = accuracy_table.spread("one_step", torch.tensor([0.004, 0.0055, 0.006, 0.0045]))
    found["columns"]["auto-0.5"] = {"worst_call": worst}
    _, about, rows = accuracy_table._budgets([found])
    assert "no bound" in about
    cells = [cell.strip() for cell in rows.splitlines()[2].split("|")]
    assert cells[1:-1] == ["T2V, as trained", "0.5%", "1.00", "1.20", "1.20", "2 of 4"]
    assert accuracy_table._budgets([goals_of(int8=46.0)]) == []


def test_budgets_are_those_of_the_columns():
    names = [column.name for column in COLUMNS if column.name.startswith("auto")]
    assert names == list(accuracy_table.BUDGETS)
    for name, budget in accuracy_table.BUDGETS.items():
        assert name == f"auto-{100 * budget:g}"


def test_what_is_added_to_a_ceiling():
    # Two equal errors are 3.01 dB worse together.
    assert accuracy_limits.added(45 - 3.0103, 45) == pytest.approx(45, abs=1e-3)
    assert accuracy_limits.added(45.1, 45) is None


def test_a_feature_is_judged_video_by_video():
    columns = {
        "int8": accuracy_table.spread("psnr", torch.tensor([40.0, 44.0, 30.0])),
        "int8-nearest": accuracy_table.spread("psnr", torch.tensor([39.0, 41.0, 31.0])),
    }
    found = goals_of()
    found["columns"] = {name: {"psnr": one} for name, one in columns.items()}
    ((_, _, mean, worst, better),) = accuracy_limits._feature("int8: clipping and GPTQ", found)
    assert (mean, worst, better) == ("+1.0 ± 1.2", "-1.0", "2 of 3")
    assert list(accuracy_limits._feature("int8: smoothing", found)) == []
    assert accuracy_limits.document([found]) == []


def test_attention_accuracy(one_block, tmp_path, capsys):
    cells = ["exact", "V bf16", "int8 QK, fp8 PV"]
    options = ["--videos", "1", "--steps", "2", "--every", "1", "--calibration-videos", "1"]
    attention_accuracy.main(["t2v", *options, "--cells", *cells, "--out", str(tmp_path)])
    (found,) = results(tmp_path, "attention_accuracy")["results"]
    exact, bf16, rounded = (found["cells"][one] for one in cells)
    assert exact["float"] < 1e-6 < bf16["float"] < rounded["float"] < 0.1
    # What attention and the linears lose is independent, so that their squares add up.
    both = (exact["int8"] ** 2 + rounded["float"] ** 2) ** 0.5
    assert rounded["int8"] == pytest.approx(both, rel=0.05)
    assert exact["int8"] > 1e-4
    assert len(rounded["psnr"]) == 1
    assert 50 < rounded["psnr"][0] < 90
    assert "int8 QK, fp8 PV" in capsys.readouterr().out


def test_cells_of_an_earlier_run_stay():
    def found(name, left_out=(), **cells):
        return {"checkpoint": name, "cells": cells, "left_out": list(left_out)}

    old = [found("t2v", ["b", "c"], a=1), found("i2v", a=2)]
    new = [found("t2v", ["c"], a=3, b=4)]
    assert attention_accuracy.merged(old, new) == [
        found("t2v", ["c"], a=3, b=4),
        found("i2v", a=2),
    ]
    assert attention_accuracy.merged(new, old)[0]["left_out"] == ["c"]


def test_cells_of_other_settings_are_not_kept(tmp_path):
    options = argparse.Namespace(
        videos=2, steps=8, every=5, calibration_videos=2, out=tmp_path, keep=True
    )
    record.write(tmp_path, "attention_accuracy", record.settings(options), [])
    assert attention_accuracy.kept(options) == []
    options.every = 3
    with pytest.raises(ValueError, match="other settings: every"):
        attention_accuracy.kept(options)


def test_what_a_choice_of_attention_buys():
    pairs = accuracy_attention.CHOICES.values()
    assert {label for pair in pairs for label in pair} <= set(attention_accuracy.CELLS)
    cells = {
        "QK int8, scales per head": {"float": 0.004},
        "QK int8, K less its middle": {"float": 0.003},
    }
    text = accuracy_attention.document([{"checkpoint": "t2v", "cells": cells}])
    (row,) = text.splitlines()[2:]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "keys less their middle", "0.400%", "0.300%", "-25%",
    ]  # fmt: skip


def test_the_gates_figures_of_recipes(small, tmp_path, capsys):
    options = ["t2v", "--videos", "2", "--steps", "2", "--kinds", "outliers"]
    recipes = ["--recipes", "int8-attention", "not smoothed"]
    accuracy_gate.main([*options, *recipes, "--out", str(tmp_path)])
    ((found,), settings) = (results(tmp_path, "gate")[key] for key in ("results", "settings"))
    healthy, broken = found["recipes"].values()
    assert settings["kinds"] == ["outliers"]
    for kind in ("own", "site", "block", "output"):
        assert 0 < 5 * healthy[kind] < broken[kind]
    assert healthy["clipped"] < 0.1
    assert "not smoothed" in capsys.readouterr().out


def test_a_budget_that_is_spent(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(record.time, "monotonic", lambda: now[0])
    budget = record.Budget(10)
    with budget.spend():
        now[0] += 6
    assert not budget.allows()  # the next one may take 6 seconds as well, and 4 are left
    assert budget.left == 4


def test_a_video_does_not_depend_on_its_batch():
    whole = Request(("one", "two", "three"), torch.rand(3, 1, 24, 24), steps=7, seed=5)
    first, last = subjects.part(whole, 0, 2), subjects.part(whole, 2, 2)
    assert first.prompts + last.prompts == whole.prompts
    assert (first.steps, last.steps) == (7, 7)
    assert torch.equal(torch.cat([first.first_frames, last.first_frames]), whole.first_frames)
    assert torch.equal(torch.cat([first.noise(), last.noise()]), whole.noise())


def test_the_worst_are_a_twentieth():
    values = torch.arange(40.0).flip(0)
    for name, worst, worst_of_three in (("psnr", 0.5, 0), ("one_step", 38.5, 2)):
        found = accuracy_table.spread(name, values)
        assert found["mean"] == pytest.approx(19.5)
        assert found["worst"] == pytest.approx(worst)
        assert accuracy_table.spread(name, values[-3:])["worst"] == worst_of_three


def test_what_is_no_number_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        record.write(tmp_path, "broken", {}, float("nan"))


def test_lora_accuracy(small, tmp_path, capsys):
    options = ["--videos", "1", "--steps", "6", "--held-out-videos", "1", "--held-out-steps", "2"]
    given = ["t2v", *options, "--recipes", "int8", "--ranks", "4", "--draws", "1"]
    lora_accuracy.main([*given, "--out", str(tmp_path)])
    found = results(tmp_path, "lora_accuracy")["results"]
    assert [one["way"] for one in found] == list(lora_accuracy.WAYS)
    assert all(0.3 < ratio < 3 for one in found for ratio in one["ratios"])
    text = capsys.readouterr().out
    assert all(way in text for way in lora_accuracy.WAYS.values())
    # Rounded twice it errs more than rounded once, whatever the LoRA.
    once, twice = (one["ratios"] for one in found[1:])
    assert all(a < b for a, b in zip(once, twice, strict=True))
