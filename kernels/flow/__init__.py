"""Kernels of the flow for up to 256 channels."""
