"""The tables of docs/quality.md, in Markdown, from the files; each is empty while a file that it needs is missing."""

from __future__ import annotations

import json
import math
import re
import statistics
from typing import Any

from benchmarks.quality import contenders, report
from benchmarks.quality.contenders import ADAMW, FUSEDBUN, INT4, OF_MEANS, PUBLIC, SM3, WITHOUT_MOMENTUM
from benchmarks.quality.report import DRAWN, HEADS, Row, load, rows
from benchmarks.quality.workloads import LEARNT, WORKLOADS
from benchmarks.tables.results import paragraph, table

ABLATIONS = tuple(name for name, workload in WORKLOADS.items() if workload.beside and not workload.shares)
LONGER = "shakespeare_longer"
IN_TORCH = tuple(x.name for x in LEARNT if x.contenders is not contenders.IN_JAX)
IN_FLAX = tuple(name for name in DRAWN if name not in IN_TORCH)
CHOICE = (FUSEDBUN, INT4, WITHOUT_MOMENTUM, OF_MEANS, "SM3", ADAMW, "NAdamW", "Adafactor")
LITTLE = 1.0  # bytes a parameter
REPORTED = (0.9166, 0.8819)  # the accuracies of the first public Fusedbun and of AdamW, in that repository's README


def found(names: tuple[str, ...] = DRAWN) -> list[str]:
    """The workloads that were run to their end."""
    return [name for name in names if load(name)]


def title(name: str) -> str:
    """The workload's name for a reader."""
    return str(_protocol(name)["title"])


def in_a_few_rows() -> str:
    """The test loss over AdamW's of those to choose from, and their state in bytes a parameter."""
    names = found(IN_TORCH)
    here = {name: {row.title: row for row in rows(name)} for name in names}
    made = []
    for who in CHOICE:
        state = [of[who].of["state_bytes_per_parameter"] for of in here.values() if who in of]
        if state:
            cells = [_against(of[who], of[ADAMW].of) if who in of else "" for of in here.values()]
            least, most = f"{min(state):.2f}", f"{max(state):.2f}"
            ours = any(of[who].of["ours"] for of in here.values() if who in of)
            made.append([f"**{who}**" if ours else who, least if least == most else f"{least} - {most}", *cells])
    return table(["", "state", *map(title, names)], made) if made else ""


def in_short() -> str:
    """The test loss over AdamW's in torch, an optimizer a row and a workload a column."""
    return _over_adamw(found(IN_TORCH))


def in_flax() -> str:
    """The same in Flax."""
    return _over_adamw(found(IN_FLAX))


def _over_adamw(names: list[str]) -> str:
    cells: dict[str, dict[str, str]] = {}
    for name in names:
        for row in rows(name):
            cells.setdefault(_family(row), {})[name] = _against(row, row.adamw)
    made = [[who, *(of.get(name, "") for name in names)] for who, of in cells.items()]
    order = {who: k for k, who in enumerate(_order())}
    made.sort(key=lambda row: order.get(row[0].strip("*"), len(order)))
    return table(["", *map(title, names)], made) if names else ""


def rates() -> str:
    """The best learning rate over AdamW's, and the geometric mean over the workloads."""
    names = found()
    cells: dict[str, dict[str, float]] = {}
    for name in names:
        for row in rows(name):
            if row.relative_rate is not None and row.is_stable and "sparse" not in row.title:
                cells.setdefault(_family(row), {})[name] = row.relative_rate
    order = {who: k for k, who in enumerate(_order())}
    made = [
        [who, *(f"{of[name]:.3g}" if name in of else "" for name in names), f"{_middle(of.values()):.2g}"]
        for who, of in sorted(cells.items(), key=lambda item: order.get(item[0].strip("*"), len(order)))
    ]
    return table(["", *map(title, names), "geometric mean"], made) if names else ""


def who() -> str:
    """For each workload the best, and which of ours are not behind AdamW, or not by more than the seeds scatter."""
    made = []
    for name in found():
        here = [row for row in rows(name) if row.is_stable]
        ours = [row for row in here if row.of["ours"]]
        level = [row.title for row in ours if row.adamw and _behind(row, row.adamw) <= 0]
        little = [row for row in ours if row.of["state_bytes_per_parameter"] < LITTLE]
        least = f"{little[0].title}: {_against(little[0], little[0].adamw)}" if little else "-"
        made.append([title(name), here[0].title, ours[0].title, "; ".join(level) or "none", least])
    heads = (
        "",
        "lowest loss",
        "lowest of ours",
        "ours not two standard errors behind AdamW",
        "best of ours with less than a byte",
    )
    return table(heads, made, left=5) if made else ""


def whole() -> str:
    """Everything about every workload."""
    parts = []
    for name in found((*DRAWN, *ABLATIONS)):
        protocol = _protocol(name)
        about = (
            f"{protocol['about'][0].upper()}{protocol['about'][1:]}. {protocol['steps']:,} steps of "
            f"{protocol['batch']}, {len(protocol['seeds'])} seeds."
        )
        body = [[_name(row), *row.cells()] for row in rows(name)]
        parts.append(f"### {title(name)}\n\n{paragraph(about)}\n\n{table(HEADS, body)}")
    return "\n\n".join(parts)


