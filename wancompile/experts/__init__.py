"""Whole pipelines: every transformer that denoises is compiled and takes its place again.

| file | what it knows |
|---|---|
| `pipe` | which parts of a pipeline are its experts, and where it switches between them |
| `play` | prompts and arguments as runs of the pipeline |
| `listen` | one run heard by all experts at once |
| `make` | `compile` and `calibrate` for pipelines |
| `compiled` | `CompiledPipeline` and its report |
| `attach` | compiled experts in a pipeline: what must fit, and what it may no longer be asked for |
| `loras` | LoRAs: which expert gets what of one |
| `facts` | what is known of an expert besides its program |
| `save`, `load` | one folder for all experts |
"""
