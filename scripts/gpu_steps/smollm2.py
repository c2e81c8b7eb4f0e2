"""A real model through a server, in the way its first user meets it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import reference

from scripts.gpu_steps.findings import Findings, parser
from sgl.errors import ConfigError
from sgl.model_files import demo_model_path

PORT = 32050
START_S = 90.0
STOP_S = 30.0
ANSWER_S = 30.0
ANSWER = "Paris"  # to the question that the server prints
_CURL = re.compile(r"curl (?P<url>http://\S+) .*?-d '(?P<body>.*?)'", re.DOTALL)


def main() -> None:
    options = parser()
    options.add_argument("--model", type=Path, nargs="+")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="smollm2-") as scratch:
        model = model_file(arguments.model, Path(scratch))
        if model is None:
            arguments.found.add("model", None, why="none given with --model, none installed")
            return
        for number, dtype in enumerate(("float32", "bfloat16")):
            trial = Trial(model, dtype, PORT + number, arguments.device, arguments.found)
            trial.run(Path(scratch), arguments.quick)


def model_file(paths: list[Path] | None, scratch: Path) -> str | None:
    """One file; several parts are joined in the order given."""
    if not paths:
        try:
            return demo_model_path()
        except ConfigError:
            return None
    if len(paths) == 1:
        return str(paths[0])
    whole = scratch / "SmolLM2-135M-Instruct.gguf"
    with whole.open("wb") as file:
        for path in paths:
            file.write(path.read_bytes())
    return str(whole)


class Trial:
    """One server, asked over HTTP."""

    def __init__(self, model: str, dtype: str, port: int, device: str, found: Findings) -> None:
        self.dtype = dtype
        self.port = port
        self.found = found
        self._command = [
            *(sys.executable, "-m", "sgl.launch_server", "--model-path", model),
            *("--dtype", dtype, "--port", str(port), "--device", device),
        ]

    def run(self, scratch: Path, is_quick: bool) -> None:
        log = scratch / f"{self.dtype}.log"
        with self._server(log):
            self._ask_as_printed(log.read_text(encoding="utf-8"))
            self._measure_stream(16 if is_quick else 256)
            if self.dtype == "float32" and reference.PATH.exists():
                self._compare_answers(4 if is_quick else None)

    @contextmanager
    def _server(self, log: Path) -> Iterator[None]:
        started = time.monotonic()
        with log.open("wb") as file:
            process = subprocess.Popen(self._command, stdout=file, stderr=file)
        try:
            while not self._is_ready():
                assert process.poll() is None, f"the server ended: {log.read_text()[-800:]}"
                assert time.monotonic() - started < START_S, "the server was not ready in time"
                time.sleep(0.1)
            self._add("ready", True, s=round(time.monotonic() - started, 1))
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(STOP_S)
            print(log.read_text(encoding="utf-8"))
        self._add("stops when told to", code == 0, code=code)

    def _is_ready(self) -> bool:
        try:
            return self._post_or_get("/health/ready")[0] == 200
        except OSError:
            return False

    def _ask_as_printed(self, log: str) -> None:
        """The request that the server prints when it is ready."""
        printed = _CURL.search(log)
        assert printed, "the server prints no request to try"
        path = printed["url"].split(f":{self.port}", 1)[1]
        try:
            _, text = self._post_or_get(path, printed["body"])
        except TimeoutError:
            text = "no answer in time"
        is_right = ANSWER in text
        self._add("printed request", is_right, answer=text[-300:])
        answer = self._generate("The capital of France is", max_new_tokens=16)["text"]
        self._add("completion", "Paris" in answer, answer=answer)

    def _measure_stream(self, num_tokens: int) -> None:
        seconds = []
        for num in (1, num_tokens):
            started = time.monotonic()
            self._generate("A long story:", max_new_tokens=num, ignore_eos=True)
            seconds.append(time.monotonic() - started)
        rate = (num_tokens - 1) / (seconds[1] - seconds[0])
        self._add("one stream", True, decode_tok_s=round(rate, 1))

    def _compare_answers(self, num_answers: int | None) -> None:
        """With those of transformers on a CPU, all asked at the same time."""
        items = list(reference.Reference.load().answers.items())[:num_answers]
        with ThreadPoolExecutor(len(items)) as pool:
            outputs = list(pool.map(lambda item: self._generate(item[1].prompt_ids), items))
        wrong, num_ties = [], 0
        for (name, answer), output in zip(items, outputs, strict=True):
            if not answer.agrees(output):
                is_tie = answer.parts_at_tie(output["output_ids"], reference.TIE)
                num_ties += is_tie
                wrong += [] if is_tie else [name]
        self._add("answers of transformers", not wrong, of=len(items), ties=num_ties, wrong=wrong)

    def _generate(self, prompt: str | list[int], **sampling: object) -> dict[str, Any]:
        base = {"temperature": 0.0, "max_new_tokens": reference.NUM_ANSWER_TOKENS}
        key = "text" if isinstance(prompt, str) else "input_ids"
        body = json.dumps({key: prompt, "sampling_params": base | sampling})
        status, text = self._post_or_get("/generate", body)
        assert status == 200, text
        return json.loads(text)

    def _post_or_get(self, path: str, body: str | None = None) -> tuple[int, str]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=None if body is None else body.encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
            return response.status, response.read().decode()

    def _add(self, check: str, ok: bool | None, **figures: object) -> None:
        self.found.add(f"{self.dtype}: {check}", ok, **figures)


if __name__ == "__main__":
    main()
