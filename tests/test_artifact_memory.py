"""What saving and loading cost, measured in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_memory

# A model of 253 MiB in bf16 is compiled and saved, beside a small one to warm up with.
SAVE = (
    test_memory.SCRIPT.partition("# Whatever is loaded")[0]
    + """
import sys
big, small = sys.argv[1:]
wancompile.compile(build(layers=1, heads=1, ffn=64), [call()]).save(small)
model = build(layers=3, heads=12, ffn=6144)
original = bytes_of(model)
started = time.perf_counter()
compiled = wancompile.compile(model, [call()], recipe="int8", consume=True)
seconds = time.perf_counter() - started
base = resident()
peak = Peak(daemon=True)
peak.start()
compiled.save(big)
peak.watching = False
peak.join()
print(json.dumps({
    "original": original,
    "compiled": compiled.nbytes,
    "largest": max(one.nbytes for one in compiled.program.state.values()),
    "peak": peak.high - base,
    "seconds": seconds,
}))
"""
)

LOAD = """
import json, sys, threading, time, zlib
import torch, wancompile

big, small = sys.argv[1:]


def memory(label):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(label))


class Peak(threading.Thread):
    high = own = 0
    watching = True

    def run(self):
        while self.watching:
            self.high = max(self.high, memory("VmRSS:"))
            self.own = max(self.own, memory("RssAnon:"))
            time.sleep(0.002)


wancompile.load(small)  # whatever is loaded on first use is loaded before the baseline
base, base_own = memory("VmRSS:"), memory("RssAnon:")
peak = Peak(daemon=True)
peak.start()
started = time.perf_counter()
model = wancompile.load(big)
seconds = time.perf_counter() - started
for tensor in model.program.state.values():
    zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy())  # reads it all
peak.watching = False
peak.join()
mapped = sum("weights-" in line for line in open("/proc/self/maps"))
print(json.dumps({
    "peak": peak.high - base,
    "own": peak.own - base_own,
    "mapped": mapped,
    "seconds": seconds,
}))
"""


# One thread, and freed blocks go back at once, as in test_memory.
QUIET = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0"}


def run(script: str, *folders: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, folders)],
        env={**os.environ, **QUIET},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_neither_saving_nor_loading_doubles_the_memory(tmp_path):
    big, small = tmp_path / "big", tmp_path / "small"
    saved = run(SAVE, big, small)
    on_disk = sum(path.stat().st_size for path in big.iterdir())
    assert saved["compiled"] < on_disk < 1.01 * saved["compiled"]
    assert on_disk < 0.6 * saved["original"]  # embedders stay in bf16: a tenth of so small a model
    # Weights lie on the CPU in one piece: they are written from where they are.
    assert saved["peak"] < saved["largest"]
    loaded = run(LOAD, big, small)
    assert loaded["mapped"] > 0
    # Every weight was read, and none is in memory of the process's own.
    assert 0.95 * saved["compiled"] < loaded["peak"] < 1.1 * saved["compiled"]
    assert loaded["own"] < 0.1 * saved["compiled"]
    assert loaded["seconds"] < saved["seconds"]
