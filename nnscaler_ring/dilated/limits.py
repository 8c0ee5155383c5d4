"""Buffers that are refused before they are made."""

from __future__ import annotations

from dataclasses import dataclass

GB = 10**9


class BufferLimitError(ValueError, RuntimeError):
    """A call would need a larger buffer than its limits allow."""


@dataclass(frozen=True)
class BufferLimits:
    """The largest buffers that a call may need on one rank; None: any size.

    Args:
        communication_bytes: keys and values in messages at one time.
        qkv_elements: numbers in q, k and v together.
    """

    communication_bytes: int | None = GB
    qkv_elements: int | None = 100_000_000

    def __post_init__(self) -> None:
        for name in ("communication_bytes", "qkv_elements"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or None for any, got {value}.")

    def check_communication(self, size: int) -> None:
        """Refuse messages that are too large together.

        Raises:
            BufferLimitError: the messages hold too many bytes.
        """
        limit = self.communication_bytes
        if limit is not None and size > limit:
            raise BufferLimitError(
                f"Requested buffer size ({size / GB:.1f}GB) exceeds maximum reasonable size "
                f"({limit / GB:.1f}GB). Consider reducing sequence length or ring size, "
                "exchange='direct', whose messages are short, or "
                "limits=BufferLimits(communication_bytes=...)."
            )

    def check_qkv(self, elements: int) -> None:
        """Refuse q, k and v that are too large together.

        Raises:
            BufferLimitError: q, k and v have too many numbers.
        """
        limit = self.qkv_elements
        if limit is not None and elements > limit:
            raise BufferLimitError(
                f"Requested QKV buffer ({elements:,} elements) exceeds maximum reasonable size "
                f"({limit:,} elements). Consider more ranks, a smaller batch, or "
                "limits=BufferLimits(qkv_elements=...)."
            )
