from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wancompile.errors import RecipeError
from wancompile.ir.site import Attention, Group, Role, Site, Source
from wancompile.recipe import (
    ATTENTIONS,
    RECIPES,
    AttentionRule,
    AttentionSpec,
    QSpec,
    Recipe,
    Rule,
    resolve,
)


def group(role: Role, *members: str) -> Group:
    return Group(role, tuple(map(Site.parse, members)), Source.STREAM)


UP = group(Role.FFN_UP, "blocks.0.ffn.net.0.proj")
QKV = group(Role.ATTN_QKV, *(f"blocks.10.attn1.to_{name}" for name in "qkv"))
INT8, FP8 = ATTENTIONS["int8"], ATTENTIONS["fp8"]
AGAIN = group(Role.FFN_UP, "blocks.0.ffn.net.0.proj#1")

specs = st.builds(
    QSpec,
    st.sampled_from(["int8", "fp8"]),
    st.booleans(),
    st.sampled_from(["nearest", "gptq"]),
    st.booleans(),
    st.sampled_from(["token", "static"]),
)
rules = st.builds(Rule, st.text(), st.none() | specs)
attentions = st.sampled_from([None, *ATTENTIONS.values()])
recipes = st.builds(
    Recipe,
    st.text(),
    st.none() | specs,
    st.lists(rules, max_size=4).map(tuple),
    attentions,
    st.lists(st.builds(AttentionRule, st.text(), attentions), max_size=3).map(tuple),
)


@given(recipes)
def test_json_gives_back_the_recipe(recipe):
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_json_is_for_people_too():
    recipe = RECIPES["int8-attention"].with_rules([Rule("ffn_*", None)])
    assert json.loads(recipe.with_float_attention(["blocks.0.*"]).to_json()) == {
        "name": "int8-attention",
        "linears": {
            "dtype": "int8",
            "smooth": True,
            "rounding": "gptq",
            "clip": True,
            "activation": "token",
        },
        "rules": [{"pattern": "ffn_*", "spec": None}],
        "attention": {"dtype": "int8", "values": "bf16"},
        "attention_rules": [{"pattern": "blocks.0.*", "spec": None}],
    }


GOOD = json.loads(RECIPES["fp8"].to_json())


@pytest.mark.parametrize(
    "data",
    [
        "no json",
        [],
        "text",
        None,
        {},
        {**GOOD, "linears": {"dtype": "int4", "smooth": True}},
        {**GOOD, "linears": {"dtype": "int8", "bits": 8}},
        {**GOOD, "linears": "int8"},
        {**GOOD, "linears": {"dtype": "int8", "smooth": "no"}},
        {**GOOD, "linears": {"dtype": "int8", "clip": 1}},
        {**GOOD, "linears": {"dtype": "int8", "rounding": "up"}},
        {**GOOD, "linears": {"dtype": "int8", "rounding": None}},
        {**GOOD, "rules": [{"pattern": "ffn_*"}]},
        {**GOOD, "rules": [{"pattern": 3, "spec": None}]},
        {**GOOD, "rules": "ffn_*"},
        {**GOOD, "attention": "int8"},
        {**GOOD, "attention": ["int8"]},
        {**GOOD, "attention": {"dtype": "fp16", "values": "bf16"}},
        {**GOOD, "attention": {"dtype": "int8", "values": "int8"}},
        {**GOOD, "attention": {"dtype": "fp8", "values": "bf16"}},
        {**GOOD, "attention": {"dtype": "int8"}},
        {**GOOD, "attention_rules": "blocks.0.*"},
        {**GOOD, "attention_rules": [1]},
        {**GOOD, "attention_rules": [{"pattern": "*"}]},
        {**GOOD, "attention_rules": [{"pattern": 1, "spec": None}]},
        {**GOOD, "attention_rules": [{"pattern": "*", "spec": "int8"}]},
        {**GOOD, "unknown": 1},
    ],
    ids=str,
)
def test_anything_else_is_refused(data):
    text = data if data == "no json" else json.dumps(data)
    with pytest.raises(RecipeError):
        Recipe.from_json(text)


def test_older_recipes_round_to_nearest():
    older = {**GOOD, "linears": {"dtype": "int8", "smooth": True}}
    assert Recipe.from_json(json.dumps(older)).linears == QSpec("int8", rounding="nearest")


