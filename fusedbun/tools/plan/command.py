"""`fusedbun plan`: its options, and how it is run."""

from __future__ import annotations

import ast
import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedbun.recipes import RECIPES
from fusedbun.tools.plan import Plan, Setting, plan
from fusedbun.tools.plan.planner import matching
from fusedbun.tools.plan.sizes import SIZE, parse_size, readable
from fusedbun.tools.plan.sources import tensors_of
from fusedbun.tools.shared.command import Command, CommandError, converter, count, libraries_for, option, print_out
from fusedbun.tools.shared.files import write_atomically, writing
from fusedbun.tools.shared.networks import gpt2, resnet50

_DESCRIPTION = """\
Show how much memory training a model takes with each optimizer: its weights, gradients
and optimizer state to the byte, and a step's temporaries at most; with all gradients
held, and with gradient release. Nothing of the model is loaded, and neither torch nor
JAX is needed. Activations are not counted: they grow with the batch.

MODEL is a safetensors file or a folder of them (only their headers are read), a JSON
file of shapes by name ({"embed.weight": [50257, 768], …}), gpt2 or resnet50, or shapes
as they are: 50257x768 768x3072. Every floating-point tensor is taken to be trained.
"""

_EPILOG = """\
optimizers: NAME alone stands for its usual settings, NAME:KEY=VALUE,… for one's own.
  {names}

examples:
  fusedbun plan gpt2
  fusedbun plan gpt2 --dtype bfloat16 --budget 1GiB
  fusedbun plan path/to/model/ --budget 24GiB --only-fitting
  fusedbun plan model.safetensors --optimizer sm3 fusedbun --chart memory.png
  fusedbun plan 4096x4096 4096 --optimizer fusedbun:momentum_dtype=int8,lagged=True
  fusedbun plan embed=250000x1024 1024x1024 --sparse 'embed*' --tokens 8192
  fusedbun plan experts=64x4096x1024 router=64x1024 --stacked experts

In Python fusedbun.plan(model) also takes torch modules, on the meta device too, and
trees of JAX's arrays or ShapeDtypeStruct.

exit codes:
  0    done
  2    an option is not valid, a file is not what it should be, or a library is not
       installed; one line on stderr says which
"""

_NETWORKS = {"gpt2": gpt2, "resnet50": resnet50}
_SHAPE = re.compile(r"(?:(?P<name>[^=]+)=)?(?P<sizes>-?[0-9]+(?:x-?[0-9]+)*)")
_PLAN_TAKES = ("dtype", "stochastic_rounding", "sparse", "tokens", "threads", "budget")
_SIZE = converter(parse_size, bool, SIZE)
_TO_NEAREST = "round bfloat16 weights to the nearest instead of stochastically"
_SPARSE = "the gradients of parameters of such names are sparse rows"
_STACKED = "parameters of such names are stacks along their first axis"


@dataclass(frozen=True)
class Options:
    """The options, as `fusedbun plan --help` describes them."""

    model: Sequence[str] = option("what is trained, as above", flag="model", nargs="+", metavar="MODEL")
    optimizer: Sequence[str] | None = option("plan for these alone (default: for all)", nargs="+", metavar="NAME")
    dtype: str | None = option("of floating-point weights, such as bfloat16 (default: their own)", metavar="DTYPE")
    stochastic_rounding: bool = option(_TO_NEAREST, flag="--no-stochastic-rounding", action="store_false")
    sparse: Sequence[str] = option(_SPARSE, nargs="+", default=[], metavar="PATTERN")
    stacked: Sequence[str] = option(_STACKED, nargs="+", default=[], metavar="PATTERN")
    tokens: int = count("in a batch: so many rows has a sparse gradient", 4096)
    threads: int | None = count("on so many the step runs (default: the number of CPUs)", None)
    budget: int | None = option("mark what fits in so much, such as 24GiB", type=_SIZE, metavar="SIZE")
    only_fitting: bool = option("leave out what does not fit in --budget", action="store_true")
    chart: Path | None = option("write a bar chart as PNG", type=Path, metavar="FILE")
    json: bool = option("the same as JSON, for a program to read; sizes are in bytes", action="store_true")


