"""Chat templates render as in transformers, refuse with a reason, and cannot run away."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import pytest

from sgl.errors import ConfigError, InvalidRequestError
from sgl.protocol.chat_template import ChatTemplate
from sgl.protocol.conversations import CONVERSATIONS
from sgl.protocol.template_sandbox import Meter

SMOLLM = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""  # noqa: E501
ALTERNATING = """{{ bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content + '\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' ~ (system if loop.first else '') ~ message.content | trim ~ ' [/INST]' }}
    {%- else %}
        {{- ' ' ~ message.content ~ eos_token }}
    {%- endif %}
{%- endfor %}"""
TOOLS = """{%- set ns = namespace(last=-1, found=false) %}
{%- macro describe(tool) %}{{ tool | tojson(indent=2) }}{% endmacro %}
{%- if tools %}
    {{- '# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}{{ describe(tool.function) }}
    {%- endfor %}
    {{- '\\n</tools>\\n' }}
{%- endif %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if not ns.found and message.role == 'user' %}
        {%- set ns.last = index %}{%- set ns.found = true %}
    {%- endif %}
{%- endfor %}
{%- for message in messages if message.role != 'skip' %}
    {%- if message.role == 'stop' %}{% break %}{% endif %}
    {{- '<' ~ message.role ~ ('*' if loop.index0 == ns.last else '') ~ '>' }}
    {%- if message.content is string %}
        {{- message.content.split('</think>')[-1].lstrip('\\n') }}
    {%- else %}
        {{- message.content | selectattr('type', 'equalto', 'text') | map(attribute='text')
            | join(', ') }}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '{"name": "%s", "arguments": %s}' % (call.function.name,
            call.function.arguments | tojson) }}
    {%- endfor %}
    {%- if not loop.last and loop.nextitem.role == message.role %}{{- '+' }}{% endif %}
    {%- generation %}{{ 'answer' if message.role == 'assistant' }}{% endgeneration %}
    {{- '\\n' }}
{%- else %}
    {{- 'nothing' }}
{%- endfor %}
{%- set text %}{{ 'é <&> "' | tojson }}{{ {'b': 1, 'a': [true, none]} | tojson }}{% endset %}
{{- text | replace('é', 'e') | indent(3) }} {{ loop is defined }} {{ '{:>4}'.format('x') }}
{{- '-'.join(['a', 'b']) ~ 'aXbX'.replace('X', '.', 1) ~ ['a'] * 2 ~ 'ab' * 2 ~ 2 ** 3 ~ 7 % 4 }}
{%- if enable_thinking is defined and enable_thinking is false %}<no think>{% endif %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
CHATS = [
    [{"role": "user", "content": "Hi <b> é 👩‍👧 & {{ 7 * 7 }}"}],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "  a\n"},
        {"role": "assistant", "content": "<think>x</think>\n\nb"},
        {"role": "user", "content": "c"},
    ],
]
RICH_CHATS = [
    *CHATS,
    [],
    [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "again"},
        {"role": "skip", "content": "?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": {"city": "Zürich"}}}],
        },
        {"role": "stop", "content": "unseen"},
        {"role": "user", "content": "unseen"},
    ],
]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"city": "<é>"}}}
ASKED = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": " Q "},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "R"},
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_templates_render_as_in_transformers():
    from transformers.utils.chat_template_utils import render_jinja_template

    cases = [(SMOLLM, CHATS, None), (ALTERNATING, CHATS, None), (TOOLS, RICH_CHATS, [WEATHER])]
    for source, chats, tools in cases:
        ours = ChatTemplate(source, "<s>", "</s>")
        for messages in chats:
            for add_generation_prompt in (False, True):
                [expected], _ = render_jinja_template(
                    [messages],
                    tools=tools,
                    chat_template=source,
                    add_generation_prompt=add_generation_prompt,
                    bos_token="<s>",
                    eos_token="</s>",
                    enable_thinking=False,
                )
                text = ours.render(messages, tools, add_generation_prompt, enable_thinking=False)
                assert text == expected


