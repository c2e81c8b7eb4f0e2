"""The engines that smollm2_matrix.py starts: number formats, back ends, graphs and overlap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LIMITS = {"max_total_tokens": 16384, "max_running_requests": 64, "chunked_prefill_size": 1024}
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Way:
    """One engine to start; its name is short, for the table."""

    device: str
    dtype: str
    backend: str
    has_graphs: bool = False
    has_overlap: bool = True

    @property
    def name(self) -> str:
        parts = [("graphs", self.has_graphs), ("overlap", self.has_overlap)]
        mode = "+".join(name for name, is_on in parts if is_on) or "neither"
        place = "CPU " if self.device == "cpu" else ""
        return f"{place}{SHORT[self.dtype]} {self.backend} {mode}"

    @property
    def flags(self) -> dict[str, Any]:
        return LIMITS | {
            "device": self.device,
            "dtype": self.dtype,
            "attention_backend": self.backend,
            "disable_cuda_graph": not self.has_graphs,
            "disable_overlap_schedule": not self.has_overlap,
        }


EXACT, ROUNDED = (Way("cpu", dtype, "torch") for dtype in SHORT)
MODES = {  # with graphs, with overlap
    "triton": [(True, True), (True, False), (False, True), (False, False)],
    "torch": [(False, True), (False, False)],
    "flashinfer": [(True, True), (True, False), (False, True)],
}


def ways_of(device: str, dtype: str, *backends: str) -> list[Way]:
    return [Way(device, dtype, backend, *mode) for backend in backends for mode in MODES[backend]]
