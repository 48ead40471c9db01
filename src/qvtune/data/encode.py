"""Texts with labelled ranges of characters -> tokens with labels, proved by decoding the labels again."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from qvtune.data import IGNORE_INDEX
from qvtune.data.chat import CUT, LabelledText, Span, num_shared
from qvtune.data.rows import BadRowError
from qvtune.errors import UserError

MAX_ADDED_TOKENS = 1000  # a regular expression of more of them (Gemma 3 has 6,000) takes longer than it saves

IdsAndLabels = tuple[list[int], list[int]]


class Piece:
    """A part of a text that is tokenized by itself: from one added token or ``CUT`` to the next.

    Attributes:
        start, end: its place in the whole text.
        continues: a word that begins before a ``CUT``.
        ids: its tokens.
        first_tokens: a label border inside the piece -> index of the first token after it, where that is known.
        encoding: which characters the tokens cover, where it is not.
    """

    __slots__ = ("continues", "encoding", "end", "first_tokens", "ids", "start", "text")

    def __init__(self, start: int, text: str, continues: bool) -> None:
        self.start, self.end, self.text, self.continues = start, start + len(text), text, continues
        self.ids: list[int] = []
        self.first_tokens: dict[int, int] = {}
        self.encoding: Any = None  # tokenizers.Encoding

    def borders(self, spans: Sequence[Span]) -> list[int]:
        """Where a span begins or ends inside."""
        return [border for span in spans for border in span if self.start < border < self.end]

    def labelled(self, span: Span) -> slice:
        """The tokens of a span that overlaps the piece, and a token that is in part before it."""
        first, last = span
        return slice(
            self._first_token(first) if first > self.start else 0,
            self._first_token(last) if last < self.end else len(self.ids),
        )

    def _first_token(self, border: int) -> int:
        """Index of the first token of what begins at ``border``, a place inside the piece."""
        if border in self.first_tokens:
            return self.first_tokens[border]
        assert self.encoding is not None  # no piece with a border follows a ``CUT``
        first = border - self.start
        tokens = map(self.encoding.char_to_token, range(first, len(self.text)))
        index: int = next((token for token in tokens if token is not None), len(self.ids))
        while index > 0:  # byte-level tokenizers may report white space as the empty range after it
            start, end = self.encoding.token_to_chars(index - 1) or (0, 0)
            if start < end or start <= first:
                break
            index -= 1
        return index


class _Encoded:
    """Tokens and labels of a text.

    Attributes:
        runs: the label tokens of each span; ``decoded``: what they decode to; ``expected``: the characters of the span.
    """

    def __init__(self, pieces: Sequence[Piece], text: LabelledText) -> None:
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.runs: list[list[int]] = [[] for _ in text.spans]
        self.decoded: list[str] = []
        self.expected = [text.text[first:last].replace(CUT, "") for first, last in text.spans]
        for piece in pieces:
            for run, span in zip(self.runs, text.spans, strict=True):
                if span[0] < piece.end and piece.start < span[1]:
                    part = piece.labelled(span)
                    self.labels += [IGNORE_INDEX] * (len(self.ids) + part.start - len(self.labels))
                    self.labels += piece.ids[part]
                    run += piece.ids[part]
            self.ids += piece.ids
        self.labels += [IGNORE_INDEX] * (len(self.ids) - len(self.labels))

    def proved(self) -> IdsAndLabels | BadRowError:
        for decoded, expected in zip(self.decoded, self.expected, strict=True):
            if _dense(decoded) != _dense(expected):
                place = max(num_shared(decoded, expected) - 10, 0)
                found, wanted = decoded[place:][:30], expected[place:][:30]
                reason = f"the tokens of an answer decode to {found!r} instead of {wanted!r}"
                return BadRowError(reason, "tokens of an answer that decode to another text")
        return self.ids, self.labels


class Encoder:
    """A fast tokenizer for texts that hold their special tokens already, as rendered chat templates do.

    Tokens are those of ``tokenizer(text, add_special_tokens=False)``, but for ``CUT``. A part between two added tokens
    is tokenized once for all texts of a call, if the tokenizer would tokenize it by itself anyway.

    Raises UserError if the tokenizer does not tell which characters a token covers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"The tokenizer ({type(tokenizer).__name__}) does not tell which characters a token covers, which the "
                "label mask of conversations needs. Put a tokenizer.json into the model folder."
            )
        self._backend = whole_texts(tokenizer)
        added = self._backend.get_added_tokens_decoder()
        self._added = {token.content: id for id, token in added.items()}
        longest_first = sorted(map(re.escape, self._added), key=len, reverse=True)
        self._border = re.compile(f"({'|'.join(longest_first)})") if self._works_by_parts(tokenizer) else None

    def encode(self, texts: Sequence[LabelledText]) -> list[IdsAndLabels | BadRowError]:
        """Token ids and labels of each text; BadRowError where the label tokens do not decode to exactly the spans.

        Where a token would be in a span only in part, the text is tokenized in parts: at inference the prompt is
        tokenized by itself, too.
        """
        texts = [_cut_at_borders(one) if CUT in one.text else one for one in texts]
        encoded = self._encode(texts)
        inexact = [index for index, one in enumerate(encoded) if not all(map(_is_exact, one.decoded, one.expected))]
        again = self._encode([_cut_at_borders(texts[index]) for index in inexact])
        found: list[IdsAndLabels | BadRowError] = [(one.ids, one.labels) for one in encoded]
        for index, one in zip(inexact, again, strict=True):
            found[index] = one.proved()
        return found

    def _encode(self, texts: Sequence[LabelledText]) -> list[_Encoded]:
        pieces = [list(self._pieces(one.text)) for one in texts]
        self._tokenize(pieces, [one.spans for one in texts])
        encoded = list(map(_Encoded, pieces, texts))
        decoded = iter(
            self._backend.decode_batch([run for one in encoded for run in one.runs], skip_special_tokens=False)
        )
        for one in encoded:
            one.decoded = [next(decoded) for _ in one.runs]
        return encoded

    def _pieces(self, text: str) -> Iterator[Piece]:
        start = 0
        for number, part in enumerate(text.split(CUT)):
            continues = number > 0
            for piece in self._border.split(part) if self._border else (part,):
                if piece:
                    yield Piece(start, piece, continues)
                start, continues = start + len(piece), False
            start += len(CUT)

    def _tokenize(self, pieces: Sequence[Sequence[Piece]], spans: Sequence[Sequence[Span]]) -> None:
        """Fill in the tokens of all pieces."""
        divided: list[tuple[Piece, list[int]]] = []
        others: list[Piece] = []
        for parts, of_text in zip(pieces, spans, strict=True):
            for piece in parts:
                if piece.continues:
                    piece.ids = self._continued(piece.text)
                elif borders := piece.borders(of_text):
                    divided.append((piece, borders))
                else:
                    others.append(piece)
        known = {text: [id] for text, id in self._added.items()} if self._border else {}
        unknown = list({piece.text: None for piece in others if piece.text not in known})
        tokens = self._backend.encode_batch_fast(unknown, add_special_tokens=False)
        known |= {text: found.ids for text, found in zip(unknown, tokens, strict=True)}
        for piece in others:
            piece.ids = known[piece.text]
        self._tokenize_divided(divided)

    def _tokenize_divided(self, divided: Sequence[tuple[Piece, list[int]]]) -> None:
        """Most answers follow a short opening, such as ``assistant`` and a line break.

        Where a piece begins with the tokens that its opening has alone, the next token is the first of the answer. The
        others take twice the time, for the places of the tokens in the text.
        """
        openings = [piece.text[: borders[0] - piece.start] if len(borders) == 1 else "" for piece, borders in divided]
        different = list(dict.fromkeys(openings))
        alone = dict(zip(different, self._backend.encode_batch_fast(different, add_special_tokens=False), strict=True))
        tokens = self._backend.encode_batch_fast([piece.text for piece, _ in divided], add_special_tokens=False)
        rest = []
        for (piece, borders), opening, found in zip(divided, openings, tokens, strict=True):
            first = alone[opening].ids
            if first and found.ids[: len(first)] == first:
                piece.ids, piece.first_tokens = found.ids, {borders[0]: len(first)}
            else:
                rest.append(piece)
        for piece, found in zip(
            rest, self._backend.encode_batch([one.text for one in rest], add_special_tokens=False), strict=True
        ):
            piece.ids, piece.encoding = found.ids, found

    def _continued(self, text: str) -> list[int]:
        """Tokens of what follows a ``CUT``: without the space that SentencePiece puts before what begins a text."""
        guard, guarded, alone = (
            found.ids for found in self._backend.encode_batch(["\n", "\n" + text, text], add_special_tokens=False)
        )
        starts_with_guard: bool = guarded[: len(guard)] == guard  # else the line break was joined with what follows it
        return list(guarded[len(guard) :] if starts_with_guard else alone)

    def _works_by_parts(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the text between two added tokens is tokenized as it would be alone."""
        added = self._backend.get_added_tokens_decoder().values()
        return (
            0 < len(added) <= MAX_ADDED_TOKENS
            and not tokenizer.split_special_tokens
            and not any(one.lstrip or one.rstrip or one.single_word or one.normalized for one in added)
            and "Metaspace" not in repr(self._backend.pre_tokenizer)
        )


def whole_texts(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The ``tokenizers.Tokenizer`` of a fast tokenizer, set to neither truncate nor pad."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def _cut_at_borders(text: LabelledText) -> LabelledText:
    borders = [0, *(border for span in text.spans for border in span), len(text.text)]
    parts = [text.text[start:end] for start, end in pairwise(borders)]
    places = list(accumulate(len(part) + len(CUT) for part in parts))  # where the parts after the first begin
    return LabelledText(
        CUT.join(parts), [(start, end - len(CUT)) for start, end in zip(places[::2], places[1::2], strict=False)]
    )


def _is_exact(decoded: str, expected: str) -> bool:
    """SentencePiece decodes the first token without its space."""
    return decoded == expected or " " + decoded == expected


def _dense(text: str) -> str:
    """Without what a tokenizer may change: white space at its special tokens, and how Unicode composes characters."""
    return "".join(unicodedata.normalize("NFKC", text).split())
