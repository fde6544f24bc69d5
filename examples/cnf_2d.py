"""Continuous normalizing flows in the plane, with and without regularization.

Learns the density of eight Gaussians, a checkerboard, a pinwheel, two spirals or two moons with
each of the regularizers asked for, after Finlay et al., "How to train your neural ODE"
(arXiv:2002.02798):

    python examples/cnf_2d.py --shape eight-gaussians checkerboard --regularize none rnode

For each shape OUTPUT_DIR/SHAPE has results.json, the training curves and a picture a run: data,
density, samples, and the paths of data to the base, which RNODE straightens. An interrupted call
goes on where it stopped when it is repeated with --resume.
"""

import argparse
from pathlib import Path

from pysciml_node.data.plane import SHAPES
from pysciml_node.experiments.published.flows import plane_experiment
from pysciml_node.experiments.trainer.command import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/cnf_2d"))
    arguments, words = parser.parse_known_args()
    for shape in arguments.shape:
        place = ["--output-dir", str(arguments.output_dir / shape)]
        main(plane_experiment(shape), f"{__doc__}\nshapes: {', '.join(SHAPES)}", [*words, *place])
