"""Every file of examples/ runs against SmolLM2, and what it prints and returns is as it says."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Any

import jsonschema
import pytest
from fake_apis import FakeApi, colours_seen, running
from pipeline.server import ROOT, Server

import sgl
from sgl.errors import BackendError, UnknownVariableError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FOLDER = ROOT / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))


@dataclass
class Ran:
    """
    names     what the example defines
    returned  by its `main`
    lines     that it printed
    """

    names: dict[str, Any]
    returned: Any
    lines: list[str]
    stderr: str

    def __getattr__(self, name: str) -> Any:
        return self.names[name]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    flags = ["--dtype", "float32", "--num-cpu-threads", "1"]
    with Server(flags, tmp_path_factory.mktemp("server")) as server:
        yield f"http://127.0.0.1:{server.port}"


@pytest.fixture
def eyes() -> Iterator[FakeApi]:
    with running(FakeApi(colours_seen)) as api:
        yield api


@pytest.fixture(autouse=True)
def _no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example sets its own."""
    monkeypatch.setattr(sgl.global_config, "default_backend", None)


@pytest.mark.parametrize("name", sorted({*EXAMPLES} - {"image"}))
def test_example(name, url, capsys):
    assert name in CHECKS, f"examples/{name}.py is not checked: write check_{name}"
    names = runpy.run_path(str(FOLDER / f"{name}.py"))
    returned = names["main"](["--url", url])
    printed = capsys.readouterr()
    CHECKS[name](Ran(names, returned, printed.out.splitlines(), printed.err))


def test_pictures_reach_a_model_that_sees(eyes, tmp_path, capsys):
    names = runpy.run_path(str(FOLDER / "image.py"))
    returned = names["main"](["--url", eyes.url])
    assert capsys.readouterr().out.splitlines() == [
        "picture 1: red",
        "picture 2: blue",
        "together: red and blue",
    ]
    (user, _) = returned["together"].messages()
    kinds = [part["type"] for part in user["content"]]
    assert kinds == ["text", "image_url", "text", "image_url", "text"]
    picture = tmp_path / "blue.png"
    names["drawn"]()[1].save(picture)
    names["main"](["--url", eyes.url, str(picture)])
    assert capsys.readouterr().out.splitlines() == ["picture 1: blue", "together: blue"]


