"""Pickles, read as data: nothing that a pickle asks for is run.

A pickle is a program for a small stack machine, and two of its opcodes import and call anything at
all. The machine here has the same stack, but two tables limit what it may do: ``OPCODES``, the
opcodes that are used to write tensors, and the globals that the caller admits. A global is never
imported; its name stands for a value, or for a replacement of the function. Whatever is in neither
table is refused by name before its argument is even read.

Scripts also pickle objects of their own beside the weights, such as their arguments. A class that
is in neither table may be instantiated, unless it is a part of Python, torch or numpy: its name
stands for the object. Nothing may be called by such a name, and it is not imported either.

Each opcode means what Python's ``pickletools`` says, whose argument readers are used here, except
for the names of globals.
"""

import pickletools
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, cast

from speculators.errors import CheckpointError, UnsafeCheckpointError, printable

__all__ = [
    "MALFORMED",
    "MAX_BYTES",
    "PYTHON_GLOBALS",
    "Builder",
    "Globals",
    "Ignored",
    "Instance",
    "Items",
    "OrderedItems",
    "Refused",
    "read_pickle",
]

# A tensor takes some 30 opcodes and 200 bytes, so these limits are far above real files; a hostile
# file can waste about a second and a few hundred megabytes.
MAX_BYTES = 16 << 20
MAX_OPCODES = 500_000
MAX_LINE = 1024
MAX_ARGUMENTS = 16

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_NOT_FOREIGN = frozenset(sys.stdlib_module_names) | {"__torch__", "numpy", "torch"}

# What argument readers, handlers and builders can raise on a malformed pickle.
MALFORMED = (ArithmeticError, LookupError, MemoryError, RecursionError, TypeError, ValueError)


class _TooLargeError(ValueError):
    """The pickle is larger than any that describes tensors."""


class Refused(Exception):  # noqa: N818 - not an error yet: `read_pickle` makes it one
    """Raised by handlers, builders and ``persistent``; says what the pickle asked for in vain."""


@dataclass(eq=False, repr=False, slots=True)
class Items:
    """A dict, as a list of its pairs in order.

    It is not a real dict, because hashing, comparing or printing a nested value of a hostile pickle
    can take exponential time or exhaust the C stack.
    """

    pairs: list[tuple[object, object]] = field(default_factory=list)


class OrderedItems(Items):
    """A dict whose class can have attributes, such as an OrderedDict with ``_metadata``."""

    __slots__ = ()


@dataclass(frozen=True, eq=False, slots=True)
class Ignored:
    """A value that no tensor needs; only its kind is kept."""

    kind: str


class Instance(Ignored):
    """An object of the class that ``kind`` names; what is put into it is dropped."""

    __slots__ = ()


class _Foreign(Ignored):
    """A class of a library, or of the script itself; ``kind`` is its name."""

    __slots__ = ()


@dataclass(frozen=True, eq=False, slots=True)
class Builder:
    """The function that replaces one that a pickle may name and call."""

    build: Callable[..., object]


Globals = Mapping[tuple[str, str], object]


def read_pickle(
    file: IO[bytes],
    *,
    name: str,
    size: int = MAX_BYTES,
    admitted: Globals,
    persistent: Callable[[object], object] | None = None,
) -> object:
    """Read one pickle from ``file``, up to and including its STOP.

    Lists, tuples, strings and numbers are returned as such, dicts as ``Items``, and a global as
    whatever ``admitted`` has for it.

    Args:
        file: where to read, from its current position.
        name: the name of the file in messages.
        size: the largest size that the pickle may have, in bytes.
        admitted: (module, name) of each global that may be named → what it stands for.
        persistent: turns a persistent id into a value; if not given, such ids are refused.

    Raises:
        UnsafeCheckpointError: it asks for an opcode or a global that is not admitted.
        CheckpointError: it is damaged, or larger than any pickle of tensors.

    """
    source = _Source(file, size)
    machine = _Machine(admitted, persistent)
    try:
        return _run(machine, source)
    except Refused as refusal:
        raise UnsafeCheckpointError(
            f"{name} was refused, and nothing in it was run, because its pickle asks for "
            f"{refusal}, which plain tensors do not need: convert it to safetensors with the "
            "library that made it, and in a sandbox if you do not trust where it comes from."
        ) from None
    except CheckpointError:
        raise
    except _TooLargeError:
        raise CheckpointError(
            f"{name} holds a pickle of more than {MAX_BYTES >> 20} MiB or {MAX_OPCODES} steps, "
            "which no weights need: save them alone, with torch.save(model.state_dict(), ...)."
        ) from None
    except MALFORMED:
        raise CheckpointError(
            f"{name} was not written by torch.save, or is damaged: its pickle makes no sense at "
            f"byte {source.used}; download it or save it again."
        ) from None


