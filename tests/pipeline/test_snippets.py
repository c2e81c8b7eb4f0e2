"""Code of SGLang's own README and notebook runs here as it is written, with SmolLM2.

Only what differs between installations is changed: the package's name, the port and the model.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_apis import FakeApi, colours_seen, running
from PIL import Image
from pipeline.server import ROOT, can_bind, free_port
from snippets.notebook import NOTEBOOK
from snippets.readme import README

import sgl
from sgl.model_files import demo_model_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

OWN_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
HELPFUL = "You are a helpful assistant."
TALK = ["system", "user", "assistant", "user", "assistant"]
LINE = "#" * 50 + "\n"

Names = dict[str, Any]


def adapted(code: str, port: int) -> str:
    """For this package, this server and this model."""
    code = code.replace("import sglang as sgl", "import sgl").replace("sglang", "sgl")
    code = re.sub(r"\b(30000|30333)\b", str(port), code)
    return re.sub(r"(meta-llama|Qwen)/[\w.-]+", demo_model_path(), code)


def execute(code: str, port: int, names: Names) -> None:
    exec(compile(adapted(code, port), "<snippet>", "exec"), names)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of a server that the notebook's first cell starts and its last one ends.

    Its threads sleep where they wait for each other: on cores that others use as well, those that
    spin keep the one that they wait for from running, and an answer takes several times as long.
    """
    port, names = free_port(), Names()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("GOMP_SPINCOUNT", "0")
        try:
            execute(NOTEBOOK["server"], port, names)
            yield port
        finally:
            execute(NOTEBOOK["terminate"], port, names)
    assert names["server_process"].returncode == 0
    assert can_bind(port)


