"""The instructions of a pickle, checked before any of them is followed: codes, lengths, and keys that have no end."""

import io
import pickletools
import sys
from typing import Any

LARGEST_KEY = 200  # parts of a key of a dict or of an element of a set, and of their parts

# Instructions; those that begin with EXT name classes by codes, which go past the allow-list.
_REFUSED = ["PERSID", "BINPERSID", "NEXT_BUFFER", "READONLY_BUFFER", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"]
# Their effects on the stack and the memo
_NONE, _PUSH, _LONG, _GET, _MEMOIZE, _PUT, _MARK, _TAKE, _TAKE_TWO, _POP, _DUP, _REFUSE = range(12)
_TAKEN = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2, "BUILD": 1}
_NESTING = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"}
_HASHED = {"SETITEM": 2, "SETITEMS": 2, "DICT": 2, "ADDITEMS": 1, "FROZENSET": 1}  # every so manieth of what is taken
_EFFECTS = {code.name: _PUSH if code.proto <= 5 else _REFUSE for code in pickletools.opcodes}
_EFFECTS |= dict(PROTO=_NONE, FRAME=_NONE, STOP=_NONE, MARK=_MARK, POP=_POP, DUP=_DUP, MEMOIZE=_MEMOIZE)
for _effect, _names in {
    _LONG: ("INT", "LONG", "LONG1", "LONG4"),
    _GET: ("GET", "BINGET", "LONG_BINGET"),
    _PUT: ("PUT", "BINPUT", "LONG_BINPUT"),
    _TAKE: (*_TAKEN, *_NESTING, *_HASHED, "LIST", "POP_MARK", "APPENDS"),
    _TAKE_TWO: ("STACK_GLOBAL", "REDUCE", "NEWOBJ"),
    _REFUSE: _REFUSED,
}.items():
    _EFFECTS |= dict.fromkeys(_names, _effect)


class RefusedError(Exception):
    """The pickle asks for something that is not data; the text says what."""


def check_instructions(content: bytes) -> bytes:
    """Checks what the unpickler would believe: codes, lengths, places in its memo, keys that it would hash.

    Hashing goes through all that is in a tuple, and in those within, again wherever one is met again: it has no end if
    a tuple holds another twice, which holds another twice, and so on. So the sizes of tuples are followed here.

    Returns what comes after the end.
    """
    stream = io.BytesIO(content)
    sizes: list[int] = []  # of what is on the stack
    marks: list[int] = []
    memo: dict[Any, int] = {}
    for instruction, argument, _ in pickletools.genops(stream):  # raises ValueError for a length beyond the file
        name = instruction.name
        effect = _EFFECTS[name]
        if effect is _PUSH:
            sizes.append(1)
        elif effect is _GET:
            sizes.append(memo[argument])
        elif effect is _MEMOIZE:
            memo[len(memo)] = sizes[-1]
        elif effect is _MARK:
            marks.append(len(sizes))
        elif effect is _TAKE_TWO:
            sizes[-2:] = (1,)
        elif effect is _TAKE:
            start = len(sizes) - _TAKEN[name] if name in _TAKEN else marks.pop()
            taken = sizes[start:]
            del sizes[start:]
            if name in _HASHED and max(taken[:: _HASHED[name]], default=0) > LARGEST_KEY:
                raise RefusedError(f"a key of over {LARGEST_KEY} parts or endless digits")
            if name in _NESTING:
                sizes.append(min(1 + sum(taken), 2 * LARGEST_KEY))
            elif name in ("LIST", "DICT"):
                sizes.append(1)
        elif effect is _PUT:
            if argument > len(content):  # type: ignore[operator]
                raise RefusedError(f"a memo of {argument:,} places")  # they would be filled at once
            memo[argument] = sizes[-1]
        elif effect is _POP and marks and marks[-1] == len(sizes):
            marks.pop()
        elif effect is _POP:
            sizes.pop()
        elif effect is _LONG:  # of integers, those of the same remainder have the same hash
            sizes.append(1 if abs(argument) < sys.hash_info.modulus else 2 * LARGEST_KEY)  # type: ignore[arg-type]
        elif effect is _DUP:
            sizes.append(sizes[-1])
        elif effect is _REFUSE:
            raise RefusedError(f"the instruction {name}")
    return stream.read(1)
