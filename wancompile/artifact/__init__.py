"""Compiled models on disk: safetensors for the weights, one JSON document for all the rest.

Nothing is pickled, and nothing in an artifact can name code to run: ops come from the list of the
levels, names are checked before torch.fx makes Python of them, and values are of a few plain kinds.

| file | what it knows |
|---|---|
| `values` | a constant in a graph, a signature or a configuration, as JSON |
| `facts` | frozen dataclasses, such as the report, as JSON by the types of their fields |
| `graph` | the graph |
| `inputs` | the signature, and which dimensions of the inputs are open |
| `weights` | the shards: written, checked and mapped into memory |
| `document` | `wancompile.json`: its text, its own checksum, its format |
| `folder` | a folder that appears whole or not at all |
| `save`, `load` | all of these together |
"""