@pytest.mark.parametrize(
    ("pattern", "one", "matches"),
    [
        ("ffn_up_proj", UP, True),
        ("ffn_*", UP, True),
        ("blocks.0.*", UP, True),
        ("blocks.1.*", QKV, False),
        ("blocks.1*", QKV, True),
        ("*.to_v", QKV, True),
        ("*.attn1.*", QKV, True),
        ("*.TO_V", QKV, False),
        ("to_v", QKV, False),
        ("*#1", AGAIN, True),
        ("*#1", UP, False),
        ("blocks.[01].ffn*", UP, True),
    ],
)
def test_a_rule_matches_roles_and_members(pattern, one, matches):
    assert Rule(pattern, None).matches(one) is matches


def test_the_last_rule_that_matches_decides():
    int8, fp8 = QSpec("int8"), QSpec("fp8", smooth=False)
    recipe = Recipe("mine", int8, (Rule("attn_*", None), Rule("*.to_v", fp8), Rule("ffn_*", None)))
    assert recipe.spec_for(QKV) == fp8
    assert recipe.spec_for(UP) is None
    assert recipe.with_rules([Rule("*", int8)]).spec_for(UP) == int8
    assert Recipe("none", None, (Rule("ffn_*", fp8),)).spec_for(QKV) is None


def test_a_rule_without_a_match_names_the_nearest():
    recipe = RECIPES["int8"].with_rules([Rule("ffn_up_proj", None), Rule("*ffn_downproj", None)])
    down = group(Role.FFN_DOWN, "blocks.0.ffn.net.2")
    with pytest.raises(RecipeError, match=r"'\*ffn_downproj' matches no group; nearest are ffn_do"):
        recipe.check([UP, down, QKV])
    with pytest.raises(RecipeError, match=r"'blocks.9.*' matches no group"):
        RECIPES["int8"].with_rules([Rule("blocks.9.*", None)]).check([UP, QKV])


def test_rules_that_match_pass():
    RECIPES["int8"].with_rules([Rule("ffn_*", None), Rule("*.to_q", QSpec("fp8"))]).check([UP, QKV])


def test_attention_has_exceptions():
    recipe = RECIPES["int8-attention"].with_float_attention(["blocks.0.*", "*.last:attention"])
    kept = [Site(f"blocks.{at}:attention") for at in ("0.attn1", "3.last")]
    other = Site("blocks.3.attn1:attention")
    assert [recipe.attention_for(site) for site in (*kept, other)] == [None, None, INT8]
    assert RECIPES["int8"].attention_for(other) is None
    assert recipe.rounds_attention
    assert not RECIPES["int8"].rounds_attention
    assert Recipe.from_json(recipe.to_json()) == recipe
    attentions = [Attention(site, site, site, site, True) for site in (kept[0], other)]
    with pytest.raises(RecipeError, match=r"last:attention. matches no attention; nearest"):
        recipe.check([QKV], attentions)
    recipe.check([QKV], [*attentions, Attention(kept[1], other, other, other, True)])


def test_attentions_may_differ_in_type():
    rules = (AttentionRule("blocks.0.*", FP8), AttentionRule("*.0.last:*", INT8))
    recipe = Recipe("mine", None, attention_rules=rules)
    sites = [Site(f"blocks.{at}:attention") for at in ("0.attn1", "0.last", "1.attn1")]
    assert [recipe.attention_for(site) for site in sites] == [FP8, INT8, None]
    assert recipe.rounds_attention
    assert not Recipe("mine", None).with_float_attention(["*"]).rounds_attention


def test_a_recipe_is_found_by_name():
    spec = QSpec("fp8", rounding="gptq", clip=True)
    assert resolve("fp8-attention") == Recipe("fp8-attention", spec, attention=FP8)
    mine = Recipe("mine", None)
    assert resolve(mine) is mine
    with pytest.raises(RecipeError, match="nearest: int8-attention"):
        resolve("int8_attention")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QSpec("int4"), "unknown type 'int4'"),
        (lambda: AttentionSpec("fp16", "bf16"), "unknown attention type 'fp16'"),
        (lambda: AttentionSpec("int8", "int8"), "unknown type of values 'int8'"),
        (lambda: AttentionSpec("fp8", "bf16"), "go with q and k in int8"),
        (lambda: Recipe("x", None, attention="int8"), "AttentionSpec or None, not 'int8'"),
        (lambda: AttentionRule("*", "int8"), "AttentionSpec or None, not 'int8'"),
    ],
)
def test_unknown_types_are_refused(make, message):
    with pytest.raises(RecipeError, match=message):
        make()


@pytest.mark.parametrize(("name", "spec"), ATTENTIONS.items())
def test_every_way_to_round_attention_has_a_name_and_a_recipe(name, spec):
    assert spec.name == name
    with_it = [one for one in RECIPES.values() if one.attention == spec]
    assert [one.linears.dtype for one in with_it] == [spec.dtype]
