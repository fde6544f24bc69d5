"""Stochastic equations: fields, Brownian paths, steps and adjoints, for any engine."""
