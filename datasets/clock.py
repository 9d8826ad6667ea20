"""The daily rhythm of a simulated network, as a change of clock: nights pass quickly on the activity clock.

On it the network knows no hours; between two instants of the day it advances by the integral of

    rate(h) = 1 + rhythm · cos(2π (h - 20) / 24),    h the hour of the day (UTC), constant within each

so the two clocks agree at every midnight. Ratios of rates at one instant are the same on both.
"""

import numpy as np
from numpy.typing import NDArray

PEAK = 20
"""The hour of most activity."""
HOURS = np.arange(25) / 24


def hourly_rates(rhythm: float) -> NDArray[np.float64]:
    """Activity of each hour `[24]`, on average 1."""
    return 1 + rhythm * np.cos(2 * np.pi * (np.arange(24) - PEAK) / 24)


def wall_days(activity_days: NDArray[np.float64], rhythm: float) -> NDArray[np.float64]:
    """Days since the start on the clock of the wall."""
    whole = np.floor(activity_days)
    return whole + np.interp(activity_days - whole, _elapsed(rhythm), HOURS)


def activity_days(wall: NDArray[np.float64], rhythm: float) -> NDArray[np.float64]:
    """The inverse of `wall_days`."""
    whole = np.floor(wall)
    return whole + np.interp(wall - whole, HOURS, _elapsed(rhythm))


def _elapsed(rhythm: float) -> NDArray[np.float64]:
    """What the activity clock shows at each full hour, `[25]`."""
    elapsed = np.concatenate([[0.0], np.cumsum(hourly_rates(rhythm))])
    return elapsed / elapsed[-1]
