"""Small data sets of images and of time series, and the batches drawn from them."""

from pysciml_node.data.batches import ShuffledBatches, ordered_batches
from pysciml_node.data.cifar10 import cifar10
from pysciml_node.data.digits import digits
from pysciml_node.data.idx import read_idx
from pysciml_node.data.labelled import LabelledData, Splits, stratified_split
from pysciml_node.data.mnist import mnist
from pysciml_node.data.physionet import physionet
from pysciml_node.data.prices import prices
from pysciml_node.data.series import IrregularSeries

__all__ = [
    "IrregularSeries",
    "LabelledData",
    "ShuffledBatches",
    "Splits",
    "cifar10",
    "digits",
    "mnist",
    "ordered_batches",
    "physionet",
    "prices",
    "read_idx",
    "stratified_split",
]
