"""8 bits as a backend of torch.compile, smoothed by statistics of an earlier run.

python examples/torch_compile.py
"""

from __future__ import annotations

import torch

import wancompile
from wancompile import presets


def main() -> None:
    """Calibrate, compile with the backend, and print how near the output is."""
    torch.manual_seed(0)
    preset = presets.truncated(presets.tiny(presets.find("t2v-14b")), 1)
    model = presets.build(preset, device="cpu", dtype=torch.float32)
    call = presets.example_inputs(preset, device="cpu", dtype=torch.float32)

    stats = wancompile.calibrate(model, [call])  # `stats.save(file)`: options take the path, too
    compiled = torch.compile(
        model, backend="wancompile", fullgraph=True, options={"recipe": "int8", "stats": stats}
    )
    with torch.inference_mode():
        expected, actual = model(**call).sample, compiled(**call).sample
    print(f"error of the output: {float((actual - expected).norm() / expected.norm()):.2%}")


if __name__ == "__main__":
    main()
