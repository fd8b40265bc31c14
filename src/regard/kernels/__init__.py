"""regard.kernels."""
