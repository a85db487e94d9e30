"""The tables of who stands in AdamW's place, at its learning rate: nobody is tuned."""

from __future__ import annotations

import statistics
from typing import Any

from rich.table import Table

from benchmarks.quality import document
from benchmarks.quality.contenders import ADAMW
from benchmarks.quality.report import load
from benchmarks.quality.workloads import WORKLOADS
from benchmarks.tables.results import table

NAMES = tuple(name for name, workload in WORKLOADS.items() if workload.shares)
AT = {"0.5": "half of it", "1": "AdamW's rate", "2": "twice it"}
Result = dict[str, Any]


def against(one: Result, other: Result) -> tuple[float, float] | None:
    """The test loss over another's, less 1, seed by seed, and the standard error of that; None where one diverged."""
    if one["loss"] is None or other["loss"] is None:
        return None
    differences = document.ahead(one, other)
    return statistics.fmean(differences), document.error(differences)


def changes(name: str, share: str) -> dict[str, tuple[float, float] | None]:
    """For everybody the change of the test loss against AdamW's at the same learning rate."""
    results = (load(name) or {})["results"]
    adamw = results[ADAMW]["at"][share]
    return {title: against(of["at"][share], adamw) for title, of in results.items()}


def in_short() -> str:
    """Everybody's test loss against AdamW's at half, once and twice AdamW's best learning rate, a workload a column."""
    names = [name for name in NAMES if load(name)]
    found = {name: {share: changes(name, share) for share in AT} for name in names}
    titles = dict.fromkeys(title for of in found.values() for title in of["1"])
    made = []
    for title in titles:
        cells = [" / ".join(_cell(found[name][share].get(title)) for share in AT) for name in names]
        ours = any((load(name) or {})["results"].get(title, {}).get("ours") for name in names)
        made.append([f"**{title}**" if ours else title, *(x if title != ADAMW else "0" for x in cells)])
    return table(["", *(WORKLOADS[WORKLOADS[name].beside or ""].title for name in names)], made) if made else ""


def _cell(change: tuple[float, float] | None) -> str:
    return "diverges" if change is None else document.shown(*change)


def whole() -> str:
    """Every test loss with its standard error, and what it is against AdamW's at that rate with the error of that."""
    parts = []
    for name in (name for name in NAMES if load(name)):
        heads, body = _everything(name)
        parts.append(f"### {_title(name)}\n\n{table(heads, body)}")
    return "\n\n".join(parts)


def show(name: str) -> Table:
    """The table for a terminal."""
    if not load(name):
        return Table(title=f"{name}: not run to its end")
    heads, body = _everything(name)
    shown = Table(*heads, title=_title(name))
    for row in body:
        shown.add_row(*row)
    return shown


def _title(name: str) -> str:
    return f"{WORKLOADS[WORKLOADS[name].beside or ''].title}, {len(WORKLOADS[name].seeds)} seeds"


def _everything(name: str) -> tuple[list[str], list[list[str]]]:
    results = (load(name) or {})["results"]
    rate = results[ADAMW]["learning_rate"]
    body = [
        [f"**{title}**" if of["ours"] else title, *(_loss(name, title, of["at"][share], share) for share in AT)]
        for title, of in results.items()
    ]
    return ["", *(f"{text}: {float(share) * rate:.3g}" for share, text in AT.items())], body


def _loss(name: str, title: str, of: Result, share: str) -> str:
    if of["loss"] is None:
        return f"diverges in {sum(x is None for x in of['losses'])} of {len(of['losses'])}"
    text = f"{of['loss']:.4f} ± {document.error(of['losses']):.4f}"
    change = changes(name, share)[title]
    return text if title == ADAMW or change is None else f"{text} ({change[0]:+.1%} ± {change[1]:.1%})"
