"""Runs tests/interpreted/ in a process where Triton interprets its kernels on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

INTERPRETED = Path(__file__).parent / "interpreted"
triton = pytest.importorskip("triton", reason="the package triton is missing")


@pytest.mark.skipif(
    triton.__version__ < "3.7" and numpy.__version__ >= "2.4",
    reason="this Triton's interpreter reads numbers as this numpy no longer gives them",
)
def test_kernels_are_their_plain_bodies_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(INTERPRETED)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_importing_the_compiler_imports_no_triton():
    code = "import sys, wancompile.kernels; assert 'triton' not in sys.modules"
    blocked = "import sys; sys.modules['triton'] = None; import wancompile.kernels"
    for program in (code, blocked):
        subprocess.run([sys.executable, "-c", program], check=True)
