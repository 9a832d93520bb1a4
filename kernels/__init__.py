"""Triton kernels and their launchers.

Installed as `fastbgad.kernels`; nothing here imports the rest of fastbgad. The operations in `fastbgad.ops` are the
doors to these kernels. Importing this package imports no kernel and not Triton either.

    python -m fastbgad.kernels.resources    what every kernel needs of the chip, checked without a GPU
    python -m fastbgad.kernels.tune         measures tile sizes on this machine's GPU
"""
