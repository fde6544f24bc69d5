"""The errors of kernels."""


class KernelConvergenceError(RuntimeError):
    """A kernel could not be computed to the accuracy asked for."""
