"""Rows -> token ids and labels: the assistant's turns, or the completion."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from qvtune.config.data import LossOn
from qvtune.data import IGNORE_INDEX
from qvtune.data.chat import ChatTemplate, LabelledText
from qvtune.data.encode import Encoder, IdsAndLabels, whole_texts
from qvtune.data.rows import BadRowError, ChatRow, LabelledRow, PlainTextRow, Row, TextRow
from qvtune.errors import UserError


@dataclass(frozen=True)
class Document:
    """Tokens of a row, as ``PackedRow`` has them.

    ``truncated``: the row had more tokens. ``token_type_ids``: empty where the model has no types.
    """

    ids: list[int]
    labels: list[int]
    truncated: bool = False
    token_type_ids: list[int] = field(default_factory=list)


def tokenize_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, loss_on: LossOn
) -> list[list[Document] | BadRowError]:
    """Return the documents of each row, of any length, or why the row cannot be used.

    Conversation: rendered by the tokenizer's chat template. It is one document, unless the template changes earlier
    turns when later ones are added (Qwen3 and DeepSeek-R1 remove the thinking): then each answer is in a document that
    begins with what the model sees at inference. Where labels are, and what becomes of special tokens that a message
    spells out: ``ChatTemplate``. Labels are decoded and compared with the answers.

    Prompt and completion: tokens(prompt) + tokens(completion) + end of sequence, tokenized separately, because at
    inference the prompt is tokenized alone. Labels are on what follows the prompt, with ``all`` on the prompt, too.

    Text: its tokens and the end of sequence, all with labels.

    Special tokens that a prompt, a completion or a text spells out are special tokens.

    Raises UserError if the tokenizer or ``loss_on`` does not go with the rows.
    """
    _check(rows, tokenizer, loss_on)
    chats = [row for row in rows if isinstance(row, ChatRow)]
    texts = [row for row in rows if isinstance(row, TextRow | PlainTextRow)]
    of_chats = iter(_tokenize_chats(chats, tokenizer, loss_on) if chats else ())
    of_texts = iter(_tokenize_texts(texts, tokenizer, loss_on) if texts else ())
    return [next(of_chats) if isinstance(row, ChatRow) else next(of_texts) for row in rows]


def _check(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> None:
    for row in rows:
        if isinstance(row, LabelledRow):
            raise UserError(
                f"{row.place}: a text with a label is for task: sequence_classification, this is causal_lm; "
                "`format: text` trains on the text alone."
            )
        if isinstance(row, PlainTextRow) and loss_on not in ("answers", "all"):
            raise UserError(
                f"{row.place}: loss_on: {loss_on} cannot be: in rows of text every token is trained on; use all."
            )
        if isinstance(row, ChatRow) and not row.first_reply and loss_on == "completion":
            raise UserError(
                f"{row.place}: loss_on: completion needs rows with prompt and completion, this one has messages; use "
                "answers, last_answer or all."
            )
        if not isinstance(row, ChatRow) and tokenizer.eos_token_id is None:
            raise UserError(
                "The tokenizer has no eos_token, with which every completion must end. Set it in the model folder's "
                "tokenizer_config.json."
            )


def _tokenize_texts(
    rows: Sequence[TextRow | PlainTextRow], tokenizer: PreTrainedTokenizerBase, loss_on: LossOn
) -> list[list[Document]]:
    end = tokenizer.eos_token_id
    starts = [row.prompt if isinstance(row, TextRow) else row.text for row in rows]
    prompts = _ids_of(starts, tokenizer, add_special_tokens=True)
    ends = [row.completion if isinstance(row, TextRow) else "" for row in rows]
    completions = _ids_of(ends, tokenizer, add_special_tokens=False)
    documents = []
    for row, start, prompt, completion in zip(rows, starts, prompts, completions, strict=True):
        if prompt and prompt[-1] == end and not start.endswith(str(tokenizer.eos_token)):
            prompt = prompt[:-1]  # some tokenizers append it to each text
        ids = [*prompt, *completion, end]
        num_unlabelled = len(prompt) if isinstance(row, TextRow) and loss_on != "all" else 0
        documents.append([_document(ids, [IGNORE_INDEX] * num_unlabelled + ids[num_unlabelled:])])
    return documents


def _ids_of(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool) -> list[list[int]]:
    """As the tokenizer's own call; without the places of tokens in the text, which take half of its time."""
    if not tokenizer.is_fast:
        found: list[list[int]] = tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return found
    encoded = whole_texts(tokenizer).encode_batch_fast(texts, add_special_tokens=add_special_tokens)
    return [one.ids for one in encoded]


def _tokenize_chats(
    rows: Sequence[ChatRow], tokenizer: PreTrainedTokenizerBase, loss_on: LossOn
) -> list[list[Document] | BadRowError]:
    template, encoder = ChatTemplate(tokenizer), Encoder(tokenizer)
    texts: list[list[LabelledText] | BadRowError] = []
    for row in rows:
        try:
            texts.append(template.texts(row, loss_on))
        except BadRowError as reason:
            texts.append(reason)
        except RecursionError:
            texts.append(BadRowError("its messages are nested too deeply", "nested too deeply"))
    encoded = iter(encoder.encode([text for of_row in texts if isinstance(of_row, list) for text in of_row]))
    return [row if isinstance(row, BadRowError) else _documents([next(encoded) for _ in row]) for row in texts]


def _documents(encoded: Sequence[IdsAndLabels | BadRowError]) -> list[Document] | BadRowError:
    """A row is trained on as a whole or not at all."""
    documents = []
    for one in encoded:
        if isinstance(one, BadRowError):
            return one
        documents.append(_document(*one))
    return documents


def _document(ids: list[int], labels: list[int]) -> Document:
    if labels:
        labels[0] = IGNORE_INDEX  # there is no token before it to predict it from
    return Document(ids, labels)
