"""The pictures of reports: colours that follow numbers, bars as high as they should be, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from heads_for_tests import make_head

from chebface.errors import InputError
from chebface.render import chart, heat


def column_tops(picture, color):
    """The first row of each run of columns that has a colour below the legend."""
    found = (np.asarray(picture)[chart.TOP - 4 :] == color).all(2)
    return [int(found[:, x].argmax()) for x in np.flatnonzero(found.any(0) & ~np.roll(found.any(0), 1))]


def test_bars_stand_in_proportion():
    picture = chart.bars("t", ["a", "b"], {"x": [1.0, 2.0], "y": [0.5, 0.0]})
    assert picture.size == chart.SIZE_PX
    bottom = chart.SIZE_PX[1] - chart.BOTTOM - chart.TOP + 4
    one, two = (bottom - top for top in column_tops(picture, chart.COLORS[0]))
    assert two == pytest.approx(2 * one, abs=2) and one > 50
    assert bottom - column_tops(picture, chart.COLORS[1])[0] == pytest.approx(one / 2, abs=2)


def test_numbers_on_bars_have_no_exponent():
    assert [chart.spell(value) for value in (1654.4, 116.0, 33.4, 5.13, 0.893, 0.0)] == [
        "1654",
        "116",
        "33",
        "5.1",
        "0.89",
        "0",
    ]


def test_log_bars_stand_by_their_powers():
    picture = chart.bars("t", ["a", "b", "c"], {"x": [1e-5, 1e-4, 1e-2]}, log=True)
    tops = column_tops(picture, chart.COLORS[0])
    assert (tops[0] - tops[1]) * 2 == pytest.approx(tops[1] - tops[2], abs=3)


@pytest.mark.parametrize("most", [0.8, 0.85, 9, 99.9, 1, 8.0001, 1.4, 2e-7])
def test_ticks_are_few_and_reach_every_value(most):
    ticks = chart._round_ticks(most)
    assert ticks[0] == 0 and ticks[-1] >= most and 4 <= len(ticks) <= 10


def test_histograms_peak_where_values_are():
    picture = chart.histograms("t", {"x": np.full(50, 0.5)}, (-1.0, 1.0))
    found = (np.asarray(picture)[chart.TOP : chart.TOP + 5] == chart.COLORS[0]).all(2).any(0)
    middle = chart.LEFT + 0.75 * (chart.SIZE_PX[0] - chart.LEFT - chart.RIGHT)
    assert abs(np.flatnonzero(found).mean() - middle) < 20


def test_pictures_stack():
    parts = [chart.bars("t", ["a"], {"x": [1.0]})] * 3
    assert chart.stack(parts).size == (chart.SIZE_PX[0], 3 * chart.SIZE_PX[1])


@pytest.mark.parametrize("values", [[1.0], [1.0, -1.0], [1.0, np.nan], [1.0, np.inf]])
def test_bars_refuse_what_they_cannot_draw(values):
    with pytest.raises(InputError, match="2 finite numbers"):
        chart.bars("t", ["a", "b"], {"x": values})


def test_histograms_refuse_nothing():
    with pytest.raises(InputError, match="x: expected values"):
        chart.histograms("t", {"x": np.zeros(0)}, (0.0, 1.0))


def test_heat_gets_lighter_with_the_number():
    shades = heat.colors(np.linspace(0, 2, 50), 2.0)
    assert (np.diff(shades @ [0.2126, 0.7152, 0.0722]) > 0).all()
    np.testing.assert_allclose(heat.colors(np.array([9.0]), 2.0), heat.STOPS[-1:])


def test_a_heat_map_shows_where():
    head = make_head(10)
    values = (head.template[:, 1] > 0).astype(np.float64)
    picture = np.asarray(heat.draw(head.template, head.faces, {"top": values}, "mm", most=1.0)).astype(int)
    side = heat.CELL_PX
    assert picture.shape == (side + heat.BAR_PX, len(heat.YAWS_DEG) * side, 3)
    for column in range(len(heat.YAWS_DEG)):
        view = picture[:side, column * side : (column + 1) * side]
        upper, lower = (
            view[rows, side // 2 - 10 : side // 2 + 10].mean((0, 1)) for rows in (slice(90, 120), slice(180, 210))
        )
        assert upper[0] - upper[2] > 100 > -20 > lower[0] - lower[2]  # yellow above, blue below


def test_heat_maps_refuse_what_they_cannot_draw():
    head = make_head(4)
    with pytest.raises(InputError, match="one at least"):
        heat.draw(head.template, head.faces, {}, "mm")
    for values in (np.zeros(3), np.full(len(head.template), np.nan)):
        with pytest.raises(InputError, match="x: expected"):
            heat.draw(head.template, head.faces, {"x": values}, "mm")
