"""The commands that belong to the Julia engine."""
