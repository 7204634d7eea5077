from __future__ import annotations

import clone
import pytest
import torch
import zoo
from torch import nn

TASTES = [
    clone.Taste(style, split, long_gelu)
    for style, split, long_gelu in [
        ("matmul", "count", False),
        ("matmul", "fixed", True),
        ("einsum", "count", True),
        ("einsum", "fixed", False),
        ("bmm", "count", False),
        ("bmm", "fixed", True),
    ]
]


@pytest.mark.parametrize("taste", TASTES, ids=str)
@pytest.mark.parametrize("variant", ["t2v", "i2v", "i2v22"])
def test_the_clone_computes_what_wan_computes(variant: str, taste: clone.Taste) -> None:
    wan, kwargs = zoo.make(variant)
    loom = clone.from_wan(wan, taste)
    for arguments in (kwargs, zoo.example(variant, batch=3)):
        with torch.no_grad():
            expected = wan(**arguments, return_dict=False)[0]
            got = loom(**clone.arguments(arguments))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_every_weight_of_wan_is_in_the_clone() -> None:
    wan, _ = zoo.make("i2v")
    loom = clone.from_wan(wan)
    assert sum(p.numel() for p in loom.parameters()) == sum(p.numel() for p in wan.parameters())


def test_the_clone_shares_no_name_with_wan() -> None:
    wan, kwargs = zoo.make("i2v")
    loom = clone.from_wan(wan)
    assert not _words(loom) & _words(wan)
    assert not clone.arguments(kwargs).keys() & kwargs.keys()


def _words(model: nn.Module) -> set[str]:
    names = [name for name, _ in model.named_parameters()]
    words = {word for name in names for word in name.split(".") if not word.isdecimal()}
    # What nn.Linear and nn.Conv3d call their own parameters is not for a model to choose.
    return {*words, *(type(one).__name__ for one in model.modules())} - _TORCH


_TORCH = {"weight", "bias", *(cls.__name__ for cls in (nn.Linear, nn.Conv3d, nn.ModuleList))}


@pytest.mark.parametrize("photo", [False, True])
def test_the_table_of_the_clone_names_its_weights(photo: bool) -> None:
    wan, _ = zoo.make("i2v" if photo else "t2v")
    loom = clone.from_wan(wan)
    table = clone.expected_table_clone(photo=photo)
    named = [member for _, members in table for member in members]
    matrices = {
        name.removesuffix(".weight") for name, p in loom.named_parameters() if p.dim() == 2
    } - {"glaze", "heddles.0.compass", "heddles.1.compass"}
    assert len(named) == len(set(named))
    assert {*named, *clone.expected_ungrouped_clone(photo=photo)} == matrices


@pytest.mark.parametrize("variant", list(zoo.VARIANTS))
@pytest.mark.parametrize("layers", [2, 4])
def test_the_table_of_the_zoo_names_its_linears(variant: str, layers: int) -> None:
    model, _ = zoo.make(variant, layers)
    named = [member for _, members in zoo.expected_table(variant, layers) for member in members]
    ungrouped = zoo.expected_ungrouped(variant, layers)
    assert len(named) == len(set(named))
    assert not ungrouped & set(named)
    assert all(model.get_submodule(name).weight.dim() == 2 for name in {*named, *ungrouped})
    if not zoo.VARIANTS[variant].fused:
        linears = {name for name, one in model.named_modules() if isinstance(one, nn.Linear)}
        assert linears <= {*named, *ungrouped}
