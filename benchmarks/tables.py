"""The tables of README.md and of the documents in docs, from the files that the benchmarks wrote.

    python -m benchmarks.tables

Between `<!-- table: NAME -->` and `<!-- end -->` stands what `TABLES[NAME]` makes, and nothing else: this command puts
it there, and `tests/test_readme.py` fails where a document says anything else. A table of a benchmark that has not
been run to its end is empty.
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from fusedbun.bench import shapes
from fusedbun.cli.files import write_atomically
from fusedbun.cli.table import cell

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
DOCUMENTS = ("README.md", "docs/performance.md", "docs/memory.md", "docs/quality.md")
SPEED, SHAPES = "speed.json", "shapes/speed.json"
_BLOCK = re.compile(r"(?P<begin><!-- table: (?P<name>[\w ]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)

Label: TypeAlias = tuple[str, str]  # a contender's path and name
OURS, STEP, PACKAGES = "fusedbun", "fusedbun_jax step", "packages for torch"
ADAMW, OPTAX_ADAMW = ("torch", "AdamW, fused"), ("optax", "adamw")
NETWORKS = (("gpt2", 1), ("gpt2", 2), ("resnet50", 1), ("resnet50", 2))
PEERS = (
    ("torch", "AdamW, foreach"),
    ("torch", "Adafactor"),
    (PACKAGES, "torch-SM3 SM3"),
    (PACKAGES, "pytorch_optimizer SM3"),
    (PACKAGES, "lion-pytorch Lion"),
)
# What the README shows of the memory: with most of our ways to save, and what one would use without them.
MEMORY = (
    *("SM3", "SM3, tied", "Fusedbun, int4", "Fusedbun, int8", "DecoupledLionW, int8"),
    *("SM3, gradients kept", "Fusedbun, float32"),
    *("AdamW, fused, bfloat16", "AdamW, fused", "AdamW, foreach", "Adafactor", "torch-SM3"),
)


@dataclass(frozen=True)
class Case:
    """What `fusedbun bench` measured of a workload on a number of threads.

    Args:
        workload: its name.
        title: its name for a reader.
        tensors: how many it has.
        parameters: the elements of all.
        threads: on how many.
        runs: a row of the file for each contender that was measured.
    """

    workload: str
    title: str
    tensors: int
    parameters: int
    threads: int
    runs: dict[Label, dict[str, Any]]

    @property
    def on_threads(self) -> str:
        """The number of threads in words."""
        return f"{self.threads} thread{'s' if self.threads > 1 else ''}"

    def quotients(self, label: Label, reference: Label = ADAMW) -> list[float]:
        """The quartiles of its time over the reference's, in the rounds in which both stepped."""
        one, other = (dict(zip(self.runs[x]["rounds"], self.runs[x]["ms"], strict=True)) for x in (label, reference))
        both = [ms / other[k] for k, ms in one.items() if k in other]
        return statistics.quantiles(both, n=4, method="inclusive")

    def over_median(self, label: Label, reference: Label) -> list[float]:
        """Its quartiles, over the reference's median."""
        low, _, high = statistics.quantiles(self.runs[label]["ms"], n=4, method="inclusive")
        return [x / self.runs[reference]["median_ms"] for x in (low, self.runs[label]["median_ms"], high)]

    def per_byte(self, label: Label) -> float:
        """The time for each byte that has to be moved, up to a factor that all cases share."""
        run = self.runs[label]
        return float(run["median_ms"] / (run["bytes_per_parameter"] * self.parameters))

    def of_path(self, path: str, fewer_bits: bool | None = None) -> list[Label]:
        """The contenders of a path; with or without those on bfloat16 parameters, where that is said."""
        return [x for x in self.runs if x[0] == path and (fewer_bits is None or ("bfloat16" in x[1]) == fewer_bits)]


def load(name: str) -> dict[str, Any]:
    """A file of results."""
    found: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return found


@cache
def cases(name: str) -> dict[tuple[str, int], Case]:
    """The cases of a speed benchmark, by workload and threads."""
    file = load(name)
    if file["interrupted"]:
        raise ValueError(f"{RESULTS / name} must be of a run that came to its end, but that was interrupted")
    found = {}
    for case in file["cases"]:
        runs = {(run["path"], run["name"]): run for run in case["contenders"] if run["status"] == "measured"}
        about = {key: case[key] for key in ("workload", "title", "tensors", "parameters", "threads")}
        found[case["workload"], case["threads"]] = Case(**about, runs=runs)
    return found


