"""The compiler: how a chain's step runs fast, derived from its definition.

    trace      a chain's rules, called once with symbols, become a graph of values
    schedule   the values are put in order: passes over memory, sweeps along a tile, small values in between
    cpp        a schedule is printed as C++
    triton     a schedule is printed as Triton, which gpu launches
    tiles      a schedule is run tile by tile with any array library

No mathematics of any optimizer is written here: a new transformation needs none of these modules to be touched.
"""

from fusedbun.compiler.graph import UnschedulableError
from fusedbun.compiler.schedule import Schedule, schedule
from fusedbun.compiler.trace import Program, trace

__all__ = ["Program", "Schedule", "UnschedulableError", "schedule", "trace"]
