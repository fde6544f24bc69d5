"""Solutions: what comes back."""
