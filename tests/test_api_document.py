"""docs/api.md says what the docstrings say, and leaves nothing out."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest

import wancompile
from docs import api, rendering

WRITTEN = (Path(__file__).parent.parent / "docs/api.md").read_text(encoding="utf-8")


class Colour(Enum):
    RED = 1


@dataclass(frozen=True)
class Example:
    """What a class may have.

    Args:
        colour: of which
            there is one.

    More of it.
    """

    colour: Colour = Colour.RED
    names: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """The number of names."""
        return len(self.names)

    @classmethod
    def named(cls, *names: str, **more: str) -> Example:
        """Return one.

        Raises:
            KeyError: a name is missing.
        """
        return cls(names=(*names, *more))

    def _hidden(self) -> None:
        """Do nothing."""


EXAMPLE = """\
### class Example

```py
class test_api_document.Example(colour: Colour = Colour.RED, names: tuple[str, ...] = ())
```

What a class may have.

**Args**

- `colour`: of which
  there is one.

More of it.

#### Example.size

```py
size: int
```

The number of names.

#### Example.named

```py
classmethod named(*names: str, **more: str) -> Example
```

Return one.

**Raises**

- `KeyError`: a name is missing."""


def undocumented(one: int) -> int:
    return one


def test_the_document_is_what_the_docstrings_say():
    assert api.document() == WRITTEN, "run `python -m docs.api > docs/api.md`"


@pytest.mark.parametrize("name", wancompile.__all__)
def test_all_that_is_offered_is_in_it(name):
    assert f"wancompile.{name}(" in WRITTEN or f"wancompile.{name}\n" in WRITTEN


def test_a_heading_is_there_once():
    found = Counter(re.findall(r"^#+ (.+)$", WRITTEN, re.MULTILINE))
    assert not [title for title, count in found.items() if count > 1]


def test_a_class_with_all_that_one_may_have():
    assert "\n\n".join(rendering.described(Example)) == EXAMPLE


@pytest.mark.parametrize("thing", [undocumented, rendering.Constant(rendering, "inspect")])
def test_what_has_no_docstring_is_refused(thing):
    with pytest.raises(ValueError, match="has no"):
        list(rendering.described(thing))
