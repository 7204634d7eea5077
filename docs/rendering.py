"""Signatures and docstrings as Markdown."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from functools import cached_property
from types import ModuleType
from typing import Any, get_overloads

import wancompile
from wancompile import html, interchange, presets

_WIDTH = 96
_LANGUAGE = "py"  # not "python", which the tests of documents run
_PART = re.compile(r"[A-Z][a-z ]+:")
_ITEM = re.compile(r"(\w+): (.*)")


@dataclass(frozen=True)
class Constant:
    """A name in a module that has a string beneath it to explain it."""

    module: ModuleType
    name: str


def title(thing: Any) -> str:
    """Return the heading of a thing; a class and a function of one name get two."""
    if isinstance(thing, Constant):
        return thing.name
    is_class = inspect.isclass(thing)
    return f"class {thing.__name__}" if is_class else _path(thing).removeprefix("wancompile.")


def described(thing: Any) -> Iterator[str]:
    """Yield the paragraphs about one thing: title, signature, docstring, members."""
    if inspect.ismodule(thing):
        yield _prose(thing)
        return
    yield f"### {title(thing)}"
    if isinstance(thing, Constant):
        yield from _constant(thing)
        return
    path = _path(thing)
    if not inspect.isclass(thing):
        yield _code(*_signatures(path, thing))
        yield _prose(thing)
        return
    yield _code(*_class(path, thing))
    yield _prose(thing)
    for name, member in _members(thing):
        yield f"#### {thing.__name__}.{name}"
        yield _code(*_member(name, member))
        yield _prose(_function(member))


def _path(thing: Any) -> str:
    """Return where a thing is imported from: the package, if it is offered there."""
    where = thing.__module__
    for module in (wancompile, html, interchange, presets):
        if getattr(module, thing.__name__, None) is thing:
            where = module.__name__
    return f"{where}.{thing.__name__}"


def _constant(one: Constant) -> Iterator[str]:
    """Yield what its module says of a constant: its type where that is told, or its value."""
    path = f"{one.module.__name__}.{one.name}"
    body = ast.parse(inspect.getsource(one.module)).body
    for made, below in itertools.pairwise(body):
        match made, below:
            case ast.AnnAssign(ast.Name(one.name), kind), ast.Expr(ast.Constant(str(text))):
                yield _code(f"{path}: {ast.unparse(kind)}")
                yield text
                return
            case ast.Assign([ast.Name(one.name)], value), ast.Expr(ast.Constant(str(text))):
                yield _code(_assigned(path, ast.unparse(value)))
                yield text
                return
    raise ValueError(f"{path} has no text beneath it")


def _assigned(path: str, value: str) -> str:
    line = f"{path} = {value}"
    return line if len(line) <= _WIDTH else f"{path} = (\n    {value}\n)"


# Signatures -------------------------------------------------------------------------------------


def _signatures(path: str, function: Callable[..., Any]) -> list[str]:
    return [_call(path, one) for one in get_overloads(function) or [function]]


def _class(path: str, cls: type) -> list[str]:
    if issubclass(cls, Enum):
        names = [f"    {one.name} = {_value(one.value)}" for one in cls]
        return [f"class {path}({cls.__mro__[1].__name__}):", *names]
    if is_dataclass(cls):
        defaults = {
            one.name: one.default_factory()
            for one in fields(cls)
            if one.default_factory is not MISSING
        }
        return [_call(f"class {path}", cls, defaults)]
    bases = [one.__name__ for one in cls.__bases__ if issubclass(one, Exception)]
    return [f"class {path}" + (f"({bases[0]})" if bases else "")]


def _member(name: str, member: Any) -> list[str]:
    if isinstance(member, (property, cached_property)):
        return [f"{name}: {_function(member).__annotations__['return']}"]
    kinds = {classmethod: "classmethod ", staticmethod: "staticmethod "}
    return [_call(f"{kinds.get(type(member), '')}{name}", _function(member))]


def _call(name: str, function: Callable[..., Any], defaults: dict[str, Any] | None = None) -> str:
    signature = inspect.signature(function)
    shown: list[str] = []
    for one in signature.parameters.values():
        if one.name in ("self", "cls"):
            continue
        if one.kind is one.KEYWORD_ONLY and not any(part.startswith("*") for part in shown):
            shown.append("*")
        shown.append(_parameter(one, (defaults or {}).get(one.name, one.default)))
    result = signature.return_annotation
    is_said = result is not signature.empty and not inspect.isclass(function)
    end = f" -> {_annotation(result)}" if is_said else ""
    line = f"{name}({', '.join(shown)}){end}"
    if len(line) <= _WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {part}," for part in shown), f"){end}"])


def _parameter(one: inspect.Parameter, default: Any) -> str:
    stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(one.kind.name, "")
    text = f"{stars}{one.name}: {_annotation(one.annotation)}"
    return text if default is one.empty else f"{text} = {_value(default)}"


def _annotation(given: Any) -> str:
    return given if isinstance(given, str) else inspect.formatannotation(given)


def _value(given: Any) -> str:
    if isinstance(given, Enum):
        return f"{type(given).__name__}.{given.name}"
    if isinstance(given, str):
        return json.dumps(given)
    if is_dataclass(given) and not isinstance(given, type) and given == type(given)():
        return f"{type(given).__name__}()"
    return repr(given).replace("'", '"')


# Members and docstrings -------------------------------------------------------------------------


def _members(cls: type) -> Iterator[tuple[str, Any]]:
    if issubclass(cls, Enum):
        return
    seen = set()
    package = cls.__module__.partition(".")[0]
    own = [one for one in cls.__mro__ if one.__module__.partition(".")[0] == package]
    if issubclass(cls, Exception):  # of which the base is in the document, too
        own = [cls]
    for name, member in ((n, m) for one in own for n, m in vars(one).items()):
        is_public = not name.startswith("_") or name == "__call__"
        kinds = (property, cached_property, classmethod, staticmethod)
        if is_public and name not in seen and (inspect.isfunction(member) or type(member) in kinds):
            yield name, member
        seen.add(name)


def _function(member: Any) -> Any:
    if isinstance(member, property):
        return member.fget
    if isinstance(member, cached_property):
        return member.func
    return getattr(member, "__func__", member)


def _prose(thing: Any) -> str:
    """Return a docstring as Markdown: its parts, such as Args, become lists."""
    text = inspect.getdoc(thing)
    if not text:
        raise ValueError(f"{thing} has no docstring")
    lines: list[str] = []
    is_part = False
    for line in text.splitlines():
        if _PART.fullmatch(line):
            is_part = True
            lines += [f"**{line.removesuffix(':')}**", ""]
        elif is_part and line.startswith("    "):
            lines.append(_item(line.removeprefix("    ")))
        else:
            is_part = is_part and not line
            lines.append(line)
    return "\n".join(lines).strip()


def _item(line: str) -> str:
    if line.startswith("    "):
        return line.removeprefix("  ")
    named = _ITEM.fullmatch(line)
    return f"- `{named[1]}`: {named[2]}" if named else line


def _code(*lines: str) -> str:
    return "\n".join([f"```{_LANGUAGE}", *lines, "```"])