def test_the_embedded_models_template_gives_its_known_prompt():
    assert ChatTemplate(SMOLLM).render([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_message_is_text_and_never_a_program():
    template = ChatTemplate("{{ messages[0].content }}")
    assert template.render([{"role": "user", "content": "{{ 7 * 7 }}"}]) == "{{ 7 * 7 }}"


@pytest.mark.parametrize(
    ("source", "messages", "reason"),
    [
        (ALTERNATING, [{"role": "assistant", "content": "a"}], "Roles must alternate"),
        (SMOLLM, [{"role": "user", "content": None}], "concatenate"),
        (SMOLLM, [{"role": "user"}], "undefined|no attribute"),
        (SMOLLM, ["text"], "no attribute"),
        ("{{ messages[5].content.strip() }}", [], "undefined|no element"),
        ("{{ 1 // 0 }}", [], "zero"),
        ("{{ range(1000000) }}", [], "Range too big"),
        ("{{ 'x'.join() }}", [], "index"),
        ("{{ messages }}", [{"role": "user", "content": "\ud83d"}], "surrogate"),
        ("{{ ''.__class__.__mro__ }}", [], "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format(1).x.y }}", [], "unsafe"),
        ("{% set _ = messages.append(1) %}", [], "unsafe"),
    ],
)
def test_what_a_template_does_not_accept_is_the_clients_mistake(source, messages, reason):
    with pytest.raises(InvalidRequestError, match=reason):
        ChatTemplate(source).render(messages)


@pytest.mark.parametrize("name", ["messages", "bos_token", "raise_exception", "range"])
def test_arguments_cannot_replace_what_the_server_provides(name):
    with pytest.raises(InvalidRequestError, match=name):
        ChatTemplate("{{ bos_token }}").render([], **{name: "x"})


@pytest.mark.parametrize("source", ["{% for %}", "{{ 'a' | center(9) }}", "{% generation %}"])
def test_a_template_that_cannot_be_compiled_is_the_operators_mistake(source):
    with pytest.raises(ConfigError, match="--chat-template"):
        ChatTemplate(source)


DOUBLE = "{% set ns = namespace(x='abcdefgh') %}{% for i in range(60) %}BODY{% endfor %}"
HOSTILE = [
    "{{ 'a' * 10**8 }}",
    "{{ [0] * 10**9 }}",
    "{{ 3 ** 100000000 }}",
    "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
    "{{ 'a' * 10**6 | replace('', 'b' * 10**6) }}",
    "{{ range(100000) | join('b' * 10**6) }}",
    "{{ ('b' * 10**6).join(['a'] * 10**5) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ ('%s' * 10**5) % (('b' * 10**5,) * 10**5) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ ('a\\n' * 10**5) | indent(10**6) }}",
    "{{ messages | tojson(indent=10**9) }}",
    DOUBLE.replace("BODY", "{% set ns.x = ns.x ~ ns.x %}"),
    DOUBLE.replace("BODY", "{% set ns.x = ns.x + ns.x %}"),
    DOUBLE.replace("BODY", "{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}"),
    "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(9) }}",
    "{% for a in range(99999) %}{{ 'abcdefghijklmnopqrstuvwxyz' }}{% endfor %}",
]
ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% if a < 0 %}{% endif %}{% endfor %}"
    "{% endfor %}",
    "{% macro f(n) %}{% if n %}{% set a = f(n - 1) %}{% set b = f(n - 1) %}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
]


def num_resident_mib() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20


@pytest.mark.parametrize("source", HOSTILE)
def test_a_template_that_builds_too_much_is_cut_off(source):
    before = num_resident_mib()
    with pytest.raises(InvalidRequestError):
        ChatTemplate(source).render(CHATS[0])
    assert num_resident_mib() - before <= 64


@pytest.mark.parametrize("source", ENDLESS)
def test_a_template_that_does_not_end_is_cut_off(source):
    with pytest.raises(InvalidRequestError, match="longer than 2 s"):
        ChatTemplate(source).render(CHATS[0])


def test_memory_that_grows_step_by_step_is_noticed(monkeypatch):
    monkeypatch.setattr("sgl.protocol.template_sandbox.MEMORY_LIMIT", 16 << 20)
    source = (
        "{% set ns = namespace(kept=[]) %}{% set text = 'a' * 10**6 %}"
        "{% for i in range(9999) %}{% set ns.kept = ns.kept + [text[1:]] %}{% endfor %}"
    )
    with pytest.raises(InvalidRequestError, match="memory"):
        ChatTemplate(source).render([])


