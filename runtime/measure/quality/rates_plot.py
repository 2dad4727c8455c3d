"""A plot of how many prompts come out right over the values of a parameter."""

from collections.abc import Sequence

from wanforge.runtime.measure.page import Plot, Series
from wanforge.runtime.measure.quality.held_out import ASKED, Rates


def rates_plot(parameter: str, points: Sequence[tuple[float, str, Rates]], names: Sequence[str] = ()) -> Plot:
    """Return a plot with one line each for colour, shape and direction, in percent.

    Args:
        points: Place on the axis, value of the parameter, and the rates there.
        names: Names of the places, where values are not numbers.
    """
    series = []
    for asked in ASKED:
        shares = [(x, value, 100 * getattr(rates, asked)) for x, value, rates in points]
        series.append(Series(asked, [(x, y, f"{parameter} {value}: {asked} {y:.1f} %") for x, value, y in shares]))
    return Plot(f"held-out prompts that come out right, over {parameter}", parameter, "%", series, x_names=names)
