"""Stochastic members, each with a path and steps of its own, in one batch."""
