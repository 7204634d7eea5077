"""Damaged, foreign and hostile artifacts are refused, each with the reason."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import calls, compiled, output, rewrite

import wancompile
from wancompile import presets
from wancompile.artifact import document
from wancompile.errors import ArtifactError

WEIGHTS = "weights-00001-of-00001.safetensors"
FILES = (WEIGHTS, document.FILE)


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    compiled("t2v", "int8").save(folder / "int8")
    compiled("t2v", "fp8").save(folder / "fp8")
    other = wancompile.load(folder / "int8")
    other._fused.state.update({n: t.roll(1) for n, t in other._fused.state.items()})
    other.save(folder / "other")
    return folder


@pytest.fixture
def artifact(kept, tmp_path) -> Path:
    shutil.copytree(kept / "int8", tmp_path / "model")
    return tmp_path / "model"


def refused(folder: Path, reason: str, **options: Any) -> ArtifactError:
    with pytest.raises(ArtifactError, match=reason) as caught:
        wancompile.load(folder, **options)
    return caught.value


# Bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("percent", range(0, 100, 10))
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_cut_off_is_refused(artifact, name, percent):
    data = (artifact / name).read_bytes()
    (artifact / name).write_bytes(data[: len(data) * percent // 100])
    refused(artifact, "is damaged: it is not JSON" if name == document.FILE else "bytes where")


def test_cut_off_weights_are_refused_unverified(artifact):
    path = artifact / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    refused(artifact, "bytes where", verify=False)


@pytest.mark.parametrize("percent", range(0, 100, 7))
@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_noticed(artifact, name, percent):
    data = bytearray((artifact / name).read_bytes())
    data[len(data) * percent // 100] ^= 1 << percent % 8
    (artifact / name).write_bytes(data)
    refused(artifact, "damaged|no artifact of wancompile|has format")


def test_no_digit_of_the_checksum_may_change(artifact):
    path = artifact / document.FILE
    before = path.read_text(encoding="utf-8")
    place = before.index('"sha256": "') + len('"sha256": "')
    changed = "1" if before[place] != "1" else "2"
    path.write_text(before[:place] + changed + before[place + 1 :], encoding="utf-8")
    refused(artifact, "damaged: its SHA-256")


def test_unverified_weights_may_have_changed(artifact):
    path = artifact / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)
    refused(artifact, "SHA-256")
    call = calls("t2v")[0]
    changed = wancompile.load(artifact, verify=False)
    differs = [
        name
        for name, tensor in compiled("t2v", "int8")._fused.state.items()
        if not torch.equal(tensor, changed._fused.state[name])
    ]
    assert len(differs) == 1
    assert torch.isfinite(output(changed, call)).all()


def test_text_that_says_the_same_in_other_words_is_refused(artifact):
    path = artifact / document.FILE
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    refused(artifact, "damaged")


# Other things ----------------------------------------------------------------------------------


def test_missing_files_are_named(artifact, tmp_path):
    (artifact / WEIGHTS).rename(tmp_path / "elsewhere")
    refused(artifact, f"{WEIGHTS} is missing")
    (artifact / document.FILE).unlink()
    refused(artifact, "holds no artifact")
    refused(tmp_path / "nowhere", "holds no artifact")
    refused(tmp_path / "elsewhere", "holds no artifact")


@pytest.mark.parametrize("verify", [True, False])
def test_a_document_of_another_recipe_is_refused(artifact, kept, verify):
    shutil.copy(kept / "fp8" / document.FILE, artifact)
    refused(artifact, "bytes where|another model", verify=verify)


def test_a_document_of_another_model_of_the_same_shapes_is_refused(artifact, kept):
    shutil.copy(kept / "other" / document.FILE, artifact)
    refused(artifact, "damaged, or of another model")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "3", '"x"', "\xff", "[" * 100_000, json.dumps({"format": "pt"})]
)
def test_foreign_json_is_refused(artifact, text):
    (artifact / document.FILE).write_text(text, encoding="latin-1")
    refused(artifact, "not JSON|no artifact of wancompile")


def test_a_diffusers_folder_is_no_artifact(tmp_path):
    preset = presets.truncated(presets.tiny(presets.find("t2v-1.3b")), 1)
    presets.build(preset, device="cpu", dtype=torch.float32).save_pretrained(tmp_path)
    refused(tmp_path, "holds no artifact: there is no .*wancompile.json")


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (document.VERSION + 1, f"newer than {document.VERSION}, .*: upgrade wancompile"),
        (document.VERSION - 1, f"older than {document.VERSION}, .*: compile the model again"),
        (1, "format 1, older than"),
        (0, "format 0; this"),
        ("2", "format '2'"),
    ],
)
def test_other_formats_are_refused(artifact, monkeypatch, version, reason):
    data = document.read(artifact)
    monkeypatch.setattr(document, "VERSION", version)
    (artifact / document.FILE).write_text(document.render(data), encoding="utf-8")
    monkeypatch.undo()
    refused(artifact, reason)


# Facts, with a checksum that is right ----------------------------------------------------------

Change = Callable[[dict[str, Any]], None]


def call_node(data: dict[str, Any], op: str) -> dict[str, Any]:
    found: dict[str, Any] = next(node for node in data["nodes"] if node.get("call") == op)
    return found


def setting(*path: Any, value: Any) -> Change:
    """A change of one place of a document."""

    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


FOREIGN_OPS = [
    "os.system",
    "builtins.eval",
    "operator.methodcaller",
    "torch.load",
    "aten.add_.Tensor",
    "wancompile_kernels.linear_triton.default",
    "",
    ["aten.silu.default"],
]


@pytest.mark.parametrize("op", FOREIGN_OPS)
def test_ops_that_are_not_on_the_list_are_refused(artifact, op):
    rewrite(artifact, lambda data: call_node(data, "aten.silu.default").update(call=op))
    error = refused(artifact, "is not known here|no model that can be rebuilt")
    if op == "os.system":
        assert error.site == "condition_embedder.time_embedder.act"
        assert "in forward" in error.source


CODE = "__import__('pathlib').Path('RAN').touch()"


def rename_stored(data: dict[str, Any]) -> None:
    name = f'x", {CODE}, "'
    tensors = data["shards"][0]["tensors"]
    tensors[name] = tensors.pop("proj_out.weight")
    next(node for node in data["nodes"] if node.get("read") == "proj_out.weight")["read"] = name


def rename_input(data: dict[str, Any]) -> None:
    first = next(node for node in data["nodes"] if "input" in node)
    written = json.dumps(data["nodes"]).replace(json.dumps(first["input"]), json.dumps(f"a={CODE}"))
    data["nodes"] = json.loads(written)


HOSTILE: dict[str, tuple[Change, str]] = {
    "keyword": (
        lambda data: call_node(data, "aten.silu.default").update(kwargs={f"y={CODE}, z": 1}),
        "has no argument",
    ),
    "name of a value": (
        lambda data: call_node(data, "aten.silu.default").update(name=f"a = {CODE} #"),
        "cannot be the name of a value",
    ),
    "name of an input": (rename_input, "cannot be the name of a value"),
    "name of a tensor": (rename_stored, "is no name of a stored tensor"),
    "enum of a module": (
        setting("signature", "output", value={"__enum__": True, "fqn": "antigravity:x"}),
        "is no value of an artifact",
    ),
    "object": (setting("config", value={"pickle": "gASVAAA="}), "is no value of an artifact"),
    "path": (setting("shards", 0, "file", value="../model/" + WEIGHTS), "is no name of a shard"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_in_an_artifact_runs(artifact, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change, reason = HOSTILE[name]
    rewrite(artifact, change)
    refused(artifact, reason)
    assert not (tmp_path / "RAN").exists()


def test_text_of_a_source_line_stays_text(artifact, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = f"model.py, line 1, in forward\n{CODE}\n#"
    rewrite(artifact, lambda data: call_node(data, "aten.silu.default").update(source=line))
    loaded = wancompile.load(artifact)
    output(loaded, calls("t2v")[0])
    assert CODE not in loaded.lowered.code
    assert not (tmp_path / "RAN").exists()


def drop(*path: Any) -> Change:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


def swap_nodes(data: dict[str, Any]) -> None:
    data["nodes"].insert(-1, data["nodes"].pop(len(data["nodes"]) // 2))


def read_twice(data: dict[str, Any]) -> None:
    data["nodes"].insert(1, dict(data["nodes"][0]))


WRONG: dict[str, tuple[Change, str]] = {
    "no nodes": (setting("nodes", value=[]), "placeholders"),
    "nodes out of order": (swap_nodes, "before it exists"),
    "an input twice": (read_twice, "signature does not know|cannot be the name"),
    "a node of no kind": (setting("nodes", 3, value={"run": "x"}), "is no node of a graph"),
    "nodes that are numbers": (setting("nodes", value=[1, 2]), "no model that can be rebuilt"),
    "a wrong shape": (
        lambda data: call_node(data, "aten.permute.default").update(
            args=[call_node(data, "aten.permute.default")["args"][0], [0, 2, 1, 9]]
        ),
        "does not take what the graph gives it",
    ),
    "a fixed batch": (setting("inputs", "sizes", "d0", "example", value=1), "beyond its range"),
    "an input too many": (drop("nodes", 0), "before it exists"),
    "no report": (drop("report"), "KeyError"),
    "a report that lacks a field": (drop("report", "recipe"), "is no Report"),
    "a role of no name": (
        setting("report", "groups", 0, "role", value="attn_x_proj"),
        "'attn_x_proj' is no Role",
    ),
    "a recipe of no type": (
        setting("report", "recipe", "linears", "dtype", value="int4"),
        "unknown type 'int4'",
    ),
    "bytes that are text": (setting("report", "bytes_before", value="7"), "7 is no int"),
    "no dtype": (setting("dtype", value="float7"), "is no value of an artifact"),
    "a type that does not fit": (
        setting("shards", 0, "tensors", "proj_out.bias", "dtype", value="int32"),
        "is of another model: proj_out.bias|does not take",
    ),
    "a tensor that is not there": (
        lambda data: data["shards"][0]["tensors"].update(x={"dtype": "int8", "shape": [1]}),
        "only one of the two holds x",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_facts_that_do_not_fit_are_explained(artifact, name):
    change, reason = WRONG[name]
    rewrite(artifact, change)
    error = refused(artifact, reason)
    assert re.search(reason, str(error))


def test_a_younger_field_with_a_default_may_be_absent(artifact):
    rewrite(artifact, drop("report", "recipe", "attention_rules"))
    assert wancompile.load(artifact).report.recipe == compiled("t2v", "int8").report.recipe


def test_an_unknown_field_is_refused(artifact):
    rewrite(artifact, setting("report", "recipe", "magic", value=1))
    refused(artifact, "is no Recipe")
