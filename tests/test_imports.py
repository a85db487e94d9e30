"""A torch user needs no JAX and a JAX user no torch; what is missing is named with the extra that brings it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from fusedbun.recipes import RECIPES
from fusedbun.torch import optimizers

USE_JAX = """
import jax.numpy as jnp, fusedbun, fusedbun_jax
tx = fusedbun_jax.fusedbun(0.1, centralize=True, use_rms=True)
params = {"w": jnp.ones((2, 3))}
tx.update(params, tx.init(params), params)
"""
USE_TORCH = """
import torch, fusedbun
p = torch.nn.Parameter(torch.ones(2, 3))
p.grad = torch.ones(2, 3)
fusedbun.Fusedbun([p], lr=0.1).step()
fusedbun.ChainOptimizer([p], [fusedbun.transforms.Momentum()], lr=0.1).step()
"""


def run(code, *blocked):
    block = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in blocked)
    return subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("code", "blocked"),
    [
        ("import fusedbun, fusedbun.recipes, fusedbun.reference", ["torch", "jax", "optax", "flax"]),
        (USE_JAX, ["torch"]),
        (USE_TORCH, ["jax", "optax", "flax"]),
    ],
    ids=["neither", "jax alone", "torch alone"],
)
def test_works_without_the_other_framework(code, blocked):
    done = run(code, *blocked)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("code", "blocked", "message"),
    [
        ("import fusedbun; fusedbun.Fusedbun", "torch", "needs PyTorch: pip install 'fusedbun[torch]'"),
        ("import fusedbun_jax", "jax", "pip install 'fusedbun[jax]'"),
        ("import fusedbun_jax", "optax", "pip install 'fusedbun[jax]'"),
    ],
)
def test_names_the_extra_that_is_missing(code, blocked, message):
    done = run(code, blocked)
    assert done.returncode != 0
    assert message in done.stderr.strip().splitlines()[-1]


def test_importing_the_package_imports_no_framework():
    done = run("import fusedbun; assert not {'torch', 'jax'} & set(sys.modules), 'a framework was imported'")
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error():
    import fusedbun

    with pytest.raises(AttributeError, match="no attribute 'AdamW'"):
        fusedbun.AdamW  # noqa: B018 - the access is the test
    assert "Fusedbun" in dir(fusedbun)


def test_type_checkers_are_told_of_every_class():
    tree = ast.parse(Path(optimizers.__file__).read_text())
    (section,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    declared = {node.name for node in section.body if isinstance(node, ast.ClassDef)} - {"_Made"}
    declared |= {node.targets[0].id for node in section.body if isinstance(node, ast.Assign)}
    assert declared == {name for recipe in RECIPES.values() for name in recipe.torch_names}
