"""Checks of arguments: each returns what was given in the form the package works with, or refuses.

A refusal names the argument and says what was expected, what was given and, on a second line, what
to do. It is a `TypeError` for a value of the wrong kind and a `ValueError` for one out of range.
"""

from pysciml_node.checks.arrays import as_tensor, numbers, sequence, shape, tensor
from pysciml_node.checks.callables import (
    Arguments,
    Configured,
    arguments,
    expect_time_first,
    function,
    keywords,
    parameters,
    takes,
)
from pysciml_node.checks.values import (
    as_float,
    choice,
    did_you_mean,
    flag,
    generator,
    instance,
    nearest,
    number,
    path,
    refuse,
    settle,
    shown,
    text,
    whole,
)

__all__ = [
    "Arguments",
    "Configured",
    "arguments",
    "as_float",
    "as_tensor",
    "choice",
    "did_you_mean",
    "expect_time_first",
    "flag",
    "function",
    "generator",
    "instance",
    "keywords",
    "nearest",
    "number",
    "numbers",
    "parameters",
    "path",
    "refuse",
    "sequence",
    "settle",
    "shape",
    "shown",
    "takes",
    "tensor",
    "text",
    "whole",
]