def test_the_limits_leave_room_for_long_conversations():
    messages = [{"role": "user", "content": "x" * 4000}, {"role": "assistant", "content": "y"}]
    text = ChatTemplate(ALTERNATING, "<s>", "</s>").render(messages * 500)
    assert len(text) > 2_000_000
    gathering = (
        "{% set ns = namespace(text='') %}{% for m in messages %}"
        "{% set ns.text = ns.text ~ m.content %}{% endfor %}{{ ns.text }}"
    )
    assert len(ChatTemplate(gathering).render(messages * 50)) == 50 * 4001


def test_threads_render_the_same_template_side_by_side():
    template, texts = ChatTemplate(SMOLLM), {}

    def render(name: str) -> None:
        messages = [{"role": "user", "content": name}] * 50
        texts[name] = {template.render(messages) for _ in range(20)}

    threads = [threading.Thread(target=render, args=(f"<{it}>",)) for it in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(seen) == 1 and name in next(iter(seen)) for name, seen in texts.items())


def test_a_meter_counts_down_what_may_be_shown():
    assert Meter(0).collect(["ab"] * 10) == "ab" * 10
    with pytest.raises(InvalidRequestError, match="too long"):
        Meter(0).collect(["ab"] * 500_001)


def test_strftime_now_gives_todays_date():
    year = ChatTemplate("{{ strftime_now('%Y') }}").render([])
    assert abs(int(year) - time.localtime().tm_year) <= 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "llama-2",
            "[INST] <<SYS>>\nS\n<</SYS>>\n\n Q  [/INST] A </s><s>[INST] R [/INST]",
        ),
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n Q <|im_end|>\n"
            "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nR<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        ("vicuna_v1.1", "S USER:  Q  ASSISTANT: A</s>USER: R ASSISTANT:"),
        (
            "llama_3_vision",
            "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nR<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
)
def test_built_in_formats_by_name(name, expected):
    template = ChatTemplate.load(name)
    assert template.render(ASKED) == expected
    assert template.needs_special_tokens


@pytest.mark.parametrize(
    ("name", "expected", "stop"),
    [
        ("chatml-llava", "<|im_start|>assistant\nSo", ("<|endoftext|>", "<|im_end|>")),
        ("llava_llama_3", "assistant<|end_header_id|>\n\nSo", ("<|end_of_text|>", "<|eot_id|>")),
        ("internlm2-chat", "<|im_start|>assistant\nSo", ("<|im_end|>", "<|action_end|>")),
        ("qwen2-vl", "<|im_start|>assistant\nSo", ("<|im_end|>",)),
        ("minicpmv", "<|im_start|>assistant\nSo", ("<|endoftext|>", "<|im_end|>")),
        ("vicuna_v1.1", "ASSISTANT: So", ()),
        ("llama-2", "[/INST] So", ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")),
    ],
)
def test_an_answer_that_was_begun_stands_where_a_whole_one_would(name, expected, stop):
    template = ChatTemplate.load(name)
    prompt = template.render(ASKED) + template.begin_answer("So")
    assert prompt.endswith(expected)
    whole = template.render([*ASKED, {"role": "assistant", "content": "So"}], None, False)
    assert whole.startswith(prompt)
    assert template.begin_answer("") == ""
    assert template.stop == stop


def test_a_format_that_brings_the_first_token_gets_no_second_one(tmp_path):
    keys = {
        "user": "U",
        "assistant": "A",
        "sep_style": "NO_COLON_SINGLE",
        "sep": "",
        "stop_str": [],
    }
    for number, first in enumerate(({"system": "<s>S"}, {"user": "<s>U"})):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(keys | first))
        assert not ChatTemplate.load(str(file), bos_token="<s>").needs_special_tokens
        assert ChatTemplate.load(str(file), bos_token="<bos>").needs_special_tokens
        assert ChatTemplate.load(str(file)).needs_special_tokens


