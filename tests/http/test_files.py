"""`/v1/files` over real sockets, with the client most people use and by hand."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from fakes import in_loop, until
from ingress_server import Server, server

from sgl.actors import http_body

FILE_HEAD = b'--b\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n'


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


async def post_form(s: Server, form: Any, **headers: str) -> tuple[int, Any]:
    async with s.http.post(s.url + "/v1/files", data=form, headers=headers) as response:
        return response.status, await response.json()


def form(**fields: str) -> aiohttp.FormData:
    made = aiohttp.FormData()
    for name, value in fields.items():
        made.add_field(name, value)
    made.add_field("file", b"one\n", filename="lines.jsonl")
    return made


@in_loop
async def test_the_openai_client_keeps_files(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    data = b"".join(b"line %d\r\n--boundary\n" % number for number in range(50_000))
    async with server(file_storage_path=str(folder)) as s, s.openai() as client:
        assert (await client.files.list()).data == []
        assert not folder.exists()
        made = await client.files.create(file=("zwei ü.jsonl", data), purpose="batch")
        assert (made.object, made.bytes, made.filename) == ("file", len(data), "zwei ü.jsonl")
        assert (made.purpose, made.status) == ("batch", "processed")
        assert await client.files.retrieve(made.id) == made
        other = await client.files.create(file=b"", purpose="user_data")
        assert (other.bytes, other.filename) == (0, "upload")
        assert [file.id for file in (await client.files.list()).data] == [other.id, made.id]
    async with server(file_storage_path=str(folder)) as s, s.openai() as client:
        assert (await client.files.content(made.id)).content == data
        assert (await client.files.content(other.id)).content == b""
        gone = await client.files.delete(other.id)
        assert (gone.id, gone.object, gone.deleted) == (other.id, "file", True)
        assert (await client.files.list()).data == [made]
        for use in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError, match="there is no file"):
                await use(other.id)
    assert names(folder) == [f"{made.id}.data", f"{made.id}.json"]


@in_loop
async def test_lists_come_in_pages(tmp_path: Path) -> None:
    async with server(file_storage_path=str(tmp_path)) as s, s.openai() as client:
        made = [
            (await client.files.create(file=(f"{number}", b"x"), purpose=purpose)).id
            for number, purpose in enumerate(("batch", "evals", "batch", "batch", "vision"))
        ]
        pages = [file.id async for file in client.files.list(limit=2)]
        assert pages == made[::-1]
        first = await client.files.list(limit=2, order="asc")
        assert (first.has_more, [file.id for file in first.data]) == (True, made[:2])
        found = await client.files.list(purpose="batch", order="asc")
        assert [file.id for file in found.data] == [made[0], made[2], made[3]]
        with pytest.raises(openai.BadRequestError, match="limit must be at least 1, got 0"):
            await client.files.list(limit=0)


@in_loop
async def test_a_file_is_shown_by_no_browser_as_a_page(tmp_path: Path) -> None:
    async with server(file_storage_path=str(tmp_path)) as s:
        data = aiohttp.FormData()
        data.add_field("file", b"<script>", filename='a"b;ü.html', content_type="text/html")
        _, made = await post_form(s, data)
        async with s.http.get(f"{s.url}/v1/files/{made['id']}/content") as response:
            assert response.headers["Content-Type"] == "application/octet-stream"
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert response.headers["Content-Disposition"].startswith("attachment;")
            assert await response.read() == b"<script>"


@pytest.mark.parametrize("is_chunked", [False, True])
@in_loop
async def test_an_upload_over_the_limit_is_refused(tmp_path: Path, is_chunked: bool) -> None:
    async with server(file_storage_path=str(tmp_path), max_file_mb=1.0) as s, s.openai() as client:
        assert (await client.files.create(file=b"x" * 1_000_000, purpose="batch")).bytes == 10**6
        kept = names(tmp_path)
        with pytest.raises(openai.APIStatusError, match="--max-file-mb") as refused:
            await client.files.create(file=b"x" * 1_000_001, purpose="batch")
        assert refused.value.status_code == 413
        data = aiohttp.FormData()
        data.add_field("file", io.BytesIO(b"x" * 3_000_000), filename="x")
        body = _in_chunks(data) if is_chunked else data
        headers = {"Content-Type": "multipart/form-data; boundary=b"} if is_chunked else {}
        status, told = await post_form(s, body, **headers)
        assert (status, told["error"]["type"]) == (413, "RequestTooLargeError")
        await until(lambda: names(tmp_path) == kept)


async def _in_chunks(_: Any) -> Any:
    yield FILE_HEAD % b"x"
    for _ in range(30):
        yield b"x" * 100_000
    yield b"\r\n--b--\r\n"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (form(purpose="world domination"), "purpose must be one of"),
        (form(purpose="x" * 1000), "purpose must have at most 256 bytes"),
        (form(**{"expires_after[seconds]": "3600"}), "expires_after is not supported"),
        (form(**{str(number): "x" for number in range(8)}), "more than 7 fields"),
        (form(file="twice"), "two files"),
        (b"just bytes", "multipart/form-data"),
    ],
    ids=["purpose", "long", "expiry", "many", "twice", "bytes"],
)
@in_loop
async def test_a_wrong_form_is_refused(tmp_path: Path, data: Any, reason: str) -> None:
    async with server(file_storage_path=str(tmp_path)) as s:
        status, told = await post_form(s, data)
        assert status == 400
        assert reason in told["error"]["message"]
        assert names(tmp_path) == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b--\r\n",
        b"nothing",
        b"x" * 100_000,
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n',
        FILE_HEAD % b"x" + b"no end",
        FILE_HEAD % b"a\tb" + b"x\r\n--b--\r\n",
        FILE_HEAD % (b"x" * 256) + b"x\r\n--b--\r\n",
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n\xff\r\n--b--\r\n',
        b"--b\r\nContent-Type: multipart/form-data; boundary=c\r\n\r\n--c--\r\n--b--\r\n",
    ],
    ids=lambda body: body[:60],
)
@in_loop
async def test_a_broken_form_is_refused(tmp_path: Path, body: bytes) -> None:
    async with server(file_storage_path=str(tmp_path)) as s:
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        status, told = await post_form(s, body, **headers)
        assert (status, bool(told["error"]["message"])) == (400, True)
        status, _ = await post_form(s, body, **{"Content-Type": "multipart/form-data"})
        assert status == 400
        assert names(tmp_path) == []


@in_loop
async def test_a_client_that_leaves_or_stalls_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with server(file_storage_path=str(tmp_path)) as s:
        for is_stalling in (False, True):
            if is_stalling:
                monkeypatch.setattr(http_body, "BODY_TIMEOUT_S", 0.05)
            port = int(s.url.rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(
                b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n"
                b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
                b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
                + b"x"
                * 500
            )
            if is_stalling:
                assert (await reader.readline()).startswith(b"HTTP/1.1 408")
            else:
                await until(lambda: len(names(tmp_path)) == 1)
            writer.close()
            await until(lambda: names(tmp_path) == [])


@pytest.mark.parametrize(
    "wrong",
    ["x", "..%2F..%2Fsecret", "%2e%2e", "file-" + "a" * 32, "file-%00", "secret", "a" * 4000],
)
@in_loop
async def test_an_unknown_id_is_a_404(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "secret.data").write_text("secret")
    async with server(file_storage_path=str(tmp_path / "a" / "b")) as s:
        port = int(s.url.rpartition(":")[2])
        for method, path in (
            ("GET", f"/v1/files/{wrong}"),
            ("GET", f"/v1/files/{wrong}/content"),
            ("DELETE", f"/v1/files/{wrong}"),
            ("GET", f"/v1/batches/{wrong}"),
            ("POST", f"/v1/batches/{wrong}/cancel"),
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(
                f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
            )
            answer = await reader.read()
            assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 405")), (method, path)
            assert b'"error":{"message":' in answer
            writer.close()


@in_loop
async def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    async with server(file_storage_path=str(tmp_path / "taken")) as s:
        status, told = await post_form(s, form())
        assert status == 500
        assert "--file-storage-path cannot be used" in told["error"]["message"]
        assert str(tmp_path) not in told["error"]["message"]


@in_loop
async def test_files_and_batches_need_the_key(tmp_path: Path) -> None:
    async with server(api_key="right", file_storage_path=str(tmp_path)) as s:
        for path in (
            "/v1/files",
            "/v1/files/x",
            "/v1/files/x/content",
            "/v1/batches",
            "/v1/batches/x",
        ):
            assert await s.get(path) == 401
            assert await s.get(path, headers={"Authorization": "Bearer right"}) in (200, 404)
        status, _ = await post_form(s, form())
        assert status == 401
        assert names(tmp_path) == []
