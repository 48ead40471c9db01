import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from qvtune.config.data import LossOn
from qvtune.data import IGNORE_INDEX
from qvtune.data.rows import BadRowError, ChatRow, LabelledRow, PlainTextRow, Row, TextRow
from qvtune.data.tokenize import Document, tokenize_rows
from qvtune.errors import UserError


def chat(*turns: str, first_reply: int = 0) -> ChatRow:
    """Alternate user and assistant."""
    roles = ("user", "assistant")
    messages = tuple({"role": roles[index % 2], "content": text} for index, text in enumerate(turns))
    return ChatRow("rows.jsonl:7", messages, first_reply)


def documents_of(row: Row, tokenizer: PreTrainedTokenizerFast, loss_on: LossOn = "answers") -> list[Document]:
    [documents] = tokenize_rows([row], tokenizer, loss_on)
    assert isinstance(documents, list), documents
    for document in documents:
        assert len(document.ids) == len(document.labels)
        assert all(label in (IGNORE_INDEX, token) for token, label in zip(document.ids, document.labels, strict=True))
    return documents


def tokenized(row: Row, tokenizer: PreTrainedTokenizerFast, loss_on: LossOn = "answers") -> Document:
    [document] = documents_of(row, tokenizer, loss_on)
    return document


def refusal(row: Row, tokenizer: PreTrainedTokenizerFast, loss_on: LossOn = "answers") -> str:
    [reason] = tokenize_rows([row], tokenizer, loss_on)
    assert isinstance(reason, BadRowError)
    return str(reason)


