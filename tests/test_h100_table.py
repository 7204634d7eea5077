"""The parts of the H100 benchmark that need no GPU; times of tiny models on a CPU mean nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import pytest
import torch

from benchmarks import h100, h100_figures, h100_peers, h100_profile, h100_table
from benchmarks.h100_plan import COLUMNS, ROWS, jobs
from benchmarks.h100_turns import Scheduler, Task, overlap
from wancompile.ops import norm

ROW = "t2v-14b-480p"
aten = torch.ops.aten


def cell(column, deep, shallow, row=ROW, **more):
    return {
        "row": row,
        "column": column,
        "forward_ms": {"3": deep, "1": shallow},
        "peak_gib": {"3": 9.0, "1": 7.0},
        **more,
    }


def entry(op="wancompile_kernels.linear", part="linears", kind="fp8", **values):
    return {"op": op, "shapes": "a -> b", "part": part, "kind": kind, "calls": 1.0, "ms": 1.0,
            "gbytes": 0.0, "tflop": 0.0, **values}  # fmt: skip


def by_key(*cells):
    return {(one["row"], one["column"]): one for one in cells}


# ---------------------------------------------------------------- figures


def test_layers_and_models_come_from_two_depths():
    one = cell("eager", [215.0, 211.0, 205.0], [75.0, 71.0, 70.0])
    assert h100_figures.layer_ms(one) == pytest.approx((211 - 71) / 2)
    assert h100_figures.layer_range_ms(one) == ((205 - 75) / 2, (215 - 70) / 2)
    assert h100_figures.model_ms(one) == pytest.approx(1 + 40 * 70)
    assert h100_figures.model_gib(one) == pytest.approx(6 + 40 * 1)


def test_a_floor_is_the_larger_of_bytes_and_flops():
    rates = {"copy": 2000.0, "fp8": 1000.0}
    assert h100_figures.floor_ms(entry(gbytes=4.0), rates) == pytest.approx(2.0)
    assert h100_figures.floor_ms(entry(gbytes=4.0, tflop=3.0), rates) == pytest.approx(3.0)
    assert h100_figures.floor_ms(entry(gbytes=8.0, tflop=3.0), rates) == pytest.approx(4.0)
    assert h100_figures.floor_ms(entry(kind="int8", tflop=3.0), rates) is None
    assert h100_figures.floor_ms(entry(gbytes=4.0), {}) is None


def test_the_best_rate_may_be_that_of_a_linear():
    profile = [entry(ms=2.0, tflop=3.0), entry(part="attention", ms=1.0, tflop=9.0)]
    one = cell("fp8-attention", [3.0], [1.0], rates={"fp8": 1200.0, "copy": 2.0}, profile=profile)
    assert h100_figures.best_rates(one) == {"fp8": 1500.0, "copy": 2.0}


def test_runs_are_compared_through_what_both_measured(tmp_path):
    runs = {
        "a": [cell("compile-sdpa", [170.0], [70.0]), cell("fp8-attention", [90.0], [40.0])],
        "b": [cell("compile-sdpa", [340.0], [140.0]), cell("torchao-fa3", [255.0], [105.0])],
        "c": [cell("torchao-sdpa", [90.0], [40.0])],
        "d": [cell("fp8-attention", [270.0], [120.0]), cell("int8", [360.0], [160.0])],
    }
    files = []
    for name, results in runs.items():
        content = {"measured_on": {}, "settings": {"packages": {}}, "results": results}
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(content))
    cells, _ = h100_figures.load(files)
    # The card of b takes twice as long for everything; c measured nothing to compare with.
    expected = (1.5 * (20 + 40 * 50) / 2) / (15 + 40 * 25)
    over = h100_figures.gain(cells, ROW, "fp8-attention", h100_figures.TORCHAO)
    assert over == pytest.approx(expected)
    assert h100_figures.ratio(cells[ROW, "torchao-sdpa"], cells[ROW, "fp8-attention"]) is None
    assert h100_figures.over_compiled(cells, cells[ROW, "torchao-fa3"]) == pytest.approx(4 / 3)
    # That of d, three times as slow as a, has our fp8 only: int8 is a quarter slower than that.
    fp8_in_a = (20 + 40 * 50) / (15 + 40 * 25)
    int8_over_fp8 = (60 + 40 * 100) / (45 + 40 * 75)
    over = h100_figures.over_compiled(cells, cells[ROW, "int8"])
    assert over == pytest.approx(fp8_in_a / int8_over_fp8)


def test_targets_are_met_or_not_or_not_measured():
    slow, fast = [170.0], [70.0]  # 50 ms a layer
    norm_entry = entry("norm", "elementwise", "bf16", ms=1.3, gbytes=2.0)
    ours = cell(
        "fp8-attention", [90.0], [40.0], rates={"copy": 2000.0}, profile=[norm_entry]
    )  # 25 ms a layer
    peer = cell("compile-sdpa", slow, fast)
    int8 = cell("int8-attention-fast", [93.0], [41.0])
    whole = {"row": ROW, "column": "whole", "first_call_s": 61.0, "peak_gib": {"40": 20.0},
             "forward_ms": {"40": [1000.0]}}  # fmt: skip
    found = {(one.text, one.where): one for one in h100_figures.targets(
        by_key(ours, peer, int8, whole))}  # fmt: skip
    over_sdpa = found["ours fp8 over torch.compile bf16, cuDNN attention", ROW]
    assert over_sdpa.value == pytest.approx((20 + 40 * 50) / (15 + 40 * 25))
    assert over_sdpa.met
    assert found["ours fp8 over torch.compile bf16 + FA3", ROW].met is None
    int8_time = found["time of ours int8 over ours fp8", ROW]
    assert int8_time.value == pytest.approx((15 + 40 * 26) / (15 + 40 * 25))
    assert int8_time.met is False
    floor = found["worst elementwise kernel over its floor", ROW]
    assert (floor.value, floor.met) == (pytest.approx(1.3), False)
    memory = found["peak memory of ours fp8 over torch.compile bf16", ROW]
    assert (memory.value, memory.met) == (pytest.approx(20 / 46), True)
    assert found["first call of all 40 layers, seconds", ROW].met is False


def test_rates_and_errors_are_targets_too():
    def product(ms, shapes="1x32760x5120 fp8, 13824x5120 fp8 -> 1x32760x13824 bf16"):
        return entry(ms=ms, tflop=4.2, shapes=shapes)

    def attention(ms):
        return entry("attention", "attention", ms=ms)

    ours = [product(3.0), product(4.2), attention(1.0), attention(20.0)]
    cells = by_key(
        cell("fp8-attention", [90.0], [40.0], profile=ours),
        cell("int8-attention-fast", [90.0], [40.0], profile=[product(3.0), attention(25.0)]),
        cell("torchao-sdpa", [90.0], [40.0], error=2e-2),
        cell("fp8", [90.0], [40.0], error=2.5e-2),
    )
    found = {one.text: one for one in h100_figures.targets(cells) if one.where == ROW}
    ffn = found["TFLOP/s of the slower product of the FFN, ours fp8, 8-bit attention"]
    assert (ffn.value, ffn.met) == (pytest.approx(1000), False)
    rate = found["rate of our attention over FlashAttention-3's in fp8, inside of models"]
    assert (rate.value, rate.met) == (pytest.approx(0.8), False)
    error = found["error of ours fp8, bf16 attention, over torchao fp8's"]
    assert (error.value, error.met) == (pytest.approx(1.25), False)
    assert found["error of ours int8, bf16 attention, over torchao fp8's"].met is None


def test_the_faster_torchao_counts():
    cells = by_key(
        cell("fp8-attention", [30.0], [10.0]),
        cell("torchao-fa3", [60.0], [20.0]),
        cell("torchao-sdpa", [90.0], [30.0]),
    )
    assert h100_figures.gain(cells, ROW, "fp8-attention", h100_figures.TORCHAO) == pytest.approx(2)


def test_of_several_files_the_last_timed_cell_counts(tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    failed = {"row": ROW, "column": "fp8", "note": "not run: out of time"}
    known = {"measured_on": {"gpu": "H100"}, "settings": {}}
    first.write_text(json.dumps({**known, "results": [cell("eager", [3.0], [1.0]), failed]}))
    later = [{"row": ROW, "column": "eager", "note": "crashed"}, cell("fp8", [5.0], [1.0])]
    second.write_text(json.dumps({**known, "results": later}))
    cells, machines = h100_figures.load([first, second])
    assert h100_figures.layer_ms(cells[ROW, "eager"]) == 1.0
    assert h100_figures.layer_ms(cells[ROW, "fp8"]) == 2.0
    assert machines[0]["gpu"] == "H100"


def test_the_document_says_what_was_measured_and_what_was_not():
    profile = [entry(ms=8.0, tflop=8.0), entry("norm", "elementwise", "bf16", ms=2.0, gbytes=4.0)]
    theirs = [entry("gemm", ms=11.0), entry("triton_", "elementwise", ms=5.0)]
    rates = {"copy": 4000.0, "fp8": 1000.0}
    cells = by_key(
        cell(
            "compile-sdpa",
            [48.0],
            [16.0],
            profile=theirs,
            error=4e-3,
            cold=True,
            first_call_s=31,
        ),
        cell("fp8-attention", [30.0], [10.0], rates=rates, profile=profile),
        {"row": ROW, "column": "eager", "note": "stopped after 150 s"},
    )
    text = h100_table.document(cells, [])
    line = next(one for one in text.splitlines() if one.startswith("| torch.compile bf16, cuDNN"))
    assert "| 16.00 | 16.00 to 16.00 | 0.640 | 1.00 | 46.0 |  | 31 | 4.0e-03 |" in line
    line = next(one for one in text.splitlines() if one.startswith("| ours fp8, 8-bit"))
    assert "| 10.00 | 10.00 to 10.00 | 0.400 | 1.60 | 46.0 |  |  |  |" in line
    assert "| `norm` | a -> b | 1 | 2.000 | 4.00 |  | 1.000 | 2.00 |" in text
    gains = f"| {ROW} | fp8-attention | compile-sdpa |"
    assert f"{gains} linears | 11.00 | 8.00 | 8.00 | 3.00 | 3.00 |" in text
    assert f"{gains} elementwise | 5.00 | 2.00 | 1.00 | 4.00 | 3.00 |" in text
    assert f"{gains} sum | 16.00 | 10.00 | 9.00 | 7.00 | 6.00 |" in text
    assert "stopped after 150 s" in text
    assert "Not measured." in text.split("## All layers, measured")[1].split("##")[0]


# ---------------------------------------------------------------- work of ops


def test_a_linear_reads_its_operands_once():
    x, weight = torch.zeros(2, 100, 32), torch.zeros(48, 32)
    out = aten.linear.default(x, weight)
    found = h100_profile.entry_of(aten.linear.default, (x, weight), {}, out)
    assert found.part == "linears"
    assert found.gbytes * 1e9 == pytest.approx(4 * (6400 + 1536 + 9600))
    assert found.tflop * 1e12 == pytest.approx(2 * 200 * 32 * 48)
    assert found.kind == "fp32"


def test_attention_multiplies_twice():
    q, k = torch.zeros(1, 3, 40, 16), torch.zeros(1, 3, 24, 16)
    target = aten.scaled_dot_product_attention.default
    found = h100_profile.entry_of(target, (q, k, k), {}, target(q, k, k))
    assert found.part == "attention"
    assert found.tflop * 1e12 == pytest.approx(4 * 3 * 40 * 24 * 16)
    assert found.gbytes * 1e9 == pytest.approx(4 * (2 * 1920 + 1152))  # k and v are one tensor


def test_a_view_moves_nothing_and_a_broadcast_counts_once():
    x = torch.zeros(8, 6)
    view = h100_profile.entry_of(aten.permute.default, (x, [1, 0]), {}, x.permute(1, 0))
    assert (view.gbytes, view.tflop) == (0.0, 0.0)
    wide = torch.zeros(8, 1).expand(8, 6)
    found = h100_profile.entry_of(aten.add.Tensor, (x, wide), {}, x + wide)
    assert found.gbytes * 1e9 == pytest.approx(4 * (48 + 8 + 48))


def test_of_operands_with_rows_only_those_rows_are_read():
    x, table = torch.zeros(1, 50, 8), torch.zeros(1, 50, 8)
    rows = torch.tensor([[0] * 20 + [7] * 30], dtype=torch.int32)
    target = torch.ops.wancompile.add_gated.default
    args = x, x.clone(), table, None, rows
    found = h100_profile.entry_of(target, args, {}, norm.add_gated(*args))
    assert found.gbytes * 1e9 == pytest.approx(4 * (400 + 400 + 2 * 8 + 50 + 400))
    without = h100_profile.entry_of(target, (*args[:4], None), {}, norm.add_gated(*args[:4], None))
    assert without.gbytes * 1e9 == pytest.approx(4 * 4 * 400)


def test_a_layer_is_what_the_deeper_model_does_more():
    def one(op, part, calls, ms):
        return h100_profile.Entry(op, "s", part, "fp8", calls, ms, calls * 2.0, 0.0)

    deep = [one("a", "linears", 7.0, 21.0), one("b", "elementwise", 1.0, 4.0)]
    shallow = [one("a", "linears", 3.0, 9.0), one("c", "elementwise", 1.0, 2.0)]
    found = {each["op"]: each for each in h100_profile.per_layer(deep, shallow, 2)}
    assert (found["a"]["calls"], found["a"]["ms"], found["a"]["gbytes"]) == (2.0, 6.0, 4.0)
    assert (found["b"]["ms"], found["c"]["ms"]) == (2.0, -1.0)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nvjet_sm90_tst_256x128_64x4_2x1_v_bz_coopA_bias_TNN", "linears"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<gemm", "linears"),
        (
            "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwd",
            "attention",
        ),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("_attn_fwd", "attention"),
        ("triton_red_fused__scaled_mm_add_mul_native_layer_norm_3", "elementwise"),
        ("triton_tem_fused_mm_0", "linears"),
        ("void at::native::vectorized_elementwise_kernel<4", "elementwise"),
    ],
)
def test_kernels_belong_to_parts(name, part):
    assert h100_profile.part_of_kernel(name) == part


def test_exact_attention_is_attention():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, tokens, 3, 8, dtype=torch.float64) for tokens in (30, 20, 20))
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    expected = torch.softmax(heads[0] @ heads[1].mT / 8**0.5, -1) @ heads[2]
    actual = h100_peers._exact_attention(q, k, v)
    assert torch.allclose(actual, expected.transpose(1, 2), rtol=1e-12)


# ---------------------------------------------------------------- plan


def test_the_plan_puts_what_matters_first():
    planned = jobs(list(ROWS), list(COLUMNS))
    assert planned[0].name == f"{ROW} whole"
    assert [job.column.rank for job in planned] == sorted(job.column.rank for job in planned)
    assert len(planned) == len(ROWS) * (len(COLUMNS) - 1) + 1
    assert all(job.gib < 74 for job in planned)
    assert {row.tokens for row in ROWS.values()} == {32760, 75600, 27280}


# ---------------------------------------------------------------- turns


def _alone(turn, folder):
    """Count while others hold their turns; hold one, and say whether others counted meanwhile."""
    mine = folder / str(os.getpid())
    for _ in range(10):
        mine.write_text(str(time.monotonic()))
        time.sleep(0.02)
    turn.take()
    begin = time.monotonic()
    time.sleep(0.4)
    stamps = [float(one.read_text() or 0) for one in folder.iterdir() if one != mine]
    turn.report(disturbed=any(stamp > begin for stamp in stamps))
    turn.give_back()
    end = time.monotonic()
    while time.monotonic() < end + 2.0:
        mine.write_text(str(time.monotonic()))
        time.sleep(0.02)
    turn.report_span("tail", end, time.monotonic())


def _fail(turn):
    turn.report(half="done")
    raise ValueError("no such thing\nand more")


def _die_in_turn(turn):
    turn.take()
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(turn):
    turn.report(started=True)
    time.sleep(600)


def _out_of_memory(turn, folder):
    mark = folder / "tried"
    if mark.exists():
        turn.report(second=True)
        return
    mark.touch()
    raise RuntimeError("CUDA out of memory")


def _run(tasks, seconds=120.0, processes=3):
    saved = []
    deadline = time.monotonic() + seconds
    scheduler = Scheduler(tasks, saved.append, deadline=deadline, processes=processes, gib=10.0)
    records = scheduler.run()
    assert saved
    return records


def test_one_is_timed_while_all_others_are_stopped(tmp_path):
    tasks = [Task(f"t{i}", _alone, (tmp_path,), 60.0, 1.0) for i in range(3)]
    records = _run(tasks)
    assert [one["disturbed"] for one in records] == [False] * 3
    assert all("note" not in one for one in records)
    assert min(one["tail"] for one in records) < 1.7  # pauses are not counted


def test_failures_cost_only_their_own_figures(tmp_path):
    records = _run([
        Task("fails", _fail, (), 60.0, 1.0),
        Task("dies", _die_in_turn, (), 60.0, 1.0),
        Task("hangs", _hang, (), 3.0, 1.0),
        Task("memory", _out_of_memory, (tmp_path,), 60.0, 1.0),
    ])  # fmt: skip
    fails, dies, hangs, memory = records
    assert (fails["half"], fails["note"]) == ("done", "ValueError: no such thing")
    assert dies["note"] == "exit code -9"
    assert re.fullmatch(r"stopped after \d s", hangs["note"])
    assert (memory.get("second"), memory.get("note")) == (True, None)


def test_what_does_not_fit_into_the_time_is_noted():
    tasks = [Task(name, _hang, (), 60.0, 1.0) for name in ("first", "second")]
    first, second = _run(tasks, seconds=3.0, processes=1)
    assert first["note"] == "stopped: out of time"
    assert second["note"] == "not run: out of time"


def test_the_overlap_of_intervals():
    assert overlap([(0.0, 2.0), (5.0, 9.0)], 1.0, 6.0) == pytest.approx(2.0)


# ---------------------------------------------------------------- all of it


def test_tiny_models_go_all_the_way(tmp_path, capfd):
    out = tmp_path / "h100.json"
    columns = ["reference", "eager", "int8-attention"]
    tiny = ["--device", "cpu", "--tiny", "--rows", ROW, "--columns", *columns]
    h100.main([str(out), *tiny, "--processes", "2", "--budget", "300"])
    cells, _ = h100_figures.load([out])
    assert {column for _, column in cells} == set(columns)
    eager, ours = cells[ROW, "eager"], cells[ROW, "int8-attention"]
    assert 0 < eager["error"] < 0.02
    assert eager["error"] < ours["error"] < 0.1
    assert len(ours["forward_ms"]["3"]) == 5
    assert {one["part"] for one in ours["profile"]} == set(h100_profile.PARTS)
    attention = next(one for one in ours["profile"] if "wancompile" in one["op"]
                     and one["part"] == "attention")  # fmt: skip
    assert attention["calls"] == pytest.approx(1.0)
    assert attention["kind"] == "int8"
    h100_table.main([str(out)])
    printed = capfd.readouterr().out
    assert "| ours int8, 8-bit attention, v in bf16 |" in printed