# What tables are made of.


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table in Markdown whose first columns begin at the left."""
    rule = ["---" if i < left else "---:" for i in range(len(heads))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, rule, *rows))


def paragraph(text: str) -> str:
    """Text in lines."""
    return textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False)


def quartiles(low: float, middle: float, high: float) -> str:
    """A quotient with its quartiles."""
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def ms(value: float | None) -> str:
    """A time with three digits or so."""
    return cell(value, ",.0f" if value and value >= 100 else ".1f" if value and value >= 10 else ".2f")


def command(name: str) -> str:
    """The command that wrote a file of the speed benchmark."""
    settings = load(name)["settings"]
    usual = {"elements": shapes.ELEMENTS, "largest": shapes.LARGEST, "only": None}
    words = ["python", "-m", "benchmarks.speed"]
    for key, value in settings.items():
        if key not in usual or value != usual[key]:
            words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    folder = (RESULTS / name).parent
    if folder != RESULTS:
        words += ["--output", str(folder.relative_to(ROOT))]
    return shlex.join(words)


def how_measured(name: str) -> str:
    """Where, when nothing else is said, and with which command."""
    machine = load(name)["machine"]
    versions = machine["versions"]
    libraries = ", ".join(f"{x} {versions[x]}" for x in ("torch", "jax", "optax") if x in versions)
    load_average = machine.get("load_average")
    busy = f" The load average of the machine was {load_average[0]:.2f}." if load_average else ""
    where = (
        f"Measured on {machine['cpu']} with {machine['cpus']} CPUs and {machine['memory_bytes'] / 2**30:.1f} GiB "
        f"({machine['system']}), with Python {versions['python']}, {libraries}.{busy}"
    )
    written = f"This command writes `benchmarks/results/{name}`:"
    return f"{paragraph(f'{where} {written}')}\n\n```sh\n{command(name)}\n```"


# The tables of speed.


def speed_in_short() -> str:
    """Ours, some peers and JAX, on two networks."""
    chosen = [cases(SPEED)[key] for key in NETWORKS]
    spreads: list[float] = []

    def row(title: str, found: Iterable[list[float]]) -> list[str]:
        cells = []
        for low, middle, high in found:
            spreads.append((high - low) / middle)
            cells.append(f"{middle:.2f}")
        return [title, *cells]

    first, blank = chosen[0], [""] * len(chosen)
    rows = [["**torch: times the step of its fused AdamW**", *blank]]
    labels = [*first.of_path(OURS, fewer_bits=False), *PEERS]
    for label in labels:
        title = _marked(label[1]) if label[0] == OURS else _titled(label)
        rows.append(row(title, (case.quotients(label) for case in chosen)))
    rows.append(["**JAX: times the step of `optax.adamw`**", *blank])
    for label in first.of_path(STEP):
        rows.append(row(_marked(label[1]), (case.over_median(label, OPTAX_ADAMW) for case in chosen)))
    said = (
        f"Less than 1 is faster. The quartiles of a number in this table are {statistics.median(spreads):.0%} of it "
        f"apart in the median and {max(spreads):.0%} at the most."
    )
    return f"{table(['', *(f'{c.title}, {c.on_threads}' for c in chosen)], rows)}\n\n{paragraph(said)}"


def _titled(label: Label) -> str:
    """The name of an optimizer in torch, with the package if it is not ours."""
    path, name = label
    package, _, optimizer = name.partition(" ")
    return name if path == OURS else f"{optimizer} ({package})" if path == PACKAGES else f"{name} ({path})"


def _marked(name: str) -> str:
    """One of ours, its class as code."""
    cls, comma, setting = name.partition(",")
    return f"`{cls}`{comma}{setting}"


def speed_whole() -> str:
    """Every contender of every network."""
    heads = (
        *("", "median, ms", "quartiles apart, ms", "times fused AdamW (quartiles)", "bytes a parameter", "GB/s"),
        *("of the limit", "temporaries, MiB", "first step, ms", "state, bytes a parameter"),
    )
    parts = []
    for case in cases(SPEED).values():
        rows = []
        for path in dict.fromkeys(path for path, _ in sorted(case.runs, key=lambda label: label[0] != "limit")):
            rows.append([f"**{path}**", *[""] * (len(heads) - 1)])
            rows += [_speed_row(case, label) for label in case.of_path(path)]
        title = f"### {case.title}, {case.on_threads}\n\n{case.parameters:,} parameters in {case.tensors:,} tensors."
        parts.append(f"{title}\n\n{table(heads, rows)}")
    return "\n\n".join(parts)


def _speed_row(case: Case, label: Label) -> list[str]:
    run = case.runs[label]
    temporaries = run["temporary_bytes"]
    return [
        label[1],
        ms(run["median_ms"]),
        ms(run["interquartile_ms"]),
        quartiles(*case.quotients(label)),
        cell(run["bytes_per_parameter"], ".2f"),
        cell(run["gigabytes_per_second"], ".1f"),
        cell(run["share_of_limit"], ".0%"),
        cell(temporaries if temporaries is None else temporaries / 2**20, ",.1f"),
        ms(run["first_step_ms"]),
        cell(run["state_bytes_per_parameter"], ".2f"),
    ]


def drift() -> str:
    """How much the same code differs from itself."""
    apart = [
        abs(case.quotients((OURS, name))[1] / case.quotients(label)[1] - 1)
        for case in cases(SPEED).values()
        for label in case.of_path("fusedbun kernel")
        for name in label[1:]
    ]
    said = (
        f"How much to trust a quotient is measured too: the paths `fusedbun` and `fusedbun kernel` are the same code "
        f"here, measured twice in one run. Their quotients differ by {statistics.median(apart):.1%} in the median and "
        f"by {max(apart):.0%} at the most."
    )
    return paragraph(said)


def jax_whole() -> str:
    """Ours over `optax.adamw`, with and without `step`."""
    chosen = list(cases(SPEED).values())
    heads = ["", *(f"{case.title}, {case.on_threads}" for case in chosen)]
    rows = []
    for path in (STEP, "fusedbun_jax", "optax"):
        rows.append([f"**{path}**", *[""] * len(chosen)])
        for label in chosen[0].of_path(path):
            rows.append([label[1], *(quartiles(*case.over_median(label, OPTAX_ADAMW)) for case in chosen)])
    return table(heads, rows)


def slower() -> str:
    """Where ours are slower than torch's fused AdamW, and slower than `optax.adamw` where JAX steps."""
    rows = []
    for case in (*cases(SPEED).values(), *cases(SHAPES).values()):
        in_torch = {label[1]: case.quotients(label) for label in case.of_path(OURS)}
        in_jax = {f"JAX {x[1]}": case.over_median(x, OPTAX_ADAMW) for x in case.of_path(STEP)}
        found = [f"{name}: {middle:.2f}" for name, (low, middle, _) in {**in_torch, **in_jax}.items() if low > 1]
        if found:
            rows.append([case.title, str(case.threads), "; ".join(found)])
    return table(("what is stepped", "threads", "times the reference"), rows, left=3)


