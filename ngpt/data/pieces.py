"""SentencePiece models: tokenizer.model files, as Llama, Gemma and T5 have them."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ngpt.data.vocabulary import cannot_encode, end_of_document, unreadable

SPACE = "\u2581"  # what the library writes for a space; in a text it counts as one
PROBES = {  # what a normaliser may change, each with a text that shows it
    "line ends": "a\r\nb\nb",
    "tabs": "a\tb",
    "runs of spaces and those at either end": "a  b",
    "compatibility characters (\ufb01, \u2460)": "a\ufb01\u2460b",
    "letters followed by their accents": "e\u0301",
    "control and zero-width characters": "a\x01\u200b\ufeffb",
    "capital letters": "aAb",
}


class SentencePieceTokenizer:
    """A SentencePiece model. Its eos piece ends documents; without one, a control piece that `end_of_document` finds.

    Models with byte fallback have tokens for every character. The others have one unknown token, and `dropped` counts what it stands for.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path, name: str, eod_id: int | None = None) -> None:
        from sentencepiece import SentencePieceProcessor

        self.name, self.path, self.notes = name, path, list[str]()
        content = path.read_bytes()
        self._backend = SentencePieceProcessor()
        try:
            self._backend.LoadFromSerializedProto(content)
            self.vocab_size = self._backend.get_piece_size()
            changed = [what for what, text in PROBES.items() if self._normalized(text) != text]
        except BaseException as error:
            raise unreadable(error, path, "Not a SentencePiece model", "Name an undamaged tokenizer.model") from error
        if eod_id is None:
            eod_id = self._backend.eos_id()
            if eod_id < 0:
                eod_id, self.notes = end_of_document(path, self._control_pieces())
        self.eod_id = eod_id
        self.identity = hashlib.sha256(content + f"\neod {self.eod_id}".encode()).hexdigest()
        if changed:
            self.notes.append(f"the tokenizer's normaliser changes the text, and decoding does not bring back: {', '.join(changed)}")
        self._encoded: tuple[str, list[int]] = ("", [])  # the last text, for `dropped`

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._ids(text), dtype=np.int32)

    def dropped(self, text: str) -> Counter[str]:
        lost = Counter({SPACE: text.count(SPACE)}) if SPACE in text else Counter[str]()
        ids, unknown = self._ids(text), self._backend.unk_id()
        if unknown in ids:
            pieces = self._backend.encode(text, out_type=str, add_bos=False, add_eos=False, emit_unk_piece=False)
            lost.update("".join(piece for piece, number in zip(pieces, ids, strict=True) if number == unknown))
        return lost

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def _ids(self, text: str) -> list[int]:
        if self._encoded[0] is not text:
            try:
                self._encoded = text, self._backend.encode(text, out_type=int, add_bos=False, add_eos=False)
            except BaseException as error:
                raise cannot_encode(error, self.path) from error
        return self._encoded[1]

    def _normalized(self, text: str) -> str:
        return self._backend.normalize(text).strip(SPACE).replace(SPACE, " ")

    def _control_pieces(self) -> dict[str, int]:
        """The pieces that no text gives."""
        return {self._backend.id_to_piece(i): i for i in range(self.vocab_size) if self._backend.is_control(i)}
