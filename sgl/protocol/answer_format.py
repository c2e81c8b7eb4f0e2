"""How one model writes answers, and how one request's answers are to be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sgl.constrained.parts import Marker, after_thoughts
from sgl.errors import InvalidRequestError
from sgl.protocol.answer_parts import Arguments, CallBegun, Content, Part, TextParser, joined
from sgl.protocol.json_calls import HOLD_CHARS
from sgl.protocol.reasoning import CLOSE, OPEN, ReasoningFormat, ReasoningParser, Thinking
from sgl.protocol.tool_formats import PLAIN, TOOL_FORMATS, ToolFormat
from sgl.protocol.tool_grammar import tools_grammar
from sgl.protocol.tools import ToolUse
from sgl.sampling_params import Grammar

PIECE_CHARS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """What is known of the model.

    tools      how it writes calls; None: not known
    reasoning  how it writes thoughts; None: it has none, or they are not to be told apart
    markers    the texts that stand around both, with the tokens that the vocabulary has for them
    """

    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None
    markers: Mapping[str, Marker] = field(default_factory=dict)

    def grammar(
        self, use: ToolUse | None, answer: Grammar | None, thinking: Thinking
    ) -> Grammar | None:
        """What the whole text must match, thoughts and calls and all."""
        wanted = answer
        if use is not None:
            if use.choice == "required" and answer is not None:
                raise InvalidRequestError(
                    "the answer cannot match a grammar and be a call: leave out the grammar "
                    "(response_format …), or set tool_choice to auto or none",
                    param="tool_choice",
                )
            wanted = tools_grammar(use, self._tools(use).name, self.markers, answer)
        if wanted is None or thinking is Thinking.OVER:
            return wanted
        return after_thoughts(
            wanted,
            self.markers[OPEN],
            self.markers[CLOSE],
            are_optional=thinking is Thinking.POSSIBLE,
        )

    def reading(self, use: ToolUse | None, thinking: Thinking, *, is_sure: bool) -> Reading:
        """How to read the answers; `is_sure` where a grammar holds calls to their format."""
        form = None if use is None else self._tools(use)
        shown = () if form is None else form.markers
        if thinking is not Thinking.OVER:
            shown += (OPEN, CLOSE)
        ids = [self.markers[text].token_id for text in shown]
        return Reading(
            use=use,
            form=form,
            thinking=thinking,
            hold_chars=0 if is_sure else HOLD_CHARS,
            kept_ids=tuple(token_id for token_id in ids if token_id is not None),
        )

    def _tools(self, use: ToolUse) -> ToolFormat:
        if self.tools is not None:
            return self.tools
        if use.choice == "auto":
            raise InvalidRequestError(
                "this server does not know how its model writes calls: start it with "
                f"--tool-call-parser ({', '.join(TOOL_FORMATS)}), or set tool_choice to required, "
                "to one of the functions, or to none",
                param="tools",
            )
        return PLAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How the answers of one request are read.

    kept_ids   special tokens whose text is needed for that
    """

    use: ToolUse | None = None
    form: ToolFormat | None = None
    thinking: Thinking = Thinking.OVER
    hold_chars: int = HOLD_CHARS
    kept_ids: tuple[int, ...] = ()

    @property
    def is_plain(self) -> bool:
        """All of the text is the answer itself."""
        return self.use is None and self.thinking is Thinking.OVER

    def reader(self) -> AnswerReader:
        """For one answer."""
        calls = None
        if self.use is not None and self.form is not None:
            calls = self.form.make_parser(self.use.names, self.hold_chars)
        thoughts = None if self.thinking is Thinking.OVER else ReasoningParser(self.thinking)
        return AnswerReader(thoughts, calls, None if self.use is None else self.use.max_calls)

    def new_id(self) -> str:
        """For a call."""
        assert self.form is not None, "only a format has calls"
        return self.form.new_id()


class AnswerReader:
    """Thoughts come first; calls are looked for in the rest; those after `max_calls` go."""

    def __init__(
        self,
        thoughts: TextParser | None = None,
        calls: TextParser | None = None,
        max_calls: int | None = None,
    ) -> None:
        self._thoughts = thoughts
        self._calls = calls
        self._max_calls = max_calls
        self.has_calls = False

    def whole(self, text: str) -> list[Part]:
        """All of a text that is there; in pieces, as parsers copy what they have not told yet."""
        starts = range(0, len(text), PIECE_CHARS)
        parts = [part for start in starts for part in self.feed(text[start : start + PIECE_CHARS])]
        return joined(parts + self.finish())

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain now."""
        parts: list[Part] = [Content(text)]
        if self._thoughts is not None:
            parts = self._thoughts.feed(text)
        return self._told(self._with_calls(parts))

    def finish(self) -> list[Part]:
        """The text has ended: the rest."""
        parts = [] if self._thoughts is None else self._thoughts.finish()
        parts = self._with_calls(parts)
        if self._calls is not None:
            parts += self._calls.finish()
        return self._told(parts)

    def _with_calls(self, parts: list[Part]) -> list[Part]:
        if self._calls is None:
            return parts
        found: list[Part] = []
        for part in parts:
            found += self._calls.feed(part.text) if isinstance(part, Content) else [part]
        return found

    def _told(self, parts: list[Part]) -> list[Part]:
        told = joined(part for part in parts if not self._is_beyond(part))
        self.has_calls = self.has_calls or any(isinstance(part, CallBegun) for part in told)
        return told

    def _is_beyond(self, part: Part) -> bool:
        return (
            self._max_calls is not None
            and isinstance(part, CallBegun | Arguments)
            and part.index >= self._max_calls
        )


def known_markers(find_id: Callable[[str], int | None]) -> dict[str, Marker]:
    """Every text that a format may need, with its token where there is one."""
    texts = {OPEN, CLOSE}.union(*(form.markers for form in TOOL_FORMATS.values()))
    return {text: Marker(text, find_id(text)) for text in sorted(texts)}