def fewer_bits() -> str:
    """Ours on bfloat16 parameters."""
    heads = (
        *("", "", "median, ms", "times fused AdamW in float32 (quartiles)", "times itself in float32"),
        *("state, bytes a parameter", "temporaries, MiB"),
    )
    rows = []
    for case in cases(SPEED).values():
        for k, label in enumerate(case.of_path(OURS, fewer_bits=True)):
            run, full = case.runs[label], (OURS, label[1].partition(",")[0])
            rows.append(
                [
                    f"{case.title}, {case.on_threads}" if k == 0 else "",
                    label[1],
                    ms(run["median_ms"]),
                    quartiles(*case.quotients(label)),
                    f"{case.quotients(label, full)[1]:.2f}",
                    f"{run['state_bytes_per_parameter']:.2f}",
                    f"{run['temporary_bytes'] / 2**20:,.1f}",
                ]
            )
    return table(heads, rows, left=2)


def _odd() -> list[str]:
    odd = [name for name in shapes.GROUPS["odd"] if (name, 1) in cases(SHAPES)]
    return [name for name in odd if name != "square"]


def odd_shapes() -> str:
    """The time for each byte, relative to that of the square."""
    parts = []
    for threads in load(SHAPES)["settings"]["threads"]:
        square, others = cases(SHAPES)["square", threads], [cases(SHAPES)[name, threads] for name in _odd()]
        rows = [
            [_titled(label), ms(square.runs[label]["median_ms"])]
            + [f"{case.per_byte(label) / square.per_byte(label):.2f}" for case in others]
            for label in (*square.of_path(OURS), ADAMW)
        ]
        heads = [square.on_threads, f"{square.title}, ms", *(case.title for case in others)]
        parts.append(table(heads, rows))
    return "\n\n".join(parts)


def by_size() -> str:
    """Nanoseconds for each parameter."""
    parts = []
    for threads in load(SHAPES)["settings"]["threads"]:
        series = [case for (name, on), case in cases(SHAPES).items() if name.startswith("linear") and on == threads]
        rows = [
            [_titled(label)] + [f"{case.runs[label]['median_ms'] * 1e6 / case.parameters:.3f}" for case in series]
            for label in (*series[0].of_path(OURS), ADAMW)
        ]
        parts.append(table([series[0].on_threads, *(case.title for case in series)], rows))
    return "\n\n".join(parts)


