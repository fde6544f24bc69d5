"""Julia's life in this process: found, started, called, interrupted."""
