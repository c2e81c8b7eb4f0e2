"""What notebooks and scripts around programs need: a server to talk to, files, pretty printing."""

from __future__ import annotations

import html
import http.client
import json as json_lib
import shlex
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sgl.engine import Engine

POLL_S = 0.5
STOP_S = 30


class HttpAnswer:
    """What a server answered."""

    def __init__(self, response: http.client.HTTPResponse | urllib.error.HTTPError) -> None:
        self.status_code = int(response.status or 0)
        self._response = response

    @property
    def text(self) -> str:
        return self._response.read().decode()

    def json(self) -> Any:
        return json_lib.loads(self._response.read())

    def iter_lines(self) -> Iterator[bytes]:
        """As they come, without their ends."""
        for line in self._response:
            yield line.rstrip(b"\r\n")


def http_request(
    url: str,
    json: Any = None,
    api_key: str | None = None,
    verify: str | bool | None = None,
) -> HttpAnswer:
    """GET, or POST of JSON. An answer that tells of an error is an answer, too."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    data = None
    if json is not None:
        data, headers["Content-Type"] = json_lib.dumps(json).encode(), "application/json"
    context = ssl.create_default_context(cafile=verify if isinstance(verify, str) else None)
    if verify is False:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    request = urllib.request.Request(url, data=data, headers=headers)
    try:
        return HttpAnswer(urllib.request.urlopen(request, context=context))
    except urllib.error.HTTPError as error:
        return HttpAnswer(error)


def execute_shell_command(command: str) -> subprocess.Popen[bytes]:
    """Start a program, such as a server, and return at once; a backslash may end a line of it."""
    return subprocess.Popen(shlex.split(command.replace("\\\n", " ")))


def launch_server_cmd(command: str) -> tuple[subprocess.Popen[bytes], int]:
    """As `execute_shell_command`, with `--port` of a free port, which is told."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    return execute_shell_command(f"{command} --port {port}"), port


def wait_for_server(base_url: str, timeout: float | None = None) -> None:
    """Until the server is ready; raises TimeoutError after so many seconds."""
    end = None if timeout is None else time.monotonic() + timeout
    while True:
        with suppress(OSError):
            if http_request(base_url.rstrip("/") + "/health").status_code == 200:
                return
        if end is not None and time.monotonic() > end:
            raise TimeoutError(f"no server at {base_url} is ready after {timeout} s")
        time.sleep(POLL_S)


def terminate_process(process: subprocess.Popen[Any]) -> None:
    """Ask it to end, and end it where it does not within half a minute."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def print_highlight(content: object) -> None:
    """In a notebook in bold and blue, elsewhere as it is."""
    ipython = sys.modules.get("IPython")
    if ipython is not None and ipython.get_ipython() is not None:
        text = html.escape(str(content)).replace("\n", "<br>")
        shown = f"<strong style='color: #00008B;'>{text}</strong>"
        ipython.display.display(ipython.display.HTML(shown))
    else:
        print(content)  # noqa: T201


def read_jsonl(filename: str) -> Iterator[Any]:
    """The values of a file that has one to a line; lines that begin with # are left out."""
    with open(filename, encoding="utf-8") as file:
        for line in file:
            if line.strip() and not line.startswith("#"):
                yield json_lib.loads(line)


def dump_state_text(filename: str, states: Iterable[Any], mode: str = "w") -> None:
    """Write the texts of programs to a file, one after the other."""
    with open(filename, mode, encoding="utf-8") as file:
        for number, state in enumerate(states):
            text = state if isinstance(state, str) else state.text()
            file.write(f"==================== {number} ====================\n{text.strip()}\n\n")


def download_and_cache_file(url: str, filename: str | None = None) -> str:
    """The path of a file from the web, fetched once into the folder for temporary files."""
    import tempfile

    path = Path(filename or Path(tempfile.gettempdir(), url.rstrip("/").rpartition("/")[2]))
    if not path.exists():
        part = path.with_name(path.name + ".part")
        urllib.request.urlretrieve(url, part)
        part.replace(path)
    return str(path)


def stream_and_merge(llm: Engine, prompt: str, sampling_params: dict[str, Any]) -> str:
    """The text of a streamed answer, all of it."""
    text = ""
    for event in llm.generate(prompt, sampling_params, stream=True):
        text = event["text"]
    return text
