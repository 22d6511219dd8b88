"""A SentencePiece model for the tokenizers library, where the two can say the same."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ngpt.config.errors import ConfigError
from ngpt.data.pieces import SPACE
from ngpt.hf.byte_pairs import last_merge

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces
UNIGRAM, BPE = 1, 2  # types of models
WAY_OUT = "Export the weights alone with --no-tokenizer, and put the tokenizer.model beside them"


def pieces_backend(path: Path, eod_id: int) -> Any:
    """The tokenizer of a `tokenizer.model`.

    Raises:
        ConfigError: It is not a BPE, normalises text, has user-defined pieces, or has another feature that a tokenizer.json lacks.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Tokenizer as Backend

    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]  # made when it is imported
    for found in _obstacles(proto):
        raise ConfigError(str(path), found, "A tokenizer.json cannot do the same, token for token", WAY_OUT)
    backend = Backend(_bpe(proto))
    parts = list(_normalizers(proto.normalizer_spec))
    if parts:
        from tokenizers import normalizers

        backend.normalizer = normalizers.Sequence(parts)
    backend.decoder = _decoder(proto)
    backend.add_special_tokens([piece.piece for i, piece in enumerate(proto.pieces) if piece.type == CONTROL or i == eod_id])
    return backend


def _obstacles(proto: Any) -> Iterator[str]:
    """The features that have no exact counterpart in the tokenizers library."""
    if proto.trainer_spec.model_type == UNIGRAM:
        # Where two ways to cut a text are equally good up to rounding, the libraries may differ: about 1 token in 100,000.
        yield "a unigram model: SentencePiece adds its scores in single precision, the tokenizers library in double"
    elif proto.trainer_spec.model_type != BPE:
        yield "a model of words or characters"
    if proto.normalizer_spec.precompiled_charsmap or proto.denormalizer_spec.precompiled_charsmap:
        yield f"a normaliser that changes characters ({proto.normalizer_spec.name or 'unnamed'})"
    if not proto.normalizer_spec.escape_whitespaces or proto.trainer_spec.treat_whitespace_as_suffix:
        yield "spaces that are not marked before words"
    kinds = {piece.type for piece in proto.pieces}
    if USER_DEFINED in kinds or UNUSED in kinds:
        first = next(piece.piece for piece in proto.pieces if piece.type in (USER_DEFINED, UNUSED))
        yield f"user-defined or unused pieces ({first!r})"
    normal = {piece.piece for piece in proto.pieces if piece.type == NORMAL}
    if lone := sorted({character for piece in normal for character in piece} - normal):
        yield f"pieces with {lone[0]!r}, which is none by itself"


def _bpe(proto: Any) -> Any:
    from tokenizers import models

    vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    normal = [piece for piece in proto.pieces if piece.type == NORMAL]
    # SentencePiece joins entries of one score by place. Here the longer goes first, which comes to the same for runs of a character: it
    # continues where a shorter one was just made. `check_written` notices where it does not.
    ordered = sorted(normal, key=lambda piece: (-piece.score, -len(piece.piece)))
    ranks, before = dict[str, int](), None
    for piece in ordered:
        ranks[piece.piece] = len(ranks) if before is None or piece.score != before[0] else before[1]
        before = (piece.score, ranks[piece.piece])
    merges = [merge for piece in ordered if len(piece.piece) > 1 and (merge := last_merge(piece.piece, ranks))]
    unknown = proto.pieces[_unknown(proto.pieces)].piece
    return models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=proto.trainer_spec.byte_fallback)


def _unknown(pieces: Sequence[Any]) -> int:
    return next(i for i, piece in enumerate(pieces) if piece.type == UNKNOWN)  # every model has one


def _normalizers(spec: Any) -> Iterator[Any]:
    from tokenizers import Regex, normalizers

    if spec.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(" +"), " ")
        yield normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), "")
    if spec.add_dummy_prefix:
        yield normalizers.Prepend(SPACE)
    yield normalizers.Replace(" ", SPACE)


def _decoder(proto: Any) -> Any:
    from tokenizers import decoders

    unknown = proto.pieces[_unknown(proto.pieces)].piece
    parts: list[Any] = [decoders.Replace(unknown, proto.trainer_spec.unk_surface), decoders.Replace(SPACE, " ")]
    parts += [decoders.ByteFallback(), decoders.Fuse()]
    spec = proto.normalizer_spec
    if spec.remove_extra_whitespaces:
        parts.append(decoders.Strip(" ", 1 << 30, 0))  # as many as there are
    elif spec.add_dummy_prefix:
        parts.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(parts)
