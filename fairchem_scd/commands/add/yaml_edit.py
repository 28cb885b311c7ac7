"""Edits of YAML text that leave everything else as it is: comments, order, quotes, line breaks.

The parser's marks say where a value begins and ends, and the text is cut there. Reading the file and writing it again
with a YAML library would change other lines too: their line breaks and their indentation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import yaml

_Entry = tuple[yaml.Node, yaml.Node]


def set_value(text: str, keys: Sequence[str], value: Any, after: Sequence[str] = (), below: str | None = None) -> str:
    """Set one value of a YAML mapping. Mappings above it are added where they are missing.

    Args:
        text: of a YAML document that is a mapping.
        keys: from the top, such as ("task", "denoising", "scd").
        value: a scalar, or a mapping, which is written in one line.
        after: top-level keys. A new top-level key is put behind the first of these that is there, or else at the top.
        below: a key with a value in one line. A new key of its mapping is put behind it, or else at the top.

    Returns:
        The new text. Where a key above the last holds an alias, a copy of what it stands for takes its place.

    Raises:
        ValueError: a key above the last holds neither a mapping nor null, or the last holds a value of several lines.
    """
    node, above = _root(text), None
    for depth, key in enumerate(keys):
        rest, found = keys[depth + 1 :], _entry(node, key)
        if found is None and node.flow_style:
            return _into_flow(text, node, f"{_flow(key)}: {_flow(_nested(rest, value))}")
        if found is None:
            if above is None:
                return _into_root(text, node, key, _nested(rest, value), after)
            indent = " " * node.value[0][0].start_mark.column
            before = _entry(node, below)
            mark = (above if before is None else before[1]).end_mark
            return _put(text, _line_end(text, mark.index), _block(key, rest, value, indent, _newline(text)))
        above, held = found
        alias = held.start_mark.index < above.start_mark.index
        if not rest or alias:
            new = _with(_plain(held), rest, value) if rest else value
            return _replace(text, found, _flow(new, getattr(held, "style", None)))
        if isinstance(held, yaml.MappingNode):
            node = held
        elif _plain(held) is None and node.flow_style:
            return _replace(text, found, _flow(_nested(rest, value)))
        elif _plain(held) is None:
            newline, indent = _newline(text), " " * (above.start_mark.column + 2)
            block = newline + _block(rest[0], rest[1:], value, indent, newline).rstrip()
            return _replace(text, found, block)
        else:
            raise ValueError(f"{'.'.join(keys[: depth + 1])} is not a mapping")
    raise ValueError("no key was given")


def map_items(text: str, key: str, new: Callable[[str], str]) -> str:
    """Replace the strings of a top-level list.

    Args:
        text: of a YAML document that is a mapping.
        key: of the list; where it is not there, nothing changes.
        new: called with an item, returns what to put in its place. An item that does not change keeps its quotes.
    """
    found = _entry(_root(text), key)
    for item in reversed(found[1].value if found else ()):
        value = new(item.value)
        if value != item.value:
            text = text[: item.start_mark.index] + _flow(value, item.style) + text[item.end_mark.index :]
    return text


def _root(text: str) -> yaml.MappingNode:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("the document is not a mapping")
    return root


def _entry(node: yaml.MappingNode, key: str | None) -> _Entry | None:
    return next((entry for entry in node.value if entry[0].value == key), None)


def _plain(node: yaml.Node) -> Any:
    """The Python value of a node."""
    return yaml.SafeLoader("").construct_document(node)


def _nested(keys: Sequence[str], value: Any) -> Any:
    for key in reversed(keys):
        value = {key: value}
    return value


def _with(mapping: Any, keys: Sequence[str], value: Any) -> Any:
    """A mapping with the value set under nested keys."""
    if not keys:
        return value
    mapping = mapping or {}
    return {**mapping, keys[0]: _with(mapping.get(keys[0]), keys[1:], value)}


def _flow(value: Any, style: str | None = None) -> str:
    """A value as YAML in one line, which may stand inside a flow mapping too."""
    how: dict[str, Any] = {
        "default_flow_style": True,
        # The block styles (| and >) take more than one line.
        "default_style": style if isinstance(value, str) and style in ("'", '"') else None,
        "width": float("inf"),
        "sort_keys": False,
    }
    text = yaml.safe_dump([value], allow_unicode=True, **how)
    if yaml.safe_load(text) != [value]:  # it has a line break of Unicode, which is written only as an escape
        text = yaml.safe_dump([value], allow_unicode=False, **how)
    return text.strip()[1:-1]


def _block(key: str, rest: Sequence[str], value: Any, indent: str, newline: str) -> str:
    """A line for `key` and for each key of `rest` below it. The last has the value."""
    lines = [f"{indent}{'  ' * depth}{_flow(name)}:" for depth, name in enumerate((key, *rest))]
    return newline.join(lines) + f" {_flow(value)}{newline}"


def _replace(text: str, entry: _Entry, new: str) -> str:
    """The text with another value in an entry."""
    key, value = entry
    start, end = value.start_mark.index, value.end_mark.index
    if start < key.start_mark.index:  # an alias, whose marks are those of its anchor
        start, end = re.compile(r"\*[^\s,\]}]+").search(text, key.end_mark.index).span()
    elif (isinstance(value, yaml.CollectionNode) and not value.flow_style) or getattr(value, "style", None) in (
        "|",
        ">",
    ):
        # Its end mark stands after the comments that follow it.
        raise ValueError(f"{key.value} holds a value of several lines")
    before = text[:start]
    if new[:1] not in "\r\n" and before.endswith(":"):  # after a key alone
        before += " "
    if new[:1] in "\r\n":
        before = before.rstrip(" ")
    return before + new + text[end:]


def _into_flow(text: str, node: yaml.MappingNode, item: str) -> str:
    """The text with an item put first in a flow mapping. At its end, a comma or a comment might be in the way."""
    at = text.index("{", node.start_mark.index) + 1
    at += len(text[at:]) - len(text[at:].lstrip(" "))
    comma = "," if node.value and text[at] in "\r\n#" else ", " if node.value else ""
    return text[:at] + item + comma + text[at:]


def _into_root(text: str, root: yaml.MappingNode, key: str, value: Any, after: Sequence[str]) -> str:
    newline = _newline(text)
    rest = []
    while isinstance(value, dict) and value and len(value) == 1 and isinstance(next(iter(value.values())), dict):
        name, value = next(iter(value.items()))
        rest.append(name)
    lines = _block(key, rest, value, "", newline)
    names = [entry[0].value for entry in root.value]
    before = next((name for name in after if name in names), None)
    if before is None:
        at = _line_start(text, root.value[0][0].start_mark.index)
        above = _back(text, at, blank=False)
        # A comment at the top of the file belongs to the file. A comment further down belongs to the key below it.
        return _put(text, above or at, lines + newline)
    index = names.index(before) + 1
    at = root.value[index][0].start_mark.index if index < len(names) else root.end_mark.index
    at = _back(text, _line_start(text, at) if index < len(names) else at, blank=True)
    dense = bool(text[at:]) and not text[at:].startswith(("\n", "\r"))
    return _put(text, at, lines if dense else newline + lines)


def _put(text: str, at: int, lines: str) -> str:
    """The text with lines put in at the start of a line, or at the end, where the last line may lack its line break."""
    if at and text[at - 1] not in "\r\n":
        lines = _newline(text) + lines
    return text[:at] + lines + text[at:]


def _back(text: str, at: int, *, blank: bool) -> int:
    """The start of the comment lines above the line that starts at `at`; with `blank`, of blank lines too."""
    while at:
        start = _line_start(text, at - 1)
        line = text[start:at].strip()
        if not (line.startswith("#") or (blank and not line)):
            break
        at = start
    return at


def _line_start(text: str, at: int) -> int:
    return text.rfind("\n", 0, at) + 1


def _line_end(text: str, at: int) -> int:
    """The start of the next line."""
    end = text.find("\n", at)
    return len(text) if end < 0 else end + 1


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"
