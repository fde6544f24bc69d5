"""CIFAR-10 classified by convolutional neural ODEs, with and without regularization.

The image experiments of Pal, Edelman and Rackauckas, "Locally Regularized Neural Differential
Equations" (arXiv:2303.02262, section 4.4). --model standard: eight channels flow along three
convolutions with batch normalization. --model multi-scale: images on two scales flow along
residual blocks into which the input is injected.

    python examples/cifar10_ode.py --data-dir data/cifar10 \\
        --regularize none local-unbiased local-biased --seeds 0

On a CPU, start with --budget reduced. --quick takes scikit-learn's digits instead of CIFAR-10.
"""

import argparse

from pysciml_node.experiments.published.cifar10 import CIFAR10
from pysciml_node.experiments.published.multiscale import CIFAR10_MULTI_SCALE
from pysciml_node.experiments.trainer.command import main

MODELS = {"standard": CIFAR10, "multi-scale": CIFAR10_MULTI_SCALE}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", choices=list(MODELS), default="standard")
    chosen, words = parser.parse_known_args()
    main(MODELS[chosen.model], __doc__, words)
