"""The embedded engine: adaptive solvers and adjoints written in PyTorch."""
