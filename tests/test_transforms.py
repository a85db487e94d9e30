"""Each transformation against numbers worked out by hand, and against its formula written plainly."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fusedbun.transform import Signal
from fusedbun.transforms import Centralize, ClipRMS, Decay, Momentum, RMSScale, SM3Accumulate, SparseMask

NAN, INF = float("nan"), float("inf")


def array(*values):
    return np.array(values, np.float64)


def run(transform, update, state=None, param=None, second_moment=None):
    update = np.asarray(update, np.float64)
    if state is None:
        state = {name: np.zeros(slot.shape(update.shape)) for name, slot in transform.slots(update.shape).items()}
    return transform.update(np, Signal(update, second_moment), state, param)


def moment(signal):
    """The second moment that an accumulator hands on, or the square of its root."""
    return signal.second_moment if signal.root is None else signal.root**2


class TestCentralize:
    def test_takes_the_mean_of_each_channel(self):
        signal, _ = run(Centralize(), [[1, 3], [10, 20]])
        assert_array_equal(signal.update, [[-1, 1], [-5, 5]])

    @pytest.mark.parametrize("axis", [1, -1])
    def test_channel_axis(self, axis):
        signal, _ = run(Centralize(axis), [[1, 3], [5, 11]])
        assert_array_equal(signal.update, [[-2, -4], [2, 4]])

    def test_a_convolution_keeps_its_output_channels(self):
        u = np.random.default_rng(0).standard_normal((4, 3, 2, 2))
        signal, _ = run(Centralize(), u)
        assert_allclose(signal.update.mean(axis=(1, 2, 3)), np.zeros(4), atol=1e-15)

    @pytest.mark.parametrize("u", [3.0, [1.0, 2.0]])
    def test_leaves_fewer_than_two_axes_alone(self, u):
        assert_array_equal(run(Centralize(), u)[0].update, u)

    def test_an_axis_that_is_not_there(self):
        with pytest.raises(ValueError, match=r"channel_axis must lie in \[-2, 2\).*\(3, 4\).*it is 2"):
            Centralize(2).slots((3, 4))


class TestSparseMask:
    def test_the_threshold_itself_is_masked(self):
        signal, _ = run(SparseMask(0.5), [-2, -0.5, 0.25, 0.5, 0.75])
        assert_array_equal(signal.update, [-2, 0, 0, 0, 0.75])

    def test_hides_neither_nan_nor_infinity(self):
        assert_array_equal(run(SparseMask(), [NAN, INF, -INF, 0.0])[0].update, [NAN, INF, -INF, 0])


class TestSM3Accumulate:
    def test_maxima_and_minima_by_hand(self):
        """SM3-II with beta 0 over two steps: squares add up under each cover."""
        transform = SM3Accumulate(0.0, "max", "min")
        signal, state = run(transform, [[1, 2], [3, 0]])
        assert_array_equal(signal.update, [[1, 2], [3, 0]])
        assert_array_equal(moment(signal), [[1, 4], [9, 0]])
        assert_array_equal(state["axis0"], [[4], [9]])
        assert_array_equal(state["axis1"], [[9, 4]])
        signal, state = run(transform, [[1, 0], [0, 1]], state)
        assert_array_equal(moment(signal), [[4 + 1, 4], [9, 4 + 1]])
        assert_array_equal(state["axis0"], [[5], [9]])
        assert_array_equal(state["axis1"], [[9, 5]])

    def test_maxima_with_beta_never_fall(self):
        transform = SM3Accumulate(0.5, "max", "min")
        _, state = run(transform, [[2.0, 0.0]])
        assert_array_equal(state["axis1"], [[2, 0]])
        signal, state = run(transform, [[0.0, 0.0]], state)
        assert_array_equal(moment(signal), [[1, 0]])
        assert_array_equal(state["axis1"], [[2, 0]])
        assert_array_equal(state["axis0"], [[2]])

    def test_the_product_of_means_by_hand(self):
        signal, state = run(SM3Accumulate(0.0, "mean", "product"), [[1, 2], [3, 0]])
        assert_array_equal(state["axis0"], [[2.5], [4.5]])
        assert_array_equal(state["axis1"], [[5, 2]])
        assert_allclose(moment(signal), [[2.5 * 5 / 3.5, 2.5 * 2 / 3.5], [4.5 * 5 / 3.5, 4.5 * 2 / 3.5]])

    def test_the_product_is_exact_for_a_rank_one_square(self):
        row, column, depth = np.arange(1.0, 4), np.arange(2.0, 6), np.arange(1.0, 3)
        squares = row[:, None, None] * column[:, None] * depth
        signal, _ = run(SM3Accumulate(0.0, "mean", "product"), np.sqrt(squares))
        assert_allclose(moment(signal), squares)

    @pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
    def test_the_product_is_accurate_in_float32_over_thirty_orders(self, size):
        u = (np.random.default_rng(1).uniform(0.5, 1, (6, 5, 4)) * size).astype(np.float32)
        transform = SM3Accumulate(0.8, "mean", "product")
        state = {name: np.zeros(slot.shape(u.shape), np.float32) for name, slot in transform.slots(u.shape).items()}
        signal, _ = transform.update(np, Signal(u), state, u)
        exact, _ = run(transform, u)
        assert moment(signal).dtype == np.float32
        assert_allclose(moment(signal), moment(exact), rtol=2e-6)

    def test_the_smallest_of_the_means(self):
        signal, _ = run(SM3Accumulate(0.0, "mean", "min"), [[1, 2], [3, 0]])
        assert_array_equal(moment(signal), [[2.5, 2], [4.5, 2]])

    def test_lagged_takes_the_other_axes_from_the_step_before(self):
        transform = SM3Accumulate(0.5, "mean", "product", lagged=True)
        u, v = array([1, 2], [3, 0]), array([2, 1], [1, 5])
        signal, state = run(transform, u)
        first = np.maximum([[2.5], [4.5]], u * u)  # ratios are 1 at first, and no square is above what is divided by
        assert_allclose(moment(signal), 0.5 * first)
        signal, new = run(transform, v, state)
        c = state["axis0"].mean()
        assert_allclose(moment(signal), np.maximum(new["axis0"] * (state["axis1"] / c), 0.5 * v * v))
        plain = run(SM3Accumulate(0.5, "mean", "product"), v, state)[1]
        assert_allclose(new["axis1"], plain["axis1"])

    @pytest.mark.parametrize("combine", ["product", "min"])
    @pytest.mark.parametrize("lagged", [False, True])
    @pytest.mark.parametrize("u", [2.0, [1.0, 2.0]])
    def test_fewer_than_two_axes_keep_one_full_accumulator(self, u, combine, lagged):
        signal, state = run(SM3Accumulate(0.75, "mean", combine, lagged), u)
        assert list(state) == ["axis0"]
        assert_array_equal(state["axis0"], 0.25 * np.square(u))
        assert_array_equal(moment(signal), state["axis0"])

    def test_nothing_yet_is_zero(self):
        assert_array_equal(moment(run(SM3Accumulate(0.8, "mean", "product"), np.zeros((2, 3)))[0]), np.zeros((2, 3)))

    @pytest.mark.parametrize(("statistic", "combine"), [("max", "min"), ("mean", "product"), ("mean", "min")])
    def test_nan_reaches_the_second_moment(self, statistic, combine):
        u = np.ones((3, 4))
        u[1, 2] = NAN
        signal, _ = run(SM3Accumulate(0.9, statistic, combine), u)
        assert np.isnan(moment(signal)[1, 2])

    @pytest.mark.parametrize("kwargs", [{"combine": "product"}, {"lagged": True}, {"bias_correction": True}])
    def test_maxima_take_the_minimum_only(self, kwargs):
        with pytest.raises(ValueError, match='is for statistic="mean"'):
            SM3Accumulate(0.9, "max", **kwargs)

    @pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 4, 5)])
    def test_state_is_the_sum_of_the_axes(self, shape):
        slots = SM3Accumulate().slots(shape)
        assert sum(np.prod(slot.shape(shape)) for slot in slots.values()) == (sum(shape) if shape else 1)


class TestRMSScale:
    def test_divides_by_the_root(self):
        signal, _ = run(RMSScale(0.5, 1.0), [6.0, 4.0], second_moment=array(8, 0))
        assert_allclose(signal.update, [6 / 3.5, 4 / 1.5])
        assert signal.second_moment is None

    def test_zero_over_zero_is_zero(self):
        signal, _ = run(RMSScale(0.0), [0.0, 3.0], second_moment=array(0, 4))
        assert_array_equal(signal.update, [0, 1.5])

    def test_hides_neither_nan_nor_infinity(self):
        signal, _ = run(RMSScale(0.0), [0.0, NAN, INF], second_moment=array(NAN, 1, 4))
        assert_array_equal(signal.update, [NAN, NAN, INF])

    def test_without_a_second_moment(self):
        with pytest.raises(ValueError, match="put an accumulator such as sm3_accumulate directly before it"):
            run(RMSScale(), [1.0])


class TestClipRMS:
    def test_shrinks_a_large_update_to_the_threshold(self):
        signal, _ = run(ClipRMS(0.5), [[3, 4], [0, 0]])
        assert_allclose(np.sqrt(np.mean(signal.update**2)), 0.5)
        assert_allclose(signal.update / signal.update[0, 0], [[1, 4 / 3], [0, 0]])

    def test_leaves_a_small_one_alone(self):
        assert_array_equal(run(ClipRMS(10.0), [3, -4])[0].update, [3, -4])

    def test_nan_is_not_hidden(self):
        assert np.isnan(run(ClipRMS(1.0), [NAN, 1.0])[0].update).all()


class TestMomentum:
    def test_heavy_ball_by_hand(self):
        transform = Momentum(0.5, dampening=0.25)
        signal, state = run(transform, [4.0])
        assert_array_equal(signal.update, [3])
        signal, state = run(transform, [8.0], state)
        assert_array_equal(signal.update, [0.5 * 3 + 6])
        assert_array_equal(state["moment"], [7.5])

    def test_nesterov_looks_ahead(self):
        transform = Momentum(0.5, nesterov=True)
        signal, state = run(transform, [4.0])
        assert_array_equal(signal.update, [0.5 * 4 + 4])
        assert_array_equal(state["moment"], [4])

    @pytest.mark.parametrize("zero", [0, 0.0, np.float32(0)])
    def test_without_momentum_there_is_no_state(self, zero):
        signal, state = run(Momentum(zero), [4.0])
        assert dict(state) == {}
        assert_array_equal(signal.update, [4])


def test_decay_adds_a_share_of_the_parameter():
    assert_array_equal(run(Decay(0.25), [1, 1], param=array(4, -8))[0].update, [2, -1])


@pytest.mark.parametrize(
    "transform", [Centralize(), SparseMask(), ClipRMS(), Momentum(), Decay()], ids=lambda t: t.name
)
def test_all_but_an_accumulator_drop_the_second_moment(transform):
    u = np.ones((2, 3))
    assert run(transform, u, param=u, second_moment=u)[0].second_moment is None
