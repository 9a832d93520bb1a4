"""Kernels of one coupling layer, between a library's matrix products, for flows of more than 256 channels."""
