"""Two days of intensive care explained by a latent ODE, with and without regularization.

The time-series experiment of Pal, Edelman and Rackauckas, "Locally Regularized Neural Differential
Equations" (arXiv:2303.02262, section 4.3), on set a of the PhysioNet 2012 challenge: a recurrent
encoder reads a patient's observations backward, a latent state of 20 numbers flows through the 48
hours, and a linear decoder is to explain all that was observed.

    python examples/physionet_latent_ode.py --data-dir data/physionet \\
        --regularize none local-unbiased local-biased --seeds 0

Each run adds to OUTPUT_DIR/results.json, and draws what the model makes of patients of whom it has
seen only 70 % of the times. --quick takes a small series that matplotlib ships instead.
"""

from pysciml_node.experiments.published.physionet import PHYSIONET
from pysciml_node.experiments.trainer.command import main

if __name__ == "__main__":
    main(PHYSIONET, __doc__)
