"""The vocabulary of a draft: the verifier's, or a part of it that ``d2t`` and ``t2d`` tell.

Either of the two follows from the other. Both are small, so they are read and checked.
"""

from array import array
from itertools import pairwise

from speculators.checkpoint.output.writer import contiguous_chunks
from speculators.checkpoint.tensor import Constant, PlannedTensor, TensorInfo, describe_shape
from speculators.errors import ConversionError
from speculators.families.family import Completion, Source

__all__ = ["complete_vocabulary", "drafted_tokens", "read_tokens", "vocabulary_size"]

INTEGERS = {"I32": "i", "I64": "q"}
"""Dtypes that offsets are stored with → the typecodes of ``array``."""

MOST_TOKENS = 2**24
"""No vocabulary has more: tables of this size are made."""


def drafted_tokens(source: Source) -> int | None:
    """How many tokens the draft can propose: the rows of its head; ``None`` if it has none.

    Raises:
        ConversionError: if its head is not a matrix.

    """
    head = source.tensors.get("lm_head.weight")
    if head is None:
        return None
    if len(head.shape) != 2 or 0 in head.shape:
        raise ConversionError(
            f"{head.file}: {head.name} has the shape {describe_shape(head.shape)}, which is not "
            "that of a head, (draft vocabulary, hidden); give the checkpoint as it was published."
        )
    return head.shape[0]


def vocabulary_size(source: Source, said: object) -> int:
    """The size of the verifier's vocabulary.

    Args:
        source: the checkpoint.
        said: what its config says.

    Raises:
        ConversionError: if nothing says it.

    """
    for name in ("embed_tokens.weight", "t2d"):
        info = source.tensors.get(name)
        if info is not None and info.shape:
            if said not in (None, info.shape[0]):
                raise ConversionError(
                    f"{source.checkpoint.config_file} says vocab_size {said}, but {info.name} has "
                    f"the shape {describe_shape(info.shape)}; give the config that belongs to the "
                    "tensors."
                )
            return info.shape[0]
    if type(said) is int:
        if not 0 < said <= MOST_TOKENS:
            raise ConversionError(
                f"{source.checkpoint.config_file} says vocab_size {said}, which no model has; "
                "correct the config."
            )
        return said
    if source.verifier is not None:
        return source.verifier.vocab_size
    raise ConversionError(f"{source.checkpoint.config_file} lacks vocab_size.")


def complete_vocabulary(source: Source, vocabulary: int) -> Completion:
    """Check ``d2t`` and ``t2d``, and derive the one that is missing.

    Raises:
        ConversionError: if they contradict each other or the sizes, or both are missing and needed.

    """
    drafted = drafted_tokens(source)
    d2t, t2d = source.tensors.get("d2t"), source.tensors.get("t2d")
    if drafted is None or (d2t is None and t2d is None and drafted == vocabulary):
        return Completion()
    if d2t is None and t2d is None:
        raise ConversionError(
            f"{source.checkpoint.name}: its head has {drafted} tokens of {vocabulary}, but neither "
            "d2t nor t2d is there to say which; they are not made up: look for them in the "
            "publisher's other files."
        )
    _check_forms(d2t, t2d, drafted, vocabulary)
    if source.verifier is None:
        tokens = list(range(drafted))  # no data is read, and what is made here is not written
    else:
        tokens = read_tokens(d2t, t2d, drafted, vocabulary)
    if drafted == vocabulary:
        return Completion(
            left_out={
                info.name: "the draft has the verifier's whole vocabulary"
                for info in (d2t, t2d)
                if info is not None
            }
        )
    completion = Completion()
    if source.verifier is not None and tokens[-1] == drafted - 1:
        completion.discrepancies.append(
            f"its tables say that it drafts the first {drafted} tokens of the vocabulary, as "
            "tables do that were never filled; check that it was trained so"
        )
    if d2t is None or d2t.dtype != "I64":
        offsets = array("q", [token - index for index, token in enumerate(tokens)]).tobytes()
        label = "from t2d" if d2t is None else "as 64-bit integers"
        completion.made["d2t"] = PlannedTensor(
            "I64", (drafted,), (Constant(label, "I64", offsets),)
        )
        if d2t is None:
            completion.discrepancies.append("it has no d2t, which is derived from t2d")
        else:
            completion.left_out[d2t.name] = "its offsets are written as 64-bit integers"
    if t2d is None:
        flags = bytearray(vocabulary)
        for token in tokens:
            flags[token] = 1
        completion.made["t2d"] = PlannedTensor(
            "BOOL", (vocabulary,), (Constant("from d2t", "BOOL", bytes(flags)),)
        )
        completion.discrepancies.append("it has no t2d, which is derived from d2t")
    return completion


