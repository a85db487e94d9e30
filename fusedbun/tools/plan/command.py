"""`fusedbun plan`: its options, and how it is run."""

from __future__ import annotations

import argparse
import ast
import json
import re
import textwrap
from pathlib import Path
from typing import Any

from fusedbun.recipes import RECIPES
from fusedbun.tools.plan import Plan, Setting, plan
from fusedbun.tools.plan.sizes import parse_size, readable
from fusedbun.tools.shared.command import AS_JSON, DEFAULT, Commands, add_command, print_out
from fusedbun.tools.shared.errors import CommandError, libraries_for
from fusedbun.tools.shared.files import write_atomically
from fusedbun.tools.shared.networks import gpt2, resnet50
from fusedbun.tools.shared.options import whole

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

In Python fusedbun.plan(model) also takes torch modules, on the meta device too, and
trees of JAX's arrays or ShapeDtypeStruct.

exit codes:
  0    done
  2    an option is not valid, a file is not what it should be, or a library is not
       installed; one line on stderr says which
"""

_SHAPE = re.compile(r"(?:(?P<name>[^=]+)=)?(?P<sizes>-?[0-9]+(?:x-?[0-9]+)*)")


def register(commands: Commands) -> None:
    """Adds the command to the parser of all commands."""
    summary = "show how much memory training a model takes with each optimizer"
    names = textwrap.fill(", ".join([*RECIPES, "adamw (torch's own)"]), 86, subsequent_indent="  ")
    add = add_command(commands, "plan", run, summary, _DESCRIPTION, _EPILOG.format(names=names))
    add("model", nargs="+", metavar="MODEL", help="what is trained, as above")
    add("--optimizer", nargs="+", metavar="NAME", help="plan for these alone (default: for all)")
    add("--dtype", metavar="DTYPE", help="of floating-point weights, such as bfloat16 (default: their own)")
    rounding = "round bfloat16 weights to the nearest instead of stochastically"
    add("--no-stochastic-rounding", dest="stochastic_rounding", action="store_false", help=rounding)
    sparse = "the gradients of parameters of such names are sparse rows"
    add("--sparse", nargs="+", default=[], metavar="PATTERN", help=sparse)
    tokens = f"in a batch: so many rows has a sparse gradient {DEFAULT}"
    add("--tokens", type=whole(1), default=4096, metavar="N", help=tokens)
    add("--threads", type=whole(1), metavar="N", help="on so many the step runs (default: the number of CPUs)")
    add("--budget", type=_size, metavar="SIZE", help="mark what fits in so much, such as 24GiB")
    add("--only-fitting", action="store_true", help="leave out what does not fit in --budget")
    add("--chart", type=Path, metavar="FILE", help="write a bar chart as PNG")
    add("--json", action="store_true", dest="as_json", help=f"{AS_JSON}; sizes are in bytes")


def run(*, as_json: bool, chart: Path | None, only_fitting: bool, **options: Any) -> int:
    """Plans, and returns the exit code.

    Raises:
        CommandError: it cannot be run as it was given.
    """
    if only_fitting and options["budget"] is None:
        raise CommandError("argument --only-fitting: needs a --budget to fit in, such as --budget 24GiB")
    everything = _plan(**options)
    shown = everything.fitting() if only_fitting else everything
    if chart is not None:
        _draw(chart, shown)
    if as_json:
        return print_out(json.dumps(shown.as_dict(), indent=1))
    lines = [str(shown)]
    if not shown.estimates and everything.estimates:
        least = min(everything.estimates, key=lambda one: one.total)
        release = " with gradient release" if least.gradient_release else ""
        lines.append(f"The least takes {readable(least.total)}: {least.setting.title}, {least.setting.label}{release}.")
    return print_out("\n".join([*lines, *([f"chart: {chart}"] if chart is not None else [])]))


def _plan(*, model: list[str], optimizer: list[str] | None, **options: Any) -> Plan:
    try:
        settings = None if optimizer is None else [_setting(text) for text in optimizer]
        return plan(_model(model), settings, **options)
    except OSError as error:
        reason = f"cannot read {error.filename!r}: {error.strerror}" if error.filename else str(error)
        raise CommandError(reason) from error
    except (TypeError, ValueError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name != "safetensors":
            raise
        raise CommandError(" ".join(str(error).split())) from error


def _model(texts: list[str]) -> Any:
    """The model that the arguments name: a path, a network, or shapes."""
    networks = {"gpt2": gpt2, "resnet50": resnet50}
    shapes = [_SHAPE.fullmatch(text) for text in texts]
    if len(texts) == 1 and (Path(texts[0]).exists() or not shapes[0]):
        text = texts[0]
        if not Path(text).exists() and text not in networks:
            raise CommandError(
                f"argument MODEL: there is no file or folder {text!r}; it must be one, a network "
                f"({', '.join(networks)}), or shapes such as 768x3072"
            )
        return Path(text) if Path(text).exists() else networks[text]()
    found: dict[str, tuple[int, ...]] = {}
    for place, (text, shape) in enumerate(zip(texts, shapes, strict=True)):
        if shape is None:
            raise CommandError(
                f"argument MODEL: where several are given, each must be a shape such as 768x3072 or "
                f"embed=50257x768, but one is {text!r}"
            )
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
    values = {}
    for entry in re.split(r",(?=\s*\w+=)", listed):
        key, equals, value = entry.partition("=")
        if not equals:
            raise CommandError(f"argument --optimizer: must be NAME or NAME:KEY=VALUE,…, but it is {text!r}")
        values[key.strip()] = _value(value)
    return Setting(name, values)


def _value(text: str) -> Any:
    """A number, True, False, None or a tuple of these; anything else is text."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text.strip()


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _draw(path: Path, shown: Plan) -> None:
    try:
        with libraries_for("a chart", "plan"):
            from fusedbun.tools.plan.picture import draw

            write_atomically(path, draw(shown))
    except OSError as error:
        raise CommandError(f"argument --chart: cannot write {str(path)!r}: {error.strerror}") from error
