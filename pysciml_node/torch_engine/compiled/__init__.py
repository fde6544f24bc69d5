"""Solves whose loop runs as compiled graphs."""
