"""Routes of administrators over HTTP: weights, and what is told of requests."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import stat
import threading
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fakes import in_loop, until
from ingress_server import Server, server
from tiny_models import write_config

from sgl.actors import request_dump


async def update(s: Server, path: Path, **fields: Any) -> tuple[int, Any]:
    return await s.post("/update_weights_from_disk", {"model_path": str(path), **fields})


async def told(s: Server, path: str) -> Any:
    async with s.http.get(s.url + path) as response:
        return await response.json()


def test_an_update_is_asked_of_the_engine_and_then_told(tmp_path) -> None:
    @in_loop
    async def run() -> None:
        async with server() as s:
            good = write_config(tmp_path / "good")
            status, answer = await update(s, good, load_format="safetensors")
            assert (status, answer) == (200, {"success": True, "message": "Loaded."})
            [message] = s.engine.updates
            assert (message.path, message.load_format) == (str(good), "safetensors")
            assert (await told(s, "/get_model_info"))["model_path"] == str(good)
            info = await told(s, "/get_server_info")
            assert (info["model_path"], info["load_format"]) == (str(good), "safetensors")
            status, answer = await s.post("/update_weights", {"model_path": str(good)})
            assert (status, s.engine.updates[1].load_format) == (200, "auto")

    run()


def test_what_the_engine_refuses_changes_nothing(tmp_path) -> None:
    @in_loop
    async def run() -> None:
        async with server() as s:
            status, answer = await update(s, write_config(tmp_path / "bad"))
            assert (status, answer) == (400, {"success": False, "message": "torn"})
            status, answer = await update(s, tmp_path / "absent")
            assert (status, answer["success"]) == (400, False)
            assert "there is no folder" in answer["message"]
            (tmp_path / "good").mkdir()
            status, answer = await update(s, tmp_path / "good")
            assert "the folder has no config.json" in answer["message"]
            assert len(s.engine.updates) == 1
            assert (await told(s, "/get_model_info"))["model_path"] == "letters"
            assert (await told(s, "/get_server_info"))["model_path"] == "letters"

    run()


def test_an_update_goes_on_when_whoever_asked_has_left(tmp_path) -> None:
    @in_loop
    async def run() -> None:
        async with server() as s:
            good = write_config(tmp_path / "good")
            timeout = aiohttp.ClientTimeout(total=0.0001)
            with pytest.raises(TimeoutError):
                await s.post("/update_weights", {"model_path": str(good)}, timeout=timeout)
            task = asyncio.create_task(update(s, good))
            await asyncio.sleep(0)
            await task
            assert (await told(s, "/get_model_info"))["model_path"] == str(good)

    run()


@in_loop
async def test_a_weight_is_shown_as_json() -> None:
    async with server() as s:
        status, rows = await s.post("/get_weights_by_name", {"name": "norm.weight"})
        assert (status, rows) == (200, [100.5])
        body = {"name": "norm.weight", "truncate_size": 3}
        async with s.http.get(s.url + "/get_weights_by_name", json=body) as response:
            assert (response.content_type, await response.json()) == ("application/json", [3.5])
        status, error = await s.post("/get_weights_by_name", {"name": "x"})
        assert (status, error) == (400, {"error": {"message": "no such weight"}})


@pytest.mark.parametrize(
    "path",
    ["/update_weights", "/update_weights_from_disk", "/get_weights_by_name", "/configure_logging"],
)
def test_they_are_for_administrators_alone(path: str) -> None:
    @in_loop
    async def run() -> None:
        async with server(api_key="key", admin_api_key="admin") as s:
            headers = {"Authorization": "Bearer key"}
            assert (await s.post(path, {}, headers=headers))[0] == 403
            assert (await s.post(path, {}))[0] == 401
            headers = {"Authorization": "Bearer admin"}
            assert (await s.post(path, {}, headers=headers))[0] in (200, 400)

    run()


def lines_of(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    found = [record.getMessage() for record in caplog.records]
    return [json.loads(text[8:]) for text in found if text.startswith("Finish: ")]


def test_requests_are_logged_as_far_as_the_level_says(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    @in_loop
    async def run() -> None:
        async with server() as s:
            await s.generate("secret\n" * 500, max_new_tokens=2)
            assert not lines_of(caplog), "nothing is told unless it is asked for"
            for level in range(3):
                status, settings = await s.post(
                    "/configure_logging", {"log_requests": True, "log_requests_level": level}
                )
                assert (status, settings["log_requests_level"]) == (200, level)
                await s.generate("secret\n" * 500, max_new_tokens=2, logit_bias={"5": 1.0})
            await s.post("/configure_logging", {"log_requests": False})
            await s.generate("secret", max_new_tokens=2)

    run()
    numbers, beginnings, everything = lines_of(caplog)
    assert (numbers["prompt_tokens"], numbers["completion_tokens"]) == (3500, 2)
    assert numbers["finish_reason"] == {"type": "length", "length": 2}
    assert not {"prompt", "answer", "sampling_params"} & numbers.keys()
    assert beginnings["prompt"] == ("secret\n" * 500)[:2048]
    assert beginnings["sampling_params"]["logit_bias"] == {"5": 1.0}
    assert (everything["prompt"], everything["answer"]) == ("secret\n" * 500, "\x0b\x0c")
    assert not any(
        "\n" in record.getMessage() for record in caplog.records if "Finish" in str(record.msg)
    )


@in_loop
async def test_the_level_can_be_set_at_the_start_and_is_told() -> None:
    async with server(log_requests=True, log_requests_level=2) as s:
        wanted = {"log_requests": True, "log_requests_level": 2}
        wanted |= {"dump_requests_folder": "", "dump_requests_threshold": 1000}
        assert await told(s, "/configure_logging") == wanted
        assert (await told(s, "/get_server_info")).items() >= wanted.items()


def records_in(folder: Path) -> list[list[dict[str, Any]]]:
    """The lines of each file, the oldest first."""
    texts = [path.read_bytes() for path in folder.glob("*.jsonl")]
    files = [[json.loads(line) for line in text.split(b"\n")[:-1]] for text in texts]
    return sorted(files, key=lambda lines: lines[0]["ended_at"] if lines else math.inf)


def test_requests_are_dumped_so_many_to_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "dump"

    @in_loop
    async def run() -> None:
        async with server() as s:
            body = {"dump_requests_folder": str(folder), "dump_requests_threshold": 2}
            assert (await s.post("/configure_logging", body))[0] == 200
            for number in range(3):
                await s.generate("a", max_new_tokens=number + 1, stop_token_ids=[120])
            await s.post("/generate", {"input_ids": [97], "rid": "ids"})
            await until(lambda: [len(file) for file in records_in(folder)] == [2, 2])
            await s.post("/configure_logging", {"dump_requests_folder": ""})
            await s.generate("a", max_new_tokens=1)

    run()
    [[first, _], [third, last]] = records_in(folder)
    assert (first["prompt"], first["answer"], first["output_ids"]) == ("a", "b", [98])
    assert third["answer"] == "bcd"
    assert third["sampling_params"]["stop_token_ids"] == [120]
    assert (last["rid"], last["prompt"], last["input_ids"]) == ("ids", None, [97])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_a_folder_that_cannot_be_written_is_refused_and_the_old_one_stays(tmp_path: Path) -> None:
    @in_loop
    async def run() -> None:
        async with server() as s:
            await s.post("/configure_logging", {"dump_requests_folder": str(tmp_path / "a")})
            (tmp_path / "file").touch()
            status, error = await s.post(
                "/configure_logging", {"dump_requests_folder": str(tmp_path / "file")}
            )
            assert (status, "give another" in error["error"]["message"]) == (400, True)
            settings = await told(s, "/configure_logging")
            assert settings["dump_requests_folder"] == str(tmp_path / "a")

    run()


def test_a_disk_that_fails_hurts_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(fd: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    @in_loop
    async def run() -> None:
        async with server() as s:
            await s.post("/configure_logging", {"dump_requests_folder": str(tmp_path)})
            monkeypatch.setattr(request_dump, "_write_all", full)
            for _ in range(3):
                assert (await s.generate("a", max_new_tokens=1))["text"] == "b"
            await until(lambda: len(list(tmp_path.iterdir())) == 3)
            monkeypatch.undo()
            await s.generate("a", max_new_tokens=1)
            await until(lambda: any(records_in(tmp_path)))

    run()
    complaints = [record for record in caplog.records if "not dumped" in record.getMessage()]
    assert len(complaints) == 1


def test_a_disk_that_is_too_slow_loses_records_and_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_dump, "MAX_WAITING", 2)
    dump = request_dump.RequestDump(tmp_path, 100)
    is_free = threading.Event()
    dump.add(lambda: b"1" if is_free.wait(10) else b"")
    for number in range(2, 6):
        dump.add(lambda number=number: b"%d" % number)
    is_free.set()
    dump.close()
    dump._thread.shutdown(wait=True)
    [path] = tmp_path.iterdir()
    assert path.read_text() == "1\n2\n"
