"""How large and how deep the objects of a pickle would be, told from its operations without making any of them.

Tuples that hold another twice, again and again, take no room in a file and no end when they are hashed or shown; deeply
nested ones overflow the stack of the interpreter.
"""

import pickletools
from typing import Any

MOST_OPERATIONS = 2_000_000  # a checkpoint of thousands of tensors has some hundred thousand
MOST_PARTS = 10_000_000  # of an object with all that it holds, however often, and of all that is put into dictionaries
DEEPEST = 100
LONGEST_INTEGER = 4096  # bits
IN_PLACE = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
STORING, FETCHING = ("PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")


def check_pickle(content: bytes) -> None:
    """Raises ValueError if a pickle would make objects beyond the limits above, or is none."""
    stack: list[Any] = []  # of [depth, parts], and None for a mark
    memo: dict[Any, list[int]] = {}
    work = 0
    for number, (operation, argument, _) in enumerate(pickletools.genops(content)):
        if number >= MOST_OPERATIONS:
            raise ValueError(f"it has more than {MOST_OPERATIONS:,} operations")
        if isinstance(argument, int) and argument.bit_length() > LONGEST_INTEGER:
            raise ValueError("it has an integer of thousands of digits")
        if operation.name == "MARK":
            stack.append(None)
        elif operation.name in STORING:
            memo[argument] = stack[-1]
        elif operation.name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif operation.name in FETCHING:
            stack.append(memo[argument])
        elif operation.name == "DUP":
            stack.append(stack[-1])
        else:
            held = _popped(stack, operation)
            if operation.name in IN_PLACE:
                made, held = held[0], held[1:]
            else:
                made = [0, 1]
            made[0] = max(made[0], 1 + max((depth for depth, _ in held), default=-1))
            parts = sum(parts for _, parts in held)
            made[1] += parts
            work += parts if operation.name.startswith("SETITEM") else 0
            if made[0] > DEEPEST:
                raise ValueError(f"it is nested more than {DEEPEST} levels deep")
            if max(made[1], work) > MOST_PARTS:
                raise ValueError(f"it unfolds to more than {MOST_PARTS:,} parts")
            if operation.stack_after:
                stack.append(made)


def _popped(stack: list[Any], operation: pickletools.OpcodeInfo) -> list[list[int]]:
    """Takes what an operation uses off the stack."""
    before = operation.stack_before
    if pickletools.markobject in before:
        place = len(stack) - 1 - stack[::-1].index(None) - before.index(pickletools.markobject)
    else:
        place = len(stack) - len(before)
    if place < 0:
        raise ValueError("it takes more off its stack than there is")
    taken = stack[place:]
    del stack[place:]
    return [item for item in taken if item is not None]
