"""Answers that must have a certain form: a regular expression, a JSON schema, a type, a choice.

The server lets the model pick only tokens that fit, so the answers can be parsed without a check.

Prints the answers, parsed.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import sgl

DATE = r"[12][0-9]{3}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
CONTINENTS = ["Africa", "America", "Asia", "Europe"]
# Every part has a largest length, so that the answer is always complete within `max_tokens`.
CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "millions_of_people": {"type": "integer", "minimum": 0, "maximum": 40},
        "is_capital": {"type": "boolean"},
    },
    "required": ["name", "millions_of_people", "is_capital"],
    "additionalProperties": False,
}


@sgl.function
def describe_city(s: sgl.ProgramState, city: str) -> None:
    s += sgl.user(f"Describe the city {city} as JSON.")
    s += sgl.assistant(sgl.gen("city", json_schema=CITY, max_tokens=64))
    s += sgl.user("On which date is its best known festival, as year-month-day?")
    s += sgl.assistant(sgl.gen("date", regex=DATE))
    s += sgl.user("In which year was it founded?")
    s += sgl.assistant("In the year " + sgl.gen("founded", dtype=int, max_tokens=8))
    s += sgl.user("Which continent is it on?")
    s += sgl.assistant("It is in " + sgl.gen("continent", choices=CONTINENTS))


def parsed(state: sgl.ProgramState) -> dict[str, Any]:
    """Variables are always text, also with a schema or a `dtype`."""
    return {
        "city": json.loads(state["city"]),
        "date": state["date"],
        "founded": int(state["founded"]),
        "continent": state["continent"],
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="address of the server")
    sgl.set_default_backend(sgl.RuntimeEndpoint(parser.parse_args(argv).url))

    answers = parsed(describe_city.run("Paris", temperature=0))
    for name, value in answers.items():
        print(f"{name}: {value!r}")
    return answers


if __name__ == "__main__":
    main()
