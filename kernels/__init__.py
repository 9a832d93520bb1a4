"""Triton kernels and their launchers.

Installed as `fastbgad.kernels`; nothing here imports the rest of fastbgad. The operations in `fastbgad.ops` launch
these kernels. Importing this package imports no kernel, and not Triton either.

    python -m fastbgad.kernels.resources    the resources that every kernel needs, checked without a GPU
    python -m fastbgad.kernels.tune         measures tile sizes on this machine's GPU

Pointers end in `_ptr`, sizes that vary are lower case. "operand" is the type of the operands of matrix products. Upper
case names are constants of a compiled kernel; each has one meaning:

    BM, BH, BK, BT    rows, hidden units and channels of a tile; tiles whose partial sums are added at a time
    TH, TW, KT        height and width of a tile of pixels; table rows that such a tile reads, padded
    NS                pipeline stages of the inner loop
    C, C1, C2, K      channels, those of the two halves, and of a half padded to a power of two (flow)
    CS                channels of a saved half row
    H, HP             hidden units, and padded
    P, PP, HALF       channels of the condition, padded, and half of that
    S, PARTS, SPLIT   parts of an operand: 2 (high and low) if it is float16, where SPLIT is true, else 1
    COND              how the condition reaches the hidden units (flow/condition.py)
    FORM              how the input of the permutation is stored (coupling/forward.py)
    HARD              the permutation moves channels without a product
    HAS_INDEX         rows have an index; GATHER: it chooses features too, not only positions
    WANT_, HAS_       a result is wanted, an input is there; SAVE: saved activations are wanted
    UNIT              divides the channels and the stride of rows
    GROUP             rows whose sums one program adds up
    BETA, NLL, MEAN, FOCAL, PUSH      options of the boundary and of the loss
"""
