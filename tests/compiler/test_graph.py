"""The graph: what is computed twice is one value, and each value knows what it spans."""

import pytest

from fusedbun.compiler import UnschedulableError
from fusedbun.compiler.graph import Graph, Span


@pytest.fixture
def graph():
    return Graph(3)


def inputs(graph):
    return (
        graph.input("full", (0, 1, 2)),
        graph.input("row", (0,)),
        graph.input("first", (1,)),
        graph.input("last", (2,)),
    )


def test_what_is_computed_twice_is_one_value(graph):
    full, row, *_ = inputs(graph)
    assert graph.apply("mul", full, row) is graph.apply("mul", full, row)
    assert graph.apply("mul", full, row) is not graph.apply("mul", row, full)
    assert graph.apply("add", full, 2.0) is graph.apply("add", full, 2)
    assert graph.input("full", (0, 1, 2)) is full
    assert graph.reduce("sum", full, (1, 2)) is graph.reduce("sum", full, (2, 1))


def test_reductions_differ_by_function_and_by_axes(graph):
    full, *_ = inputs(graph)
    total, largest = graph.reduce("sum", full, (0,)), graph.reduce("max", full, (0,))
    assert total is not largest
    over_first, over_last = graph.reduce("max", largest, (1,)), graph.reduce("max", largest, (2,))
    assert over_first is not over_last
    assert (over_first.axes, over_last.axes) == ({2}, {1})


def test_a_value_spans_what_it_is_made_of(graph):
    full, row, first, last = inputs(graph)
    number, lr = graph.count((1, 2)), graph.hyperparameter("lr")
    assert [v.span for v in (full, row, first, number, lr)] == [
        Span.FULL,
        Span.ROW,
        Span.COLUMN,
        Span.SCALAR,
        Span.HOST,
    ]
    for left, right, span in (
        (row, lr, Span.ROW),
        (row, number, Span.ROW),
        (first, last, Span.COLUMN),
        (row, graph.apply("add", first, last), Span.FULL),
        (number, lr, Span.SCALAR),
        (lr, 2.0, Span.HOST),
    ):
        assert graph.apply("add", left, right).span == span
    assert graph.apply("add", first, last).axes == {1, 2}


def test_a_part_of_the_columns_is_repeated_beside_a_row(graph):
    _, row, first, last = inputs(graph)
    product = graph.apply("mul", row, first)
    assert product.span == Span.FULL
    assert [a.op for a in product.args] == ["input", "expand"]
    assert product.args[1].axes == {1, 2}
    whole = graph.apply("mul", first, last)
    assert graph.apply("mul", row, whole).args == (row, whole)


def test_reductions_go_across_rows_then_down_and_then_within_the_columns(graph):
    full, row, *_ = inputs(graph)

    def made_by(v):
        return [*made_by(v.args[0]), v.op] if v.args else []

    assert made_by(graph.reduce("sum", full, (1, 2))) == ["across"]
    assert made_by(graph.reduce("sum", full, (0,))) == ["down"]
    assert made_by(graph.reduce("sum", full, (0, 1, 2))) == ["across", "down"]
    assert made_by(graph.reduce("sum", full, (0, 1))) == ["down", "within"]
    assert made_by(graph.reduce("sum", row, (0, 1, 2))) == ["down"]
    assert graph.reduce("sum", row, (1, 2)) is row


def test_the_slowest_axis_in_memory_makes_the_rows():
    graph = Graph(3, (2, 0, 1))
    assert graph.input("last", (2,)).span == Span.ROW
    assert graph.input("leading", (0,)).span == Span.COLUMN
    assert graph.reduce("sum", graph.input("full", (0, 1, 2)), (0, 1)).op == "across"


def test_a_parameter_of_one_axis_is_one_row():
    graph = Graph(1)
    full = graph.input("full", (0,))
    assert full.span == Span.FULL
    across = graph.reduce("sum", full, (0,)).args[0]
    assert (across.op, across.span) == ("across", Span.ROW)


def test_minima_take_the_small_operands_first(graph):
    full, row, *_ = inputs(graph)
    left, right = graph.input("left", (1, 2)), graph.input("right", (1, 2))
    minimum = graph.apply("minimum", graph.apply("minimum", full, left), graph.apply("minimum", row, right))
    assert minimum.args[1] is full
    assert minimum.args[0].args[1] is row
    assert minimum.args[0].args[0].args == (left, right)
    assert graph.apply("minimum", row, 1.0) is graph.apply("minimum", 1.0, row)
    mixed = graph.apply("maximum", graph.apply("minimum", full, row), row)
    assert mixed.args == (row, graph.apply("minimum", row, full))


def test_a_one_that_multiplies_or_divides_is_no_value(graph):
    full, *_ = inputs(graph)
    for same in (graph.apply("mul", 1, full), graph.apply("mul", full, 1.0), graph.apply("div", full, 1.0)):
        assert same is full
    assert graph.apply("div", 1.0, full) is not full
    assert graph.apply("add", full, 0.0) is not full  # of a negative zero it makes a positive one


def test_a_zero_that_is_added_is_no_value_where_it_changes_no_sign(graph):
    full, *_ = inputs(graph)
    square = graph.apply("mul", full, full)
    root = graph.apply("sqrt", graph.apply("add", square, full))
    for never_minus_zero in (square, graph.apply("abs", full), graph.apply("add", square, full), root):
        assert graph.apply("add", never_minus_zero, 0.0) is never_minus_zero
    product = graph.apply("mul", full, square)
    assert graph.apply("add", product, 0.0) is not product


def test_a_comparison_chooses_and_is_no_number(graph):
    full, row, *_ = inputs(graph)
    condition = graph.apply("le", full, row)
    assert graph.apply("where", condition, 0.0, full).span == Span.FULL
    for op, *operands in (("mul", condition, full), ("add", 1.0, condition), ("where", condition, condition, full)):
        with pytest.raises(
            UnschedulableError, match=rf"computes with a comparison as a number \({op}\); write it with"
        ):
            graph.apply(op, *operands)


@pytest.mark.parametrize("axes", [(1,), (2,)])
def test_reductions_over_some_of_the_columns_of_a_full_value_are_refused(graph, axes):
    full, *_ = inputs(graph)
    with pytest.raises(UnschedulableError, match=r"takes the max over some, but not all, of the axes \[1, 2\]"):
        graph.reduce("max", full, axes)


def test_a_sum_does_not_count_what_is_repeated(graph):
    _, row, first, last = inputs(graph)
    part, whole = graph.apply("mul", row, first), graph.apply("mul", row, graph.apply("add", first, last))
    assert (part.varies, whole.varies) == ({0, 1}, {0, 1, 2})
    graph.reduce("max", part, (0, 1, 2))
    graph.reduce("sum", whole, (0, 1, 2))
    with pytest.raises(UnschedulableError, match="takes the sum over axes along which its numbers are only repeated"):
        graph.reduce("sum", part, (0, 1, 2))


def test_an_input_of_the_rows_and_a_part_of_the_columns_is_refused(graph):
    with pytest.raises(UnschedulableError, match=r"slot spans the axes \[0, 2\]: with the slowest in memory, some of"):
        graph.input("slot", (0, 2))


def test_values_print_in_one_line(graph):
    value, *_ = inputs(graph)
    for _ in range(100):
        value = graph.apply("add", value, value)
    assert repr(value) == str(value) == f"%{value.number} = add %{value.number - 1} %{value.number - 1}"
