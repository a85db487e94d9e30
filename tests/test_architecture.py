"""The architecture: who may import whom, that nothing imports in a circle, and what the packages are kept free of."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("fusedbun", "fusedbun_jax")

# From below to above: a module imports those of its own row and of rows below. The longest prefix says where a module
# belongs; what has no row of its own under `fusedbun` is the definition.
LAYERS = (
    ("fusedbun.version",),
    ("fusedbun.",),
    ("fusedbun.compiler",),
    ("fusedbun.portable",),
    ("fusedbun.torch", "fusedbun_jax"),
    ("fusedbun.tools.shared",),
    ("fusedbun.tools.plan", "fusedbun.tools.bench", "fusedbun.tools.train"),
    ("fusedbun.tools", "fusedbun.tools.cli"),
    ("fusedbun",),  # what a user imports: the package itself, and nothing in it
)
# Those of a row that do not import one another.
APART = (("fusedbun.torch", "fusedbun_jax"), LAYERS[-3])


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def trees():
    """The syntax tree of every module, by its name."""
    files = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {name_of(path): ast.parse(path.read_text(), str(path)) for path in files}


def imported(tree):
    """Every name that is imported anywhere: in functions, and for types alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{ast.unparse(node)}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(name, modules):
    """The module that has the name: itself, or the one that it is imported from; None of another package."""
    return name if name in modules else next((m for m in [name.rpartition(".")[0]] if m in modules), None)


@cache
def graph():
    """The modules that each module imports."""
    modules = trees()
    edges = {name: {module_of(other, modules) for other in imported(tree)} for name, tree in modules.items()}
    return {name: others - {None, name} for name, others in edges.items()}


def prefix_of(module):
    """The longest prefix of a layer that the module has."""
    prefixes = [prefix for layer in LAYERS for prefix in layer]
    matching = [
        prefix
        for prefix in prefixes
        if module == prefix or module.startswith(prefix if prefix.endswith(".") else f"{prefix}.")
    ]
    return max(matching, key=len)


def layer_of(module):
    return next(i for i, layer in enumerate(LAYERS) if prefix_of(module) in layer)


def edges():
    return [(module, other) for module, others in graph().items() for other in sorted(others)]


def test_the_graph_sees_every_kind_of_import():
    found = graph()
    assert {"fusedbun.tools.plan", "fusedbun.torch", "fusedbun.recipes"} <= found["fusedbun"]
    assert "fusedbun.tools.bench.run" in found["fusedbun.tools.bench.command"]  # in a function
    assert "fusedbun.transform" in found["fusedbun.chain"]
    tree = ast.parse("if TYPE_CHECKING:\n    from a.b import c\ndef f():\n    import d.e as g")
    assert list(imported(tree)) == ["a.b.c", "d.e"]
    assert [module_of(name, {"a.b", "d.e"}) for name in ("a.b.c", "d.e", "numpy")] == ["a.b", "d.e", None]


def test_nothing_imports_in_a_circle():
    try:
        list(TopologicalSorter(graph()).static_order())
    except CycleError as error:
        circle = error.args[1][::-1]  # the sorter names whom another needs first
        pytest.fail("\n".join(f"{module} imports {other}" for module, other in pairwise(circle)))


def test_nothing_imports_what_is_above_it():
    upwards = [f"{module} imports {other}" for module, other in edges() if layer_of(module) < layer_of(other)]
    assert not upwards, "\n".join(upwards)


@pytest.mark.parametrize("apart", APART, ids=lambda names: " and ".join(names))
def test_what_stands_side_by_side_does_not_import_one_another(apart):
    sideways = [
        f"{module} imports {other}"
        for module, other in edges()
        if {prefix_of(module), prefix_of(other)} <= set(apart) and prefix_of(module) != prefix_of(other)
    ]
    assert not sideways, "\n".join(sideways)


def test_no_hook_raises_not_implemented():
    found = [
        f"{module}, line {node.lineno}: {ast.unparse(node)}"
        for module, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and node.exc and "NotImplementedError" in ast.unparse(node.exc)
    ]
    assert not found, "\n".join(found)


# Methods of texts and functions of `re` that edit or search what has been printed.
EDITS = ("replace", "sub", "subn", "translate", "search", "match", "fullmatch", "findall", "finditer")
ALLOWED = (r"re.sub('\\W', '_', ",)  # makes an identifier of an array's name
PRINTERS = ("fusedbun.compiler.cpp", "fusedbun.compiler.triton", "fusedbun.compiler.printer")
# Of the folder of C++, what finds, compiles and calls it prints nothing.
NO_PRINTERS = tuple(f"fusedbun.compiler.cpp.{name}" for name in ("build", "native", "family"))


@pytest.mark.parametrize("printer", PRINTERS)
def test_generated_code_is_printed_and_not_edited(printer):
    edits = [
        f"{module}, line {node.lineno}: {ast.unparse(node)}"
        for module, tree in trees().items()
        if module.startswith(printer) and module not in NO_PRINTERS
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in EDITS
        and not ast.unparse(node).startswith(ALLOWED)
    ]
    assert not edits, "\n".join(edits)