def settings() -> str:
    """How every setting changes the test loss of the optimizer that it varies; of these the loss."""
    names = found((*ABLATIONS, LONGER))
    made: dict[str, dict[str, str]] = {}
    for name in names:
        here = {row.title: row for row in rows(name)}
        for who, row in here.items():
            base = here[FUSEDBUN if who.startswith("Fusedbun") else SM3 if who.startswith("SM3") else ADAMW]
            if name != LONGER or who in made:
                made.setdefault(who, {})[name] = _loss(row) if row is base else _against(row, base)
    bases = [who for who in (FUSEDBUN, SM3, ADAMW) if who in made]
    order = [x for base in bases for x in (base, *(y for y in made if y not in bases and y[:3] == base[:3]))]
    body = [[f"**{x}**" if x in bases else x, *(made[x].get(name, "") for name in names)] for x in order]
    return table(["", *(title(name).removesuffix(", settings") for name in names)], body) if names else ""


def as_reported() -> str:
    """The validation accuracy at every learning rate, and the test accuracy at the best; "-" where none was run."""
    workload, path = WORKLOADS["as_reported"], report.RESULTS / "quality_as_reported.json"
    file = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    tried = {
        x.title: {
            rate: file["runs"].get(f"{x.title}|{rate:.6g}|{workload.tuning_seeds[0]}|validation", {}).get("accuracy")
            for rate in workload.rates
        }
        for x in workload.contenders
    }
    known = {who: of for who, of in tried.items() if any(of.values())}
    if ADAMW not in known:
        return ""
    made = []
    for x in workload.contenders:
        if x.title in known:
            result = (file["results"] or {}).get(x.title)
            tested = f"{result['accuracy']:.2%} ± {result['accuracy_deviation']:.2%}" if result else "-"
            rates = ["-" if accuracy is None else f"{accuracy:.2%}" for accuracy in known[x.title].values()]
            made.append([f"**{x.title}**" if x.ours else x.title, *rates, tested])
    said = (
        f"{workload.about[0].upper()}{workload.about[1:]}; {workload.steps:,} steps of {workload.batch}, "
        f"{workload.schedule}. The validation accuracy at each of the learning rates, with one seed; and the test "
        f"accuracy at that of the lowest validation loss, with {len(workload.seeds)} seeds."
    )
    of_public, of_adamw = REPORTED
    apart = {
        max(abs(of[rate] - of_public), abs(known[ADAMW][rate] - of_adamw)): (rate, who)
        for who, of in known.items()
        for rate in workload.rates
        if who.startswith(PUBLIC) and of[rate] and known[ADAMW][rate]
    }
    nearest = f"Reported were {of_public:.2%} for the first public Fusedbun and {of_adamw:.2%} for AdamW."
    if apart:
        rate, who = apart[min(apart)]
        nearest += (
            f" Nearest to both comes the learning rate {rate:.2g}, with {known[who][rate]:.2%} ({who}) and "
            f"{known[ADAMW][rate]:.2%} ({ADAMW}): neither is further away than {100 * min(apart):.2f} points."
        )
    heads = ["", *(f"{rate:.2g}" for rate in workload.rates), "test accuracy"]
    return f"{paragraph(said)}\n\n{table(heads, made)}\n\n{paragraph(nearest)}"


def measured() -> str:
    """With what the numbers were made."""
    if not found():
        return ""
    versions = (load(found()[0]) or {})["versions"]
    known = ", ".join(f"{x} {versions[x]}" for x in ("torch", "jax", "optax", "flax") if x in versions)
    return paragraph(f"On one thread of a CPU, in float32, with Python {versions['python']}, {known}.")


def _protocol(name: str) -> dict[str, Any]:
    file = load(name)
    assert file is not None, name
    return dict(file["protocol"])


def _order() -> list[str]:
    return [_without_package(x.title) for x in (*contenders.IN_TORCH, *contenders.SPARSE)]


def _without_package(name: str) -> str:
    return re.sub(r" \((torch-SM3|optax|lion-pytorch)\)", " of others", name)


def _family(row: Row) -> str:
    """The title for a column of several frameworks, where the same rule is in several packages."""
    name = _without_package(row.title)
    return f"**{name}**" if row.of["ours"] else name


def _name(row: Row) -> str:
    return f"**{row.title}**" if row.of["ours"] else row.title


def _loss(row: Row) -> str:
    return f"{row.of['loss']:.4f} ± {row.of['loss_deviation']:.4f}" if row.is_stable else "diverges"


def ahead(one: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """By how much the loss is higher than another's, seed by seed, as a share of the other's mean."""
    mean = statistics.fmean(other["losses"])
    return [(a - b) / mean for a, b in zip(one["losses"], other["losses"], strict=True)]


def error(numbers: list[float]) -> float:
    """The standard error of their mean."""
    return statistics.stdev(numbers) / math.sqrt(len(numbers))


def shown(change: float, error: float) -> str:
    """A change in per cent, in parentheses where it is less than two of its standard errors."""
    return f"{change:+.1%}" if abs(change) > 2 * error else f"({change:+.1%})"


def _behind(row: Row, other: Row | dict[str, Any]) -> float:
    """By how much the loss is higher, less two standard errors of that."""
    differences = ahead(row.of, _results(other))
    return statistics.fmean(differences) - 2 * error(differences)


def _against(row: Row, other: Row | dict[str, Any] | None) -> str:
    """The change of the loss against another's, in parentheses where it is less than two of its standard errors."""
    if not row.is_stable:
        return "diverges"
    if other is None or _results(other) is row.of:
        return "" if other is None else "0"
    differences = ahead(row.of, _results(other))
    return shown(statistics.fmean(differences), error(differences))


def _results(of: Row | dict[str, Any]) -> dict[str, Any]:
    return of.of if isinstance(of, Row) else of


def _middle(values: Any) -> float:
    return math.exp(statistics.fmean(math.log(x) for x in values))
