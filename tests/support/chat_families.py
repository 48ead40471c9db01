"""Chat templates of model families, with tokenizers of their kind: for tests of what the loss covers.

The templates are written after the families' documented formats, as short as these allow; what matters here is how each
treats turns: which white space, which end token, what becomes of thinking, calls of tools and the system message.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qvtune.embedded.model import _gguf_file

Message = dict[str, Any]
CORPUS = [
    "The user asks what the answer of the assistant is, and it calls the function get_weather.",
    "hello world " * 9,
]


@dataclass(frozen=True)
class Family:
    """A chat template and what it is expected to make of a message.

    Attributes:
        answer: message of the assistant -> exactly what the model has to generate, with its end token.
        spoofs: the template's own strings, to be spelled out in messages.
        divides: whether a conversation with several answers can be several documents.
        max_calls: of tools in one message; 0 where the template has no tools.
        thinking: where thinking is given: in ``reasoning_content``, in ``content``, or both ways.
        always_thinks: the generation prompt opens the thinking.
    """

    name: str
    template: str
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    answer: Callable[[Message], str]
    spoofs: tuple[str, ...]
    divides: bool = False
    max_calls: int = 0
    json_arguments: bool = False
    thinking: tuple[str, ...] = ()
    always_thinks: bool = False

    def make_tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer = self.tokenizer()
        tokenizer.chat_template = self.template
        return tokenizer


@cache
def smollm2_fields() -> dict[str, Any]:
    """Tokenizer of the embedded SmolLM2-135M, read from its file."""
    from gguf import GGUFReader

    fields = GGUFReader(_gguf_file()).fields
    names = {
        "tokens": "tokenizer.ggml.tokens",
        "merges": "tokenizer.ggml.merges",
        "template": "tokenizer.chat_template",
    }
    return {name: [bytes(fields[key].parts[part]).decode() for part in fields[key].data] for name, key in names.items()}


def _added(tokenizer: Tokenizer, special: Sequence[str], others: Sequence[str] = (), strips: bool = False) -> None:
    for content in (*special, *others):
        token = AddedToken(content, normalized=False, lstrip=strips, rstrip=strips, special=content in special)
        tokenizer.add_special_tokens([token]) if token.special else tokenizer.add_tokens([token])


def byte_level(
    special: Sequence[str],
    others: Sequence[str] = (),
    *,
    end: str,
    start: str | None = None,
    digits: str = "{1,3}",
    normalizer: Any = None,
    strips: bool = False,
) -> PreTrainedTokenizerFast:
    """SmolLM2's vocabulary behind the pre-tokenizer of Llama 3 and Qwen, which joins line breaks and what is before."""
    fields = smollm2_fields()
    vocabulary = {token: id for id, token in enumerate(fields["tokens"])}
    backend = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in fields["merges"]]))
    words = rf"(?i:'(?:s|t|re|ve|m|ll|d))|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    rest = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"{words}|{rest}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    _added(backend, special, others, strips)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=start, eos_token=end)


def smollm2() -> PreTrainedTokenizerFast:
    """The real one: GPT-2's pre-tokenizer."""
    fields = smollm2_fields()
    vocabulary = {token: id for id, token in enumerate(fields["tokens"])}
    backend = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in fields["merges"]]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    _added(backend, fields["tokens"][:17])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )


