"""`/v1/batches` with the OpenAI client: bad lines, cancelling, restarts, and room for others."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
import orjson
import pytest
from fakes import in_loop, until
from ingress_server import CONTEXT_LEN, server
from openai.types import Batch

from sgl.actors import batch_lines, batches
from sgl.actors.batch_files import BatchFiles
from sgl.actors.file_store import FileStore
from sgl.actors.http_answer import whole_answer
from sgl.messages import Drain, EngineDied
from sgl.protocol.batch_lines import LineAnswer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LONG = 4000  # tokens: more than any test waits for


def line(custom_id: Any, url: str = COMPLETIONS, **body: Any) -> bytes:
    fields = {"custom_id": custom_id, "method": "POST", "url": url, "body": body}
    return orjson.dumps(fields)


def prompts(num: int, **body: Any) -> list[bytes]:
    """Line i asks for the letters after the i-th: after "a" comes "bcd"."""
    return [
        line(f"line-{number}", prompt=chr(97 + number % 10), **({"max_tokens": 3} | body))
        for number in range(num)
    ]


def expected_text(custom_id: str, num_tokens: int = 3) -> str:
    first = 98 + int(custom_id.removeprefix("line-")) % 10
    return "".join(map(chr, range(first, first + num_tokens)))


async def upload(client: openai.AsyncOpenAI, lines: Sequence[bytes]) -> str:
    data = b"\n".join(lines) + b"\n"
    return (await client.files.create(file=("in.jsonl", data), purpose="batch")).id


async def start(
    client: openai.AsyncOpenAI, lines: Sequence[bytes], endpoint: Any = COMPLETIONS
) -> Batch:
    file_id = await upload(client, lines)
    return await client.batches.create(
        input_file_id=file_id, endpoint=endpoint, completion_window="24h"
    )


async def ended(client: openai.AsyncOpenAI, batch_id: str) -> Batch:
    async with asyncio.timeout(20):
        while True:
            batch = await client.batches.retrieve(batch_id)
            if batch.status in ("completed", "failed", "cancelled", "expired"):
                return batch
            await asyncio.sleep(0.005)


async def answers(client: openai.AsyncOpenAI, file_id: str | None) -> dict[str | None, Any]:
    """By custom_id, each of which must be there once."""
    if file_id is None:
        return {}
    content = await client.files.content(file_id)
    told = [orjson.loads(text) for text in content.content.splitlines()]
    assert len({each["id"] for each in told}) == len(told)
    by_id = {each["custom_id"]: each["response"] for each in told}
    assert len(by_id) == len(told)
    return by_id


BAD_LINES = {
    10: b'{"custom_id": "broken", "method": ',
    60: line("no-id").replace(b"no-id", b"").replace(b'"custom_id"', b'"customer"'),
    110: line("line-3", prompt="a"),
    160: line("other-url", url=CHAT, messages=[]),
    210: line("streams", prompt="a", stream=True),
    333: line("too-long", prompt="x" * (CONTEXT_LEN + 1)),
    499: line("wrong-field", prompt="a", temperature=-1),
}


@in_loop
async def test_500_lines_of_which_7_are_bad_survive_restarts(tmp_path: Path) -> None:
    lines = prompts(500)
    for number, text in BAD_LINES.items():
        lines[number] = text
    async with server(file_storage_path=str(tmp_path)) as s, s.openai() as client:
        file_id = await upload(client, lines)
    async with server(file_storage_path=str(tmp_path)) as s, s.openai() as client:
        made = await client.batches.create(
            input_file_id=file_id,
            endpoint=COMPLETIONS,
            completion_window="24h",
            metadata={"why": "nightly"},
        )
        assert (made.object, made.status, made.errors) == ("batch", "validating", None)
        assert made.expires_at == made.created_at + 24 * 3600
        done = await ended(client, made.id)
        assert done.status == "completed"
    async with server(file_storage_path=str(tmp_path)) as s, s.openai() as client:
        again = await client.batches.retrieve(made.id)
        assert again == done
        assert [batch.id for batch in (await client.batches.list()).data] == [made.id]
        assert again.request_counts is not None
        counts = again.request_counts
        assert (counts.total, counts.completed, counts.failed) == (500, 493, 7)
        assert again.metadata == {"why": "nightly"}
        assert again.created_at <= (again.in_progress_at or 0) <= (again.finalizing_at or 0)
        assert (again.finalizing_at or 0) <= (again.completed_at or 0)
        good = await answers(client, again.output_file_id)
        assert set(good) == {f"line-{number}" for number in range(500) if number not in BAD_LINES}
        for custom_id, response in good.items():
            assert response["status_code"] == 200
            [choice] = response["body"]["choices"]
            assert choice["text"] == expected_text(str(custom_id))
            assert response["body"]["object"] == "text_completion"
        output = await client.files.retrieve(again.output_file_id or "")
        assert (output.purpose, output.filename) == ("batch_output", f"{made.id}_output.jsonl")
        content = (await client.files.content(again.error_file_id or "")).text
        told = {each["id"]: each for each in map(orjson.loads, content.splitlines())}
        messages = {
            (each["custom_id"], each["response"]["body"]["error"]["message"])
            for each in told.values()
        }
        assert {each["response"]["status_code"] for each in told.values()} == {400}
    wanted = {
        (None, "line 11: not valid JSON"),
        (None, "line 61: custom_id must be given"),
        ("line-3", "line 111: an earlier line has the custom_id 'line-3'"),
        ("other-url", f"line 161: url must be the endpoint of the batch, {COMPLETIONS}"),
        ("streams", "a line of a batch cannot have stream: true"),
        ("too-long", "The input (4097 tokens) is longer"),
        ("wrong-field", "temperature must be"),
    }
    assert len(messages) == 7
    for custom_id, beginning in wanted:
        assert [m for c, m in messages if c == custom_id and m.startswith(beginning)], beginning


@in_loop
async def test_lines_get_what_the_handlers_answer(tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4},
        {"messages": [{"role": "user", "content": "a"}], "n": 2, "logprobs": True, "max_tokens": 2},
        {"messages": [{"role": "user", "content": "ab"}], "stop": ["e"], "model": "mine"},
        {"messages": []},
        {"messages": [{"role": "user", "content": "a"}], "tools": [{}]},
        {"messages": [{"role": "user", "content": "a"}], "n": 1000},
        {},
    ]
    async with server(file_storage_path=str(tmp_path)) as s, s.openai() as client:
        asked = [line(str(number), CHAT, **body) for number, body in enumerate(bodies)]
        done = await ended(client, (await start(client, asked, CHAT)).id)
        told = await answers(client, done.output_file_id)
        assert len(told) == 3
        told |= await answers(client, done.error_file_id)
        for number, body in enumerate(bodies):
            status, direct = await s.post(CHAT, body)
            answer = told[str(number)]
            assert (answer["status_code"], set(answer["body"])) == (status, set(direct))
            for field in ("error", "choices", "usage", "object", "model"):
                assert answer["body"].get(field) == direct.get(field), (number, field)


@pytest.mark.parametrize("data", [b"", b"\n \n\n"])
@in_loop
async def test_a_batch_without_lines_fails(tmp_path: Path, data: bytes) -> None:
    async with server(file_storage_path=str(tmp_path)) as s, s.openai() as client:
        done = await ended(client, (await start(client, [data])).id)
        assert (done.status, done.output_file_id) == ("failed", None)
        assert done.failed_at is not None
        assert done.errors is not None
        assert done.errors.data is not None
        assert done.errors.data[0].message == "the input file has no lines"


@in_loop
async def test_one_line_is_a_batch_and_so_are_only_bad_ones(tmp_path: Path) -> None:
    async with server(file_storage_path=str(tmp_path)) as s, s.openai() as client:
        one = await ended(client, (await start(client, prompts(1))).id)
        assert (one.status, one.error_file_id) == ("completed", None)
        assert set(await answers(client, one.output_file_id)) == {"line-0"}
        bad = await ended(client, (await start(client, [b"?", b"!"])).id)
        assert (bad.status, bad.output_file_id) == ("completed", None)
        assert bad.request_counts is not None
        assert bad.request_counts.failed == 2


@in_loop
async def test_a_line_over_the_limit_of_a_body_fails_alone(tmp_path: Path) -> None:
    flags = {"file_storage_path": str(tmp_path), "max_body_mb": 0.001}
    async with server(**flags) as s, s.openai() as client:
        lines = [*prompts(2), line("long", prompt="x" * 2000), *prompts(3)[2:]]
        done = await ended(client, (await start(client, lines)).id)
        assert len(await answers(client, done.output_file_id)) == 3
        [error] = (await answers(client, done.error_file_id)).values()
        assert error["status_code"] == 413
        assert error["body"]["error"]["message"].startswith("line 3: more than 1000 bytes")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"endpoint": "/v1/rerank"}, "endpoint must be"),
        ({"completion_window": "7d"}, "completion_window"),
        ({"input_file_id": "file-" + "0" * 32}, "there is no file"),
        ({"input_file_id": "../../etc/passwd"}, "there is no file"),
        ({"metadata": {str(number): "x" for number in range(17)}}, "metadata"),
    ],
)
@in_loop
async def test_a_wrong_batch_is_refused(tmp_path: Path, wrong: dict[str, Any], reason: str) -> None:
    async with server(file_storage_path=str(tmp_path)) as s, s.openai() as client:
        right: dict[str, Any] = {
            "input_file_id": await upload(client, prompts(1)),
            "endpoint": COMPLETIONS,
            "completion_window": "24h",
        }
        with pytest.raises(openai.BadRequestError, match=reason):
            await client.batches.create(**(right | wrong))
        other = await client.files.create(file=b"x", purpose="user_data")
        with pytest.raises(openai.BadRequestError, match="purpose batch"):
            await client.batches.create(**(right | {"input_file_id": other.id}))
        assert (await client.batches.list()).data == []
        with pytest.raises(openai.NotFoundError, match="there is no batch"):
            await client.batches.retrieve("batch_" + "0" * 32)


@in_loop
async def test_cancelling_keeps_what_is_answered(tmp_path: Path) -> None:
    lines = [*prompts(20), *prompts(120, max_tokens=LONG)[20:]]
    async with server(step_s=0.001, file_storage_path=str(tmp_path)) as s, s.openai() as client:
        made = await start(client, lines)
        await until_some_are_answered(client, made.id, 20)
        await until(lambda: s.engine.num_running == 64)
        with pytest.raises(openai.BadRequestError, match="still reads this file"):
            await client.files.delete(made.input_file_id)
        cancelling = await client.batches.cancel(made.id)
        assert cancelling.status == "cancelling"
        done = await ended(client, made.id)
        assert done.status == "cancelled"
        assert done.cancelling_at is not None
        assert done.cancelled_at is not None
        await until(lambda: s.engine.num_running == 0)
        assert len(s.engine.aborted) == 64
        assert s.front.num_live == 0
        assert len(s.engine.seen) == 1 + 20 + 64  # with the warm-up
        assert set(await answers(client, done.output_file_id)) == {f"line-{n}" for n in range(20)}
        assert done.error_file_id is None
        with pytest.raises(openai.BadRequestError, match="is cancelled: only a batch"):
            await client.batches.cancel(made.id)
        await client.files.delete(made.input_file_id)
    assert {name.split(".", 1)[1] for name in os.listdir(tmp_path)} == {"data", "json"}


@in_loop
async def test_cancelling_while_a_slow_disk_still_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that is being written when the work is cancelled is not written twice at a time."""
    sync = os.fsync
    async with server(step_s=0.001, file_storage_path=str(tmp_path)) as s, s.openai() as client:
        monkeypatch.setattr(os, "fsync", lambda file: (time.sleep(0.1), sync(file)))
        made = await start(client, prompts(1, max_tokens=LONG))
        await until_status(client, made.id, "in_progress")
        assert (await client.batches.cancel(made.id)).status == "cancelling"
        done = await ended(client, made.id)
        assert (done.status, done.errors) == ("cancelled", None)


