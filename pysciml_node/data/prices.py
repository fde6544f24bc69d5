"""Share prices on trading days, which matplotlib ships: a small irregular series."""

import numpy as np
import torch

from pysciml_node._optional import require
from pysciml_node.data.labelled import Splits, check_division
from pysciml_node.data.series import IrregularSeries, split_at_random

WINDOW_DAYS = 28
_FEATURES = 3


def prices(
    *,
    validation: float = 0.15,
    test: float = 0.2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Splits[IrregularSeries]:
    """Load windows of four weeks of a share's price, observed on trading days.

    Weekends and holidays are gaps. The variables are the logarithms of the closing price, of the
    day's range (high over low) and of the volume. Each has its mean in the window subtracted and is
    divided by its standard deviation over all windows. Nothing is downloaded: matplotlib carries
    the daily prices from August 2004 to October 2008.

    Args:
        validation: share of the windows held out to choose settings on.
        test: share held out to report on.
        seed: of the division; the same seed gives the same division.
        dtype: of times and values.

    Returns:
        The parts; times in units of the window, in [0, 1), three variables.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the shares leave nothing for one of the parts.

    Examples:
        >>> data = prices()
        >>> data.train.variables, bool(data.train.times.max() < 1)
        (3, True)
    """
    seed = check_division(validation, test, seed, dtype)
    cbook = require("matplotlib.cbook", extra="examples", purpose="load the prices")
    table = cbook.get_sample_data("goog.npz")["price_data"]
    days = (table["date"] - table["date"][0]).astype(int)
    columns = (table["close"], table["high"] / table["low"], table["volume"])
    values = np.log(np.stack(columns, axis=1).astype(np.float64))
    window = days // WINDOW_DAYS
    complete = window < window[-1]
    lengths = np.bincount(window[complete])
    first = np.repeat(np.cumsum(lengths) - lengths, lengths)
    means = np.add.reduceat(values[complete], first[np.flatnonzero(np.diff(first, prepend=-1))])
    centred = values[complete] - np.repeat(means / lengths[:, None], lengths, axis=0)
    series = IrregularSeries(
        torch.from_numpy(days[complete] % WINDOW_DAYS / WINDOW_DAYS).to(dtype),
        torch.from_numpy(centred / centred.std(axis=0)).to(dtype),
        torch.ones(len(centred), _FEATURES, dtype=torch.bool),
        torch.from_numpy(lengths),
    )
    return split_at_random(series, validation=validation, test=test, seed=seed)
