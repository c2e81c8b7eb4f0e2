"""Programs of the language on this server as if it were OpenAI's, with nothing but its SDK."""

from __future__ import annotations

import sys

import openai

import sgl
from checks.common import ANSWER, API_KEY, BASE_URL, COMPLETION, MODEL, PROMPT, QUESTION
from checks.openai_client import raised

SERVER = {"api_key": API_KEY, "base_url": BASE_URL, "max_retries": 0}
CHAT = sgl.OpenAI(MODEL, **SERVER)
TEXT = sgl.OpenAI(MODEL, is_chat_model=False, **SERVER)


@sgl.function
def ask(s, question):
    s += sgl.user(question) + sgl.assistant(sgl.gen("answer", max_tokens=12, temperature=0))


def check_chat_program() -> None:
    state = ask.run(QUESTION, backend=CHAT)
    assert state["answer"] == ANSWER
    assert [one["role"] for one in state.messages()] == ["user", "assistant"]
    assert state.get_meta_info("answer")["finish_reason"] == "stop"


def check_streamed_program() -> None:
    state = ask.run(QUESTION, backend=CHAT, stream=True)
    pieces = list(state.text_iter("answer"))
    assert len(pieces) > 1
    assert "".join(pieces) == ANSWER == state["answer"]


def check_batch_of_programs() -> None:
    states = ask.run_batch([{"question": QUESTION}] * 6, backend=CHAT)
    assert [state["answer"] for state in states] == [ANSWER] * 6


def check_completion_program() -> None:
    @sgl.function
    def complete(s):
        s += PROMPT + sgl.gen("city", max_tokens=2, temperature=0)

    state = complete.run(backend=TEXT)
    assert state.text() == PROMPT + COMPLETION


def check_one_call_answers_several_gens() -> None:
    def count(s):
        s += "One, two, three, four,"
        for name in ("a", "b", "c"):
            s += sgl.gen(name, stop=",", max_tokens=8, temperature=0) + ","

    plain, speculating = (sgl.OpenAI(MODEL, is_chat_model=False, **SERVER) for _ in range(2))
    one_by_one = sgl.function(count).run(backend=plain)
    one_by_one.sync()
    at_once = sgl.function(num_api_spec_tokens=24)(count).run(backend=speculating)
    at_once.sync()
    assert at_once.text() == one_by_one.text()
    assert one_by_one["a"] == " five"
    saved = plain.token_usage.prompt_tokens / speculating.token_usage.prompt_tokens
    assert saved > 2, saved


def check_error_is_the_clients_own() -> None:
    @sgl.function
    def ask_wrongly(s):
        s += sgl.user(QUESTION) + sgl.assistant(sgl.gen("answer", temperature=-1))

    state = ask_wrongly.run(backend=CHAT)
    error = raised(openai.BadRequestError, lambda: state["answer"])
    assert "temperature" in str(error)


def check_language_needs_no_runtime() -> None:
    assert "torch" not in sys.modules
