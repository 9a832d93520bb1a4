"""Kernels of one coupling layer, around a library's matrix products."""
