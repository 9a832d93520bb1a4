"""Meeting points with other code: FrEIA's flows, anomalib's models, the official BGAD's function names.

Nothing here is imported by the rest of fastbgad, and importing it needs none of those packages.
"""
