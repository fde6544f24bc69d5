"""MNIST classified by a neural SDE, with and without regularization.

The stochastic experiment of Pal, Edelman and Rackauckas, "Locally Regularized Neural Differential
Equations" (arXiv:2303.02262, section 4.2): the image is mapped to 32 numbers, which flow with
diagonal noise from t = 0 to 1 and are read linearly.

    python examples/mnist_sde.py --data-dir data/mnist \\
        --regularize none local-unbiased local-biased --seeds 0

On a CPU, start with --budget reduced. An interrupted call goes on with --resume.
"""

from pysciml_node.experiments.published.mnist_sde import MNIST_SDE
from pysciml_node.experiments.trainer.command import main

if __name__ == "__main__":
    main(MNIST_SDE, __doc__)
