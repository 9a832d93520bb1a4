"""Spills in a kernel's machine code: loads and stores of local memory inside innermost loops."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Instructions that a matrix product compiles to, best first.
MATRIX_UNITS = ("UTCHMMA", "UTCQMMA", "HGMMA", "HMMA")
LOCAL_MEMORY = ("LDL", "STL")  # load and store

_LABEL = re.compile(r"(\.L_x_\d+|\.text\.\S+|[\w$]+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)")


def count_local_in_loops(assembly: str) -> int:
    """Count the loads and stores of local memory (LDL, STL) in the innermost loops of a kernel's machine code.

    `assembly` is what `nvdisasm --print-code` prints. A spill around an innermost loop costs once per layer, one inside
    it once per product. Loops are cycles of the control flow, not stretches of text: sm_100 code waits in spin loops
    that lie behind the end of the kernel and jump back. A spin loop is not counted as a loop, or the loop that waits
    would no longer be an innermost one.
    """
    code, successors = _control_flow(assembly)
    innermost = set().union(*_innermost_loops(code, set(range(len(code))), successors))
    return sum(op.split(".")[0] in LOCAL_MEMORY for block in innermost for op in code[block])


def _control_flow(assembly: str) -> tuple[list[list[str]], list[set[int]]]:
    """Return the operations of each block (entered at its top, left at its bottom) and the blocks that may follow."""
    blocks: list[list[str]] = [[]]
    label_at: dict[str, int] = {}
    jumps: list[tuple[int, str | None]] = []  # from block to label; None: to any
    falls: list[int] = []  # blocks that run into the next one
    for line in assembly.splitlines():
        if label := _LABEL.match(line):
            if blocks[-1]:
                falls.append(len(blocks) - 1)
                blocks.append([])
            label_at[label[1]] = len(blocks) - 1
        elif instruction := _INSTRUCTION.match(line):
            predicate, operation, operands = instruction.groups()
            kind = operation.split(".")[0]
            target = re.search(r"^(.*)`\((\.L_x_\d+)\)", operands)
            blocks[-1].append(operation)
            # sm_80 leaves some loops by a CALL of a label in the same kernel; a call of a function comes back.
            if kind in ("BRA", "BRX", "JMP", "JMX") or (kind == "CALL" and target):
                jumps.append((len(blocks) - 1, target[2] if target else None))
                conditional = bool(predicate) or bool(target and target[1].strip())
            elif kind in ("EXIT", "RET", "KILL"):
                conditional = bool(predicate)
            else:
                continue
            if conditional:
                falls.append(len(blocks) - 1)
            blocks.append([])
    successors: list[set[int]] = [set() for _ in blocks]
    for start in falls:
        if start + 1 < len(blocks):
            successors[start].add(start + 1)
    for start, name in jumps:
        successors[start].update(label_at.values() if name is None else {label_at[name]})
    return blocks, successors


def _innermost_loops(code: Sequence[list[str]], blocks: set[int], successors: Sequence[set[int]]) -> list[set[int]]:
    """Return the cycles among `blocks` that hold no other cycles than spin loops."""
    found = []
    for loop in _cycles(blocks, successors):
        if _is_spin(code, loop):
            continue
        # Without the ways back to its entries, what is still a cycle is a loop inside this one.
        entries = {to for start in blocks - loop for to in successors[start]} & loop or {min(loop)}
        inside = [to & loop - entries for to in successors]
        found += _innermost_loops(code, loop, inside) or [loop]
    return found


def _cycles(blocks: set[int], successors: Sequence[set[int]]) -> list[set[int]]:
    """Return the strongly connected components of more than one block, or of one that jumps to itself."""
    predecessors: list[set[int]] = [set() for _ in successors]
    for start in blocks:
        for to in successors[start]:
            predecessors[to].add(start)
    found, left = [], set(blocks)
    while left:
        block = min(left)
        component = (_reach(block, successors, left) & _reach(block, predecessors, left)) | {block}
        left -= component
        if len(component) > 1 or block in successors[block]:
            found.append(component)
    return found


def _reach(start: int, successors: Sequence[set[int]], among: set[int]) -> set[int]:
    """Return the blocks of `among` that can follow `start`."""
    seen: set[int] = set()
    waiting = [start]
    while waiting:
        new = (successors[waiting.pop()] & among) - seen
        seen |= new
        waiting += new
    return seen


def _is_spin(code: Sequence[list[str]], loop: set[int]) -> bool:
    """Return whether a loop does nothing but wait for a barrier or an allocation."""
    operations = [op for block in loop for op in code[block]]
    waits = any("TRYWAIT" in op or op.startswith("NANOSLEEP") for op in operations)
    works = any(op.split(".")[0] in (*MATRIX_UNITS, *LOCAL_MEMORY) for op in operations)
    return waits and not works and len(operations) <= 16
