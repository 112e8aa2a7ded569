"""Shows the examples and the trees in docstrings as code: the docstrings have them without a fence."""

import re
from typing import Any

import griffe

# A paragraph of a doctest, or of a tree that is drawn with lines; with what stands above the tree.
_EXAMPLE = re.compile(r"(?:^>>> .*(?:\n(?!\s*$).*)*)(?:\n\n>>> .*(?:\n(?!\s*$).*)*)*", re.MULTILINE)
_TREE = re.compile(r"^.+\n(?:^[ │]*[├└].*\n?)+", re.MULTILINE)


def fenced(text: str) -> str:
    """Return a docstring with each example and each tree between fences."""
    text = _EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", text)
    return _TREE.sub(lambda found: f"```text\n{found[0].rstrip()}\n```\n", text)


class DocstringFences(griffe.Extension):
    """A griffe extension, named in mkdocs.yml."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring before it is parsed."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)