@pytest.fixture(autouse=True)
def _default_backend(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs find the server, and those of other modules do not."""
    endpoint = sgl.RuntimeEndpoint(f"http://localhost:{port}")
    monkeypatch.setattr(sgl.global_config, "default_backend", endpoint)


@pytest.fixture
def no_backend(_default_backend: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sgl.global_config, "default_backend", None)


def readme(name: str, port: int, **names: Any) -> Names:
    """What a snippet defines, after `import sglang as sgl`."""
    execute(README["import"] + README[name], port, names)
    return names


def notebook(name: str, port: int, **names: Any) -> Names:
    """What a cell defines, after all that the cells before it import."""
    found = Names()
    earlier = takewhile(lambda other: other != name, NOTEBOOK)
    lines = [line for cell in earlier for line in ast.parse(NOTEBOOK[cell]).body]
    imports = [line for line in lines if isinstance(line, ast.Import | ast.ImportFrom)]
    execute("\n".join(map(ast.unparse, imports)), port, found)
    found |= names
    execute(NOTEBOOK[name], port, found)
    return found


def regex_of(code: str) -> str:
    return re.findall(r'regex=r"(.*)"', code)[0]


def said(state: Any) -> list[str]:
    return [message["content"] for message in state.messages()]


def roles(state: Any) -> list[str]:
    return [message["role"] for message in state.messages()]


def num_tokens(state: Any, name: str) -> int:
    return state.get_meta_info(name)["completion_tokens"]


def shown(state: Any) -> str:
    """What the snippets print of messages."""
    return "".join(f"{each['role']} : {each['content']}\n" for each in state.messages())


def test_readme_curl(port):
    command = adapted(README["curl"], port)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["text"].strip()
    meta = answer["meta_info"]
    assert meta["completion_tokens"] == 16
    assert meta["prompt_tokens"] == 5
    assert meta["finish_reason"] == {"type": "length", "length": 16}


def test_readme_openai(port):
    """The server of a model that writes refuses what comes last in it, a vector of a text."""
    printed: list[Any] = []
    with pytest.raises(openai.BadRequestError, match="--is-embedding"):
        readme("openai", port, print=printed.append)
    completion, chat = printed
    assert completion.object == "text_completion"
    assert "Paris" in completion.choices[0].text
    assert 0 < completion.usage.completion_tokens <= 32
    assert chat.object == "chat.completion"
    assert chat.choices[0].message.role == "assistant"
    assert chat.choices[0].message.content
    assert chat.choices[0].finish_reason in ("stop", "length")
    assert 0 < chat.usage.completion_tokens <= 64
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens


def test_readme_engine(port, tmp_path):
    script = tmp_path / "engine.py"
    script.write_text(adapted(README["engine"], port), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    begin, *answers = re.split(r"^={31}\n", done.stdout, flags=re.MULTILINE)
    prompts = re.findall(r'^        "(.*)",$', README["engine"], re.MULTILINE)
    assert begin == ""
    assert len(answers) == len(prompts) == 4
    for prompt, answer in zip(prompts, answers, strict=True):
        head = f"Prompt: {prompt}\nGenerated text: "
        assert answer.startswith(head)
        assert answer.removeprefix(head).strip()


@pytest.mark.usefixtures("no_backend")
def test_readme_local_models(port, capsys):
    first, second = talked(readme("local_models", port)["state"], capsys.readouterr().out)
    assert second["cached_tokens"] >= first["prompt_tokens"]


@pytest.mark.usefixtures("no_backend")
def test_readme_openai_models(port, capsys, monkeypatch):
    """This server, as if it were OpenAI's."""
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    first, second = talked(readme("openai_models", port)["state"], capsys.readouterr().out)
    assert second["prompt_tokens"] > first["prompt_tokens"] + first["completion_tokens"]


def talked(state: Any, printed: str) -> list[Names]:
    """What was told with the two answers."""
    assert roles(state) == TALK
    answers = [state["answer_1"], state["answer_2"]]
    assert said(state) == [
        *(HELPFUL, "What is the capital of the United States?", answers[0].lstrip()),
        *("List two local attractions.", answers[1].lstrip()),
    ]
    assert printed == shown(state) + answers[0] + "\n"
    told = [state.get_meta_info(name) for name in ("answer_1", "answer_2")]
    assert all(0 < one["completion_tokens"] <= 256 for one in told)
    return told


@pytest.mark.parametrize("tool", ["calculator", "search engine"])
def test_readme_control_flow(port, tool):
    """A question for each of its branches."""
    question, asked, name, other = {
        "calculator": ("7 times 9", "The math expression is", "expression", "word"),
        "search engine": ("the newest phone", "The key word to search is", "word", "expression"),
    }[tool]
    question = f"What is {question}?"
    state = readme("control_flow", port)["tool_use"].run(question)
    assert state["tool"] == tool
    assert state.text() == (
        f"To answer this question: {question}. I need to use a {tool}. {asked}{state[name]}"
    )
    assert other not in state
    assert num_tokens(state, name) <= 128
    assert len(state.get_meta_info("tool")["normalized_prompt_logprobs"]) == 2
    assert state.messages() == []


def test_readme_parallelism(port):
    state = readme("parallelism", port)["tip_suggestion"].run()
    begin = "Here are two tips for staying healthy: 1. Balanced Diet. 2. Regular Exercise.\n\n"
    text = state.text().removesuffix(f"In summary{state['summary']}")
    tips = re.fullmatch(re.escape(begin) + r"Tip 1:(.*)\nTip 2:(.*)\n", text, re.DOTALL)
    assert tips is not None
    assert all(tip and "\n\n" not in tip for tip in tips.groups())
    assert "detailed_tip" not in state  # it was read from the copies, which were not joined
    assert num_tokens(state, "summary") <= 128


def test_readme_constrained_decoding(port):
    program = readme("constrained_decoding", port)["regular_expression_gen"]
    state = program.run()
    assert re.fullmatch(regex_of(README["constrained_decoding"]), state["answer"])
    question = "Q: What is the IP address of the Google DNS servers?\n"
    assert state.text() == f"{question}A: {state['answer']}"


@pytest.mark.parametrize("indent", ["four spaces", "one space"])
def test_readme_json_decoding(port, indent):
    names = Names()
    code = README["import"] + README["json_decoding"]
    if indent == "one space":
        code = re.sub(r'r""" +', 'r""" ', code)
    execute(code, port, names)
    state = names["character_gen"].run(name="Harry Potter")
    answer = state["json_output"]
    assert re.fullmatch(names["character_regex"], answer)
    assert answer.startswith('{\n    "name"' if indent != "one space" else '{\n "name"')
    assert state.get_meta_info("json_output")["finish_reason"]["type"] == "stop"
    assert state.text() == (
        "Harry Potter is a character in Harry Potter. Please fill in the following information "
        f"about this character.\n{answer}"
    )


def test_readme_batching(port, capsys):
    states = readme("batching", port)["states"]
    countries = ["the United Kingdom", "France", "Japan"]
    for country, state in zip(countries, states, strict=True):
        assert state.text() == f"Q: What is the capital of {country}?\nA:{state['answer']}"
        assert "\n" not in state["answer"]
        assert num_tokens(state, "answer") <= 128
    assert "3/3" in capsys.readouterr().err  # the progress bar


def test_readme_streaming(port):
    pieces: list[str] = []
    names = readme("streaming", port, print=lambda piece, **how: pieces.append(piece))
    state = names["state"]
    assert len(pieces) > 1
    assert "".join(pieces) == state.text()
    assert state.text() == f"Q: What is the capital of France?\nA:{state['answer']}"
    assert "\n" not in state["answer"]


def test_readme_roles(port):
    state = readme("roles", port)["chat_example"].run()
    system, user, assistant = said(state)
    assert roles(state) == ["system", "user", "assistant"]
    assert (system, user) == (HELPFUL, "Question: What is the capital of France?")
    assert assistant.startswith("Answer: ")
    assert "\n" not in assistant
    assert state.text() == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
        f"<|im_start|>assistant\n{assistant}<|im_end|>\n"
    )


