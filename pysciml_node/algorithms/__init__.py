"""Algorithms, adjoints and step size control: how a problem is solved."""
