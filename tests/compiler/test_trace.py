"""The trace: a chain becomes a program for any value of its hyper-parameters, or is refused with a reason."""

import math

import numpy as np
import pytest
from leaves import LR
from rules import rule, stateful

from fusedbun import Slot, chain
from fusedbun.compiler import UnschedulableError, trace
from fusedbun.compiler.graph import Span
from fusedbun.compiler.trace import evaluate, hyperparameters
from fusedbun.transforms import Centralize, Decay, Momentum, ScaleByAdam, SM3Accumulate


def test_a_program_prints_its_values_and_what_it_writes():
    assert str(trace(chain(Centralize(), Momentum(0.9, nesterov=True)), 2)) == "\n".join(
        [
            "%0 = input param                             FULL",
            "%1 = input grad                              FULL",
            "%2 = input momentum.moment                   FULL",
            "%3 = input lr                                HOST",
            "%4 = input momentum.beta                     HOST",
            "%5 = across sum %1                           ROW",
            "%6 = count (1,)                              SCALAR",
            "%7 = div %5 %6                               ROW",
            "%9 = const 1.0                               HOST",
            "%10 = eq %6 %9                               SCALAR",
            "%11 = const 0.0                              HOST",
            "%12 = where %10 %11 %7                       ROW",
            "%13 = sub %1 %12                             FULL",
            "%14 = mul %4 %2                              FULL",
            "%15 = add %14 %13                            FULL",
            "%16 = mul %4 %15                             FULL",
            "%17 = add %16 %13                            FULL",
            "%18 = mul %3 %17                             FULL",
            "%19 = sub %0 %18                             FULL",
            "param <- %19",
            "momentum.moment <- %15",
        ]
    )


def test_one_program_serves_every_value_of_a_hyper_parameter():
    def program(beta, decay):
        return str(trace(chain(Momentum(beta, nesterov=True), Decay(decay)), 2))

    assert program(0.9, 0.01) == program(0.5, 3.0)


@pytest.mark.parametrize(
    ("zero", "other"),
    [
        (Momentum(0.0), Momentum(0.9)),
        (Momentum(0.9, 0.0), Momentum(0.9, 0.1)),
        (Decay(0.0), Decay(0.1)),
        (SM3Accumulate(0.0), SM3Accumulate(0.1)),
    ],
    ids=repr,
)
def test_that_a_hyper_parameter_is_zero_is_part_of_the_program(zero, other):
    assert str(trace(chain(zero), 2)) != str(trace(chain(other), 2))


def test_numbers_made_of_hyper_parameters_are_computed_by_python():
    adam = chain(ScaleByAdam(0.9, 0.99))
    program = trace(adam, 2)
    assert all(v.span == Span.HOST and v.op != "const" for v in program.scalars)
    numbers = evaluate(program.scalars, hyperparameters(program, adam, LR))
    assert sorted(numbers) == sorted([LR, 0.9, 0.99, 1e-8, 1 - 0.9, 1 - 0.99, math.log(0.9), math.log(0.99)])


def test_a_hyper_parameter_may_be_an_array_of_no_axes():
    momentum = chain(Momentum(np.float32(0.5), 0.25))
    program = trace(momentum, 2)
    by_name = hyperparameters(program, momentum, np.float32(2))
    python = evaluate(program.scalars, by_name)
    arrays = evaluate(program.scalars, {name: np.asarray(x) for name, x in by_name.items()}, np)
    assert list(map(float, arrays)) == list(map(float, python))


def test_what_stays_as_it_is_is_no_output():
    assert list(trace(chain(Centralize()), 2).outputs) == ["param"]
    kept = stateful({"one": Slot(()), "row": Slot((0,))}, lambda xp, u, state: {**state, "one": state["one"] + 1})
    assert list(trace(kept, 2).outputs) == ["param", "rule.one"]


def test_maximize_climbs():
    up, down = (trace(chain(Momentum(0.9)), 2, maximize=maximize) for maximize in (True, False))
    assert [v.op for v in up.graph.values].count("neg") == 1
    assert "neg" not in [v.op for v in down.graph.values]


def test_the_trace_of_a_parameter_without_axes_is_that_of_one_element():
    assert str(trace(chain(Momentum(0.9)), 0)) == str(trace(chain(Momentum(0.9)), 1))


def test_axes_count_from_the_back_too():
    front, back = (rule(lambda xp, u, axis=axis: u - xp.mean(u, axis=axis, keepdims=True)) for axis in ((1,), (-1,)))
    assert str(trace(front, 2)) == str(trace(back, 2))


def branches(xp, u):
    return u if xp.max(u, axis=(0, 1), keepdims=True) > 1 else -u


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (branches, "a rule branches on an array's value"),
        (lambda xp, u: xp.arctan(u), "a rule uses xp.arctan, which the compiler does not know"),
        (lambda xp, u: u * (u > 0), r"a rule computes with a comparison as a number \(mul\); write it with xp.where"),
        (
            lambda xp, u: u - xp.max(u, axis=(0, 1), keepdims=False),
            "a rule reduces without a tuple of axes, or without",
        ),
        (lambda xp, u: u - xp.mean(u, axis=0, keepdims=True), "a rule reduces without a tuple of axes, or without"),
        (lambda xp, u: u**2, "a rule does to an array what the compiler does not know: .* for .* 'Symbol' and 'int'"),
        (
            lambda xp, u: u.clip(0, 1),
            "a rule does to an array what the compiler does not know: 'Symbol' .* no .* 'clip'",
        ),
        (lambda xp, u: np.tanh(u), "a rule does to an array what the compiler does not know: .*Symbol.*tanh"),
    ],
    ids=["branch", "function", "comparison", "keepdims", "axis", "operator", "method", "library"],
)
def test_what_no_kernel_expresses_is_refused_with_a_reason(update, reason):
    with pytest.raises(UnschedulableError, match=reason):
        trace(rule(update), 2)


def test_a_reduction_over_some_of_the_columns_is_refused():
    over_last = rule(lambda xp, u: u - xp.mean(u, axis=(2,), keepdims=True))
    with pytest.raises(UnschedulableError, match=r"a rule takes the sum over some, but not all, of the axes \[1, 2\]"):
        trace(over_last, 3)
    trace(over_last, 3, order=(2, 0, 1))


def test_a_slot_keeps_the_axes_that_it_is_declared_with():
    grows = stateful({"row": Slot((0,))}, lambda xp, u, state: {"row": state["row"] + u})
    with pytest.raises(UnschedulableError, match=r"the new rule.row does not have the axes that it is declared with"):
        trace(grows, 2)