def sentencepiece_like(
    special: Sequence[str], kind: str, *, end: str, others: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """BPE with byte fallback, in which a space is a character of a token.

    ``kind``: how spaces come before a text: ``prepend`` (Llama 2), ``metaspace`` (Mistral), ``none`` (Gemma).
    """
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spaces = [normalizers.Replace(" ", "▁")]
    if kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces])
    elif kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence(spaces)
    strip = [] if kind == "none" else [decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", *bytes_], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    _added(backend, ["<unk>", *special], others)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=special[0], eos_token=end, unk_token="<unk>")


def _calls(message: Message) -> list[tuple[str, str]]:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return [
        (call["name"], one if isinstance(one := call["arguments"], str) else json.dumps(one, ensure_ascii=False))
        for call in calls
    ]


# --- ChatML, as SmolLM2 has it -----------------------------------------------------------------------------------


def _plain(message: Message, end: str) -> str:
    return str(message["content"]) + end


# --- Llama 2 -----------------------------------------------------------------------------------------------------

LLAMA2 = """
{%- set first = 1 if messages[0]['role'] == 'system' else 0 %}
{%- for m in messages[first:] %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if m['role'] == 'user' %}
{%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' if loop.first and first else '' %}
{{- bos_token + '[INST] ' + (system + m['content']).strip() + ' [/INST]' }}
{%- else %}{{- ' ' + m['content'].strip() + ' ' + eos_token }}{%- endif %}
{%- endfor %}"""

# --- Llama 3.x ---------------------------------------------------------------------------------------------------

LLAMA3 = """
{%- set first = 1 if messages[0]['role'] == 'system' else 0 %}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + strftime_now('%d %b %Y') + '\\n\\n' }}
{{- messages[0]['content'] | trim if first else '' }}{{- '<|eot_id|>' }}
{%- for m in messages[first:] %}
{%- if m.tool_calls is defined %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one tool call at a time') }}{% endif %}
{%- set call = m.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson + '}<|eot_id|>' }}
{%- elif m.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content + '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
{%- if loop.first and tools %}{{- 'Functions you may call:\\n' + tools | tojson + '\\n\\n' }}{% endif %}
{{- m.content | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""


def _llama3(message: Message) -> str:
    for name, arguments in _calls(message):
        return f'{{"name": "{name}", "parameters": {arguments}}}<|eot_id|>'
    return message["content"].strip() + "<|eot_id|>"


# --- Mistral: system message and tools stand before the last question --------------------------------------------

MISTRAL = """
{%- set first = 1 if messages[0]['role'] == 'system' else 0 %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{{- bos_token }}
{%- for m in messages[first:] %}
{%- if m.role == 'user' %}
{%- set is_last = loop.index0 + first == ns.last %}
{%- if is_last and tools %}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST] ' + (messages[0].content + '\\n\\n' if is_last and first else '') + m.content + '[/INST]' }}
{%- elif m.tool_calls is defined %}
{{- '[TOOL_CALLS] [' }}
{%- for call in m.tool_calls %}
{{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}' }}
{{- ', ' if not loop.last else ']' + eos_token }}
{%- endfor %}
{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS] {"content": ' + m.content + '}[/TOOL_RESULTS]' }}
{%- else %}{{- ' ' + m.content + eos_token }}
{%- endif %}
{%- endfor %}"""


def _mistral(message: Message) -> str:
    calls = [f'{{"name": "{name}", "arguments": {arguments}}}' for name, arguments in _calls(message)]
    return f"[TOOL_CALLS] [{', '.join(calls)}]</s>" if calls else f" {message['content']}</s>"


# --- Qwen2.5 and Qwen3 -------------------------------------------------------------------------------------------

_QWEN_START = """
{%- set first = 1 if messages[0].role == 'system' else 0 %}
{%- set system = messages[0].content if first else default_system %}
{%- if tools %}{% set system = system + '\\n\\n# Tools\\n<tools>\\n' + tools | tojson + '\\n</tools>' %}{% endif %}
{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}
{%- for m in messages[first:] %}
{%- if m.role == 'tool' %}
{%- if loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
{%- elif m.role != 'assistant' %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- else %}"""
_QWEN_CALLS = """
{%- for call in m.tool_calls or [] %}
{{- '\\n' if body or not loop.first or break_first else '' }}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
QWEN25 = (
    "{%- set default_system = 'You are Qwen.' %}{% set break_first = false %}"
    + _QWEN_START
    + "{%- set body = m.content %}{{- '<|im_start|>assistant\\n' + body }}"
    + _QWEN_CALLS
)
QWEN3 = (
    """{%- set default_system = '' %}{% set break_first = false %}{% set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"""
    + _QWEN_START
    + """
{%- set body, thoughts = m.content, m.reasoning_content or '' %}
{%- if m.reasoning_content is not defined and '</think>' in body %}
{%- set thoughts = body.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set body = body.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 + first > ns.last and (loop.last or thoughts) %}
{%- set body = '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + body.lstrip('\\n') %}
{%- endif %}
{{- body }}"""
    + _QWEN_CALLS
)


def _thoughts_and_body(message: Message) -> tuple[str, str]:
    content = message["content"]
    if "reasoning_content" in message:
        return message["reasoning_content"], content
    thoughts, closed, body = content.partition("</think>")
    return (thoughts.partition("<think>")[2], body.lstrip("\n")) if closed else ("", content)


def _qwen(message: Message, thinks: bool) -> str:
    body = message["content"]
    if thinks:
        thoughts, body = _thoughts_and_body(message)
        stripped = thoughts.strip("\n")
        body = f"<think>\n{stripped}\n</think>\n\n" + body.lstrip("\n")
    for name, arguments in _calls(message):
        line_break = "\n" if body else ""
        body += f'{line_break}<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
    return f"{body}<|im_end|>"


# --- DeepSeek-R1: the thinking is removed from every answer, the last one included -------------------------------

R1 = """
{{- bos_token }}{% if messages[0].role == 'system' %}{{- messages[0].content }}{% endif %}
{%- set ns = namespace(after_tool=false) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.after_tool = false %}{{- '<｜User｜>' + m.content }}
{%- elif m.role == 'tool' %}{% set ns.after_tool = true %}
{{- '<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜><｜tool▁outputs▁end｜>' }}
{%- elif m.role == 'assistant' %}
{%- if not ns.after_tool %}{{- '<｜Assistant｜>' }}{% endif %}
{%- set ns.after_tool = false %}
{{- m.content.split('</think>')[-1] }}
{%- for call in m.tool_calls or [] %}
{{- '<｜tool▁calls▁begin｜>' if loop.first else '\\n' }}
{{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name + '\\n```json\\n' + call.function.arguments }}
{{- '\\n```<｜tool▁call▁end｜>' + ('<｜tool▁calls▁end｜>' if loop.last else '') }}
{%- endfor %}
{{- '<｜end▁of▁sentence｜>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not ns.after_tool %}{{- '<｜Assistant｜>' + opening }}{% endif %}"""


def _r1(message: Message, opening: str = "") -> str:
    calls = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"
        for name, arguments in _calls(message)
    ]
    block = "<｜tool▁calls▁begin｜>" + "\n".join(calls) + "<｜tool▁calls▁end｜>" if calls else ""
    return str(message["content"]).removeprefix(opening) + block + "<｜end▁of▁sentence｜>"


# --- Gemma 3 -----------------------------------------------------------------------------------------------------

GEMMA3 = """
{{- bos_token }}
{%- set first = 1 if messages[0].role == 'system' else 0 %}
{%- for m in messages[first:] %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{%- if loop.first and first %}{{- messages[0].content + '\\n\\n' }}{% endif %}
{{- m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""

# --- Phi-4: no line break after the header, and special tokens take the white space around them ------------------

PHI4 = """
{%- for m in messages %}{{- '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""

_CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA3_TOKENS = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>")
_MISTRAL_TOKENS = (
    "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)  # fmt: skip
_QWEN = partial(
    byte_level,
    _CHATML_TOKENS,
    ("<tool_call>", "</tool_call>", "<think>", "</think>"),
    end="<|im_end|>",
    digits="",
    normalizer=normalizers.NFC(),
)
_R1_WORDS = ("tool▁calls", "tool▁call", "tool▁outputs", "tool▁output")
_R1_TOKENS = partial(
    byte_level,
    ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    (
        "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁sep｜>",
        *(f"<｜{word}▁{place}｜>" for word in _R1_WORDS for place in ("begin", "end")),
    ),
    start="<｜begin▁of▁sentence｜>",
    end="<｜end▁of▁sentence｜>",
)  # fmt: skip
_R1_SPOOFS = ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
_GEMMA_TOKENS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")


FAMILIES = (
    "smollm2", "llama2", "llama3", "mistral", "qwen2.5", "qwen3", "deepseek-r1", "deepseek-r1, thinking opened",
    "gemma3", "phi4",
)  # fmt: skip


def family_of(name: str) -> Family:
    """One of ``FAMILIES``."""
    [found] = [family for family in _families() if family.name == name]
    return found


def _families() -> list[Family]:
    """SmolLM2's template is that of its own file."""
    qwen_spoofs = ("<|im_end|>", "<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n", "<tool_call>")
    return [
        Family(
            "smollm2",
            smollm2_fields()["template"][0],
            smollm2,
            partial(_plain, end="<|im_end|>"),
            ("<|im_end|>", "<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n", "<|endoftext|>"),
        ),
        Family(
            "llama2",
            LLAMA2,
            partial(sentencepiece_like, ("<s>", "</s>"), "prepend", end="</s>"),
            lambda message: f" {message['content'].strip()} </s>",
            ("[/INST]", " [/INST] ", "</s>", "<s>[INST] ", "<<SYS>>"),
        ),
        Family(
            "llama3",
            LLAMA3,
            partial(byte_level, _LLAMA3_TOKENS, start="<|begin_of_text|>", end="<|eot_id|>"),
            _llama3,
            ("<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|begin_of_text|>"),
            max_calls=1,
        ),
        Family(
            "mistral",
            MISTRAL,
            partial(sentencepiece_like, _MISTRAL_TOKENS, "metaspace", end="</s>"),
            _mistral,
            ("[/INST]", "</s>", "</s>[INST] ", "[TOOL_CALLS]"),
            divides=True,
            max_calls=2,
        ),
        Family("qwen2.5", QWEN25, _QWEN, partial(_qwen, thinks=False), qwen_spoofs, max_calls=2),
        Family(
            "qwen3",
            QWEN3,
            _QWEN,
            partial(_qwen, thinks=True),
            qwen_spoofs,
            divides=True,
            max_calls=2,
            thinking=("reasoning_content", "content"),
        ),
        Family(
            "deepseek-r1",
            R1.replace("opening", "''"),
            _R1_TOKENS,
            _r1,
            _R1_SPOOFS,
            divides=True,
            max_calls=2,
            json_arguments=True,
            thinking=("content",),
        ),
        Family(
            "deepseek-r1, thinking opened",
            R1.replace("opening", "'<think>\\n'"),
            _R1_TOKENS,
            partial(_r1, opening="<think>\n"),
            _R1_SPOOFS,
            divides=True,
            thinking=("content",),
            always_thinks=True,
        ),
        Family(
            "gemma3",
            GEMMA3,
            partial(
                sentencepiece_like,
                _GEMMA_TOKENS,
                "none",
                end="<end_of_turn>",
                others=("\n\n", "\n\n\n", "▁▁", "▁▁▁", *(f"<unused{number}>" for number in range(1000))),
            ),
            lambda message: message["content"].strip() + "<end_of_turn>",
            ("<end_of_turn>", "<start_of_turn>model\n", "<end_of_turn>\n<start_of_turn>user\n", "<eos>"),
        ),
        Family(
            "phi4",
            PHI4,
            partial(
                byte_level,
                ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"),
                start="<|endoftext|>",
                end="<|im_end|>",
                strips=True,
            ),
            lambda message: message["content"].rstrip() + "<|im_end|>",
            ("<|im_end|>", "<|im_start|>assistant<|im_sep|>", "<|im_sep|>", "<|endoftext|>"),
        ),
    ]
