"""Texts with labelled ranges of characters -> tokens with labels, proved by decoding the labels again."""

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from qvtune.data import IGNORE_INDEX
from qvtune.data.chat import CUT, LabelledText, Span, num_shared
from qvtune.data.rows import BadRowError
from qvtune.errors import UserError

MAX_ADDED_TOKENS = 1000  # a regular expression of more of them (Gemma 3 has 6,000) takes longer than it saves
_GUARD = "\n"  # before a piece that continues a word: SentencePiece puts a space before what begins a text

IdsAndLabels = tuple[list[int], list[int]]


@dataclass
class _Piece:
    """A part of a text that is tokenized by itself: from one added token or ``CUT`` to the next.

    ``offsets``: the characters of each token in ``text``; only where a label border is inside the piece.
    """

    start: int
    text: str
    continues: bool  # a word that begins before a ``CUT``
    ids: list[int] = field(default_factory=list)
    offsets: list[Span] = field(default_factory=list)

    def has_border(self, spans: Sequence[Span]) -> bool:
        """Whether a span begins or ends inside."""
        end = self.start + len(self.text)
        return any(self.start < first < end or self.start < last < end for first, last in spans)

    def labelled(self, span: Span) -> slice:
        """The tokens that belong to a span of the whole text. Raises BadRowError for one that does so only in part."""
        first, last = span[0] - self.start, span[1] - self.start
        if first >= len(self.text) or last <= 0:
            return slice(0)
        if first <= 0 and last >= len(self.text):
            return slice(len(self.ids))
        low, high = bisect_left(self.offsets, (first,)), bisect_left(self.offsets, (last,))
        while low > 0 and self.offsets[low - 1][1] > first:
            low -= 1
        while low < high and not self._is_within(low, first, last):
            low += 1
        while high < len(self.offsets) and self._is_within(high, first, last):
            high += 1
        while high > low and not self._is_within(high - 1, first, last):
            high -= 1
        return slice(low, high)

    def _is_within(self, token: int, first: int, last: int) -> bool:
        """Whether a token belongs to the characters [first, last); only its white space may be outside."""
        start, end = self.offsets[token]
        if start == end:  # byte-level tokenizers may report white space as the empty range after it
            return first < start <= last
        if first <= start and end <= last:
            return True
        core = self.text[start:end].strip()
        if end <= first or last <= start or not core:
            return False
        core_start = self.text.index(core, start)
        core_end = core_start + len(core)
        if core_end <= first or last <= core_start:
            return False
        if first <= core_start and core_end <= last:
            return True
        raise BadRowError(
            f"the tokenizer joins {core!r} into one token, only a part of which is the assistant's text; the chat "
            "template must separate the assistant's text from its own by a special token or white space"
        )


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
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = tokenizer.split_special_tokens
        added = self._backend.get_added_tokens_decoder()
        self._added = {token.content: id for id, token in added.items()}
        longest_first = sorted(map(re.escape, self._added), key=len, reverse=True)
        self._border = re.compile(f"({'|'.join(longest_first)})") if self._works_by_parts(tokenizer) else None

    def encode(self, texts: Sequence[LabelledText]) -> list[IdsAndLabels | BadRowError]:
        """Token ids and labels of each text; BadRowError where the label tokens do not decode to exactly the spans."""
        pieces = [list(self._pieces(one.text)) for one in texts]
        self._tokenize(pieces, [one.spans for one in texts])
        found = list(map(_with_labels, pieces, texts))
        runs = [run for one in found if not isinstance(one, BadRowError) for run in one[2]]
        decoded = iter(self._backend.decode_batch(runs, skip_special_tokens=False))
        return [
            one if isinstance(one, BadRowError) else _proved(one[0], one[1], text, [next(decoded) for _ in text.spans])
            for one, text in zip(found, texts, strict=True)
        ]

    def _pieces(self, text: str) -> Iterator[_Piece]:
        start = 0
        for number, part in enumerate(text.split(CUT)):
            continues = number > 0
            for piece in self._border.split(part) if self._border else (part,):
                if piece:
                    yield _Piece(start, piece, continues)
                start, continues = start + len(piece), False
            start += len(CUT)

    def _tokenize(self, pieces: Sequence[Sequence[_Piece]], spans: Sequence[Sequence[Span]]) -> None:
        """Fill in the tokens of all pieces."""
        with_offsets: list[_Piece] = []
        others: list[_Piece] = []
        for parts, of_text in zip(pieces, spans, strict=True):
            for piece in parts:
                (with_offsets if piece.continues or piece.has_border(of_text) else others).append(piece)
        known = {text: [id] for text, id in self._added.items()} if self._border else {}
        unknown = list({piece.text: None for piece in others if piece.text not in known})
        tokens = self._backend.encode_batch_fast(unknown, add_special_tokens=False)
        known |= {text: found.ids for text, found in zip(unknown, tokens, strict=True)}
        for piece in others:
            piece.ids = known[piece.text]
        guarded = [_GUARD * piece.continues + piece.text for piece in with_offsets]
        tokens = self._backend.encode_batch(guarded, add_special_tokens=False)
        for piece, found in zip(with_offsets, tokens, strict=True):
            piece.ids, piece.offsets = found.ids, found.offsets
            if piece.continues:
                self._remove_guard(piece)

    def _remove_guard(self, piece: _Piece) -> None:
        guard = self._backend.encode(_GUARD, add_special_tokens=False).ids
        if piece.ids[: len(guard)] == guard:
            piece.ids = piece.ids[len(guard) :]
            piece.offsets = [(start - len(_GUARD), end - len(_GUARD)) for start, end in piece.offsets[len(guard) :]]
        else:  # the line break is joined with what follows it
            found = self._backend.encode(piece.text, add_special_tokens=False)
            piece.ids, piece.offsets = found.ids, found.offsets

    def _works_by_parts(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the text between two added tokens is tokenized as it would be alone."""
        added = self._backend.get_added_tokens_decoder().values()
        return (
            0 < len(added) <= MAX_ADDED_TOKENS
            and not tokenizer.split_special_tokens
            and not any(one.lstrip or one.rstrip or one.single_word or one.normalized for one in added)
            and "Metaspace" not in repr(self._backend.pre_tokenizer)
        )


def _with_labels(
    pieces: Sequence[_Piece], text: LabelledText
) -> tuple[list[int], list[int], list[list[int]]] | BadRowError:
    """Token ids, labels, and the label tokens of each span."""
    ids: list[int] = []
    labels: list[int] = []
    runs: list[list[int]] = [[] for _ in text.spans]
    for piece in pieces:
        of_piece = [IGNORE_INDEX] * len(piece.ids)
        for run, span in zip(runs, text.spans, strict=True):
            try:
                part = piece.labelled(span)
            except BadRowError as reason:
                return reason
            of_piece[part] = piece.ids[part]
            run += piece.ids[part]
        ids += piece.ids
        labels += of_piece
    return ids, labels, runs


def _proved(
    ids: list[int], labels: list[int], text: LabelledText, decoded: Sequence[str]
) -> IdsAndLabels | BadRowError:
    for (first, last), found in zip(text.spans, decoded, strict=True):
        expected = text.text[first:last].replace(CUT, "")
        if found != expected and _dense(found) != _dense(expected):
            return BadRowError(f"the tokens of an answer decode to another text: {_excerpt(found, expected)}")
    return ids, labels


def _dense(text: str) -> str:
    """Without what a tokenizer may change: white space at its special tokens, and how Unicode composes characters."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def _excerpt(found: str, expected: str) -> str:
    """Where the two begin to differ."""
    place = max(num_shared(found, expected) - 10, 0)
    return f"{found[place:][:30]!r} instead of {expected[place:][:30]!r}"
