"""Every route, with every key, on servers with every choice of keys."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from fakes import in_loop
from ingress_server import Server, server

from sgl.actors.access import Level
from sgl.actors.endpoint import Endpoint

BEARERS = {"nobody": None, "wrong": "x", "api": "api-key", "admin": "admin-key"}
EVERYBODY = set(BEARERS)
LOCAL, PUBLIC = "127.0.0.1", "0.0.0.0"

# host, keys that are set, who may use routes of the level API, and of the level ADMIN
SETTINGS: list[tuple[str, tuple[str, ...], set[str], set[str]]] = [
    (LOCAL, (), EVERYBODY, EVERYBODY),
    (PUBLIC, (), EVERYBODY, set()),
    (LOCAL, ("api",), {"api"}, {"api"}),
    (PUBLIC, ("api",), {"api"}, set()),
    (LOCAL, ("api", "admin"), {"api", "admin"}, {"admin"}),
    (PUBLIC, ("api", "admin"), {"api", "admin"}, {"admin"}),
    (LOCAL, ("admin",), EVERYBODY, {"admin"}),
    (PUBLIC, ("admin",), EVERYBODY, {"admin"}),
]


@pytest.mark.parametrize(("host", "keys", "may_api", "may_admin"), SETTINGS)
@in_loop
async def test_each_route_is_open_to_whom_its_level_says(
    host: str, keys: tuple[str, ...], may_api: set[str], may_admin: set[str], tmp_path: Any
) -> None:
    flags: dict[str, Any] = {
        f"{'' if key == 'api' else 'admin_'}api_key": BEARERS[key] for key in keys
    }
    may = {Level.PUBLIC: EVERYBODY, Level.API: may_api, Level.ADMIN: may_admin}
    num_calls = 0
    async with server(host=host, file_storage_path=str(tmp_path), **flags) as s:
        for row, who in itertools.product(s.ingress.routes.table(), BEARERS):
            for method in row.methods.split():
                status = await call(s, method, row, BEARERS[who])
                was_refused = status if status in (401, 403) else None
                assert was_refused == refusal(who, row.level, may), (who, method, row.path)
                num_calls += 1
    assert num_calls > 130


def refusal(who: str, level: Level, may: dict[Level, set[str]]) -> int | None:
    """The status for somebody who may not; None for those who may."""
    if who in may[level]:
        return None
    return 403 if level is Level.ADMIN and who in may[Level.API] else 401


async def call(s: Server, method: str, row: Endpoint, key: str | None) -> int:
    """The status of a request without a body: who may send it gets an answer, or a 400."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    path = row.path.replace("{id}", "x").replace("{id:.+}", "x")
    async with s.http.request(method, s.url + path, headers=headers) as response:
        await response.read()
        return response.status


@in_loop
async def test_who_has_no_key_does_not_learn_which_paths_there_are() -> None:
    async with server(api_key="api-key") as s:
        assert await s.get("/nowhere") == await s.get("/v1/nowhere") == 401
        assert await s.get("/generate") == 401  # which there is only for POST
        with_key = {"Authorization": "Bearer api-key"}
        assert await s.get("/nowhere", headers=with_key) == 404


@pytest.mark.parametrize(
    ("authorization", "is_open"),
    [
        ("Bearer api-key", True),
        ("bearer  api-key ", True),
        ("api-key", False),
        ("Basic api-key", False),
        ("Bearer api-key2", False),
        ("Bearer api-ke", False),
        ("Bearer", False),
        ("", False),
    ],
)
@in_loop
async def test_a_key_is_sent_as_a_bearer_token(authorization: str, is_open: bool) -> None:
    async with server(api_key="api-key") as s:
        status = await s.get("/get_model_info", headers={"Authorization": authorization})
        assert status == (200 if is_open else 401)
