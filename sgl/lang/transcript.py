"""What a program has said so far: its text, its messages, its images."""

from __future__ import annotations

import copy
from typing import TypeAlias

from sgl.lang.chat_template import ChatTemplate
from sgl.lang.images import message_content
from sgl.lang.ir import Image, Role, RoleBegin, RoleEnd, Video
from sgl.lang.prompt import NOTHING_HELD, Message, Prompt

Said: TypeAlias = "str | RoleBegin | RoleEnd | Image | Video"


class Transcript:
    """
    text      everything, with the template's marks around roles
    messages  what was said in roles that have ended
    held      the text's beginning, as tokens that a backend keeps
    num_prefilled   characters of it that a backend has computed before there was a question
    """

    __slots__ = (
        "_begun_at",
        "_images",
        "_num_images_said",
        "_role",
        "_suffix",
        "_template",
        "held",
        "messages",
        "num_prefilled",
        "text",
    )

    def __init__(self, template: ChatTemplate) -> None:
        self.text = ""
        self.messages: list[Message] = []
        self.held = NOTHING_HELD
        self.num_prefilled = 0
        self._template = template
        self._images: tuple[bytes, ...] = ()
        self._num_images_said = 0  # in roles that have ended
        self._role: Role | None = None
        self._begun_at = 0  # where the role's text begins, and what will end it
        self._suffix = ""

    def write(self, said: Said) -> None:
        match said:
            case str():
                self.text += said
            case RoleBegin(role):
                self._begin_role(role)
            case RoleEnd(role):
                self._end_role(role)
            case Image(data):
                self._images += (data,)
                self.text += self._template.image_token
            case Video(frames):
                self._images += frames
                self.text += self._template.image_token * len(frames)

    def prompt(self) -> Prompt:
        """All of it, to go on from."""
        is_in_role = self._role is not None
        return Prompt(
            text=self.text,
            messages=self.messages,
            begun=self.text[self._begun_at :] if is_in_role else None,
            images=self._images,
            stops=self._template.stops if is_in_role else (),
            held=self.held,
        )

    def copy(self) -> Transcript:
        """One that goes on by itself."""
        other = copy.copy(self)
        other.messages = list(self.messages)
        return other

    def _begin_role(self, role: Role) -> None:
        said_first = self._template.default_system_prompt
        if not self.messages and role != "system" and said_first is not None:
            self._begin_role("system")
            self.text += said_first
            self._end_role("system")
        begin, self._suffix = self._template.marks(role, self.messages)
        self.text += begin
        self._role, self._begun_at = role, len(self.text)

    def _end_role(self, role: Role) -> None:
        said = self.text[self._begun_at :]
        self.text += self._suffix
        images = self._images[self._num_images_said :]
        self._num_images_said = len(self._images)
        content = message_content(said, images, self._template.image_token)
        self.messages.append({"role": role, "content": content})
        self._role = None
