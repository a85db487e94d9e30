"""How much memory training takes: weights, gradients, optimizer state and a step's temporaries, without allocating it.

sources      what is trained: a module, shapes, a tree of arrays, or files (`files`)
settings     the optimizers to plan for
temporaries  what a step takes beside its arrays
planner      the sums
table, picture    the sums for a reader
"""

from fusedbun.tools.plan.planner import Estimate, Plan, Refusal, plan
from fusedbun.tools.plan.settings import Setting

__all__ = ["Estimate", "Plan", "Refusal", "Setting", "plan"]