def test_an_example_is_a_command(url):
    done = subprocess.run(
        [sys.executable, "examples/multi_turn.py", "--url", url],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_is_a_command_and_is_told_of(name):
    source = (FOLDER / f"{name}.py").read_text("utf-8")
    assert source.endswith('\n\nif __name__ == "__main__":\n    main()\n')
    table = (FOLDER / "README.md").read_text("utf-8")
    row = rf"^\| \[{name}\]\({name}\.py\) \| .+ \| `\.venv/bin/python examples/{name}\.py` \|$"
    assert len(re.findall(row, table, re.MULTILINE)) == 1


def roles(state: Any) -> list[str]:
    return [message["role"] for message in state.messages()]


def said(state: Any) -> list[str]:
    return [message["content"] for message in state.messages()]


def cached(state: Any, name: str) -> int:
    return state.get_meta_info(name)["cached_tokens"]


def check_multi_turn(ran: Ran) -> None:
    state = ran.returned
    assert roles(state) == ["system", "user", "assistant", "user", "assistant"]
    assert said(state)[1] == "What is the capital of France?"
    assert said(state)[2::2] == [state["capital"].lstrip(), state["building"].lstrip()]
    assert "Paris" in state["capital"]
    assert cached(state, "building") >= state.get_meta_info("capital")["prompt_tokens"]
    messages = zip(roles(state), said(state), strict=True)
    assert ran.lines == [f"{role}: {content}" for role, content in messages]


def check_roles(ran: Ran) -> None:
    texts = [state.text() for state in ran.returned]
    assert len(texts) == 3
    assert len(set(texts)) == 1
    assert texts[0].startswith(
        f"<|im_start|>system\n{ran.RULE}<|im_end|>\n<|im_start|>user\n{ran.QUESTION}<|im_end|>\n"
        "<|im_start|>assistant\nThe answer is"
    )
    assert all(roles(state) == ["system", "user", "assistant"] for state in ran.returned)
    assert all(said(state) == said(ran.returned[0]) for state in ran.returned)
    assert ran.lines[-1] == "equal: True"


def check_control_flow(ran: Ran) -> None:
    assert [state["tool"] for state in ran.returned] == ["calculator", "search engine"]
    for question, state in zip(ran.QUESTIONS, ran.returned, strict=True):
        scores = state.get_meta_info("tool")["normalized_prompt_logprobs"]
        assert state["tool"] == ran.TOOLS[scores.index(max(scores))]
        is_sum = state["tool"] == "calculator"
        assert ("expression" in state, "keywords" in state) == (is_sum, not is_sum)
        begin = f"To answer the question '{question}' I need to use a {state['tool']}. The "
        assert state.text().startswith(begin)
    assert ran.lines[::3] == ran.QUESTIONS
    assert [line.split(":")[0] for line in ran.lines[2::3]] == ["  expression", "  keywords"]


def check_constrained(ran: Ran) -> None:
    answers = ran.returned
    jsonschema.validate(answers["city"], ran.CITY)
    assert re.fullmatch(ran.DATE, answers["date"])
    assert isinstance(answers["founded"], int)
    assert answers["continent"] in ran.CONTINENTS
    assert ran.lines == [f"{name}: {value!r}" for name, value in answers.items()]


def check_fork_join(ran: Ran) -> None:
    state = ran.returned
    reasons = state["reason"]
    assert len(reasons) == len(ran.TIPS) == 3
    assert len(set(reasons)) == 3
    assert all(reason.strip() and "\n" not in reason for reason in reasons)
    told = [
        f"{tip}: this helps because{reason}" for tip, reason in zip(ran.TIPS, reasons, strict=True)
    ]
    assert state.text().endswith("\n".join(["", *told, f"In summary,{state['summary']}"]))
    assert [line.partition(":")[0] for line in ran.lines[:-1]] == ran.TIPS
    assert ran.lines[-1] == f"In summary,{state['summary']}"


def check_batching(ran: Ran) -> None:
    states = ran.returned
    for country, state in zip(ran.CAPITALS, states, strict=True):
        question = f"Q: What is the capital of {country}?\nA:"
        assert state.text() == ran.EXAMPLES + question + state["answer"]
        assert "\n" not in state["answer"]
    answers = [state["answer"].strip() for state in states]
    pairs = zip(ran.CAPITALS.values(), answers, strict=True)
    num_right = sum(capital == answer for capital, answer in pairs)
    assert num_right >= 3
    told = [f"{country}: {answer}" for country, answer in zip(ran.CAPITALS, answers, strict=True)]
    assert ran.lines == [*told, f"{num_right} of 6 are right"]
    assert "6/6" in ran.stderr
    assert min(cached(state, "answer") for state in states[1:]) > 20  # the worked questions


def check_streaming(ran: Ran) -> None:
    pieces = ran.returned
    state = ran.fruit_story.run("apple", temperature=0)
    assert "".join(pieces["whole"]) == state.text()
    assert "".join(pieces["end"]) == "".join(pieces["end_async"]) == state["end"]
    assert min(map(len, pieces.values())) > 3
    printed = ["".join(f"{piece}|" for piece in found) for found in pieces.values()]
    for found in printed:
        assert found in "\n".join(ran.lines)


def check_async_programs(ran: Ran) -> None:
    answers, order = ran.returned
    states = ran.ask.run_batch([{"question": each} for each in ran.QUESTIONS], temperature=0)
    assert answers == [state["answer"] for state in states]
    assert set(order) == {0, 1, 2}
    assert order != sorted(order)  # they were at work at the same time
    pieces = ran.lines[: len(order)]
    assert [int(line.partition(": ")[0]) for line in pieces] == order
    asked = zip(ran.QUESTIONS, answers, strict=True)
    assert "\n".join(f"{question} {answer}" for question, answer in asked) == "\n".join(
        ran.lines[len(order) :]
    )


def check_errors(ran: Ran) -> None:
    errors = ran.returned
    kinds = {name: type(error) for name, error in errors.items()}
    assert kinds == {
        "wrong_argument": ValueError,
        "body_raises": ValueError,
        "server_refuses": BackendError,
        "no_server": BackendError,
        "unknown_variable": UnknownVariableError,
    }
    assert "unterminated character set" in str(errors["wrong_argument"])
    assert str(errors["body_raises"]) == "5 is odd"
    assert errors["body_raises"].__notes__ == ["in run 2 of the batch"]
    assert "temperature" in str(errors["server_refuses"])
    assert errors["server_refuses"].__notes__ == ["in program 'story', variable 'end'"]
    assert "does not answer" in str(errors["no_server"])
    assert "no variable 'middle'; it has: begin, end" in str(errors["unknown_variable"])
    for name, error in errors.items():
        at = ran.lines.index(f"--- {name}")
        assert f"{type(error).__name__}: {error}" in ran.lines[at:]


def check_api_models(ran: Ran) -> None:
    state, sent = ran.returned["chat"], ran.returned["sent"]
    assert "Paris" in state["capital"]
    assert "Rome" in state["other"]
    assert sent["one call for all"] * 2 < sent["one call for each"]
    counted = [line.partition(": ")[2].partition(" (")[0] for line in ran.lines[-2:]]
    assert counted[0] == counted[1]
    assert counted[0].startswith("One, two, three, four, five,")


def check_rag(ran: Ran) -> None:
    amazon, sahara, everest = ran.PARAGRAPHS
    contexts = [amazon, amazon, everest, sahara]
    assert [ran.retrieve(question) for question in ran.QUESTIONS] == contexts
    for question, context, state in zip(ran.QUESTIONS, contexts, ran.returned, strict=True):
        asked, answered = said(state)[-2:]
        assert asked == f"Text: {context}\n\nQuestion: {question}"
        assert answered == f"According to the text,{state['answer']}".strip()
    first, second, third, _ = (cached(state, "answer") for state in ran.returned)
    assert second > max(first, third) + 20  # the same paragraph was computed once
    assert ran.lines[::4] == ran.QUESTIONS
    assert "6400" in ran.lines[2]


def check_react(ran: Ran) -> None:
    transcript = ran.returned["transcript"]
    assert ran.lines == transcript.splitlines()
    question, *steps, answer = ran.lines
    assert question == "Question: How high is Big Ben?"
    assert answer == f"Answer:{ran.returned['answer']}"
    seen = []
    while steps and len(seen) < ran.MAX_STEPS:
        thought, action, *steps = steps
        assert thought.startswith("Thought:")
        if action == "Action: Finish":
            break
        name = action.removeprefix("Action: Look up ")
        observation, *steps = steps
        assert observation == f"Observation: {ran.FACTS[name]}"
        seen.append(name)
    assert steps == []
    assert seen
    assert len(set(seen)) == len(seen) <= ran.MAX_STEPS


def check_llm_judge(ran: Ran) -> None:
    state = ran.returned
    assert len(state["judgement"]) == len(state["grade"]) == len(ran.DIMENSIONS) == 3
    assert set(state["grade"]) <= set(ran.GRADES)
    assert state.ret_value == mean(map(int, state["grade"]))
    pairs = zip(ran.DIMENSIONS, state["judgement"], strict=True)
    judged = "".join(f"\nJudged by its {name}, this essay is{found}." for name, found in pairs)
    assert state.text() == (
        f"An essay:\n\n{ran.ESSAY}\n{judged}\nIn short, this essay{state['summary']}"
    )
    rows = zip(ran.DIMENSIONS, state["grade"], state["judgement"], strict=True)
    assert ran.lines[:3] == [f"{name}: {grade} of 5,{found}" for name, grade, found in rows]
    assert ran.lines[3] == f"mean: {state.ret_value:.1f}"


def check_tree_of_thought(ran: Ran) -> None:
    leaves = ran.returned
    assert len(leaves) == ran.BRANCHING**ran.DEPTH == 9
    assert all(len(leaf.thoughts) == ran.DEPTH for leaf in leaves)
    scores = [leaf.score for leaf in leaves]
    assert scores == sorted(scores, reverse=True)
    firsts = [leaf.thoughts[0] for leaf in leaves]
    assert all(firsts.count(first) % ran.BRANCHING == 0 for first in firsts)
    assert len({json.dumps(leaf.thoughts) for leaf in leaves}) > ran.BRANCHING
    told = [f"{leaf.score:+.2f}  {' / '.join(leaf.thoughts)}" for leaf in leaves]
    assert ran.lines == told


CHECKS: dict[str, Callable[[Ran], None]] = {
    name.removeprefix("check_"): check
    for name, check in globals().items()
    if name.startswith("check_")
}
