"""What a model thinks before it answers, apart from what it says."""

from __future__ import annotations

from sgl.protocol.answer_parts import Content, Part, Thought
from sgl.protocol.reasoning import REASONING_FORMATS, ReasoningParser, thinking_after

NAME_ENDING = "_reasoning_content"  # of the variable beside the one with the answer


class Split:
    """Of an answer that grows: what is thought of it, and what is said."""

    def __init__(self, model_type: str | None, prompt: str) -> None:
        """`model_type` is one of REASONING_FORMATS; None: all of it is said."""
        self.thought = self.said = ""
        self._parser: ReasoningParser | None = None
        if model_type is not None:
            self._parser = ReasoningParser(thinking_after(prompt, REASONING_FORMATS[model_type]))
        self._num_read = 0

    def read(self, text: str, *, is_whole: bool = False) -> None:
        """All of it so far; `is_whole`: no more comes."""
        if self._parser is None:
            self.said = text
            return
        self._take(self._parser.feed(text[self._num_read :]))
        self._num_read = len(text)
        if is_whole:
            self._take(self._parser.finish())

    def _take(self, parts: list[Part]) -> None:
        for part in parts:
            match part:
                case Thought(text):
                    self.thought += text
                case Content(text):
                    self.said += text
