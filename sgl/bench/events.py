"""Server-sent events out of a stream of bytes that may be cut anywhere."""

from __future__ import annotations

DONE = b"[DONE]"


class EventSplitter:
    """Bytes in, the data of each complete event out. Lines may end in LF or CRLF."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The events that `piece` completes."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        return [event for line in lines if (event := self._take(line.removesuffix(b"\r")))]

    def close(self) -> list[bytes]:
        """The last event, where the server ended without the empty line behind it."""
        self._take(self._rest.removesuffix(b"\r"))
        self._rest = b""
        event = self._take(b"")
        return [event] if event else []

    def _take(self, line: bytes) -> bytes:
        """Remember a line of data; an empty line ends the event. Comments and names are skipped."""
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
        if line:
            return b""
        event, self._data = b"\n".join(self._data), []
        return event