@in_loop
async def test_a_batch_that_has_ended_cannot_be_cancelled(tmp_path: Path) -> None:
    async with server(file_storage_path=str(tmp_path)) as s, s.openai() as client:
        done = await ended(client, (await start(client, prompts(1))).id)
        with pytest.raises(openai.BadRequestError, match="is completed: only a batch"):
            await client.batches.cancel(done.id)
        with pytest.raises(openai.NotFoundError):
            await client.batches.cancel("batch_" + "0" * 32)


async def until_some_are_answered(client: openai.AsyncOpenAI, batch_id: str, num: int) -> None:
    async with asyncio.timeout(10):
        while True:
            counts = (await client.batches.retrieve(batch_id)).request_counts
            if counts is not None and counts.completed >= num:
                return
            await asyncio.sleep(0.002)


@in_loop
async def test_a_restart_in_the_middle_answers_each_line_once(tmp_path: Path) -> None:
    lines = prompts(300, max_tokens=10)
    lines[7], lines[250] = b"bad", line("line-5", prompt="a")  # the id of a line answered before
    async with server(step_s=0.001, file_storage_path=str(tmp_path)) as s, s.openai() as client:
        made = await start(client, lines)
        await until_some_are_answered(client, made.id, 64)
        first = len(s.engine.seen)
    assert first < 300
    async with server(file_storage_path=str(tmp_path)) as s, s.openai() as client:
        done = await ended(client, made.id)
        assert done.status == "completed"
        assert done.in_progress_at is not None
        assert len(s.engine.seen) - 1 <= 298 - 64
        good = await answers(client, done.output_file_id)
        assert len(good) == 298
        for custom_id, response in good.items():
            text = response["body"]["choices"][0]["text"]
            assert text == expected_text(str(custom_id), 10)
        assert set(await answers(client, done.error_file_id)) == {None, "line-5"}


