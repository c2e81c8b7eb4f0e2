"""Lines that batches read and write, and what is left of them after a crash."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest
from fakes import in_loop

from sgl.actors.batch_files import AnswerFile, BatchFiles, input_lines
from sgl.actors.batch_share import BatchShare
from sgl.errors import InvalidRequestError, NotFoundError, RequestTooLargeError
from sgl.protocol.batch_lines import Line, LineAnswer, LineParser, answered_number, bad_line
from sgl.protocol.batches import BatchQuery, BatchRecord, check_batch_id, parse_batch
from sgl.protocol.files import FileRecord, page, parse_query

URL = "/v1/completions"
BATCH_ID = "batch_" + "a" * 32


def line(**fields: Any) -> bytes:
    good = {"custom_id": "one", "method": "POST", "url": URL, "body": {"prompt": "a"}}
    return orjson.dumps(good | fields)


def without(name: str) -> bytes:
    fields = orjson.loads(line())
    del fields[name]
    return orjson.dumps(fields)


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def test_a_good_line_is_the_body_of_a_request():
    parsed = LineParser(URL).parse(3, line())
    assert (parsed.number, parsed.custom_id, parsed.error) == (3, "one", None)
    assert orjson.loads(parsed.body) == {"prompt": "a"}
    assert LineParser(URL).parse(1, without("method")).error is None


@pytest.mark.parametrize(
    ("text", "custom_id", "reason"),
    [
        (b"{", None, "not valid JSON"),
        (b'{"custom_id": "\xff"}', None, "not valid JSON"),
        (b'{"custom_id": NaN}', None, "not valid JSON"),
        (b"[" * 100_000, None, "not valid JSON"),
        (b"[1]", None, "not a JSON object but an array"),
        (without("custom_id"), None, "custom_id must be given"),
        (line(custom_id=7), None, "custom_id must be given, a string"),
        (line(custom_id=""), "", "custom_id must be 1 to 256"),
        (line(custom_id="x" * 300), "x" * 256, "custom_id must be 1 to 256"),
        (line(custom_id="a\nb"), "a\nb", "printable"),
        (line(method="GET"), "one", 'method must be "POST"'),
        (without("url"), "one", "url must be"),
        (line(url="/v1/chat/completions"), "one", f"the endpoint of the batch, {URL}"),
        (without("body"), "one", "body must be a JSON object, got null"),
        (line(body="x"), "one", "body must be a JSON object, got a string"),
        (line(body={"prompt": nested(100)}), "one", "nested"),
    ],
)
def test_a_bad_line_says_what_is_wrong_with_it(text, custom_id, reason):
    parsed = LineParser(URL).parse(12, text)
    assert parsed.custom_id == custom_id
    assert parsed.error is not None
    assert str(parsed.error).startswith("line 12: ")
    assert reason in str(parsed.error)
    assert parsed.error.status == 400


def test_the_second_line_with_a_custom_id_is_bad():
    parser = LineParser(URL)
    errors = [parser.parse(number, line(custom_id=name)).error for number, name in enumerate("aba")]
    assert [error is None for error in errors] == [True, True, False]
    assert "an earlier line has the custom_id 'a'" in str(errors[2])


def test_an_answer_tells_which_line_it_answers():
    asked = Line(17, "one", b"{}")
    answer = LineAnswer(asked, 200, {"choices": []})
    written = answer.encode(BATCH_ID)
    assert written.endswith(b"\n")
    assert answered_number(written) == 17
    told = orjson.loads(written)
    assert set(told) == {"id", "custom_id", "response", "error"}
    assert told["id"].startswith("batch_req_")
    assert (told["custom_id"], told["error"]) == ("one", None)
    assert set(told["response"]) == {"status_code", "request_id", "body"}
    refused = bad_line(3, None, RequestTooLargeError("too long"))
    assert refused.error is not None
    told = orjson.loads(LineAnswer.of_error(refused, refused.error).encode(BATCH_ID))
    assert told["response"]["status_code"] == 413
    assert told["response"]["body"]["error"]["message"] == "line 3: too long"
    assert answered_number(b'{"custom_id":"one"}\n') is None


def test_lines_are_numbered_as_in_the_file(tmp_path: Path):
    path = tmp_path / "lines"
    path.write_bytes(
        b"\xef\xbb\xbfone\r\n\n  \n" + b"x" * 3_000_000 + b"\n12345678\n123456789\nend"
    )
    assert list(input_lines(path, max_bytes=8)) == [
        (1, b"one"),
        (4, None),
        (5, b"12345678"),
        (6, None),
        (7, b"end"),
    ]
    path.write_bytes(b"")
    assert list(input_lines(path, max_bytes=8)) == []


def test_half_an_answer_is_cut_off_when_a_batch_goes_on(tmp_path: Path):
    answers = [LineAnswer(Line(number, "x"), 200, {}) for number in (4, 2)]
    file = AnswerFile(tmp_path / "part")
    file.open()
    file.append(BATCH_ID, answers)
    file.close()
    whole = file.path.read_bytes()
    for torn_len in (1, 40, len(answers[0].encode(BATCH_ID)) - 1):
        file.path.write_bytes(whole + answers[0].encode(BATCH_ID)[:torn_len])
        again = AnswerFile(file.path)
        again.open()
        assert again.numbers == {2, 4}
        again.append(BATCH_ID, [LineAnswer(Line(9, "y"), 200, {})])
        again.close()
        assert file.path.read_bytes().startswith(whole)
        assert [answered_number(text) for text in file.path.read_bytes().splitlines()] == [4, 2, 9]


def test_good_and_bad_answers_go_to_their_files(tmp_path: Path):
    files = BatchFiles(tmp_path, BATCH_ID)
    files.open()
    files.append([LineAnswer(Line(1, "a"), 200, {}), LineAnswer(Line(2, "b"), 400, {})])
    assert (files.output.numbers, files.errors.numbers) == ({1}, {2})
    files.remove()
    assert list(tmp_path.iterdir()) == []


def test_only_one_server_holds_a_batch(tmp_path: Path):
    mine, other = BatchFiles(tmp_path, BATCH_ID), BatchFiles(tmp_path, BATCH_ID)
    assert mine.lock()
    assert not other.lock()
    mine.close()
    assert other.lock()
    other.remove()


@in_loop
async def test_a_share_bounds_the_answers_of_all_batches() -> None:
    share = BatchShare.of(max_running=8, max_live=40)
    await share.take(3)
    await share.take(1)
    waiting = asyncio.create_task(share.take(1))
    small = asyncio.create_task(share.take(20))  # more than usual: it gets all, alone
    await asyncio.sleep(0)
    assert not waiting.done()
    share.give(1)
    await waiting
    share.give(3)
    await asyncio.sleep(0)
    assert not small.done()
    share.give(1)
    await small
    share.give(20)
    with pytest.raises(InvalidRequestError, match="asks for 21 answers"):
        await share.take(21)
    share.close()
    late = asyncio.create_task(share.take(1))
    await asyncio.sleep(0.01)
    assert not late.done()
    late.cancel()


WANTED = {"input_file_id": "file-1", "endpoint": URL, "completion_window": "24h"}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/rerank"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: ""}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"metadata": {"k": 1}}, "metadata"),
        ({"output_expires_after": {"seconds": 3600}}, "output_expires_after"),
        ({"input_file_id": None}, "input_file_id"),
    ],
)
def test_a_batch_that_nobody_understands_is_refused(change, param):
    assert parse_batch(orjson.dumps(WANTED)).endpoint == URL
    with pytest.raises(InvalidRequestError) as refused:
        parse_batch(orjson.dumps(WANTED | change))
    assert refused.value.param == param


def test_batch_ids_are_checked():
    assert check_batch_id(BATCH_ID) == BATCH_ID
    for wrong in ("", "batch_", "../" + BATCH_ID, BATCH_ID + "\n", "file-" + "a" * 32):
        with pytest.raises(NotFoundError):
            check_batch_id(wrong)


def test_pages_are_cut_newest_first():
    records = [
        FileRecord(id=f"file-{number}", num_bytes=0, created=number, filename="x", purpose="batch")
        for number in range(5)
    ]

    def ids(**query: str) -> tuple[list[str], bool]:
        shown = page(records, parse_query({"limit": "3"} | query, BatchQuery))
        ids = [each["id"][-1] for each in shown["data"]]
        assert (shown["first_id"] or "")[-1:] == "".join(ids)[:1]
        assert (shown["last_id"] or "")[-1:] == "".join(ids)[-1:]
        return ids, shown["has_more"]

    assert ids() == (["4", "3", "2"], True)
    assert ids(after="file-2") == (["1", "0"], False)
    assert ids(after="file-0") == ([], False)
    assert ids(order="asc", limit="10") == (["0", "1", "2", "3", "4"], False)
    for wrong in (
        {"limit": "0"},
        {"limit": "101"},
        {"limit": "x"},
        {"order": "up"},
        {"after": "?"},
    ):
        with pytest.raises(InvalidRequestError):
            ids(**wrong)


def test_a_record_shows_what_the_clients_expect():
    record = BatchRecord(
        id=BATCH_ID, input_file_id="file-1", endpoint=URL, model="m", created=5.5, num_lines=2
    )
    shown = record.show()
    assert shown["request_counts"] == {"total": 2, "completed": 0, "failed": 0}
    assert (shown["created_at"], shown["expires_at"]) == (5, 86405)
    assert (shown["status"], shown["errors"]) == ("validating", None)
