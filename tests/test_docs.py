"""The documentation site: its code runs, its formulas name what the code names, and no measured number is typed."""

import re
import sys
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from unittest import mock

import pytest

from benchmarks import tables
from docs import optimizers
from fusedbun import transforms
from fusedbun.recipes import RECIPES
from fusedbun.storage.codes import CODES
from fusedbun.torch import dispatch

DOCS = Path(__file__).parent.parent / "docs"
TEXTS = {str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
BLOCKS = {
    name: found for name, text in TEXTS.items() if (found := re.findall(r"^```python\n(.*?)^```", text, re.M | re.S))
}
LONG = (
    *("tutorial-jax.md", "how-to/torch-to-jax.md", "how-to/memory-budget.md", "how-to/configuration.md"),
    *("how-to/lora.md", "how-to/torch-compile.md", "how-to/stacks.md"),
)
MATHEMATICS = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## )", TEXTS["mathematics.md"], re.M | re.S))
TRANSFORMS = [getattr(transforms, name) for name in transforms.__all__]


@pytest.mark.usefixtures("as_torchrun")
@pytest.mark.parametrize("page", [pytest.param(p, marks=pytest.mark.long) if p in LONG else p for p in BLOCKS])
def test_a_pages_code_runs_from_top_to_bottom(page):
    namespace = {"__name__": "page"}
    with ExitStack() as undo:
        for table in (RECIPES, CODES, dispatch.REGISTRY, dispatch.BEST):  # where pages make entries of their own
            undo.enter_context(mock.patch.dict(table))
        for number, block in enumerate(BLOCKS[page], 1):
            exec(compile(block, f"docs/{page}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", TEXTS)
def test_what_is_python_is_marked_so(page):
    fences = re.findall(r"^ *```(\S*)", TEXTS[page], re.M)
    assert not {"py", "python3", "pycon"} & set(fences)
    assert len(fences) % 2 == 0


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: t.name)
def test_the_mathematics_names_what_the_module_names(transform):
    section = MATHEMATICS[transform.name]
    slots = {slot for t in variants(transform) for shape in ((3, 4), (3,)) for slot in t.slots(shape)}
    for name in [field.name for field in fields(transform)] + sorted(slots):
        assert re.search(rf"`[^`]*\b{name}\b[^`]*`|\\texttt{{{name}}}", section), name
    assert f"(../{transform.__module__.replace('.', '/')}.py)" in section
    assert f"`~fusedbun.transforms.{transform.__name__}`" in section


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: t.name)
def test_the_mathematics_cites_what_the_module_cites(transform):
    cited = re.findall(r"arXiv (\d+\.\d+)", f"{sys.modules[transform.__module__].__doc__} {transform.__doc__}")
    assert not set(cited) - set(re.findall(r"https://arxiv.org/abs/(\d+\.\d+)", MATHEMATICS[transform.name]))


def variants(transform):
    """The transformation at its defaults, and with every flag set."""
    not_alone = {"sm3_accumulate": {"statistic": "mean"}, "momentum": {"dampening": 0.9}}.get(transform.name, {})
    flags = [field.name for field in fields(transform) if field.default is False]
    return [transform(), *(transform(**{flag: True}, **not_alone) for flag in flags)]


def test_the_mathematics_has_the_chains_of_the_recipes():
    assert "```{optimizers} chains\n" in TEXTS["mathematics.md"]
    rows = dict(re.findall(r"^\| `(\w+)` \| (`.*`) \|$", optimizers.chains(), re.M))
    for recipe in RECIPES.values():
        stated = rows.pop(recipe.torch_class).replace("`", "").split(" → ")
        made = [[transform.name for transform in recipe.chain(given, 1.0)] for given in recipe.tested.values()]
        assert {name for chain in made for name in chain} == set(stated)
        assert all(chain == [name for name in stated if name in chain] for chain in made)
    assert not rows


@pytest.mark.parametrize("page", TEXTS)
def test_no_measured_number_is_typed(page):
    prose = re.sub(r"```.*?```|`[^`\n]*`|\]\([^)]*\)", "", tables.typed(TEXTS[page]), flags=re.S)
    assert not re.findall(r"\d\s?%|\d\s(?:ms|ns|seconds|KiB|MiB|GiB|MB|GB|times)\b", prose)


@pytest.mark.parametrize(
    "name", [*(f"fusedbun.{r.torch_class}" for r in RECIPES.values()), *(f"fusedbun_jax.{n}" for n in RECIPES)]
)
def test_the_reference_has_every_optimizer(name):
    assert re.search(
        rf"^\.\. auto(class|function):: {re.escape(name)}$",
        optimizers.torch() + optimizers.jax(),
        re.M,
    )
    page = name.split(".")[0].replace("fusedbun_jax", "jax").replace("fusedbun", "torch")
    assert f"\n.. optimizers:: {page}\n" in TEXTS[f"reference/{page}.md"]


@pytest.mark.parametrize("name", transforms.__all__)
def test_the_reference_has_every_transformation(name):
    assert f".. autoclass:: fusedbun.transforms.{name}\n" in TEXTS["reference/transformations.md"]
