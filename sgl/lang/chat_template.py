"""How roles are written in the text of a program.

The formats are those that the models were trained with. A model whose name says nothing gets what
its server's own template writes (`RuntimeEndpoint`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sgl.lang.ir import Role
from sgl.lang.prompt import Message

Marks = tuple[str, str]  # before and after what is said in a role


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """
    name
    roles                  role -> what comes before and after its text
    default_system_prompt  said first where a program says nothing else
    stops                  texts that end an answer, and are not part of it
    image_token            stands in the text where an image is
    opening                before the first role
    merges_system          the system prompt stands in the first message of the user, between these
    """

    name: str
    roles: Mapping[str, Marks]
    default_system_prompt: str | None = None
    stops: tuple[str, ...] = ()
    image_token: str = "<image>"
    opening: str = ""
    merges_system: Marks | None = None

    def marks(self, role: Role, before: Sequence[Message]) -> Marks:
        """Before and after what is said in a role that follows on these messages."""
        begin, end = self.roles[role]
        if self.merges_system is not None:
            if role == "system":
                user_begin, _ = self.roles["user"]
                merge_begin, merge_end = self.merges_system
                begin, end = user_begin + merge_begin, merge_end
            elif role == "user" and len(before) == 1 and before[0]["role"] == "system":
                begin = ""
        return (begin if before else self.opening + begin), end


def _marked(
    name: str, mark: str, end: str, stops: Sequence[str], **more: object
) -> tuple[str, ChatTemplate]:
    roles = {role: (mark.format(role), end) for role in ("system", "user", "assistant")}
    return name, ChatTemplate(name=name, roles=roles, stops=tuple(stops), **more)  # type: ignore[arg-type]


def _written(
    name: str, system: Marks, user: Marks, assistant: Marks, **more: object
) -> tuple[str, ChatTemplate]:
    roles = {"system": system, "user": user, "assistant": assistant}
    return name, ChatTemplate(name=name, roles=roles, **more)  # type: ignore[arg-type]


_CHATML = "<|im_start|>{}\n"
_LLAMA_3 = "<|start_header_id|>{}<|end_header_id|>\n\n"
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_COHERE = "<|START_OF_TURN_TOKEN|><|{}_TOKEN|>"

TEMPLATES: dict[str, ChatTemplate] = dict(
    [
        _written("default", ("SYSTEM:", "\n"), ("USER:", "\n"), ("ASSISTANT:", "\n")),
        _written("claude", ("", ""), ("\n\nHuman: ", ""), ("\n\nAssistant:", "")),
        _marked("chatml", _CHATML, "<|im_end|>\n", ["<|im_end|>"]),
        _marked(
            "chatml-llava",
            _CHATML,
            "<|im_end|>\n",
            ["<|im_end|>"],
            default_system_prompt="You are a helpful assistant.",
            image_token="<image>\n",
        ),
        _marked(
            "qwen",
            _CHATML,
            "<|im_end|>\n",
            ["<|im_end|>"],
            default_system_prompt="You are a helpful assistant.",
        ),
        _marked(
            "qwen2-vl",
            _CHATML,
            "<|im_end|>\n",
            ["<|im_end|>"],
            default_system_prompt="You are a helpful assistant.",
            image_token="<|vision_start|><|image_pad|><|vision_end|>",
        ),
        _written(
            "vicuna_v1.1",
            ("", " "),
            ("USER:", " "),
            ("ASSISTANT:", "</s>"),
            default_system_prompt=_VICUNA,
            image_token=" <image>\n",
        ),
        _written(
            "llama-2-chat",
            ("<<SYS>>\n", "\n<</SYS>>\n\n"),
            ("[INST] ", " [/INST]"),
            ("", " </s><s>"),
            merges_system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        ),
        _marked("llama-3-instruct", _LLAMA_3, "<|eot_id|>", ["<|eot_id|>"]),
        _marked(
            "llama-3-instruct-llava",
            _LLAMA_3,
            "<|eot_id|>",
            ["<|eot_id|>"],
            image_token="<image>\n",
        ),
        _written(
            "minicpmv",
            ("", " "),
            ("user:", " "),
            ("assistant:", "</s>"),
            stops=("<|im_end|>", "<|endoftext|>"),
            image_token="(<image>./</image>)",
        ),
        _marked("yi-1.5", _CHATML, "<|im_end|>\n", ["<|im_end|>"]),
        _written(
            "yi-vl",
            ("", "\n\n"),
            ("### Human:", "\n"),
            ("### Assistant:", "\n"),
            default_system_prompt=(
                "This is a chat between an inquisitive human and an AI assistant. Assume the role "
                "of the AI assistant. Read all the images carefully, and respond to the human's "
                "questions with informative, helpful, detailed and polite answers."
            ),
            image_token=" <image_placeholder>\n",
        ),
        _written(
            "gemma-it",
            ("", ""),
            ("<start_of_turn>user\n", "<end_of_turn>\n"),
            ("<start_of_turn>model\n", "<end_of_turn>\n"),
        ),
        _marked("dbrx-instruct", _CHATML, "<|im_end|>\n", ["<|im_end|>"]),
        _written(
            "c4ai-command-r",
            (_COHERE.format("SYSTEM"), "<|END_OF_TURN_TOKEN|>"),
            (_COHERE.format("USER"), "<|END_OF_TURN_TOKEN|>"),
            (_COHERE.format("CHATBOT"), "<|END_OF_TURN_TOKEN|>"),
        ),
        _marked(
            "granite-3-instruct",
            "<|start_of_role|>{}<|end_of_role|>",
            "<|end_of_text|>\n",
            ["<|end_of_text|>"],
        ),
        _written(
            "deepseek-v3",
            ("", ""),
            ("<｜User｜>", ""),
            ("<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
            stops=("<｜end▁of▁sentence｜>",),
        ),
    ]
)

_OF_PATHS = [  # the first that is found in a model's path, in lower case
    (r"llava.*(v1\.6-34b|next|onevision|qwen)", "chatml-llava"),
    (r"llama-?3.*llava|llava.*llama-?3", "llama-3-instruct-llava"),
    (r"vicuna|llava", "vicuna_v1.1"),
    (r"deepseek-(v3|r1)(?!.*base)", "deepseek-v3"),
    (r"llama-2.*chat|codellama.*instruct", "llama-2-chat"),
    (r"mi(s|x)tral.*instruct", "llama-2-chat"),
    (r"llama-3.*instruct", "llama-3-instruct"),
    (r"qwen.*vl", "qwen2-vl"),
    (r"qwen.*(chat|instruct)", "qwen"),
    (r"tinyllama.*chat|smollm.*instruct|hermes", "chatml"),
    (r"minicpm-?v", "minicpmv"),
    (r"yi-vl", "yi-vl"),
    (r"yi-1\.5.*chat", "yi-1.5"),
    (r"yi.*chat", "chatml"),
    (r"gemma.*it", "gemma-it"),
    (r"dbrx.*instruct", "dbrx-instruct"),
    (r"c4ai-command-r", "c4ai-command-r"),
    (r"granite.*instruct", "granite-3-instruct"),
    (r"claude", "claude"),
]


def template_of(name: str) -> ChatTemplate:
    """By its name; raises ValueError, which lists them."""
    if name not in TEMPLATES:
        raise ValueError(f"no chat template {name!r}; there are {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]


def template_for(model_path: str) -> ChatTemplate | None:
    """The one that a model's path speaks of; None where it does not."""
    path = model_path.lower()
    return next((TEMPLATES[name] for regex, name in _OF_PATHS if re.search(regex, path)), None)
