"""openai: what goes wrong comes as the right exception, and says what and why."""

from __future__ import annotations

from typing import Any

import openai

from checks.common import BASE_URL, SHORT, TEXT, TOO_LONG
from checks.openai_client import client, content, raised


def refused(**fields: Any) -> Any:
    call = client.chat.completions.create
    return raised(openai.BadRequestError, call, **(SHORT | fields))


def check_a_wrong_value() -> None:
    error = refused(temperature=-1)
    assert (error.status_code, error.param, error.type) == (400, "temperature", "BadRequestError")
    assert error.code is None
    assert "temperature must be at least 0" in error.message
    assert set(error.body) == {"message", "type", "param", "code"}


def check_an_error_has_the_id_of_its_request() -> None:
    error = refused(temperature=-1)
    assert error.request_id
    assert error.request_id == error.response.headers["x-request-id"]


def check_a_wrong_type() -> None:
    error = refused(max_tokens="many")
    assert error.param == "max_tokens"
    assert "must be an integer" in error.message
    assert refused(messages=[{"role": "robot", "content": "x"}]).param == "messages[0].role"


def check_wrong_values_of_every_parameter() -> None:
    wrong: dict[str, Any] = {
        "top_p": 0,
        "n": 0,
        "frequency_penalty": 3,
        "presence_penalty": -3,
        "max_tokens": -1,
        "top_logprobs": 21,
        "logit_bias": {"504": 101},
        "messages": [],
        "stop": ["x"] * 17,
    }
    for name, value in wrong.items():
        assert refused(**{name: value}, logprobs=True).param == name
    for name, value in {"top_k": -2, "min_p": 2, "repetition_penalty": 0, "min_tokens": -1}.items():
        assert refused(extra_body={name: value}).param == name


def check_a_prompt_that_is_too_long() -> None:
    error = refused(messages=[{"role": "user", "content": TOO_LONG}])
    assert error.code == "context_length_exceeded"
    assert "8192" in error.message
    call = client.completions.create
    error = raised(openai.BadRequestError, call, **(TEXT | {"prompt": TOO_LONG}))
    assert error.code == "context_length_exceeded"


def check_an_answer_that_is_too_long() -> None:
    error = refused(max_tokens=100_000)
    assert (error.code, error.param) == ("context_length_exceeded", "max_tokens")


def check_an_empty_prompt() -> None:
    call = client.completions.create
    error = raised(openai.BadRequestError, call, **(TEXT | {"prompt": ""}))
    assert "empty" in error.message


def check_images_for_a_model_without_eyes() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aaaa"}}
    error = refused(messages=[{"role": "user", "content": [image]}])
    assert error.param == "messages[0].content"
    assert "image_url" in error.message


def check_an_unknown_route() -> None:
    error = raised(openai.NotFoundError, client.images.generate, prompt="x")
    assert (error.status_code, error.type, error.param) == (404, "NotFoundError", None)
    assert "/v1/images/generations" in error.message


def check_an_unknown_model() -> None:
    error = raised(openai.NotFoundError, client.models.retrieve, "nope")
    assert (error.type, error.code, error.param) == ("NotFoundError", "model_not_found", "model")
    assert "nope" in error.message


def check_an_unknown_file_or_batch() -> None:
    for get in (client.files.retrieve, client.files.content, client.files.delete):
        error = raised(openai.NotFoundError, get, "file-nope")
        assert error.type == "NotFoundError"
    assert raised(openai.NotFoundError, client.batches.retrieve, "batch_nope")


def check_a_wrong_method() -> None:
    error = raised(openai.APIStatusError, client.get, "/chat/completions", cast_to=object)
    assert (error.status_code, error.response.headers["allow"]) == (405, "POST")
    assert "GET /v1/chat/completions" in error.message


def check_a_wrong_key() -> None:
    stranger = client.with_options(api_key="sk-wrong")
    for call, fields in ((stranger.models.list, {}), (stranger.chat.completions.create, SHORT)):
        error = raised(openai.AuthenticationError, call, **fields)
        assert (error.status_code, error.code) == (401, "invalid_api_key")


def check_a_base_url_without_v1() -> None:
    lost = client.with_options(base_url=BASE_URL.removesuffix("/v1"))
    error = raised(openai.NotFoundError, lost.chat.completions.create, **SHORT)
    assert "/v1/chat/completions" in error.message


def check_a_timeout() -> None:
    hasty = client.with_options(timeout=0.2)
    fields = SHORT | {"max_tokens": 4000, "extra_body": {"ignore_eos": True}}
    raised(openai.APITimeoutError, hasty.chat.completions.create, **fields)
    assert content(client.chat.completions.create(**(SHORT | {"max_tokens": 2}))) == "The capital"


def check_no_server() -> None:
    nobody = client.with_options(base_url="http://127.0.0.1:9/v1")
    raised(openai.APIConnectionError, nobody.models.list)


def check_mistakes_are_not_tried_again() -> None:
    patient = client.with_options(max_retries=3)
    call = patient.chat.completions.create
    error = raised(openai.BadRequestError, call, **(SHORT | {"n": 0}))
    assert error.response.request.headers.get("x-stainless-retry-count", "0") == "0"