def test_stop_strings_that_no_request_could_have_are_refused_at_the_start(tmp_path):
    keys = {"user": "U", "assistant": "A", "sep_style": "CHATML", "sep": "s"}
    for stop, reason in ((["x"] * 17, "at most 16"), ([""], "1 to 256"), ("x" * 257, "1 to 256")):
        (tmp_path / "mine.json").write_text(json.dumps(keys | {"stop_str": stop}))
        with pytest.raises(ConfigError, match=reason):
            ChatTemplate.load(str(tmp_path / "mine.json"))


def test_a_format_without_system_message_has_no_system_block():
    question = [{"role": "user", "content": "Q"}]
    assert ChatTemplate.load("llama-2").render(question) == "[INST] Q [/INST]"
    assert ChatTemplate.load("internlm2-chat").render(question).startswith("<|im_start|>user")
    assert "You are a helpful assistant." in ChatTemplate.load("chatml").render(question)
    silenced = [{"role": "system", "content": ""}, *question]
    assert ChatTemplate.load("chatml").render(silenced).startswith("<|im_start|>user")


def test_a_format_leaves_the_answer_open_only_when_asked():
    text = ChatTemplate.load("chatml").render(ASKED, add_generation_prompt=False)
    assert text.endswith("R<|im_end|>\n")


def test_every_built_in_format_places_images_or_refuses_them():
    parts = [{"type": "image_url", "image_url": {}}, {"type": "text", "text": "What is it?"}]
    for name, conversation in CONVERSATIONS.items():
        template = ChatTemplate.load(name)
        if conversation.image:
            text = template.render([{"role": "user", "content": parts}])
            assert conversation.image + "What is it?" in text
        else:
            with pytest.raises(InvalidRequestError, match="image_url"):
                template.render([{"role": "user", "content": parts}])


def test_formats_refuse_roles_and_tools_they_do_not_know():
    with pytest.raises(InvalidRequestError, match="not tool"):
        ChatTemplate.load("chatml").render([{"role": "tool", "content": "x"}])
    with pytest.raises(InvalidRequestError, match="no place for tools"):
        ChatTemplate.load("chatml").render(ASKED, [WEATHER])


def test_a_json_format_is_read_with_its_stop_strings(tmp_path):
    file = tmp_path / "mine.json"
    keys = {
        "name": "mine",
        "system": "<sys>",
        "user": "<usr>",
        "assistant": "<bot>",
        "sep_style": "CHATML",
        "sep": "{end}",
        "stop_str": ["{end}", "<usr>"],
    }
    file.write_text(json.dumps(keys))
    template = ChatTemplate.load(str(file))
    assert template.stop == ("{end}", "<usr>")
    assert template.render(ASKED[:2]) == "<sys>\nS{end}\n<usr>\n Q {end}\n<bot>\n"


@pytest.mark.parametrize("changed", [{"sep_style": "NO_SUCH"}, {"sep": 3}, {"user": None}])
def test_a_json_format_with_a_wrong_key_is_refused_with_its_file(tmp_path, changed):
    keys = {"user": "U", "assistant": "A", "sep_style": "CHATML", "sep": "s", "stop_str": "s"}
    (tmp_path / "mine.json").write_text(json.dumps(keys | changed))
    with pytest.raises(ConfigError, match=rf"mine\.json.*{next(iter(changed))}"):
        ChatTemplate.load(str(tmp_path / "mine.json"))


def test_a_jinja_file_is_read_as_it_is(tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ bos_token }}{{ messages[0].content }}\\n")
    template = ChatTemplate.load(str(tmp_path / "mine.jinja"), bos_token="<s>")
    assert template.render([{"role": "user", "content": "Hi"}]) == "<s>Hi\\n"
    assert template.stop == ()
    assert not template.needs_special_tokens


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path):
    for name in ("no-such", str(tmp_path)):
        with pytest.raises(ConfigError, match=r"vicuna_v1\.1"):
            ChatTemplate.load(name)
    with pytest.raises(ConfigError, match=r"there is no file /nowhere/x\.json"):
        ChatTemplate.load("/nowhere/x.json")


def test_templates_need_neither_torch_nor_transformers():
    script = (
        "import sys, sgl.protocol.chat_template\n"
        "sys.exit(len({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0
