"""How much memory training takes: weights, gradients, optimizer state and a step's temporaries, without allocating it.

sources      what is trained: a module, a tree of arrays or shapes, or files
settings     the optimizers to plan for
temporaries  what a step takes beside its arrays
planner      the sums
estimates    what they come to, and its table; its `picture`
command      `fusedbun plan`
"""

from fusedbun.tools.plan.estimates import Estimate, Plan, Refusal
from fusedbun.tools.plan.planner import plan
from fusedbun.tools.plan.settings import Setting

__all__ = ["Estimate", "Plan", "Refusal", "Setting", "plan"]