def _run(options: Options) -> int:
    if options.only_fitting and options.budget is None:
        raise CommandError("argument --only-fitting: needs a --budget to fit in, such as --budget 24GiB")
    everything = _plan(options)
    shown = everything.fitting() if options.only_fitting else everything
    if options.chart is not None:
        with libraries_for("a chart", "plan"), writing(options.chart, "--chart", "write"):
            from fusedbun.tools.plan.picture import draw

            write_atomically(options.chart, draw(shown))
    if options.json:
        return print_out(json.dumps(shown.as_dict(), indent=1))
    lines = [str(shown)]
    if not shown.estimates and everything.estimates:
        least = min(everything.estimates, key=lambda one: one.total)
        release = " with gradient release" if least.gradient_release else ""
        lines.append(f"The least takes {readable(least.total)}: {least.setting.title}, {least.setting.label}{release}.")
    if options.chart is not None:
        lines.append(f"chart: {options.chart}")
    return print_out("\n".join(lines))


def _plan(options: Options) -> Plan:
    try:
        settings = None if options.optimizer is None else [_setting(text) for text in options.optimizer]
        model = _model(options.model)
        stacks = options.stacked and matching(tensors_of(model), options.stacked, "--stacked")
        taken: dict[str, Any] = {name: getattr(options, name) for name in _PLAN_TAKES}
        taken["stacked"] = lambda path, _: int(".".join(path) in stacks)
        return plan(model, settings, **taken)
    except OSError as error:
        reason = f"cannot read {error.filename!r}: {error.strerror}" if error.filename else str(error)
        raise CommandError(reason) from error
    except (TypeError, ValueError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name != "safetensors":
            raise
        raise CommandError(" ".join(str(error).split())) from error


def _model(texts: Sequence[str]) -> Any:
    """The model that the arguments name: a path, a network, or shapes."""
    is_alone = len(texts) == 1
    if is_alone and Path(texts[0]).exists():
        return Path(texts[0])
    if is_alone and texts[0] in _NETWORKS:
        return _NETWORKS[texts[0]]()
    found: dict[str, tuple[int, ...]] = {}
    for place, text in enumerate(texts):
        shape = _SHAPE.fullmatch(text)
        if shape is None:
            must = f"it must be one, a network ({', '.join(_NETWORKS)}), or shapes such as 768x3072"
            several = "where several are given, each must be a shape such as 768x3072 or embed=50257x768, but one is"
            reason = f"there is no file or folder {text!r}; {must}" if is_alone else f"{several} {text!r}"
            raise CommandError(f"argument MODEL: {reason}")
        name = shape["name"] or str(place)
        if name in found:
            raise CommandError(f"argument MODEL: each shape must have a name of its own, but {name!r} is there twice")
        found[name] = tuple(map(int, shape["sizes"].split("x")))
    return found


def _setting(text: str) -> str | Setting:
    """A name, or a setting with the hyper-parameters behind a colon."""
    name, colon, listed = text.partition(":")
    if not colon:
        return name
    values: dict[str, Any] = {}
    for entry in re.split(r",(?=\s*\w+=)", listed):
        key, equals, value = map(str.strip, entry.partition("="))
        if not equals:
            raise CommandError(f"argument --optimizer: must be NAME or NAME:KEY=VALUE,…, but it is {text!r}")
        try:
            values[key] = ast.literal_eval(value)  # a number, True, False, None or a tuple of these
        except (ValueError, SyntaxError):
            values[key] = value
    return Setting(name, values)


COMMAND = Command(
    "plan",
    "show how much memory training a model takes with each optimizer",
    _DESCRIPTION,
    _EPILOG.format(names=textwrap.fill(", ".join([*RECIPES, "adamw (torch's own)"]), 86, subsequent_indent="  ")),
    Options,
    _run,
)
