"""Pickles that do harm when they are loaded, written opcode by opcode.

Each is made for a sentinel, a path that its payload creates, so that a test can show
both that the payload works and that reading it as data does not run it.
"""

import struct
from collections.abc import Callable
from typing import NamedTuple

STOP = b"."
MARK = b"("
MANY = 300_000


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def stack_name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def tuple_of(*items: bytes) -> bytes:
    return MARK + b"".join(items) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + tuple_of(*arguments) + b"R"


def state_dict(value: bytes) -> bytes:
    return call(name("collections", "OrderedDict")) + text("fc.weight") + value + b"s"


def command(sentinel: str) -> bytes:
    return text(f"echo run >'{sentinel}'")


def shell(sentinel: str, function: bytes = name("os", "system")) -> bytes:
    """The payload: a call that creates the sentinel."""
    return call(function, command(sentinel))


def code(sentinel: str) -> bytes:
    return text(f"open({sentinel!r}, 'w').close()")


def whole(body: bytes) -> bytes:
    return b"\x80\x04" + body + STOP


STORAGE = (text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), b"K\x04")
TENSOR_V2 = name("torch._utils", "_rebuild_tensor_v2")
SIZES = (b"K\x00", tuple_of(b"K\x04"), tuple_of(b"K\x01"))


class Hostile(NamedTuple):
    refused: str
    """What the error has to name."""
    make: Callable[[str], bytes]
    """Makes the pickle, including its STOP, for a sentinel."""
    works: bool = False
    """Whether Python's pickle runs the payload."""


def _body(refused: str, make: Callable[[str], bytes], works: bool = False) -> Hostile:
    return Hostile(refused, lambda sentinel: whole(make(sentinel)), works)


def _calling(module: str, attribute: str, *arguments: bytes) -> Hostile:
    return _body(
        f"the global {module}.{attribute}",
        lambda sentinel: call(name(module, attribute), *(arguments or (command(sentinel),))),
    )