def state_by_shape() -> str:
    """The bytes of state for each parameter."""
    chosen = [cases(SHAPES)[name, 1] for name in ("square", *_odd())]
    rows = [
        [label[1], *(f"{case.runs[label]['state_bytes_per_parameter']:.2f}" for case in chosen)]
        for label in chosen[0].of_path(OURS)
        if any(case.runs[label]["state_bytes_per_parameter"] for case in chosen)
    ]
    return table(["", *(case.title for case in chosen)], rows)


# The tables of memory.


@cache
def planned(model: str) -> dict[str, float]:
    """What `fusedbun.plan` says of the contenders that it knows, in bytes a parameter."""
    import torch

    import fusedbun
    from benchmarks.memory.training import CONTENDERS, SIZES, Model
    from fusedbun.memory import Setting
    from fusedbun.recipes import RECIPES

    recipes = {recipe.torch_class: name for name, recipe in RECIPES.items()}
    with torch.device("meta"):
        net = Model(SIZES[model], tied=False)
    found = {}
    for title, contender in CONTENDERS.items():
        given, rounds = dict(contender.settings), False
        if contender.module == "fusedbun":
            rounds = given.pop("stochastic_rounding", False)
            setting = Setting(recipes[contender.name], given)
        elif contender.name == "AdamW" and given == {"fused": True}:
            setting = Setting("adamw", {"weights": "param"})
        else:
            continue
        of = fusedbun.plan(net, setting, dtype=contender.dtype, stochastic_rounding=rounds, threads=1)
        if of.refusals:
            raise ValueError(f"fusedbun.plan refuses {title!r}: {of.refusals[0].reason}")
        (found[title],) = (x.bytes_per_parameter for x in of.estimates if x.gradient_release == contender.releases)
    return found


def _memory_rows(model: str) -> dict[str, dict[str, Any]]:
    return {row["contender"]: row for row in load("memory.json")["results"] if row["model"] == model}


def memory_in_short() -> str:
    """The peak beside the plan, for GPT-2."""
    from benchmarks.memory.training import CONTENDERS

    rows = []
    for title in MEMORY:
        row, contender = _memory_rows("gpt2")[title], CONTENDERS[title]
        name = re.sub(", (gradients kept|bfloat16|float32)$", "", title)  # the columns say so
        name = _marked(name) if contender.module == "fusedbun" else name
        release = "released" if contender.releases else "kept"
        peak = f"{row['bytes_per_parameter']:.2f}"
        rows.append([name, contender.dtype, release, peak, cell(planned("gpt2").get(title), ".2f")])
    heads = ("", "weights", "gradients", "measured", "`fusedbun plan`")
    said = "Bytes a parameter at the peak of training GPT-2 small, everything counted, and as planned:"
    return f"{said}\n\n{table(heads, rows, left=3)}"


def memory_whole() -> str:
    """Everything that was measured."""
    from benchmarks.memory.training import BARE, CONTENDERS

    heads = (
        *("", "weights", "gradients", "peak, MiB", "bytes a parameter", "without activations"),
        *("`fusedbun plan`", "over the plan"),
    )
    parts = []
    for model in dict.fromkeys(row["model"] for row in load("memory.json")["results"]):
        rows, missing, count = [], [], 0
        for title, row in _memory_rows(model).items():
            if row["status"] != "measured":
                missing.append(f"{title}: {row['status']}")
                continue
            contender, plan, count = CONTENDERS[title], planned(model).get(title), row["parameters"]
            above = row["above_activations"]
            gradients = "dropped" if title == BARE else "released" if contender.releases else "kept"
            rows.append(
                [
                    *(title, contender.dtype, gradients),
                    f"{(row['peak_bytes'] - row['without_model_bytes']) / 2**20:,.0f}",
                    f"{row['bytes_per_parameter']:.2f}",
                    f"{above:.2f}",
                    cell(plan, ".2f"),
                    cell(plan and above / plan - 1, "+.1%"),
                ]
            )
        versions = load("memory.json")["versions"]
        said = f"{model}: {count:,} parameters, on one thread, with torch {versions['torch']}."
        said += f" Not measured: {'; '.join(missing)}." if missing else ""
        parts.append(f"{paragraph(said)}\n\n{table(heads, rows, left=3)}")
    return "\n\n".join(parts)


