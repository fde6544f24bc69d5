"""Stochastic equations: the parts of the torch engine that solve them."""
