"""The other ways to run a Wan on one H100: plain diffusers, torch.compile, torchao, FA3, Sage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.h100_plan import Column
from benchmarks.h100_turns import Turn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

_SDPA_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_QUERIES = 4096


def prepare(column: Column, model: nn.Module, turn: Turn) -> Callable[..., Any]:
    """Return `model` as the column runs it; compilation happens in the first call.

    Raises:
        ImportError: a package of this column is missing.
    """
    if column.kind == "eager":
        return model
    _use_attention(_attention(column.attention))
    if column.torchao:
        _quantize(model)
    _compile(column, model, turn)
    return _with_cudnn(model) if column.attention == "cudnn" else model


def exact(model: nn.Module) -> nn.Module:
    """Return `model` in fp32, TF32 switched off; changes it in place."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    _use_attention(_exact_attention)
    return model.float()


def _compile(column: Column, model: nn.Module, turn: Turn) -> None:
    # Coordinate descent, which torchao switches on, takes minutes: too long to stop all others.
    backend: Any = "inductor" if column.torchao else _aside(turn)
    parts = [model] if column.scope == "model" else list(model.get_submodule("blocks").children())
    for part in parts:
        part.compile(backend=backend, dynamic=False)


def _aside(turn: Turn) -> Callable[[Any, Any], Any]:
    """Inductor, which compiles beside other processes, but chooses its tiles alone on the card."""
    from torch._inductor.compile_fx import compile_fx

    def backend(graph: Any, example_inputs: Any) -> Any:
        turn.give_back()
        compiled = compile_fx(graph, example_inputs)
        turn.take()
        return compiled

    return backend


def _with_cudnn(model: nn.Module) -> Callable[..., Any]:
    def forward(**kwargs: Any) -> Any:
        with sdpa_kernel(_SDPA_ORDER, set_priority=True):
            return model(**kwargs)

    return forward


def _quantize(model: nn.Module) -> None:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    def in_block(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name.startswith("blocks.")

    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), in_block)


def _use_attention(attend: Attend) -> None:
    """Let every attention of diffusers' Wan be computed by `attend`; a process has one column."""
    from diffusers.models.transformers import transformer_wan

    def dispatch(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        return attend(query, key, value)

    transformer_wan.dispatch_attention_fn = dispatch


def _attention(name: str) -> Attend:
    """Return an attention over q, k, v `[B, S, H, D]`."""
    if name == "fa3":
        return _fa3()
    return _sage() if name == "sage" else _sdpa


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def _fa3() -> Attend:
    import fa3_fwd._C  # noqa: F401  registers torch.ops.fa3_fwd

    # The package's own custom op cannot be traced: its fake imports a module of another name.
    @torch.library.custom_op("wancompile_bench::fa3", mutates_args=())
    def fa3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out: Tensor = torch.ops.fa3_fwd.fwd(q, k, v, num_splits=1)[0]
        return out

    fa3.register_fake(lambda q, k, v: q.new_empty(q.shape))
    return fa3


def _sage() -> Attend:
    from sageattention import sageattn

    @torch.library.custom_op("wancompile_bench::sage", mutates_args=())
    def sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = sageattn(q, k, v, tensor_layout="NHD", smooth_k=False)
        return out

    sage.register_fake(lambda q, k, v: q.new_empty(q.shape))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # The same smoothing of k as in the package, which would write into k.
        out: Tensor = sage(q, k - k.mean(1, keepdim=True), v)
        return out

    return attend


def _exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention in the type of q, in parts that fit into memory and take little time."""
    out = torch.empty_like(q)
    scale = q.shape[-1] ** -0.5
    for head in range(q.shape[2]):
        keys, values = k[:, :, head].transpose(1, 2), v[:, :, head]
        for start in range(0, q.shape[1], _QUERIES):
            rows = slice(start, start + _QUERIES)
            logits = (q[:, rows, head] @ keys).mul_(scale)
            out[:, rows, head] = torch.softmax(logits, -1) @ values
        if q.is_cuda:
            torch.cuda.synchronize()  # a process that is to be stopped must not have queued more
    return out
