"""What the compiler makes of a model: its groups, one linear before and after, a page to look at.

python examples/inspect_graph.py block.html
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import wancompile
from wancompile import inspect, presets
from wancompile.html import write_html

FFN = "blocks.0.ffn"


def main() -> None:
    """Print what was found and what was rewritten, and write the page."""
    torch.manual_seed(0)
    preset = presets.truncated(presets.tiny(presets.find("t2v-14b")), 1)
    model = presets.build(preset, device="cpu", dtype=torch.float32)
    call = presets.example_inputs(preset, device="cpu", dtype=torch.float32)

    before = wancompile.trace(model, call)  # with weights on the meta device, too
    for group in before.groups:
        print(f"{group.role:<16} reads {group.source}, 1/s goes to {group.fold}")

    compiled = wancompile.compile(model, [call], recipe="int8")
    print("\nfeed-forward, as traced:")
    print(*(line.text for line in inspect.lines(before, FFN)), sep="\n")
    print("\nfeed-forward, as it runs:")
    print(*(line.text for line in inspect.lines(compiled.program, FFN)), sep="\n")
    print("\nnot in 8 bits:")
    for one in compiled.report.ungrouped:
        print(f"{one.site}: {one.reason}")
    page = Path(sys.argv[1] if len(sys.argv) > 1 else "block.html")
    write_html(page, compiled.report, programs=(before, compiled.program), title=preset.name)
    print(f"\nwrote {page}")


if __name__ == "__main__":
    main()
