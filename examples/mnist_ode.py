"""MNIST classified by a neural ODE, with and without local-error regularization.

The experiment of Pal, Edelman and Rackauckas, "Locally Regularized Neural Differential Equations"
(arXiv:2303.02262, section 4.1), at full size: a 784-dimensional state flows from t = 0 to 1 along
a tanh network with 100 hidden units, and a linear layer reads the class off its end. Each variant
and seed is added to OUTPUT_DIR/results.json:

    python examples/mnist_ode.py --data-dir data/mnist \\
        --regularize none local-unbiased local-biased --seeds 0

An interrupted call goes on where it stopped when it is repeated with --resume.
"""

from pysciml_node.experiments.published.mnist import MNIST_ODE
from pysciml_node.experiments.trainer.command import main

if __name__ == "__main__":
    main(MNIST_ODE, __doc__)
