"""The kernels compiled for GPUs that are not here, held to a budget of bytes and exponentials, without spills."""
