"""`torch.compile(model, backend="wancompile")`: the compiler behind dynamo's front end.

    compiled = torch.compile(
        model, backend="wancompile", dynamic=True,
        options={"recipe": "int8", "stats": "stats.safetensors"},
    )
    with torch.inference_mode():
        video = compiled(**inputs)

Options:
    recipe: the name of a recipe or a `Recipe`; "int8" where left out.
    stats: a `Stats` of `wancompile.calibrate`, or the path it was saved to. With it the model is
        smoothed and may have 8-bit attention; without it scales come from each call's own data.
    inductor: True hands what is left in torch's own ops to Inductor, which fuses it. It compiles
        for seconds per block, and on a CPU needs a C++ compiler; False where left out.

What to know:
    - It is for inference. A call that wants gradients, or under autocast, is refused with an
      `InputError`.
    - Weights are frozen: quantized when a graph is first called. Dynamo hands them over at every
      call, so a weight that was replaced, or changed in place in a way that torch counts (an
      optimizer's step, `load_state_dict`), is noticed and quantized anew. Writes through `.data`
      are not counted: call `torch._dynamo.reset()` after them.
    - There is no gate: dynamo shows one call, and nothing that its result could be held to.
      `wancompile.compile` with the same recipe measures.
    - The model keeps its own weights beside the 8-bit ones. `wancompile.compile(..., consume=True)`
      is the way to hold only the latter.
    - Sites are named from the outermost module that dynamo sees; statistics fit if they were made
      for that module. Where dynamo compiles a block on its own (a graph break inside of it,
      `compile_repeated_blocks`), names start at the block and only the way without `stats` works.
    - A graph that holds no attention runs as it is, and the log says so at level INFO. A rule of
      the recipe has to match in every graph that is compiled.
    - With `dynamic=None` dynamo compiles for the first size it sees, and again, for all sizes, at
      the second; `dynamic=True` compiles, and stores 8-bit weights, once for all sizes above 1. A
      batch of 1 and one of several are two graphs to it, each with weights of its own.
"""

from wancompile.backend.entry import wancompile_backend

__all__ = ["wancompile_backend"]