class _Source:
    """The file interface that argument readers need, over a pickle of at most ``size`` bytes."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._size = size
        self.used = 0

    def read(self, size: int) -> bytes:
        # The length is the pickle's own claim: check it before memory is allocated for it.
        if self.used + size > MAX_BYTES:
            raise _TooLargeError
        if self.used + size > self._size:
            raise ValueError("the pickle ends early")
        self.used += size
        return self._file.read(size)

    def readline(self) -> bytes:
        line = self._file.readline(MAX_LINE)
        self.used += len(line)
        if self.used > self._size:
            raise ValueError("the pickle ends early")
        return line

    def read_name(self) -> str:
        # As `pickle` does; `pickletools` would decode escapes, and read \x6fs as os.
        line = self.readline()
        if not line.endswith(b"\n"):
            raise ValueError("a name ends with its line")
        return line[:-1].decode()


class _Machine:
    """The state of a pickle's stack machine, named as in Python's ``pickle``."""

    def __init__(self, admitted: Globals, persistent: Callable[[object], object] | None) -> None:
        self.admitted = admitted
        self.persistent = persistent
        self.stack: list[object] = []
        self.metastack: list[list[object]] = []
        self.memo: dict[int, object] = {}

    def pop_mark(self) -> list[object]:
        items, self.stack = self.stack, self.metastack.pop()
        return items

    def find_global(self, module: str, name: str) -> object:
        if (module, name) in self.admitted:
            return self.admitted[module, name]
        full = f"{module}.{name}"
        if _NAME.fullmatch(full) and module.partition(".")[0] not in _NOT_FOREIGN:
            return _Foreign(full)
        raise Refused(f"the global {printable(full)}")


def _run(machine: _Machine, source: _Source) -> object:
    for _ in range(MAX_OPCODES):
        opcode = _BY_CODE[source.read(1)]
        if opcode.name == "STOP":
            if machine.metastack or len(machine.stack) != 1:
                raise ValueError("a pickle ends with one value")
            return machine.stack[0]
        handler = OPCODES.get(opcode.name)
        if handler is None:
            raise Refused(f"the opcode {opcode.name}")
        argument: object = None
        if opcode.name == "GLOBAL":
            argument = source.read_name(), source.read_name()
        elif opcode.arg:
            argument = opcode.arg.reader(cast("IO[bytes]", source))
        handler(machine, argument)
    raise _TooLargeError


def _nothing(_machine: _Machine, _argument: Any) -> None:
    """PROTO and FRAME say how the pickle was written, which makes no difference to reading it."""


def _push(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


def _push_new(make: Callable[[], object]) -> "Handler":
    return lambda machine, _: machine.stack.append(make())


def _mark(machine: _Machine, _: None) -> None:
    machine.metastack.append(machine.stack)
    machine.stack = []


def _tuple(machine: _Machine, _: None) -> None:
    items = machine.pop_mark()
    machine.stack.append(tuple(items))


def _tuple_of(length: int) -> "Handler":
    def handler(machine: _Machine, _: None) -> None:
        items = [machine.stack.pop() for _ in range(length)]
        machine.stack.append(tuple(reversed(items)))

    return handler


def _discard_marked(kind: str) -> "Handler":
    def handler(machine: _Machine, _: None) -> None:
        machine.pop_mark()
        machine.stack.append(Ignored(kind))

    return handler


def _add_items(machine: _Machine, _: None) -> None:
    machine.pop_mark()
    _expect(machine.stack[-1], Ignored, "ADDITEMS")


def _extend(machine: _Machine, items: list[object]) -> None:
    target = machine.stack[-1]
    if isinstance(target, Instance):
        return
    _expect(target, list, "APPEND")
    cast("list[object]", target).extend(items)


def _set_items(machine: _Machine, items: list[object]) -> None:
    target = machine.stack[-1]
    if isinstance(target, Instance):
        return
    _expect(target, Items, "SETITEM")
    cast("Items", target).pairs.extend(zip(items[::2], items[1::2], strict=True))


def _expect(target: object, kind: type, opcode: str) -> None:
    # `pickle` would call a method of whatever the target is.
    if not isinstance(target, kind):
        raise Refused(f"{opcode} on a {type(target).__name__}")


def _get(machine: _Machine, index: int) -> None:
    machine.stack.append(machine.memo[index])


def _put(machine: _Machine, index: int | None) -> None:
    machine.memo[len(machine.memo) if index is None else index] = machine.stack[-1]


def _global(machine: _Machine, names: tuple[str, str]) -> None:
    machine.stack.append(machine.find_global(*names))


def _stack_global(machine: _Machine, _: None) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if not (isinstance(module, str) and isinstance(name, str)):
        raise Refused("a global whose name is not a string")
    machine.stack.append(machine.find_global(module, name))


def _call(machine: _Machine, _: None) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    if isinstance(function, _Foreign):
        raise Refused(f"the global {function.kind}")
    if not isinstance(function, Builder):
        raise Refused(f"a call of a {type(function).__name__}, which is not a function")
    # Passing arguments copies them: a long tuple passed again and again would take forever.
    if not isinstance(arguments, tuple) or len(arguments) > MAX_ARGUMENTS:
        raise TypeError("arguments are a short tuple")
    machine.stack.append(function.build(*arguments))


def _instantiate(machine: _Machine, _: None) -> None:
    if isinstance(machine.stack[-2], _Foreign):
        machine.stack.pop()
        machine.stack.append(Instance(cast("_Foreign", machine.stack.pop()).kind))
    else:
        _call(machine, None)


def _drop_state(machine: _Machine, _: None) -> None:
    machine.stack.pop()
    if not isinstance(machine.stack[-1], OrderedItems | Ignored):
        raise Refused(f"BUILD, which sets the state of a {type(machine.stack[-1]).__name__}")


def _persistent(machine: _Machine, _: None) -> None:
    if machine.persistent is None:
        raise Refused("a persistent id where none belongs")
    machine.stack.append(machine.persistent(machine.stack.pop()))


Handler = Callable[[_Machine, Any], None]

OPCODES: dict[str, Handler] = {
    "PROTO": _nothing,
    "FRAME": _nothing,
    "NONE": _push_new(lambda: None),
    "NEWTRUE": _push_new(lambda: True),
    "NEWFALSE": _push_new(lambda: False),
    "EMPTY_TUPLE": _push_new(tuple),
    "EMPTY_LIST": _push_new(list),
    "EMPTY_DICT": _push_new(Items),
    "EMPTY_SET": _push_new(lambda: Ignored("set")),
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "BINFLOAT"), _push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), _push),
    "MARK": _mark,
    "TUPLE": _tuple,
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "FROZENSET": _discard_marked("frozenset"),
    "ADDITEMS": _add_items,
    "APPEND": lambda machine, _: _extend(machine, [machine.stack.pop()]),
    "APPENDS": lambda machine, _: _extend(machine, machine.pop_mark()),
    "SETITEM": lambda machine, _: _set_items(machine, [machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, _: _set_items(machine, machine.pop_mark()),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _get),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _put),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _call,
    "NEWOBJ": _instantiate,
    "BUILD": _drop_state,
    "BINPERSID": _persistent,
}
_BY_CODE = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}


def _ignore(kind: str) -> Builder:
    return Builder(lambda *_: Ignored(kind))


def _instance(kind: str) -> Builder:
    return Builder(lambda *_: Instance(kind))


_PLAIN_CLASSES = (
    "argparse.Namespace",
    "collections.deque",
    "datetime.date",
    "datetime.datetime",
    "datetime.time",
    "datetime.timedelta",
    "datetime.timezone",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    *(
        f"{module}.{flavour}{system}Path"
        for module in ("pathlib", "pathlib._local")
        for flavour in ("", "Pure")
        for system in ("", "Posix", "Windows")
    ),
    "transformers.trainer_utils.EvaluationStrategy",
    "transformers.trainer_utils.HubStrategy",
    "transformers.trainer_utils.IntervalStrategy",
    "transformers.trainer_utils.SaveStrategy",
    "transformers.trainer_utils.SchedulerType",
    "transformers.training_args.OptimizerNames",
    "types.SimpleNamespace",
    "uuid.UUID",
)
"""Classes of plain values that scripts save, and that a pickle calls to make one."""

PYTHON_GLOBALS: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): Builder(OrderedItems),
    ("collections", "Counter"): Builder(lambda *_: OrderedItems()),
    ("collections", "defaultdict"): Builder(lambda *_: OrderedItems()),
    ("_codecs", "encode"): _ignore("bytes"),
    **{
        (module, name): _ignore(name)
        for module in ("builtins", "__builtin__")
        for name in (
            "bytearray",
            "bytes",
            "complex",
            "frozenset",
            "range",
            "set",
            "slice",
            "xrange",
        )
    },
    # The factory of a defaultdict is one of these.
    **{
        (module, name): Ignored(name)
        for module in ("builtins", "__builtin__")
        for name in ("dict", "float", "int", "list")
    },
    ("typing", "Any"): Ignored("typing.Any"),
    **{
        (kind.rpartition(".")[0], kind.rpartition(".")[2]): _instance(kind)
        for kind in _PLAIN_CLASSES
    },
    ("numpy", "dtype"): _ignore("numpy.dtype"),
    ("numpy", "ndarray"): Ignored("numpy.ndarray"),
    **{
        (f"{core}.{module}", name): _ignore("numpy array")
        for core in ("numpy.core", "numpy._core")
        for module, name in (
            ("multiarray", "scalar"),
            ("multiarray", "_reconstruct"),
            ("numeric", "_frombuffer"),
        )
    },
}
"""Globals of values that training scripts leave beside weights, and of dicts that hold weights."""