UNSAFE: dict[str, Hostile] = {
    # Functions that run something, by their names.
    "os.system": _body("the global os.system", shell, works=True),
    "posix.system": _body(
        "the global posix.system", lambda s: shell(s, name("posix", "system")), works=True
    ),
    "nt.system": _calling("nt", "system"),
    "subprocess.Popen": _calling("subprocess", "Popen"),
    "eval": _body(
        "the global builtins.eval", lambda s: call(name("builtins", "eval"), code(s)), works=True
    ),
    "eval in Python 2": _calling("__builtin__", "eval"),
    "exec": _body(
        "the global builtins.exec", lambda s: call(name("builtins", "exec"), code(s)), works=True
    ),
    "getattr": _body(
        "the global builtins.getattr",
        lambda s: call(call(name("builtins", "getattr"), name("os", "x"), text("system"))),
    ),
    "__import__": _calling("builtins", "__import__", text("os")),
    "open": _calling("builtins", "open"),
    "io.open": _calling("_io", "open"),
    "importlib": _calling("importlib", "import_module", text("os")),
    "runpy": _calling("runpy", "run_path"),
    "timeit": _calling("timeit", "timeit"),
    "pydoc": _calling("pydoc", "pipepager"),
    "bdb": _calling("bdb", "Bdb"),
    "ctypes": _calling("ctypes", "CDLL"),
    "operator": _calling("operator", "attrgetter"),
    "functools": _calling("functools", "partial"),
    "types": _calling("types", "CodeType"),
    "webbrowser": _calling("webbrowser", "open"),
    "copyreg": _calling("copyreg", "_reconstructor"),
    "pickle in a pickle": _calling("pickle", "loads"),
    "numpy.load": _calling("numpy", "load"),
    "numpy runstring": _calling("numpy.testing._private.utils", "runstring"),
    "torch.load": _calling("torch", "load"),
    "torch.load by module": _calling("torch.serialization", "load"),
    "torch.hub.load": _calling("torch.hub", "load"),
    "torch pickle in a pickle": _calling("torch.storage", "_load_from_bytes"),
    "torch execWrapper": _calling("torch.jit.unsupported_tensor_ops", "execWrapper"),
    "torch from_type": _calling("torch._tensor", "_rebuild_from_type_v2"),
    "whole module": _calling("torch.nn.modules.linear", "Linear"),
    # Names that look like admitted ones.
    "dotted class": _calling("collections", "OrderedDict.__class__"),
    "dotted globals": _calling("torch._utils", "_rebuild_tensor_v2.__globals__"),
    "dotted module": _calling("torch", "_utils._rebuild_tensor_v2"),
    "dotted import": _calling("torch", "Size.__init__.__self__"),
    "module with a space": _body(
        "the global collections OrderedDict.OrderedDict",
        lambda _: call(name("collections OrderedDict", "OrderedDict")),
    ),
    "with escapes": _body(
        "the global coll\\\\x65ctions.OrderedDict",
        lambda _: call(name("coll\\x65ctions", "OrderedDict")),
    ),
    "not ASCII": _body("the global m\\xf6dule.name", lambda _: call(name("m\xf6dule", "name"))),
    "other case": _calling("Collections", "ordereddict"),
    "trailing blank": _calling("collections", "OrderedDict "),
    # Ways to name a global.
    "STACK_GLOBAL": _body(
        "the global os.system", lambda s: shell(s, stack_name("os", "system")), works=True
    ),
    "STACK_GLOBAL from the memo": _body(
        "the global os.system",
        lambda s: (
            tuple_of(text("os") + b"q\x00", text("system") + b"q\x01")
            + call(b"h\x00h\x01\x93", command(s))
            + b"\x86"
        ),
        works=True,
    ),
    "STACK_GLOBAL of a number": _body(
        "a global whose name is not a string", lambda _: text("os") + b"K\x01\x93"
    ),
    "STACK_GLOBAL of a computed name": _body(
        "a global whose name is not a string",
        lambda _: (
            text("os") + call(name("_codecs", "encode"), text("system"), text("ascii")) + b"\x93"
        ),
    ),
    "control characters": _body(
        r"the global os\x1b[2K.sys\ntem", lambda _: stack_name("os\x1b[2K", "sys\ntem")
    ),
    # Where a payload can hide.
    "in a list": _body("os.system", lambda s: b"]" + shell(s) + b"a", works=True),
    "in a dict": _body("os.system", lambda s: b"}" + text("a") + shell(s) + b"s", works=True),
    "as a key": _body("os.system", lambda s: b"}" + shell(s) + text("a") + b"s", works=True),
    "in an OrderedDict": _body("os.system", lambda s: state_dict(shell(s)), works=True),
    "in a set": _body("os.system", lambda s: b"\x8f" + MARK + shell(s) + b"\x90", works=True),
    "in a tuple": _body("os.system", lambda s: tuple_of(b"N", shell(s)), works=True),
    "in a nested OrderedDict": _body(
        "os.system", lambda s: state_dict(state_dict(state_dict(shell(s)))), works=True
    ),
    "in a persistent id": _body(
        "os.system", lambda s: state_dict(tuple_of(text("storage"), shell(s)) + b"Q"), works=True
    ),
    "as a storage's class": _body(
        "os.system",
        lambda s: tuple_of(STORAGE[0], name("os", "system"), *STORAGE[2:3], command(s)) + b"Q",
    ),
    "in a tensor": _body(
        "os.system",
        lambda s: state_dict(call(TENSOR_V2, tuple_of(*STORAGE) + b"Q", *SIZES, shell(s), b"N")),
    ),
    "as a state": _body(
        "os.system",
        lambda s: state_dict(b"N") + b"}" + text("_metadata") + shell(s) + b"sb",
        works=True,
    ),
    "behind a good tensor": _body(
        "os.system",
        lambda s: (
            state_dict(call(TENSOR_V2, tuple_of(*STORAGE) + b"Q", *SIZES, b"\x89", b"N"))
            + text("x")
            + shell(s)
            + b"s"
        ),
    ),
    "memo overwritten": _body(
        "os.system",
        lambda s: tuple_of(
            name("collections", "OrderedDict") + b"q\x00",
            name("os", "system") + b"q\x00",
            call(b"h\x00", command(s)),
        ),
        works=True,
    ),
    "memoized, then called": _body(
        "os.system",
        lambda s: tuple_of(name("os", "system") + b"\x94", call(b"h\x00", command(s))),
        works=True,
    ),
    # Opcodes that no tensor needs.
    "INST": _body("the opcode INST", lambda s: MARK + command(s) + b"ios\nsystem\n", works=True),
    "OBJ": _body("the global os.system", lambda s: MARK + name("os", "system") + command(s) + b"o"),
    "OBJ of an admitted class": _body(
        "the opcode OBJ", lambda _: MARK + name("collections", "OrderedDict") + b"o"
    ),
    "EXT1": _body("the opcode EXT1", lambda _: b"\x82\x01"),
    "EXT2": _body("the opcode EXT2", lambda _: b"\x83\x01\x00"),
    "EXT4": _body("the opcode EXT4", lambda _: b"\x84\x01\x00\x00\x00"),
    "NEWOBJ": _body(
        "the global subprocess.Popen", lambda _: name("subprocess", "Popen") + b")\x81"
    ),
    "NEWOBJ of a string": _body("a call of a str", lambda _: text("os.system") + b")\x81"),
    "NEWOBJ_EX": _body(
        "the opcode NEWOBJ_EX", lambda _: name("collections", "OrderedDict") + b")}\x92"
    ),
    "PERSID": _body("the opcode PERSID", lambda _: b"P0\n"),
    "DUP": _body("the opcode DUP", lambda _: b"N2"),
    "POP": _body("the opcode POP", lambda _: b"NN0"),
    "POP_MARK": _body("the opcode POP_MARK", lambda _: b"N(NN1"),
    "PUT": _body("the opcode PUT", lambda _: b"Np99999999999999\n"),
    "GET": _body("the opcode GET", lambda _: b"g0\n"),
    "STRING": _body("the opcode STRING", lambda _: b"S'\\d'\n"),
    "NEXT_BUFFER": _body("the opcode NEXT_BUFFER", lambda _: b"\x97"),
    "LONG4 bomb": _body(
        "the opcode LONG4", lambda _: b"\x8b" + struct.pack("<i", 1 << 22) + b"\x7f" * (1 << 22)
    ),
    "LONG4 of negative size": _body("the opcode LONG4", lambda _: b"\x8b" + struct.pack("<i", -1)),
    # Methods that pickle would call.
    "BUILD of a list": _body("BUILD", lambda _: b"]}b"),
    "BUILD with __setstate__": _body(
        "BUILD", lambda s: b"}}" + text("__setstate__") + name("builtins", "dict") + b"sb"
    ),
    "BUILD of a tensor": _body(
        "BUILD", lambda _: call(TENSOR_V2, tuple_of(*STORAGE) + b"Q", *SIZES, b"\x89", b"N") + b"}b"
    ),
    "APPEND to a dict": _body("APPEND on a ", lambda _: b"}Na"),
    "APPENDS to a class": _body("APPEND on a ", lambda _: name("torch", "float16") + b"(NNe"),
    "SETITEM of a list": _body("SETITEM on a list", lambda _: b"]K\x00Ns"),
    "ADDITEMS to a list": _body("ADDITEMS on a list", lambda _: b"](N\x90"),
    "call of a type": _body("a call of a ", lambda _: call(name("torch", "float16"))),
    "call of a storage's class": _body("a call of a ", lambda _: call(STORAGE[1], b"K\x04")),
    "call of a result": _body("a call of a ", lambda _: call(call(name("torch", "device")))),
    # Persistent ids of other shapes.
    "persistent string": _body("a persistent id", lambda _: text("storage") + b"Q"),
    "persistent module": _body(
        "a persistent id",
        lambda _: tuple_of(text("module"), *STORAGE[1:2], text("a.py"), text("import os")) + b"Q",
    ),
    "persistent storage of another kind": _body(
        "a persistent id", lambda _: tuple_of(text("storage"), *STORAGE[:1] * 4) + b"Q"
    ),
    # What follows a payload must not distract from it.
    "unknown opcode after it": Hostile("os.system", lambda s: whole(shell(s) + b"\xff"), True),
    "cut off after it": Hostile("os.system", lambda s: b"\x80\x04" + shell(s), True),
    "second STOP": Hostile("os.system", lambda s: whole(shell(s) + STOP + b"garbage"), True),
    "stack underflow after it": Hostile("os.system", lambda s: whole(shell(s) + b"RRR"), True),
    "no PROTO": Hostile("os.system", lambda s: shell(s) + STOP, True),
    "two PROTOs": Hostile("os.system", lambda s: whole(b"\x80\x02" + shell(s)), True),
    "lying FRAME": Hostile(
        "os.system", lambda s: b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f" + shell(s) + STOP
    ),
}

