"""Kernels of the flow for up to 256 channels: forward, gradients, and the prepared weights."""
