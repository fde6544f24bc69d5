"""Ensembles in one batch: every member has a time, a step size and an end of its own."""
