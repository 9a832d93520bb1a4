"""Triton kernels and their launchers.

Installed as `fastbgad.kernels`; nothing here imports the rest of fastbgad. The operations in `fastbgad.ops` are the
doors to these kernels. No kernel is in this release yet: `impl="triton"` says so with a clear error, and
`impl="torch"` is the fast path.
"""
