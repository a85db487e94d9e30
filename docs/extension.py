"""What Sphinx does not do by itself: formulas without scripts, text that the code writes, and docstrings as they are.

- Formulas become MathML, which browsers draw.
- `<!-- family -->` becomes the table of the optimizers, `<!-- help: plan -->` what `fusedbun plan --help` prints, and
  the directive `optimizers` what `optimizers.py` writes of them.
- Docstrings are written as people read them in an editor; here they become reStructuredText.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from typing import Any
from unittest import mock

import optimizers
from docutils import nodes
from latex2mathml.converter import convert
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

from fusedbun.tools.cli import main

_HELP = re.compile(r"<!-- help: (\w+) -->")
_SECTION = re.compile(r"^(State|Source): (.*(?:\n +\S.*)*)", re.MULTILINE)
_CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)(\w?)")
_PATTERN = re.compile(r'"[^"]*\*[^"]*"')
_HEADS = ("Args:", "Returns:", "Raises:", "Yields:")


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (inline_formula, None), (formula, None))
    app.add_directive("optimizers", Optimizers)
    app.connect("source-read", write)
    app.connect("autodoc-process-docstring", restructure, priority=400)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def inline_formula(translator: Any, node: nodes.math) -> None:
    """Draws a formula within a line."""
    translator.body.append(drawn(node.astext(), "inline"))
    raise nodes.SkipNode


def formula(translator: Any, node: nodes.math_block) -> None:
    """Draws a formula on lines of its own."""
    translator.body.append(f'<div class="formula">{drawn(node.astext(), "block")}</div>\n')
    raise nodes.SkipNode


def drawn(latex: str, display: str) -> str:
    """A formula as MathML; raises an ExtensionError for what latex2mathml does not know and would show as it is."""
    found = convert(latex, display=display)
    if unknown := re.findall(r"<m\w+>(&|\\[^<]*)</m\w+>", found):
        raise ExtensionError(f"latex2mathml does not know {', '.join(unknown)} in the formula {latex}")
    return str(found)


class Optimizers(SphinxDirective):
    """Puts in what is written of every optimizer: its argument names a function of `optimizers.py`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(getattr(optimizers, self.arguments[0])())


def write(app: Any, page: str, source: list[str]) -> None:
    """Puts in what the code writes."""
    text = source[0].replace("<!-- family -->", optimizers.family())
    source[0] = _HELP.sub(lambda found: f"```text\n{help_of(found[1])}\n```", text)


def help_of(command: str) -> str:
    """What `fusedbun COMMAND --help` prints."""
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
        mock.patch.dict(os.environ, {"COLUMNS": "90"}),
    ):
        main([command, "--help"])
    if not printed.getvalue():
        raise ExtensionError(f"fusedbun has no command {command}")
    return printed.getvalue().rstrip()


def restructure(app: Any, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """Rewrites a docstring in place."""
    lines[:] = as_rst("\n".join(lines)).split("\n")


def as_rst(docstring: str) -> str:
    """A docstring as reStructuredText: code between single backticks, indented formulas, `State:` and `Source:`."""
    text = _SECTION.sub(lambda found: f"**{found[1]}:** {' '.join(found[2].split())}\n", docstring)
    text = _CODE.sub(_literal, text)
    lines: list[str] = []
    before = ""  # the last line at the margin
    for line in text.split("\n"):
        begins = line.startswith(" ") and lines and not lines[-1].strip() and before not in _HEADS
        if begins and before:
            lines += [".. code-block:: text", ""]
            before = ""  # what follows is of the same block
        is_code = line.startswith((" " * 4, ">>>", "...")) and before not in _HEADS
        if line.strip() and not line.startswith(" "):
            before = line
        lines.append(line if is_code else _PATTERN.sub(r"``\g<0>``", line))
    return "\n".join(lines)


def _literal(found: re.Match[str]) -> str:
    """Code, and behind it what lets a letter follow directly."""
    return f"``{' '.join(found[1].split())}``" + (f"\\ {found[2]}" if found[2] else "")
