"""How a template writes roles, found from what it makes of conversations."""

from __future__ import annotations

import pytest

from sgl.lang.backends.native import written_template
from sgl.protocol.chat_template import ChatTemplate
from sgl.protocol.role_marks import chat_format

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{% for m in messages %}{{ bos_token if loop.first }}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set talk = messages[1:] %}{% else %}{% set system = none %}{% set talk = messages %}"
    "{% endif %}{% for m in talk %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] "
    "{% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}"
    "{{ m['content'] }} [/INST]{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else 'user' }}\n{{ m['content'] }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TALKS = [
    [("user", "q")],
    [("user", "q"), ("assistant", "a"), ("user", "r")],
    [("system", "s"), ("user", "q")],
    [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r")],
]


def written(source: str, talk: list[tuple[str, str]]) -> str:
    """The conversation piece by piece, with the marks that were found."""
    found = chat_format(ChatTemplate(source, "<s>", "</s>"), "<s>")
    assert found is not None
    template = written_template({"chat_format": found, "model_path": ""})
    said = list(talk)
    if said[0][0] != "system" and template.default_system_prompt is not None:
        said.insert(0, ("system", template.default_system_prompt))
    text, before = "", []
    for role, content in said:
        begin, end = template.marks(role, before)
        text += begin + content + end
        before.append({"role": role, "content": content})
    return text + template.marks("assistant", before)[0]


@pytest.mark.parametrize("talk", TALKS, ids=[" ".join(role for role, _ in t) for t in TALKS])
@pytest.mark.parametrize("source", [CHATML, LLAMA_3], ids=["chatml", "llama-3"])
def test_pieces_make_up_what_the_template_writes(source, talk):
    messages = [{"role": role, "content": content} for role, content in talk]
    whole = ChatTemplate(source, "<s>", "</s>").render(messages)
    assert written(source, talk) == whole.removeprefix("<s>")


def test_a_system_prompt_inside_of_the_first_question_is_found():
    found = chat_format(ChatTemplate(LLAMA_2, "<s>", "</s>"), "<s>")
    assert found is not None
    assert found["merges_system"] == ("<<SYS>>\n", "\n<</SYS>>\n\n")
    text = written(LLAMA_2, TALKS[2])
    assert text.startswith("[INST] <<SYS>>\ns\n<</SYS>>\n\nq [/INST]")


def test_a_template_without_system_prompts_has_the_others():
    assert written(GEMMA, TALKS[1]) == (
        "<start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n"
        "<start_of_turn>user\nr<end_of_turn>\n<start_of_turn>model\n"
    )


def test_a_template_that_says_things_twice_has_no_fixed_way():
    twice = "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}"
    assert chat_format(ChatTemplate(twice), "") is None
