"""The kernels compiled for GPUs that are not here, held to a budget of registers, bytes and exponentials."""