@pytest.mark.usefixtures("no_backend")
def test_notebook_backend(port):
    notebook("backend", port)
    backend = sgl.global_config.default_backend
    assert isinstance(backend, sgl.RuntimeEndpoint)
    assert backend.base_url == f"http://localhost:{port}"
    assert sgl.get_server_info()["max_total_num_tokens"] > 0


def test_notebook_multi_turn(port, capsys):
    state = notebook("multi_turn", port)["state"]
    capital, building = state["capital"], state["building"]
    assert roles(state) == TALK
    assert said(state) == [
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        *("What is the capital of Germany?", capital.lstrip()),
        *("Name an interesting building in this city.", building.lstrip()),
    ]
    told = f"{LINE}{capital}\n{LINE}{building}\n"
    assert capsys.readouterr().out == shown(state) + told
    assert max(num_tokens(state, "capital"), num_tokens(state, "building")) <= 250


def test_notebook_control_flow(port, capsys):
    state = notebook("control_flow", port)["state"]
    response = state["creative_response"]
    assert state["type"] == "a creative request"
    assert "technical_response" not in state  # that is a variable of the first question's state
    assert roles(state) == ["system", "user", "assistant", "assistant"]
    assert said(state) == [
        *(OWN_SYSTEM, "Can you help me write a story about time travel?"),
        "Based on the question, this seems like a creative request",
        f"Here's a creative response: {response}",
    ]
    technical, between, creative = capsys.readouterr().out.partition(f"\n{LINE}")
    assert technical
    assert between
    assert creative == f"{response}\n{LINE}"


def test_notebook_parallelism(port, capsys):
    states = notebook("parallelism", port)["states"]
    answers = states["answer"]
    assert len(answers) == 5
    assert len(set(answers)) > 1
    assert roles(states) == ["system", "user"]  # what the copies say is not in the source's text
    assert capsys.readouterr().out == "".join(f"{answer}\n{'-' * 50}\n" for answer in answers)


