"""The examples of docs/clients.md print what stands below them."""

from __future__ import annotations

import re
import runpy
import tempfile
from importlib import import_module
from pathlib import Path

from checks.common import API_KEY, BASE_URL

for library in ("langchain_openai", "litellm", "llama_index.llms.openai_like"):
    import_module(library)  # before there are threads
PAGE = (Path(__file__).parents[3] / "docs" / "clients.md").read_text()
EXAMPLE = re.compile(r"```python\n(.*?)^```\n\n```text\n(.*?)^```", re.MULTILINE | re.DOTALL)


def examples() -> dict[str, tuple[str, str]]:
    """Heading -> source, and what it prints."""
    found = {}
    for section in PAGE.split("\n## ")[1:]:
        heading, _, text = section.partition("\n")
        if example := EXAMPLE.search(text):
            found[heading] = (example[1], example[2])
    return found


def check(heading: str) -> None:
    source, expected = examples()[heading]
    source = source.replace("http://127.0.0.1:30000/v1", BASE_URL).replace('"none"', repr(API_KEY))
    printed: list[str] = []

    def note(*words: object) -> None:
        """In place of `print`: other checks may print at the same time."""
        printed.append(" ".join(map(str, words)))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "example.py"
        path.write_text(source)
        runpy.run_path(str(path), {"print": note})
    assert printed == expected.splitlines(), printed


def check_openai() -> None:
    check("openai")


def check_openai_many_requests_at_once() -> None:
    check("openai, many requests at once")


def check_openai_structured_answers() -> None:
    check("openai, structured answers")


def check_langchain() -> None:
    check("LangChain")


def check_llama_index() -> None:
    check("LlamaIndex")


def check_lite_llm() -> None:
    check("LiteLLM")


def check_that_no_example_is_left_out() -> None:
    assert len(examples()) == PAGE.count("```python") == 6
