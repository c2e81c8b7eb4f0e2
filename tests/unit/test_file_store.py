"""Files on disk: what a crash leaves behind, ids that try to leave the folder, limits."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from sgl.actors import file_store
from sgl.actors.file_store import FileStore
from sgl.actors.records import RecordFolder
from sgl.errors import InvalidRequestError, NotFoundError, RequestTooLargeError
from sgl.protocol.files import FileRecord

HOSTILE_IDS = [
    "",
    ".",
    "..",
    "../secret",
    "/etc/passwd",
    "file-",
    "file-" + "a" * 31,
    "file-" + "a" * 33,
    "file-" + "A" * 32,
    "file-" + "a" * 32 + "\n",
    "file-" + "a" * 32 + "/../../secret",
    "file-../" + "a" * 29,
    "batch_" + "a" * 32,
    "file-" + "\N{ARABIC-INDIC DIGIT ONE}" * 32,
    "file-" + "a" * 31 + "\0",
]


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "deep" / "files", max_bytes=100)


def put(store: FileStore, data: bytes = b"one\ntwo\n", filename: str = "lines.jsonl") -> FileRecord:
    upload = store.begin()
    upload.write(data[:3])
    upload.write(data[3:])
    record = upload.commit(filename, "batch")
    upload.discard()  # as after every upload
    return record


def names(store: FileStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_a_file_is_found_again_by_another_store(store):
    record = put(store)
    again = FileStore(store.folder, max_bytes=100)
    assert again.get(record.id) == record
    assert again.all() == [record]
    assert (record.num_bytes, record.filename, record.purpose) == (8, "lines.jsonl", "batch")
    assert again.data_path(record.id).read_bytes() == b"one\ntwo\n"
    assert names(store) == [f"{record.id}.data", f"{record.id}.json"]


def test_the_folder_is_made_by_the_first_upload_and_is_private(store):
    assert store.all() == []
    store.sweep()
    assert not store.folder.exists()
    record = put(store)
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(store.data_path(record.id).stat().st_mode) == 0o600


def test_an_upload_that_is_given_up_leaves_nothing(store):
    upload = store.begin()
    upload.write(b"x")
    assert len(names(store)) == 1
    upload.discard()
    assert names(store) == []


def test_an_upload_over_the_limit_is_refused(store):
    upload = store.begin()
    upload.write(b"x" * 100)
    with pytest.raises(RequestTooLargeError, match="--max-file-mb"):
        upload.write(b"x")
    upload.discard()
    assert names(store) == []


def test_a_crash_between_the_two_writes_leaves_no_half_file(store, monkeypatch):
    kept = put(store)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(RecordFolder, "write", crash)
        with pytest.raises(KeyboardInterrupt):
            store.begin().commit("half.jsonl", "batch")
    [half] = [name for name in names(store) if not name.startswith(kept.id)]
    half_id = half.removesuffix(".data")
    again = FileStore(store.folder, max_bytes=100)
    assert again.all() == [kept]
    with pytest.raises(NotFoundError):
        again.get(half_id)
    again.sweep()
    assert half in names(store)  # it could be an upload to another server
    os.utime(store.folder / half, (0, 0))
    again.sweep(kept_ids={half_id})
    assert half in names(store)
    again.sweep()
    assert half not in names(store)
    assert again.all() == [kept]


def test_old_leftovers_of_uploads_are_swept_away(store):
    record = put(store)
    (store.folder / f"{file_store.new_file_id()}.data.tmp").write_bytes(b"half")
    (store.folder / f"{record.id}.json.tmp").write_bytes(b"{")
    for name in names(store):
        os.utime(store.folder / name, (0, 0))
    store.sweep()
    assert names(store) == [f"{record.id}.data", f"{record.id}.json"]


def test_adopting_goes_on_after_a_crash(store):
    put(store)
    part, file_id = store.folder / "batch.part", file_store.new_file_id()
    part.write_bytes(b"answer\n")
    part.rename(store.data_path(file_id))  # as if the server had died right after this
    store.adopt(part, file_id, "answers.jsonl", "batch_output")
    assert store.get(file_id).num_bytes == 7
    store.adopt(part, file_id, "answers.jsonl", "batch_output")
    assert len(store.all()) == 2


def test_a_deleted_file_is_gone(store):
    record = put(store)
    store.delete(record.id)
    assert names(store) == []
    with pytest.raises(NotFoundError):
        store.delete(record.id)


def test_damaged_metadata_hides_one_file_only(store):
    damaged, kept = put(store), put(store)
    (store.folder / f"{damaged.id}.json").write_bytes(b'{"id": 5')
    assert store.all() == [kept]
    with pytest.raises(NotFoundError):
        store.get(damaged.id)


@pytest.mark.parametrize("file_id", HOSTILE_IDS)
def test_no_id_leads_out_of_the_folder(store, file_id):
    put(store)
    secret = store.folder.parent / "secret.json"
    secret.write_text("{}")
    for use in (store.get, store.delete, store.data_path):
        with pytest.raises(NotFoundError, match="there is no file"):
            use(file_id)
    assert secret.exists()


def test_links_are_not_followed(store, tmp_path):
    record = put(store)
    target = tmp_path / "target"
    (store.folder / f"{record.id}.json.tmp").symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        store.adopt(store.data_path(record.id), record.id, "name", "batch")
    assert not target.exists()


def test_the_number_of_files_is_limited(store, monkeypatch):
    monkeypatch.setattr(file_store, "MAX_FILES", 2)
    put(store)
    last = put(store)
    with pytest.raises(InvalidRequestError, match="delete some"):
        put(store)
    store.delete(last.id)
    assert put(store).created <= time.time()
