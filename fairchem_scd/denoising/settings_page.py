"""The settings, their values, defaults and where these come from, as tables made from the settings classes themselves.

`python -m fairchem_scd.denoising.settings_page > docs/settings.md` writes the page of the documentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fairchem_scd.denoising.settings import CellRepeatSettings, DenoisingBlock, DropPathSettings, _Block
from fairchem_scd.denoising.task_registry import own_task_classes

_HEAD = """# Settings

Under `task.denoising` of a config. This page is written by `python -m fairchem_scd.denoising.settings_page` from the
descriptions in the code; a test keeps it current.

A task is on when its block is there, even an empty one (`scd: {}`); `null` turns it off. A step has at most one task,
drawn from (seed, step), the same on every rank. A structure's noise is drawn from (seed, step, sid, fid), where sid
and fid are its ids ([data.md](data.md#names-of-structures) says what happens where they repeat). Unknown keys, wrong
types and values out of range end in one error before training; `fairchem-scd check` shows it too.
[methods.md](methods.md) says what the tasks do.
"""

_KINDS = {
    "number": "number",
    "integer": "whole number",
    "boolean": "`true`, `false`",
    "string": "name",
    "null": "`null`",
}


def blocks() -> dict[str, type[_Block]]:
    """The settings class of each of this package's blocks, by its key under `task.denoising`; own keys under ''."""
    return {
        **{name: task.Settings for name, task in own_task_classes().items()},
        "": DenoisingBlock,
        "drop_path": DropPathSettings,
        "repeat_cells": CellRepeatSettings,
    }


def page() -> str:
    """The page, in Markdown."""
    return _HEAD + "".join(section(name, block) for name, block in blocks().items())


def section(name: str, block: type[_Block]) -> str:
    """The table of one block's settings, in Markdown."""
    title = f"`{name}`" if name else "The block itself"
    rows = "\n".join(_rows(block, f"{name}." if name else ""))
    return (
        f"\n## {title}\n\n{_first_line(block)}\n\n"
        f"| setting | values | default | meaning | default from |\n|---|---|---|---|---|\n{rows}\n"
    )


def _first_line(block: type[_Block]) -> str:
    return (block.__doc__ or "").strip().splitlines()[0]


def _rows(block: type[_Block], prefix: str) -> Iterator[str]:
    schema = block.model_json_schema()["properties"]
    for key, field in block.model_fields.items():
        cells = (
            f"`{prefix}{key}`",
            _values(schema[key]),
            f"`{shown(field.default)}`",
            field.description,
            block.sources.get(key, block.source),
        )
        yield "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def shown(default: Any) -> str:
    """A default as YAML has it."""
    if isinstance(default, (tuple, frozenset)):
        return f"[{', '.join(map(str, sorted(default)))}]"
    return "null" if default is None else f"{default:g}" if isinstance(default, float) else str(default).lower()


def _values(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_values(part) for part in schema["anyOf"])
    if "$ref" in schema:
        return "block"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = schema["type"]
    if kind == "array":
        of = _values(schema["items"])
        return f"list of {of if of.startswith('`') else of + 's'}"
    bounds = [
        f"{sign} {schema[key]:g}"
        for keys, sign in (
            (("ge", "minimum"), "≥"),
            (("gt", "exclusiveMinimum"), ">"),
            (("le", "maximum"), "≤"),
            (("lt", "exclusiveMaximum"), "<"),
        )
        for key in keys
        if key in schema
    ]
    return " ".join([_KINDS[kind], ", ".join(bounds)]).strip()


if __name__ == "__main__":
    print(page(), end="")
