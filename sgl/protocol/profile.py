"""What `/start_profile` and `Engine.start_profile` are asked."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec


class ProfileRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Names as SGLang has them.

    output_dir  folder of the traces, relative to the server's; not given: the server's choice
    num_steps   end by itself after so many steps
    activities  what to record; nothing said: all that the machine has
    """

    output_dir: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    num_steps: Annotated[int, msgspec.Meta(ge=1)] | None = None
    activities: tuple[Literal["CPU", "GPU"], ...] | None = None
