"""Pictures and films, as bytes that travel with a prompt."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgl.errors import ConfigError

_KINDS = [(b"\x89PNG", "png"), (b"\xff\xd8", "jpeg"), (b"GIF8", "gif"), (b"RIFF", "webp")]


def image_bytes(source: Any) -> bytes:
    """A picture from a path, from bytes, or from a PIL image; raises OSError or TypeError."""
    if isinstance(source, bytes):
        return source
    if isinstance(source, str | os.PathLike):
        return Path(source).read_bytes()
    if callable(save := getattr(source, "save", None)):
        buffer = io.BytesIO()
        save(buffer, format="PNG")
        return buffer.getvalue()
    raise TypeError(f"an image is a path, bytes or a PIL image, not {type(source).__name__}")


def video_frames(path: str | os.PathLike[str], num_frames: int) -> tuple[bytes, ...]:
    """So many pictures of a film, evenly spaced, as PNG.

    Raises OSError where there is no such file, and ConfigError where no decoder is installed.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no video at {os.fspath(path)}")
    try:
        from decord import VideoReader
    except ImportError:
        raise ConfigError('to read videos, install a decoder: pip install "sgl[video]"') from None
    from PIL import Image

    reader = VideoReader(os.fspath(path))
    last = len(reader) - 1
    indices = [round(index * last / max(num_frames - 1, 1)) for index in range(num_frames)]
    pictures = reader.get_batch(indices[: last + 1]).asnumpy()
    return tuple(image_bytes(Image.fromarray(picture)) for picture in pictures)


def data_url(image: bytes) -> str:
    kind = next((kind for start, kind in _KINDS if image.startswith(start)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def message_content(said: str, images: Sequence[bytes], token: str) -> str | list[dict[str, Any]]:
    """What a message says: text, or parts of text and pictures where it has some."""
    if not images:
        return said.lstrip()
    texts = said.split(token)
    texts[0] = texts[0].lstrip()
    parts: list[dict[str, Any]] = []
    for index, text in enumerate(texts):
        if text:
            parts.append({"type": "text", "text": text})
        if index < len(images):
            parts.append({"type": "image_url", "image_url": {"url": data_url(images[index])}})
    return parts