def low_precision() -> str:
    """The quality in fewer bits; nothing before the benchmark has come to its end."""
    if not (RESULTS / "low_precision.json").exists() or "summary" not in (file := load("low_precision.json")):
        return ""
    protocol, rows = file["protocol"], []
    for row in file["summary"]:
        (full,) = (r for r in file["summary"] if (r["optimizer"], r["setting"]) == (row["optimizer"], "float32"))
        is_first = row["setting"] == "float32"
        rows.append(
            [
                *(f"`{row['optimizer']}`" if is_first else "", row["setting"], f"{row['lr']:g}"),
                "diverged" if row["mean"] is None else f"{row['mean']:.4f} ± {row['deviation']:.4f}",
                "" if is_first or row["mean"] is None else f"{row['mean'] / full['mean'] - 1:+.2%}",
            ]
        )
    said = (
        f"A character transformer ({protocol['layers']} layers of width {protocol['width']}) on Shakespeare, "
        f"{protocol['steps']:,} steps of {protocol['batch']} texts of {protocol['context']} characters, "
        f"{len(protocol['seeds'])} seeds. The learning rate of each optimizer is the best of a grid for its float32 "
        f"run with the first seed, and serves all of its settings. The loss is that of validation text; ± is the "
        f"standard deviation between seeds. Momentum is float32 where nothing else is said."
    )
    heads = ("", "setting", "learning rate", "validation loss", "against float32")
    return (
        f"## How good training in fewer bits is\n\n{paragraph(said)}\n\n```sh\npython -m benchmarks.low_precision\n```"
        f"\n\n{table(heads, rows, left=2)}"
    )


def quality(part: str) -> Callable[[], str]:
    """A table of docs/quality.md, which `benchmarks.quality.document` makes."""

    def make() -> str:
        from benchmarks.quality import document

        return str(getattr(document, part)())

    return make


def low_precision_in_short() -> str:
    """For each optimizer the loss in float32, and how far off it is in fewer bits."""
    if not (RESULTS / "low_precision.json").exists() or "summary" not in (file := load("low_precision.json")):
        return ""
    found = {(row["optimizer"], row["setting"]): row for row in file["summary"]}
    settings = list(dict.fromkeys(setting for _, setting in found if setting != "float32"))
    rows = []
    for name in dict.fromkeys(name for name, _ in found):
        full = found[name, "float32"]
        cells = [found.get((name, setting), {}).get("mean") for setting in settings]
        off = ["-" if mean is None else f"{mean / full['mean'] - 1:+.2%}" for mean in cells]
        rows.append([f"`{name}`", f"{full['mean']:.3f} ± {full['deviation']:.3f}", *off])
    steps, seeds = file["protocol"]["steps"], len(file["protocol"]["seeds"])
    said = (
        f"Validation loss of a character transformer after {steps:,} steps in float32, the mean of {seeds} seeds and "
        f"its standard deviation, and how much higher it is in fewer bits:"
    )
    return f"{paragraph(said)}\n\n{table(('', 'float32', *settings), rows)}"


TABLES: dict[str, Callable[[], str]] = {
    "speed in short": speed_in_short,
    "speed": speed_whole,
    "speed measured": lambda: how_measured(SPEED),
    "shapes measured": lambda: how_measured(SHAPES),
    "drift": drift,
    "jax": jax_whole,
    "slower": slower,
    "fewer bits": fewer_bits,
    "odd shapes": odd_shapes,
    "by size": by_size,
    "state by shape": state_by_shape,
    "memory in short": memory_in_short,
    "memory": memory_whole,
    "low precision": low_precision,
    "low precision in short": low_precision_in_short,
    "quality in short": quality("in_short"),
    "quality who": quality("who"),
    "quality rates": quality("rates"),
    "quality settings": quality("settings"),
    "quality as reported": quality("as_reported"),
    "quality measured": quality("measured"),
    "quality whole": quality("whole"),
}


def blocks(text: str) -> list[str]:
    """The names of the tables in a document."""
    return [found["name"] for found in _BLOCK.finditer(text)]


def typed(text: str) -> str:
    """What is not a table of the benchmarks."""
    return _BLOCK.sub("", text)


def updated(text: str) -> str:
    """The document with the tables that the results make; raises a KeyError for a table that there is not."""

    def block(found: re.Match[str]) -> str:
        made = TABLES[found["name"]]()
        return f"{found['begin']}\n{made}\n\n{found['end']}" if made else f"{found['begin']}{found['end']}"

    return _BLOCK.sub(block, text)


def main() -> None:
    """Writes the documents."""
    for name in DOCUMENTS:
        path = ROOT / name
        before = path.read_text()
        after = updated(before)
        if after != before:
            write_atomically(path, after.encode())
        print(f"{name}: {', '.join(blocks(after))}{'' if after != before else ' (as it was)'}")


if __name__ == "__main__":
    main()
