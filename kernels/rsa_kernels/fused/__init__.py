"""Triton kernels of the operators; nothing here is imported before one of them is wanted."""
