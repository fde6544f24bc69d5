"""Small image data sets and the batches drawn from them."""

from pysciml_node.data.batches import ShuffledBatches, ordered_batches
from pysciml_node.data.digits import digits
from pysciml_node.data.idx import read_idx
from pysciml_node.data.labelled import LabelledData, Splits, stratified_split
from pysciml_node.data.mnist import mnist

__all__ = [
    "LabelledData",
    "ShuffledBatches",
    "Splits",
    "digits",
    "mnist",
    "ordered_batches",
    "read_idx",
    "stratified_split",
]
