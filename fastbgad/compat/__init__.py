"""Compatibility with other code: FrEIA's flows, anomalib's models and the official BGAD's function names.

Only `fastbgad.compat.anomalib` needs the package that it is for.
"""
