"""Modules that hold a differential equation."""

from pysciml_node.layers.latent_ode import LatentODE, LatentSolution, Posterior
from pysciml_node.layers.latent_sde import LatentPaths, LatentSDE
from pysciml_node.layers.neural_cde import NeuralCDE
from pysciml_node.layers.neural_ode import NeuralODE
from pysciml_node.layers.neural_sde import NeuralSDE
from pysciml_node.layers.recognition import GRUEncoder, ODERNNEncoder

__all__ = [
    "GRUEncoder",
    "LatentODE",
    "LatentPaths",
    "LatentSDE",
    "LatentSolution",
    "NeuralCDE",
    "NeuralODE",
    "NeuralSDE",
    "ODERNNEncoder",
    "Posterior",
]
