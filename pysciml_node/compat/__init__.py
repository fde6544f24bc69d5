"""Drop-in signatures of other packages, over this package's solvers."""
