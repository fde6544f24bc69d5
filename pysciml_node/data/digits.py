"""The 8x8 handwritten digits that scikit-learn ships."""

import torch

from pysciml_node._optional import require
from pysciml_node.data.labelled import LabelledData, Splits, check_division, stratified_split


def digits(
    *,
    validation: float = 0.15,
    test: float = 0.2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Splits[LabelledData]:
    """Load the 1,797 handwritten digits, divided with equal class proportions.

    The images are 8x8 with pixels in [0, 1]. Nothing is downloaded: scikit-learn carries the data.

    Args:
        validation: share held out to choose settings on.
        test: share held out to report on.
        seed: of the division; the same seed gives the same division.
        dtype: of the pixels.

    Returns:
        The parts; `x` of shape `(N, 8, 8)`, `y` of shape `(N,)` with values 0 to 9.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: the shares leave nothing for one of the parts.

    Examples:
        >>> data = digits()
        >>> len(data.train) + len(data.validation) + len(data.test)
        1797

    Reference:
        E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
        Repository (1998), its test part.
    """
    seed = check_division(validation, test, seed, dtype)
    datasets = require("sklearn.datasets", extra="examples", purpose="load the digits")
    bunch = datasets.load_digits()
    highest_pixel = 16.0
    x = (torch.from_numpy(bunch.images) / highest_pixel).to(dtype)
    y = torch.from_numpy(bunch.target).to(torch.int64)
    parts = stratified_split(
        y,
        {"train": 1.0 - validation - test, "validation": validation, "test": test},
        generator=torch.Generator().manual_seed(seed),
    )
    everything = LabelledData(x, y)
    return Splits(**{name: everything[index] for name, index in parts.items()})
