"""Published experiments: a small training runner and what is trained with it."""
