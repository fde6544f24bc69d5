"""Neural differential equations in PyTorch, on SciML's solvers."""
