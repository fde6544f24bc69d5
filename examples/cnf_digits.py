"""Continuous normalizing flows of handwritten digits, with and without regularization.

The density of scikit-learn's 8x8 digits (64 dimensions, 17 values a pixel), in bits a dimension,
with each of the regularizers asked for, after Finlay et al., "How to train your neural ODE"
(arXiv:2002.02798):

    python examples/cnf_digits.py --regularize none kinetic jacobian rnode --seeds 0 1 2

With --data-dir, MNIST by the paper's multi-scale flow:

    python examples/cnf_digits.py --data-dir data/mnist --regularize none rnode

OUTPUT_DIR has results.json, the training curves and samples of each run. An interrupted call goes
on where it stopped when it is repeated with --resume.
"""

import sys

from pysciml_node.experiments.published.flows import CNF_DIGITS, CNF_MNIST
from pysciml_node.experiments.trainer.command import main

if __name__ == "__main__":
    with_folder = any(word.partition("=")[0] == "--data-dir" for word in sys.argv[1:])
    main(CNF_MNIST if with_folder else CNF_DIGITS, __doc__)
