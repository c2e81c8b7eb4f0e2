"""Answers from documents: the paragraph that fits a question is put before it.

The retrieval is the simplest there is, words in common; a real one would compare embeddings.
Questions about the same paragraph have the same beginning, which the server computes once.

Prints, for each question, the paragraph that was found, the answer, and how much of the prompt was
cached.
"""

from __future__ import annotations

import argparse
import re

import sgl

PARAGRAPHS = [
    "The Amazon is a river in South America. It is 6400 kilometres long and flows to the Atlantic.",
    "The Sahara is a desert in Africa. It is as large as China, and it hardly ever rains there.",
    "Mount Everest is the highest mountain on Earth. It is 8849 metres high and stands in Asia.",
]
QUESTIONS = [
    "How long is the Amazon?",
    "Where does the Amazon flow to?",
    "How high is Mount Everest?",
    "On which continent is the Sahara?",
]


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def retrieve(question: str) -> str:
    """The paragraph that has most words in common with the question."""
    return max(PARAGRAPHS, key=lambda paragraph: len(words(paragraph) & words(question)))


@sgl.function
def answer_from(s: sgl.ProgramState, context: str, question: str) -> None:
    # The context comes first: only the beginning of a prompt can be shared.
    s += sgl.user(f"Text: {context}\n\nQuestion: {question}")
    s += sgl.assistant(
        "According to the text," + sgl.gen("answer", max_tokens=20, stop=[".", "\n"])
    )


def main(argv: list[str] | None = None) -> list[sgl.ProgramState]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="address of the server")
    sgl.set_default_backend(sgl.RuntimeEndpoint(parser.parse_args(argv).url))

    states = []
    for question in QUESTIONS:
        context = retrieve(question)
        state = answer_from.run(context, question, temperature=0)
        meta = state.get_meta_info("answer")
        print(f"{question}\n  text: {context}\n  answer: {state['answer'].strip()}")
        print(f"  {meta['cached_tokens']} of {meta['prompt_tokens']} prompt tokens were cached")
        states.append(state)
    return states


if __name__ == "__main__":
    main()
