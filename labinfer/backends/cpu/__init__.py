"""The CPU backend: numba kernels that read weights in their stored format, with the machine's vector instructions."""
