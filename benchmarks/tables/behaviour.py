"""The tables of behaviour: what was run with each optimizer, and what became of it."""

from __future__ import annotations

import re
from typing import Any

from benchmarks.tables.results import load, paragraph, table

_NUMBER = re.compile(r"but it is [\d.e-]+")  # whichever it was
_CELLS = {"works": "✓", "not applicable": "–"}


def behaviour_of(framework: str) -> str:
    """The uses of a framework by subject, and below them what was said where one does not work."""
    rows = [row for row in load("behaviour.json")["rows"] if row["framework"] == framework]
    notes: dict[tuple[str, str], int] = {}
    parts = []
    for title in dict.fromkeys(row["part"] for row in rows):
        those = [row for row in rows if row["part"] == title]
        heads = ("use, and when it works", *(f"`{name}`" for name in rows[0]["cells"]))
        lines = [
            [
                f"{row['use']}: {row['works_if'][:1].lower()}{row['works_if'][1:]}",
                *(_cell(row, name, notes) for name in row["cells"]),
            ]
            for row in those
        ]
        parts.append(f"### {title}\n\n{table(heads, lines)}")
    said = [f"{number}. {message}{f' – {reason}' if reason else ''}" for (message, reason), number in notes.items()]
    listed = "\n".join(said)
    return "\n\n".join([*parts, f"### What is said where it does not work\n\n{listed}"])


def _cell(row: dict[str, Any], name: str, notes: dict[tuple[str, str], int]) -> str:
    found: str = row["cells"][name]
    if found in _CELLS:
        return _CELLS[found]
    kind, _, message = found.partition(": ")
    quoted = f"``{_NUMBER.sub('but it is …', message.replace(name, '…'))}``"
    said = quoted if kind == "refused" else f"It does not hold: {quoted}"
    number = notes.setdefault((said, row["reasons"].get(name, "")), len(notes) + 1)
    return f"({number})"


def behaviour_measured() -> str:
    """How many uses were run, and with what."""
    file = load("behaviour.json")
    counts = {name: sum(row["framework"] == name for row in file["rows"]) for name in ("torch", "jax")}
    libraries = ", ".join(f"{name} {version}" for name, version in file["versions"].items())
    return paragraph(f"{counts['torch']} uses in torch and {counts['jax']} in JAX, with {libraries}.")
