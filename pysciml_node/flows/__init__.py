"""Continuous normalizing flows, and the maps around them."""

from pysciml_node.flows.base import Chain, Density, Flow, Mapped, Transform
from pysciml_node.flows.cnf import CNF
from pysciml_node.flows.images import Logit, MultiScale, Squeeze, bits_per_dimension, dequantize

__all__ = [
    "CNF",
    "Chain",
    "Density",
    "Flow",
    "Logit",
    "Mapped",
    "MultiScale",
    "Squeeze",
    "Transform",
    "bits_per_dimension",
    "dequantize",
]
