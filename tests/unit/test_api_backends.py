"""Programs on models behind APIs: what is sent, counted, streamed, refused, and saved."""

from __future__ import annotations

import base64
import itertools
import os
import warnings
from collections.abc import Iterator

import pytest
from fake_apis import Body, FakeApi, all_text, running

import sgl
from sgl.errors import BackendError
from sgl.lang.backends.api import ApiBackend

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)

pytestmark = pytest.mark.filterwarnings("ignore:Inheritance class AiohttpClientSession")  # Google's


class Letters:
    """A tokenizer: each character is a token."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


def by_topic(body: Body) -> str:
    """What a model knows: one answer for each word it was last asked about."""
    asked = all_text(body.get("messages") or body.get("contents") or body.get("prompt"))
    known = {"capital": "Paris is the capital.\nMore", "river": "The Seine.\nMore"}
    return max(known.items(), key=lambda item: asked.rfind(item[0]))[1]


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with running(FakeApi(by_topic)) as api:
        yield api


def openai(api: FakeApi, model: str = "gpt-4o", **more) -> sgl.OpenAI:
    return sgl.OpenAI(model, api_key="none", base_url=api.url + "/v1", **more)


def completions(api: FakeApi, **more) -> sgl.OpenAI:
    return openai(api, "gpt-3.5-turbo-instruct", tokenizer=Letters(), **more)


def anthropic(api: FakeApi) -> sgl.Anthropic:
    return sgl.Anthropic("claude-test", api_key="none", base_url=api.url)


def vertexai(api: FakeApi) -> sgl.VertexAI:
    from google.oauth2.credentials import Credentials

    return sgl.VertexAI(
        "gemini-test",
        project="p",
        location="l",
        credentials=Credentials(token="none"),
        http_options={"base_url": api.url},
    )


CHATS = {"OpenAI": openai, "Anthropic": anthropic, "VertexAI": vertexai}


@pytest.fixture(params=CHATS)
def chat(request, api) -> ApiBackend:
    return CHATS[request.param](api)


@sgl.function
def two_questions(s):
    s += sgl.system("Be brief.")
    s += sgl.user("The capital?")
    s += sgl.assistant(sgl.gen("first", max_tokens=16, stop="\n", temperature=0))
    s += sgl.user("A river?")
    s += sgl.assistant(sgl.gen("second", max_tokens=2))


def test_a_chat_goes_back_and_forth(chat, api):
    state = two_questions.run(backend=chat)
    assert state["first"] == "Paris is the capital."
    assert state["second"] == "The Seine"
    assert [one["role"] for one in state.messages()] == [
        *("system", "user", "assistant", "user", "assistant")
    ]
    assert len(api.requests) == 2
    meta = state.get_meta_info("second")
    assert meta["completion_tokens"] == 2
    past_stop = 1 if isinstance(chat, sgl.Anthropic) else 0  # its API does not take this stop
    assert chat.token_usage.completion_tokens == 5 + past_stop + 2
    first = len(["Be", " brief", ".", " The", " capital", "?"])
    assert chat.token_usage.prompt_tokens >= 2 * first
    chat.token_usage.reset()
    assert chat.token_usage.prompt_tokens == 0


def test_openai_is_sent_messages(api):
    two_questions.run(backend=openai(api)).sync()
    assert api.requests == [
        (
            "/v1/chat/completions",
            {
                "model": "gpt-4o",
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "The capital?"},
                ],
                "max_tokens": 16,
                "stop": ["\n"],
                "temperature": 0,
            },
        ),
        (
            "/v1/chat/completions",
            {
                "model": "gpt-4o",
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "The capital?"},
                    {"role": "assistant", "content": "Paris is the capital."},
                    {"role": "user", "content": "A river?"},
                ],
                "max_tokens": 2,
                "temperature": 1.0,
            },
        ),
    ]


def test_anthropic_is_sent_the_system_apart_and_no_stop_of_space_alone(api):
    state = two_questions.run(backend=anthropic(api), stop=["\n", "END"])
    state.sync()
    path, body = api.requests[1]
    assert path == "/v1/messages"
    assert body == {
        "model": "claude-test",
        "system": "Be brief.",
        "messages": [
            {"role": "user", "content": "The capital?"},
            {"role": "assistant", "content": "Paris is the capital."},
            {"role": "user", "content": "A river?"},
        ],
        "max_tokens": 2,
        "stop_sequences": ["END"],
    }
    assert api.bodies[0]["temperature"] == 0
    assert state.messages()[0] == {"role": "system", "content": "Be brief."}


def test_vertexai_is_sent_contents(api):
    two_questions.run(backend=vertexai(api)).sync()
    path, body = api.requests[1]
    assert path.endswith(
        "/projects/p/locations/l/publishers/google/models/gemini-test:generateContent"
    )
    assert body["contents"] == [
        {"role": "user", "parts": [{"text": "The capital?"}]},
        {"role": "model", "parts": [{"text": "Paris is the capital."}]},
        {"role": "user", "parts": [{"text": "A river?"}]},
    ]
    assert body["systemInstruction"]["parts"] == [{"text": "Be brief."}]
    assert body["generationConfig"] == {"maxOutputTokens": 2, "temperature": 1.0}


@sgl.function
def one_question(s):
    s += sgl.user("The capital?") + sgl.assistant(sgl.gen("answer", max_tokens=16, stop="\n"))


def test_answers_are_streamed(chat, api):
    state = one_question.run(backend=chat, stream=True)
    pieces = list(state.text_iter("answer"))
    assert len(pieces) > 2
    assert "".join(pieces) == state["answer"] == "Paris is the capital."
    assert chat.token_usage.completion_tokens > 0
    assert state.get_meta_info("answer")["prompt_tokens"] > 0


def test_an_image_goes_with_its_message(chat, api):
    @sgl.function
    def look(s):
        s += sgl.user(sgl.image(PNG) + "The capital in this picture?")
        s += sgl.assistant(sgl.gen("answer", max_tokens=4))

    assert look.run(backend=chat)["answer"]
    sent = str(api.bodies[0]).replace("-", "+").replace("_", "/")  # Google's base64
    assert base64.b64encode(PNG).decode().rstrip("=") in sent
    assert "image/png" in sent


def test_a_batch_keeps_its_order(chat, api):
    @sgl.function
    def ask(s, topic):
        s += sgl.user(f"The {topic}?") + sgl.assistant(sgl.gen("answer", stop="\n"))

    states = ask.run_batch([{"topic": "capital"}, {"topic": "river"}] * 8, backend=chat)
    assert [state["answer"] for state in states] == ["Paris is the capital.", "The Seine."] * 8
    assert len(api.requests) == 16


def test_what_an_api_does_not_know_is_warned_of_once(api):
    backend = openai(api)

    @sgl.function
    def many(s):
        s += sgl.user("The capital?") + sgl.assistant(sgl.gen("a", top_k=5, regex="[A-Z]+"))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        many.run(backend=backend).sync()
        many.run(backend=backend).sync()
    told = sorted(str(one.message) for one in caught)
    assert told == ["OpenAI has no regex: it is not sent", "OpenAI has no top_k: it is not sent"]


def test_a_schema_is_not_left_out_in_silence_where_a_text_is_completed(api):
    backend = openai(api, is_chat_model=False)

    @sgl.function
    def one(s):
        s += sgl.gen("a", json_schema={"type": "object"})

    with pytest.warns(UserWarning, match="OpenAI has no json_schema: it is not sent"):
        one.run(backend=backend).sync()
    assert "top_k" not in api.bodies[0]


def test_the_error_of_the_api_comes_to_who_reads(api):
    import openai as sdk

    api.fail_with = [401]
    state = one_question.run(backend=openai(api))
    with pytest.raises(sdk.AuthenticationError, match="as told"):
        state["answer"]


def test_a_busy_api_is_asked_again(api):
    api.fail_with = [429, 500]
    assert one_question.run(backend=openai(api))["answer"] == "Paris is the capital."
    assert len(api.requests) == 3


def test_an_answer_that_must_be_json_is_asked_for(api):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}

    @sgl.function
    def ask(s):
        s += sgl.user("The capital?") + sgl.assistant(sgl.gen("a", json_schema=schema))

    ask.run(backend=openai(api)).sync()
    ask.run(backend=vertexai(api)).sync()
    form = api.bodies[0]["response_format"]
    assert form == {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    assert api.bodies[1]["generationConfig"]["responseMimeType"] == "application/json"


def test_reasoning_models_have_another_name_for_the_limit(api):
    one_question.run(backend=openai(api, "o3-mini")).sync()
    assert api.bodies[0]["max_completion_tokens"] == 16
    assert "max_tokens" not in api.bodies[0]


def test_azure_has_a_client_of_its_own(api):
    from openai import AsyncAzureOpenAI

    backend = sgl.OpenAI(
        "gpt-4o", is_azure=True, api_key="none", azure_endpoint=api.url, api_version="2024-10-21"
    )
    assert isinstance(backend._client, AsyncAzureOpenAI)


def test_a_chat_model_does_not_go_on_inside_of_a_message(api):
    @sgl.function
    def begun(s):
        s += sgl.user("The capital?") + sgl.assistant("It is " + sgl.gen("answer"))

    with pytest.raises(RuntimeError, match="num_api_spec_tokens"):
        begun.run(backend=openai(api))["answer"]
    assert api.requests == []


def test_anthropic_goes_on_inside_of_a_message(api):
    @sgl.function
    def begun(s):
        s += sgl.user("The capital?") + sgl.assistant("It is " + sgl.gen("answer", stop="\n"))

    assert begun.run(backend=anthropic(api))["answer"] == "Paris is the capital."
    assert api.bodies[0]["messages"][-1] == {"role": "assistant", "content": "It is"}


# models for completions


def test_a_completion_goes_on_with_the_text(api):
    @sgl.function
    def complete(s):
        s += "The capital of France: " + sgl.gen("answer", stop="\n", max_tokens=8) + "\nA river: "
        s += sgl.gen("river", stop="\n", max_tokens=8)

    state = complete.run(backend=completions(api), temperature=0)
    state.sync()
    assert state["answer"] == "Paris is the capital."
    assert api.requests[1] == (
        "/v1/completions",
        {
            "model": "gpt-3.5-turbo-instruct",
            "prompt": "The capital of France: Paris is the capital.\nA river: ",
            "max_tokens": 8,
            "stop": ["\n"],
            "temperature": 0,
        },
    )
    assert state.text().endswith("A river: The Seine.")


def test_a_string_ends_at_its_quote(api):
    api.say = lambda body: 'Ada" and so on'

    @sgl.function
    def quoted(s):
        s += "The capital's name is " + sgl.gen_string("name")

    for stream in (False, True):
        state = quoted.run(backend=completions(api), stream=stream)
        assert state["name"] == '"Ada"'
        assert api.bodies[-1]["prompt"].endswith('is "')
        assert api.bodies[-1]["stop"] == ['"']


def test_an_integer_is_made_of_digits(api):
    api.say = lambda body: "42 of them"

    @sgl.function
    def counted(s):
        s += "How many? " + sgl.gen_int("number", max_tokens=4)

    assert counted.run(backend=completions(api))["number"] == "42"
    bias = api.bodies[0]["logit_bias"]
    assert {chr(int(token)) for token in bias} == set("0123456789 -")
    assert set(bias.values()) == {100}


@pytest.mark.parametrize(
    ("choices", "would_say", "decision", "num_calls"),
    [
        (["yes", "no"], "no way", "no", 1),
        (["apple", "apricot", "banana"], "apricots", "apricot", 2),
        (["apple", "apricot", "banana"], "banana", "banana", 1),
        (["go", "gone"], "gone", "go", 0),  # the shorter is over first
        (["same"], "else", "same", 0),
    ],
)
def test_select_asks_token_by_token(api, choices, would_say, decision, num_calls):
    @sgl.function
    def choose(s):
        s += "The capital. " + sgl.select("pick", choices)

    def say(body):
        return would_say[len(body["prompt"]) - len("The capital. ") :]

    api.say = say
    state = choose.run(backend=completions(api))
    assert state["pick"] == decision
    assert len(api.requests) == num_calls
    assert state.get_meta_info("pick")["num_calls"] == num_calls
    assert all(body["max_tokens"] == 1 for body in api.bodies)


def test_a_chat_model_cannot_select(api):
    @sgl.function
    def choose(s):
        s += sgl.user("?") + sgl.assistant(sgl.select("pick", ["a", "b"]))

    with pytest.raises(BackendError, match="cannot select"):
        choose.run(backend=openai(api))["pick"]


# speculation

CHARACTER = "Name: Ada.\nBirthday: 1815.\nJob: Countess.\nAnd more"


def character(s):
    s += "Construct a character.\nName:" + sgl.gen("name", stop="\n", temperature=0)
    s += "\nBirthday:" + sgl.gen("birthday", stop="\n", temperature=0)
    s += "\nJob:" + sgl.gen("job", stop="\n", temperature=0) + "\n"


def going_on(body: Body) -> str:
    return CHARACTER[len(body["prompt"]) - len("Construct a character.\n") :]


def test_one_completion_answers_several_gens(api):
    api.say = going_on
    plain, speculating = completions(api), completions(api)
    one_by_one = sgl.function(character).run(backend=plain)
    one_by_one.sync()
    assert len(api.requests) == 3
    at_once = sgl.function(num_api_spec_tokens=64)(character).run(backend=speculating)
    at_once.sync()
    assert len(api.requests) == 3 + 1
    assert at_once.text() == one_by_one.text()
    assert [at_once[name] for name in ("name", "birthday", "job")] == [
        *(" Ada.", " 1815.", " Countess.")
    ]
    assert speculating.token_usage.prompt_tokens * 2 < plain.token_usage.prompt_tokens


def test_a_completion_that_went_another_way_is_asked_for_again(api):
    def say(body):
        return "" if body["prompt"].endswith("Job:") else " Ada.\nAge: 36.\n"

    api.say = say
    state = sgl.function(num_api_spec_tokens=64)(character).run(backend=completions(api))
    state.sync()
    assert state["name"] == state["birthday"] == " Ada."
    assert state["job"] == ""
    assert len(api.requests) == 3


def test_an_answer_without_an_end_is_not_speculated_on(api):
    @sgl.function(num_api_spec_tokens=64)
    def open_ended(s):
        s += "The capital: " + sgl.gen("answer", max_tokens=3)

    assert open_ended.run(backend=completions(api))["answer"] == "Paris is the"
    assert api.bodies[0]["max_tokens"] == 3


@sgl.function(num_api_spec_tokens=64)
def character_chat(s):
    s += sgl.user("Construct a character.")
    s += sgl.assistant(
        "Name:"
        + sgl.gen("name", stop="\n")
        + "\nBirthday:"
        + sgl.gen("birthday", stop="\n")
        + "\nJob:"
        + sgl.gen("job", stop="\n")
        + "\n"
    )
    s += sgl.user("And a capital?") + sgl.assistant(sgl.gen("capital", stop="\n"))


def test_one_message_answers_several_gens(api):
    api.say = lambda body: by_topic(body) if "capital" in str(body) else CHARACTER[:-9]
    state = character_chat.run(backend=openai(api))
    assert [state[name] for name in ("name", "birthday", "job")] == [
        *(" Ada.", " 1815.", " Countess.")
    ]
    assert state["capital"] == "Paris is the capital."
    assert len(api.requests) == 2
    assert api.bodies[0]["messages"] == [{"role": "user", "content": "Construct a character."}]
    assert api.bodies[0]["max_tokens"] == 64
    assert "stop" not in api.bodies[0]
    assert state.messages()[1]["content"] == "Name: Ada.\nBirthday: 1815.\nJob: Countess.\n"


def test_a_message_of_another_form_is_asked_for_again_then_given_up(api):
    answers = iter(["Hello!", "Name: Bo\nAge: 3", CHARACTER[:-9], "The capital"])
    api.say = lambda body: next(answers)
    state = character_chat.run(backend=openai(api))
    assert state["job"] == " Countess."
    state.sync()
    assert len(api.requests) == 4

    api.say = lambda body: "Something else"
    state = character_chat.run(backend=openai(api))
    with pytest.raises(BackendError, match="3 answers did not have the form"):
        state["name"]
    assert len(api.requests) == 4 + 3


def test_a_copy_with_another_picture_is_not_answered_for_the_first(api):
    answers = iter(["red", "blue"])
    api.say = lambda body: next(answers)

    @sgl.function(num_api_spec_tokens=64)
    def two_pictures(s):
        said = []
        for picture in (PNG, PNG + b"2"):
            with s.copy() as copy:
                copy += sgl.user(sgl.image(picture) + "What colour?")
                copy += sgl.assistant(sgl.gen("colour"))
                said.append(copy["colour"])
        return said

    assert two_pictures.run(backend=openai(api)).ret_value == ["red", "blue"]


def test_copies_that_ask_the_same_get_answers_of_their_own(api):
    numbers = itertools.count()
    api.say = lambda body: f" {next(numbers)}.\nJob: Smith {next(numbers)}.\n"

    @sgl.function(num_api_spec_tokens=64)
    def three_draws(s):
        s += "Age:"
        copies = s.fork(3)
        copies += sgl.gen("age", stop="\n") + "\nJob:" + sgl.gen("job", stop="\n")
        copies.join()

    state = three_draws.run(backend=completions(api))
    assert len(set(state["age"])) == len(set(state["job"])) == 3
    assert len(api.requests) == 3


def test_copies_of_a_message_that_has_begun_go_on_with_it(api):
    names = iter(["Ada", "Bo", "Cy", "Di", "Ed"])
    api.say = lambda body: f"Name: {next(names)}.\nJob: Countess."

    @sgl.function(num_api_spec_tokens=64)
    def two_jobs(s):
        s += sgl.user("Construct a character.") + sgl.assistant_begin()
        s += "Name:" + sgl.gen("name", stop="\n")
        copies = s.fork(2)
        copies += "\nJob:" + sgl.gen("job", stop="\n")
        copies.join()

    state = two_jobs.run(backend=openai(api))
    assert state["job"] == [" Countess."] * 2
    assert state["name"] == " Ada."
    assert len(api.requests) == 1


def test_a_process_that_was_forked_has_a_client_of_its_own(chat):
    assert two_questions.run(backend=chat)["first"] == "Paris is the capital."
    read_end, write_end = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.write(write_end, two_questions.run(backend=chat)["first"].encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end, encoding="utf-8") as said:
        assert said.read() == "Paris is the capital."
    os.waitpid(pid, 0)