def _check_forms(
    d2t: TensorInfo | None, t2d: TensorInfo | None, drafted: int, vocabulary: int
) -> None:
    """Check the shapes and dtypes of the tables."""
    for info, name, size in ((d2t, "d2t", drafted), (t2d, "t2d", vocabulary)):
        if info is not None and info.shape != (size,):
            raise ConversionError(
                f"{info.file}: {info.name} has the shape {describe_shape(info.shape)}, but the "
                f"{'head' if name == 'd2t' else 'vocabulary'} has {size} tokens."
            )
    if d2t is not None and d2t.dtype not in INTEGERS:
        raise ConversionError(
            f"{d2t.file}: {d2t.name} has the type {d2t.dtype}, where whole numbers are expected; "
            "save it as 64-bit integers."
        )
    if t2d is not None and t2d.dtype != "BOOL":
        raise ConversionError(
            f"{t2d.file}: {t2d.name} has the type {t2d.dtype}, where booleans are expected; save "
            "it as such."
        )


def read_tokens(
    d2t: TensorInfo | None, t2d: TensorInfo | None, drafted: int, vocabulary: int
) -> list[int]:
    """The verifier's ids of the draft's tokens, by one of the tables or both.

    Raises:
        ConversionError: if they are no ascending tokens of the verifier, or contradict each other.

    """
    by_flag: list[int] | None = None
    if t2d is not None:
        by_flag = [token for token, there in enumerate(_data(t2d)) if there]
        if len(by_flag) != drafted:
            raise ConversionError(
                f"{t2d.file}: {t2d.name} is true for {len(by_flag)} tokens, but the head has "
                f"{drafted}."
            )
    if d2t is None:
        assert by_flag is not None
        return by_flag
    offsets = array(INTEGERS[d2t.dtype])
    offsets.frombytes(_data(d2t))
    tokens = [index + offset for index, offset in enumerate(offsets)]
    if tokens[0] < 0:
        raise ConversionError(
            f"{d2t.file}: {d2t.name} gives the token {tokens[0]} for the draft's first; tokens are "
            "not negative."
        )
    if any(one >= other for one, other in pairwise(tokens)):
        raise ConversionError(
            f"{d2t.file}: {d2t.name} does not give ascending tokens: token i of the draft is "
            "i + d2t[i] of the verifier; it is damaged."
        )
    if tokens[-1] >= vocabulary:
        raise ConversionError(
            f"{d2t.file}: {d2t.name} gives the token {tokens[-1]}, but the vocabulary has "
            f"{vocabulary}: token i of the draft is i + d2t[i] of the verifier. It may hold the "
            "tokens themselves, not offsets."
        )
    if by_flag is not None and by_flag != tokens:
        assert t2d is not None
        wrong = next(a for a, b in zip(tokens, by_flag, strict=True) if a != b)
        raise ConversionError(
            f"{d2t.name} and {t2d.name} of {d2t.file} name different tokens (the first of them: "
            f"{wrong}); one of them is damaged."
        )
    return tokens


def _data(info: TensorInfo) -> bytes:
    return b"".join(contiguous_chunks(info))
