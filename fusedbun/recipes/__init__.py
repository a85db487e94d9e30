"""The optimizers: each is a function from its hyper-parameters to a chain of transformations.

The torch class and the optax factory of the same name are made from the recipe, and take its arguments.
"""

# In the order of `fusedbun list`.
# isort: off
from fusedbun.recipes.accumulators import *
from fusedbun.recipes.ternary import *
from fusedbun.recipes.mup import *
from fusedbun.recipes.lion import *
from fusedbun.recipe import RECIPES as RECIPES
