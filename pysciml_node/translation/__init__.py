"""A field that torch.export can trace, as a small program that other languages can run."""
