"""The tables of speed."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterable

from benchmarks.tables.results import (
    ADAMW,
    OPTAX_ADAMW,
    OURS,
    PACKAGES,
    RESULTS,
    ROOT,
    SHAPES,
    SPEED,
    STEP,
    Case,
    Label,
    cases,
    load,
    marked,
    ms,
    paragraph,
    quartiles,
    table,
    titled,
)
from fusedbun.tools.bench import shapes
from fusedbun.tools.shared.table import cell

NETWORKS = (("gpt2", 1), ("gpt2", 2), ("resnet50", 1), ("resnet50", 2))
PEERS = (
    ("torch", "AdamW, foreach"),
    ("torch", "Adafactor"),
    (PACKAGES, "torch-SM3 SM3"),
    (PACKAGES, "pytorch_optimizer SM3"),
    (PACKAGES, "lion-pytorch Lion"),
)


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
        title = marked(label[1]) if label[0] == OURS else titled(label)
        rows.append(row(title, (case.quotients(label) for case in chosen)))
    rows.append(["**JAX: times the step of `optax.adamw`**", *blank])
    for label in first.of_path(STEP):
        rows.append(row(marked(label[1]), (case.over_median(label, OPTAX_ADAMW) for case in chosen)))
    said = (
        f"Less than 1 is faster. The quartiles of a number in this table are {statistics.median(spreads):.0%} of it "
        f"apart in the median and {max(spreads):.0%} at the most."
    )
    return f"{table(['', *(f'{c.title}, {c.on_threads}' for c in chosen)], rows)}\n\n{paragraph(said)}"


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
            [titled(label), ms(square.runs[label]["median_ms"])]
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
            [titled(label)] + [f"{case.runs[label]['median_ms'] * 1e6 / case.parameters:.3f}" for case in series]
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