def tear_last_line(part: Path) -> None:
    """As if the server had been about to write one more answer."""
    with part.open("ab") as file:
        file.write(b'{"id":"batch_req_')


@in_loop
async def test_a_crash_at_any_moment_loses_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the folder, taken after some answers, is what a crash would have left then."""
    folder, copies = tmp_path / "0", list[Path]()
    append = BatchFiles.append

    def append_and_copy(files: BatchFiles, answers: Sequence[LineAnswer]) -> None:
        append(files, answers)
        copies.append(tmp_path / str(len(copies) + 1))
        shutil.copytree(folder, copies[-1])
        tear_last_line(copies[-1] / files.output.path.name)

    lines = prompts(200)
    lines[3] = b"bad"
    async with server(step_s=0.002, file_storage_path=str(folder)) as s, s.openai() as client:
        with monkeypatch.context() as copying:
            copying.setattr(BatchFiles, "append", append_and_copy)
            made = await start(client, lines)
            assert (await ended(client, made.id)).status == "completed"
    assert len(copies) >= 3
    for copy in (copies[0], copies[len(copies) // 2], copies[-1]):
        async with server(file_storage_path=str(copy)) as s, s.openai() as client:
            done = await ended(client, made.id)
            assert done.status == "completed"
            assert len(await answers(client, done.output_file_id)) == 199
            assert len(await answers(client, done.error_file_id)) == 1


@pytest.mark.parametrize("moment", ["before", "renamed", "after"])
@in_loop
async def test_a_crash_while_the_files_are_made(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adopt = FileStore.adopt

    def crash(store: FileStore, path: Path, file_id: str, *names: str) -> None:
        if moment == "renamed":
            path.rename(store.data_path(file_id))
        if moment == "after":
            adopt(store, path, file_id, *names)
        raise MemoryError

    async with server(file_storage_path=str(tmp_path)) as s, s.openai() as client:
        file_id = await upload(client, prompts(5))
        with monkeypatch.context() as broken:
            broken.setattr(FileStore, "adopt", crash)
            made = await client.batches.create(
                input_file_id=file_id, endpoint=COMPLETIONS, completion_window="24h"
            )
            await until_status(client, made.id, "finalizing")
            with pytest.raises(openai.BadRequestError, match="is finalizing"):
                await client.batches.cancel(made.id)
    async with server(file_storage_path=str(tmp_path)) as s, s.openai() as client:
        done = await ended(client, made.id)
        assert done.status == "completed"
        assert len(s.engine.seen) == 1  # the warm-up: no line is answered once more
        assert len(await answers(client, done.output_file_id)) == 5
        assert len((await client.files.list()).data) == 2


async def until_status(client: openai.AsyncOpenAI, batch_id: str, status: str) -> None:
    async with asyncio.timeout(10):
        while (await client.batches.retrieve(batch_id)).status != status:  # noqa: ASYNC110
            await asyncio.sleep(0.002)


@in_loop
async def test_others_are_answered_while_a_batch_runs(tmp_path: Path) -> None:
    async with server(step_s=0.001, file_storage_path=str(tmp_path)) as s, s.openai() as client:
        made = await start(client, prompts(400, max_tokens=50))
        await until_some_are_answered(client, made.id, 1)
        for _ in range(5):
            done = await client.completions.create(model="default", prompt="a", max_tokens=3)
            assert done.choices[0].text == "bcd"
            assert s.front.num_live <= 64
            assert (await client.batches.retrieve(made.id)).status == "in_progress"
        assert (await ended(client, made.id)).status == "completed"


@in_loop
async def test_all_batches_share_what_batches_may_use(tmp_path: Path) -> None:
    async with server(step_s=0.001, file_storage_path=str(tmp_path)) as s, s.openai() as client:
        made = [await start(client, prompts(100, n=3, max_tokens=20)) for _ in range(3)]
        peak = 0
        while not all([(await client.batches.retrieve(b.id)).output_file_id for b in made]):
            peak = max(peak, s.front.num_live)
        assert 30 < peak <= 64
        for batch in made:
            assert (await ended(client, batch.id)).status == "completed"


@in_loop
async def test_a_full_server_delays_a_batch_but_fails_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_lines, "RETRY_S", 0.01)
    async with server(step_s=0.002, file_storage_path=str(tmp_path)) as s, s.openai() as client:
        body = {"text": ["a"] * 128, "sampling_params": {"max_new_tokens": LONG}}
        others = [asyncio.create_task(s.post("/generate", body)) for _ in range(4)]
        await until(lambda: s.front.num_live == 512)
        made = await start(client, prompts(30))
        await until_status(client, made.id, "in_progress")
        await asyncio.sleep(0.05)
        for other in others:
            other.cancel()
        done = await ended(client, made.id)
        assert done.request_counts is not None
        assert (done.request_counts.completed, done.request_counts.failed) == (30, 0)


@in_loop
async def test_an_error_of_the_engine_or_a_bug_fails_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(running: Any, reply: Any) -> Any:
        if running.answers[0].prompt_ids[0] == ord("b"):
            raise KeyError("secret")
        return await whole_answer(running, reply)

    monkeypatch.setattr(batch_lines, "whole_answer", broken)
    async with server(file_storage_path=str(tmp_path)) as s, s.openai() as client:
        s.engine.fail_next("the logits were NaN", 500)
        done = await ended(client, (await start(client, prompts(3))).id)
        assert set(await answers(client, done.output_file_id)) == {"line-2"}
        errors = await answers(client, done.error_file_id)
        assert {error["status_code"] for error in errors.values()} == {500}
        assert errors["line-0"]["body"]["error"]["message"] == "the logits were NaN"
        assert "secret" not in str(errors["line-1"])


@in_loop
async def test_draining_finishes_lines_and_starts_none(tmp_path: Path) -> None:
    lines = prompts(200, max_tokens=100)
    async with server(step_s=0.002, file_storage_path=str(tmp_path)) as s, s.openai() as client:
        made = await start(client, lines)
        await until(lambda: s.engine.num_running == 64)
        s.ingress.receive([Drain(0.0, 10.0)])
        await s.task
        assert len(s.engine.seen) == 1 + 64
        assert s.engine.aborted == []
    async with server(file_storage_path=str(tmp_path)) as s, s.openai() as client:
        done = await ended(client, made.id)
        assert len(s.engine.seen) == 1 + 200 - 64
        assert len(await answers(client, done.output_file_id)) == 200


@in_loop
async def test_a_dead_engine_fails_no_line(tmp_path: Path) -> None:
    async with server(step_s=0.002, file_storage_path=str(tmp_path)) as s, s.openai() as client:
        made = await start(client, prompts(200, max_tokens=100))
        await until(lambda: s.engine.num_running == 64)
        s.ingress.receive([EngineDied("the worker was killed")])
        await s.task
    async with server(file_storage_path=str(tmp_path)) as s, s.openai() as client:
        done = await ended(client, made.id)
        assert done.status == "completed"
        assert done.request_counts is not None
        assert (done.request_counts.completed, done.request_counts.failed) == (200, 0)


@in_loop
async def test_a_batch_expires_and_keeps_what_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with server(step_s=0.002, file_storage_path=str(tmp_path)) as s, s.openai() as client:
        lines = [*prompts(4), *prompts(9, max_tokens=LONG)[4:]]
        with monkeypatch.context() as short:
            short.setattr("sgl.protocol.batches.WINDOW_S", 1)
            made = await start(client, lines)
            done = await ended(client, made.id)
        assert (done.status, done.completed_at) == ("expired", None)
        assert done.expired_at is not None
        assert set(await answers(client, done.output_file_id)) == {f"line-{n}" for n in range(4)}
        await until(lambda: s.engine.num_running == 0)


@in_loop
async def test_servers_with_one_folder_leave_each_other_alone(tmp_path: Path) -> None:
    flags = {"file_storage_path": str(tmp_path)}
    async with server(step_s=0.002, **flags) as first, first.openai() as client:
        made = await start(client, prompts(5, max_tokens=LONG))
        await until(lambda: first.engine.num_running == 5)
        async with server(**flags) as second, second.openai() as other:
            assert (await other.batches.retrieve(made.id)).status == "in_progress"
            assert len(second.engine.seen) == 1
            with pytest.raises(openai.BadRequestError, match="run by another server"):
                await other.batches.cancel(made.id)
            with pytest.raises(openai.BadRequestError, match="still reads this file"):
                await other.files.delete(made.input_file_id)
    async with server(served_model_name="another", **flags) as third, third.openai() as client:
        assert len(third.engine.seen) == 1  # not its model
        assert (await client.batches.retrieve(made.id)).status == "in_progress"
        assert (await client.batches.cancel(made.id)).status == "cancelling"
        assert (await ended(client, made.id)).status == "cancelled"


@in_loop
async def test_a_batch_whose_input_is_gone_fails(tmp_path: Path) -> None:
    async with server(step_s=0.002, file_storage_path=str(tmp_path)) as s, s.openai() as client:
        made = await start(client, prompts(5, max_tokens=LONG))
        await until(lambda: s.engine.num_running == 5)
    (tmp_path / f"{made.input_file_id}.data").unlink()
    (tmp_path / ("batch_" + "0" * 32 + ".json")).write_bytes(b"{damaged")
    async with server(file_storage_path=str(tmp_path)) as s, s.openai() as client:
        done = await ended(client, made.id)
        assert done.status == "failed"
        assert done.errors is not None
        assert done.errors.data is not None
        assert done.errors.data[0].code == "file_not_found"


@in_loop
async def test_a_full_disk_fails_the_batch_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    async with server(step_s=0.002, file_storage_path=str(tmp_path)) as s, s.openai() as client:
        monkeypatch.setattr("sgl.actors.batch_files.BatchFiles.append", full)
        done = await ended(client, (await start(client, prompts(100))).id)
        assert done.status == "failed"
        assert done.errors is not None
        assert done.errors.data is not None
        assert "No space left" in (done.errors.data[0].message or "")
        assert (await s.generate("a", max_new_tokens=1))["text"] == "b"
        await until(lambda: s.front.num_live == 0)


@in_loop
async def test_there_is_a_limit_to_open_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "MAX_OPEN", 2)
    async with server(step_s=0.002, file_storage_path=str(tmp_path)) as s, s.openai() as client:
        made = [await start(client, prompts(2, max_tokens=LONG)) for _ in range(2)]
        with pytest.raises(openai.InternalServerError, match="2 batches are waiting"):
            await start(client, prompts(1))
        await client.batches.cancel(made[0].id)
        await ended(client, made[0].id)
        await start(client, prompts(1))


@in_loop
async def test_batches_are_listed_in_pages(tmp_path: Path) -> None:
    async with server(file_storage_path=str(tmp_path)) as s, s.openai() as client:
        made = [(await start(client, prompts(1))).id for _ in range(5)]
        assert [batch.id async for batch in client.batches.list(limit=2)] == made[::-1]
        page = await client.batches.list(limit=2)
        assert (page.has_more, len(page.data)) == (True, 2)