def test_notebook_constrained_decoding(port, capsys):
    state = notebook("birth_date", port)["state"]
    assert re.fullmatch(regex_of(NOTEBOOK["birth_date"]), state["answer"])
    assert said(state)[1:] == ["What is the birth date of Albert Einstein?", state["answer"]]
    assert capsys.readouterr().out == state["answer"] + "\n"


def test_notebook_schema_as_regex(port, capsys):
    names = notebook("character", port)
    state = names["state"]
    assert re.fullmatch(names["character_regex"], state["character"])
    assert state.get_meta_info("character")["finish_reason"]["type"] == "stop"
    assert roles(state) == ["system", "user", "assistant"]
    assert said(state)[1:] == [
        "Extract the relevant information about Harry Potter.",
        state["character"],
    ]
    assert capsys.readouterr().out == state["character"] + "\n"


def test_notebook_batching(port, capsys):
    states = notebook("batching", port)["states"]
    questions = [said(state)[1] for state in states]
    assert questions == re.findall(r'"question": "(.*)"', NOTEBOOK["batching"])
    answers = [state["answer"] for state in states]
    assert [said(state)[2] for state in states] == [answer.lstrip() for answer in answers]
    assert "Armstrong" in answers[0]
    assert all("assistant" not in answer for answer in answers)
    assert max(num_tokens(state, "answer") for state in states) <= 128
    told = [f"Answer: {answer}\n{'-' * 50}\n" for answer in answers]
    assert capsys.readouterr().out == "".join(told)


def test_notebook_streaming(port):
    pieces: list[str] = []
    state = notebook("streaming", port, print_highlight=pieces.append)["state"]
    assert len(pieces) > 3
    assert "".join(pieces) == state.text()
    assert state.text() == (
        f"<|im_start|>system\n{OWN_SYSTEM}<|im_end|>\n"
        "<|im_start|>user\nWho was the first man on the moon?<|im_end|>\n"
        f"<|im_start|>assistant\n{state['answer']}<|im_end|>\n"
    )
    assert "assistant" not in state["answer"]


def test_notebook_roles(port, capsys):
    state = notebook("roles", port)["state"]
    assert roles(state) == ["system", "user", "assistant"]
    assert said(state) == [
        "You talk like a pirate and use frequently phrases like 'arrr' and 'yo-ho-ho'.",
        "Hello, how do you like life as a pirate?",
        f"There is much to tell about the life of a pirate.{state['story']}",
    ]
    assert num_tokens(state, "story") <= 128
    assert capsys.readouterr().out == state["story"] + "\n"


@pytest.fixture
def picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    """In the current folder, and programs run on a model that sees, behind OpenAI's API."""
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "example_image.png")
    monkeypatch.chdir(tmp_path)
    with running(FakeApi(colours_seen)) as api:
        backend = sgl.OpenAI("gpt-4o", base_url=api.url + "/v1", api_key="none")
        monkeypatch.setattr(sgl.global_config, "default_backend", backend)
        yield api


def test_readme_multi_modality(port, picture):
    image_qa = readme("image_qa", port)["image_qa"]
    state = image_qa.run("example_image.png", "What colour is this?")
    assert state["answer"] == "blue"
    assert picture.bodies[0]["max_tokens"] == 256


def test_notebook_multi_modal(port, picture, capsys):
    state = notebook("image_qa", port)["state"]
    assert capsys.readouterr().out == "blue\n"
    asked, answer = state.messages()
    assert [part["type"] for part in asked["content"]] == ["image_url", "text"]
    assert asked["content"][1]["text"] == "Describe the image in one short sentence."
    assert answer == {"role": "assistant", "content": "blue"}
    assert picture.bodies[0]["stop"] == ["assistant"]
