"""`fusedbun plan`: its options, and what it says when it cannot run."""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedbun.tools.shared.errors import LIBRARIES, CommandError
from fusedbun.tools.shared.files import write_atomically
from fusedbun.tools.shared.options import AS_JSON, Commands, add_command, whole

if TYPE_CHECKING:
    from fusedbun.tools.plan import Plan, Setting

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
    from fusedbun.recipes import RECIPES

    summary = "show how much memory training a model takes with each optimizer"
    names = textwrap.fill(", ".join([*RECIPES, "adamw (torch's own)"]), 86, subsequent_indent="  ")
    epilog = _EPILOG.format(names=names)
    parser = add_command(commands, "plan", summary, _DESCRIPTION, epilog)
    default = "(default: %(default)s)"
    add = parser.add_argument
    add("model", nargs="+", metavar="MODEL", help="what is trained, as above")
    add("--optimizer", nargs="+", metavar="NAME", help="plan for these alone (default: for all)")
    add("--dtype", metavar="DTYPE", help="of floating-point weights, such as bfloat16 (default: their own)")
    rounding = "round bfloat16 weights to the nearest instead of stochastically"
    add("--no-stochastic-rounding", dest="stochastic_rounding", action="store_false", help=rounding)
    sparse = "the gradients of parameters of such names are sparse rows"
    add("--sparse", nargs="+", default=[], metavar="PATTERN", help=sparse)
    tokens = f"in a batch: so many rows has a sparse gradient {default}"
    add("--tokens", type=whole(1), default=4096, metavar="N", help=tokens)
    add("--threads", type=whole(1), metavar="N", help="on so many the step runs (default: the number of CPUs)")
    add("--budget", type=_size, metavar="SIZE", help="mark what fits in so much, such as 24GiB")
    add("--only-fitting", action="store_true", help="leave out what does not fit in --budget")
    add("--chart", type=Path, metavar="FILE", help="write a bar chart as PNG")
    add("--json", action="store_true", help=f"{AS_JSON}; sizes are in bytes")


def main(options: dict[str, Any]) -> str:
    """Runs the command with its options and returns what it shows.

    Raises:
        CommandError: it cannot be run as it was given.
    """
    as_json, chart, only_fitting = (options.pop(name) for name in ("json", "chart", "only_fitting"))
    from fusedbun.tools.plan.sizes import readable

    if only_fitting and options["budget"] is None:
        raise CommandError("argument --only-fitting: needs a --budget to fit in, such as --budget 24GiB")
    whole_plan = _plan(**options)
    found = whole_plan.fitting() if only_fitting else whole_plan
    if chart is not None:
        _draw(chart, found)
    if as_json:
        return json.dumps(found.as_dict(), indent=1)
    lines = [str(found)]
    if not found.estimates and whole_plan.estimates:
        least = min(whole_plan.estimates, key=lambda one: one.total)
        release = " with gradient release" if least.gradient_release else ""
        lines.append(f"The least takes {readable(least.total)}: {least.setting.title}, {least.setting.label}{release}.")
    return "\n".join([*lines, *([f"chart: {chart}"] if chart is not None else [])])


def run(options: dict[str, Any]) -> str | None:
    """What the command shows; None where it cannot be run, after one line on stderr."""
    try:
        return main(options)
    except CommandError as error:
        print(f"fusedbun plan: error: {' '.join(str(error).split())}", file=sys.stderr)
        return None


def _plan(*, model: list[str], optimizer: list[str] | None, **settings: Any) -> Plan:
    from fusedbun.tools.plan import plan

    try:
        chosen = None if optimizer is None else [_setting(text) for text in optimizer]
        return plan(_model(model), chosen, **settings)
    except OSError as error:
        reason = f"cannot read {error.filename!r}: {error.strerror}" if error.filename else str(error)
        raise CommandError(reason) from error
    except (TypeError, ValueError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name != "safetensors":
            raise
        raise CommandError(str(error)) from error


def _model(given: list[str]) -> Any:
    """The model that the arguments name: a path, a network, or shapes."""
    from fusedbun.tools.bench.shapes import gpt2, resnet50

    networks = {"gpt2": gpt2, "resnet50": resnet50}
    shapes = [_SHAPE.fullmatch(text) for text in given]
    if len(given) == 1 and (Path(given[0]).exists() or not shapes[0]):
        text = given[0]
        if not Path(text).exists() and text not in networks:
            raise CommandError(
                f"argument MODEL: there is no file or folder {text!r}; it must be one, a network "
                f"({', '.join(networks)}), or shapes such as 768x3072"
            )
        return Path(text) if Path(text).exists() else networks[text]()
    found: dict[str, tuple[int, ...]] = {}
    for place, (text, shape) in enumerate(zip(given, shapes, strict=True)):
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
    from fusedbun.tools.plan import Setting

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
    from fusedbun.tools.plan.sizes import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _draw(path: Path, plan: Plan) -> None:
    try:
        from fusedbun.tools.plan.picture import draw

        write_atomically(path, draw(plan))
    except ModuleNotFoundError as error:
        library = LIBRARIES.get((error.name or "").partition(".")[0])
        if library is None:
            raise
        raise CommandError(f"{library} is not installed; a chart needs: pip install 'fusedbun[plan]'") from error
    except OSError as error:
        raise CommandError(f"argument --chart: cannot write {str(path)!r}: {error.strerror}") from error
