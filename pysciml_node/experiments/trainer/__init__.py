"""A small trainer whose runs can be stopped and continued bit for bit."""