BROKEN: dict[str, bytes] = {
    "nothing": b"",
    "only PROTO": b"\x80\x02",
    "no such opcode": whole(b"\xff"),
    "empty stack": b"\x80\x02.",
    "two values": whole(b"NN"),
    "an open MARK": whole(b"(N"),
    "TUPLE without MARK": whole(b"Nt"),
    "TUPLE3 of two": whole(b"NN\x87"),
    "below the MARK": whole(b"}" + text("a") + b"(s"),
    "odd SETITEMS": whole(b"}(NNNu"),
    "memo never set": whole(b"h\x07"),
    "memo far beyond": whole(b"j\xff\xff\xff\xff"),
    "memo of nothing": whole(b"\x94"),
    "arguments in a list": whole(name("collections", "OrderedDict") + b"]R"),
    "too many arguments": whole(call(name("torch", "device"), *[b"N"] * 1000)),
    "too few arguments": whole(call(TENSOR_V2)),
    "tensor without storage": whole(call(TENSOR_V2, b"N", *SIZES, b"\x89", b"N")),
    "bad UTF-8": whole(b"X\x02\x00\x00\x00\xff\xff"),
    "global without an end": b"\x80\x02c" + b"a" * 5_000_000,
    "INT of no number": whole(b"Ixyz\n"),
    "LONG of five million digits": whole(b"L" + b"9" * 5_000_000 + b"L\n"),
    "LONG of a thousand digits": whole(b"L" + b"9" * 1000 + b"L\n"),
    "string longer than the file": whole(b"X\xff\xff\xff\xff"),
    "string of four exabytes": whole(b"\x8d" + struct.pack("<Q", 1 << 62) + b"a"),
    "bytes of four exabytes": whole(b"\x8e" + struct.pack("<Q", 1 << 62) + b"a"),
    "bytearray of all there is": whole(b"\x96" + b"\xff" * 8 + b"a"),
    "stack bomb": b"\x80\x02" + b"N" * 1_500_000,
    "MARK bomb": b"\x80\x02" + b"(" * 1_500_000,
    "memo bomb": whole(b"N" + b"\x94" * 1_500_000),
    "deep list": whole(b"]" * MANY + b"a" * (MANY - 1)),
    "deep dict": whole(b"}K\x00" * MANY + b"}" + b"s" * MANY),
    "deep tuple": whole(b")" + b"\x85" * MANY),
    "tuple laughs": whole(b")" + b"q\x00h\x00\x86" * 1000),
    # Hashing this key would take 2**1000 steps, and so would comparing or printing it.
    "laughs as a key": whole(b"})" + b"q\x00h\x00\x86" * 1000 + b"Ns"),
    "list laughs": whole(b"]" + b"q\x00](h\x00h\x00h\x00e" * 1000),
    "list within itself": whole(b"]q\x00h\x00a"),
    "dict within itself": whole(b"}q\x00" + text("model") + b"h\x00s"),
    "dict as its own key": whole(b"}q\x00h\x00Ns"),
    "unhashable key": whole(b"}]Ns"),
    "long arguments again and again": whole(
        tuple_of(*[b"N"] * 100_000) + b"q\x00" + (name("torch", "device") + b"h\x00R") * 100_000
    ),
    "harmless arguments again and again": whole(
        tuple_of(*[b"N"] * 100_000) + b"q\x00" + (b"c_codecs\nencode\nh\x00R\x86") * 100_000
    ),
}
"""Damage and bombs without a payload."""