def learned_texts(document: Document, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Decode each run of tokens that have a label."""
    runs: list[list[int]] = [[]]
    for label in document.labels:
        if label == IGNORE_INDEX:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]


def test_learned_are_the_answers_with_their_end_of_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    document = tokenized(chat("hello", "world", "What?", "It does é 😀."), tokenizer)
    assert tokenizer.decode(document.ids) == (
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        "world<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nIt does é 😀.<|im_end|>\n"
    )
    assert learned_texts(document, tokenizer) == ["world<|im_end|>", "It does é 😀.<|im_end|>"]


def test_tokens_equal_those_of_apply_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    row = chat("What does it do?", "hello  world\n", "again", "  it says")
    expected = tokenizer.apply_chat_template(list(row.messages), return_dict=False)
    assert tokenized(row, tokenizer).ids == expected


def test_context_replies_are_not_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    document = tokenized(chat("a", "context", "b", "learned", first_reply=3), tokenizer)
    assert learned_texts(document, tokenizer) == ["learned<|im_end|>"]


def test_an_answer_that_repeats_header_and_question_is_masked_by_place(tokenizer: PreTrainedTokenizerFast) -> None:
    document = tokenized(chat("assistant", "assistant", "assistant"), tokenizer)
    assert learned_texts(document, tokenizer) == ["assistant<|im_end|>"]


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_white_space_at_the_boundary(trim_offsets: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    document = tokenized(chat("hello", "   hello  world  "), tokenizer)
    assert learned_texts(document, tokenizer) == ["   hello  world  <|im_end|>"]


def test_without_an_end_token_the_line_breaks_that_end_the_turn_are_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    document = tokenized(chat("hello", "world", "hello"), tokenizer)
    assert learned_texts(document, tokenizer) == [" world\n\n"]


def test_a_token_across_the_border_is_divided_as_at_inference(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'assistantwor' if m['role'] == 'assistant' else '' }}{{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistantwor' }}{% endif %}"
    )
    tokenizer.add_tokens(["world"])
    row = chat("hello", "ld")
    assert tokenizer.convert_tokens_to_ids("world") in tokenizer("assistantworld")["input_ids"]
    document = tokenized(row, tokenizer)
    assert learned_texts(document, tokenizer) == ["ld"]
    prompt = tokenizer.apply_chat_template(list(row.messages[:1]), add_generation_prompt=True, return_dict=False)
    assert document.ids[: len(prompt)] == prompt
    assert set(document.labels[: len(prompt)]) == {IGNORE_INDEX}


def test_a_template_that_rewrites_earlier_turns_gives_one_document_per_answer(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ 'thinking' }}{% endif %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    )
    assert learned_texts(tokenized(chat("hello", "world"), tokenizer), tokenizer) == ["thinkingworld"]
    row = chat("hello", "world", "hello", "it", "what")
    documents = documents_of(row, tokenizer)
    assert [learned_texts(document, tokenizer) for document in documents] == [["thinkingworld"], ["thinkingit"]]
    for document, end in zip(documents, (1, 3), strict=True):
        context = document.ids[: document.labels.count(IGNORE_INDEX)]
        assert context == tokenizer.apply_chat_template(
            list(row.messages[:end]), add_generation_prompt=True, return_dict=False
        )


def test_a_row_that_the_template_refuses_is_a_bad_row(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert refusal(chat("a", "b"), tokenizer) == "the tokenizer's chat template refuses it: roles must alternate"


def test_templates_see_the_same_date_every_day(tokenizer: PreTrainedTokenizerFast) -> None:
    expected = tokenized(chat("a", "b"), tokenizer)
    tokenizer.chat_template = " {% if strftime_now is defined %}\n{{ strftime_now('%d %b %Y') }}{% endif %}" + str(
        tokenizer.chat_template
    )
    document = tokenized(chat("a", "b"), tokenizer)
    assert tokenizer.decode(document.ids) == "26 Jul 2024" + tokenizer.decode(expected.ids)


@pytest.mark.parametrize("start", ["", "\n", " ", "\n\n  ", "  {% set x = 1 %}\n\n", "{%- set x = 1 %} "])
def test_the_fixed_date_leaves_the_rest_of_the_template_alone(start: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = start + str(tokenizer.chat_template)
    row = chat("a", "b")
    expected = tokenizer.apply_chat_template(list(row.messages), tokenize=False)
    assert tokenizer.decode(tokenized(row, tokenizer).ids) == expected


def test_a_tokenizer_without_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        tokenize_rows([chat("a", "b")], tokenizer, "answers")


def test_text_rows_are_prompt_completion_and_end(tokenizer: PreTrainedTokenizerFast) -> None:
    document = tokenized(TextRow("rows.jsonl:1", "hello", " world"), tokenizer)
    prompt, completion = tokenizer("hello")["input_ids"], tokenizer(" world")["input_ids"]
    assert document.ids == [*prompt, *completion, tokenizer.eos_token_id]
    assert document.labels == [IGNORE_INDEX] * len(prompt) + [*completion, tokenizer.eos_token_id]


def test_text_rows_begin_as_the_tokenizer_begins_and_end_once(tokenizer: PreTrainedTokenizerFast) -> None:
    end = "<|im_end|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<|im_start|> $A {end}", special_tokens=[("<|im_start|>", 1), (end, 2)]
    )
    document = tokenized(TextRow("rows.jsonl:1", "hello", " world"), tokenizer)
    assert tokenizer.decode(document.ids) == "<|im_start|>hello world<|im_end|>"
    assert learned_texts(document, tokenizer) == [" world<|im_end|>"]


def test_an_empty_prompt_leaves_the_first_token_without_a_label(tokenizer: PreTrainedTokenizerFast) -> None:
    document = tokenized(TextRow("rows.jsonl:1", "", "hello"), tokenizer)
    assert document.labels == [IGNORE_INDEX, *document.ids[1:]]


def test_text_rows_need_an_end_of_sequence(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no eos_token"):
        tokenize_rows([TextRow("rows.jsonl:1", "hello", " world")], tokenizer, "answers")


def test_rows_of_text_have_labels_on_every_token(tokenizer: PreTrainedTokenizerFast) -> None:
    row = PlainTextRow("rows.jsonl:1", "hello <|im_start|> world")
    document = tokenized(row, tokenizer)
    assert tokenizer.decode(document.ids) == "hello <|im_start|> world<|im_end|>"
    assert document.labels == [IGNORE_INDEX, *document.ids[1:]]
    assert document.ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 1
    assert tokenized(row, tokenizer, "all") == document


@pytest.mark.parametrize(
    ("loss_on", "learned"),
    [
        ("answers", ["b<|im_end|>", "d<|im_end|>"]),
        ("last_answer", ["d<|im_end|>"]),
        ("completion", ["b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>"]),
    ],
)
def test_loss_on_parts_of_a_conversation(
    loss_on: LossOn, learned: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    document = tokenized(chat("x", "y", "a", "b", "c", "d", first_reply=3), tokenizer, loss_on)
    assert learned_texts(document, tokenizer) == learned


@pytest.mark.parametrize("row", [chat("a", "b", "c"), TextRow("rows.jsonl:1", "hello", " world")])
def test_loss_on_all_tokens_but_the_first(row: Row, tokenizer: PreTrainedTokenizerFast) -> None:
    document = tokenized(row, tokenizer, "all")
    assert document.ids == tokenized(row, tokenizer).ids
    assert document.labels == [IGNORE_INDEX, *document.ids[1:]]


@pytest.mark.parametrize("loss_on", ["last_answer", "completion"])
def test_a_completion_is_the_answer(loss_on: LossOn, tokenizer: PreTrainedTokenizerFast) -> None:
    for row in (TextRow("rows.jsonl:1", "hello", " world"), chat("a", "b", first_reply=1)):
        assert tokenized(row, tokenizer, loss_on) == tokenized(row, tokenizer)


@pytest.mark.parametrize(
    ("row", "loss_on", "message"),
    [
        (chat("a", "b"), "completion", r"rows\.jsonl:7: loss_on: completion needs rows with prompt and completion"),
        (PlainTextRow("rows.jsonl:1", "a"), "last_answer", r"rows\.jsonl:1: loss_on: last_answer cannot be"),
        (PlainTextRow("rows.jsonl:1", "a"), "completion", "every token is trained on; use all"),
        (LabelledRow("rows.jsonl:1", "a", None, "0"), "answers", "task: sequence_classification"),
    ],
)
def test_loss_on_that_does_not_go_with_the_rows(
    row: Row, loss_on: LossOn, message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match=message):
        tokenize_rows([row], tokenizer, loss_on)


def test_rows_of_all_kinds_keep_their_order(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [TextRow("1", "a", "b"), chat("c", "d"), PlainTextRow("3", "e"), chat("f", "g"), TextRow("5", "h", "i")]
    together = tokenize_rows(rows, tokenizer, "answers")
    assert together == [tokenize_rows([row], tokenizer, "answers")[0] for row in rows]
