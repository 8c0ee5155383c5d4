"""flash-attn 3 and 4 mounted in torch, in place of the FlashAttention-2 that it ships.

Mounting is torch's (`torch.nn.attention.activate_flash_attention_impl`), lasts until the process
ends or somebody restores torch's own, and holds for every call of torch's operator, whoever makes
it; so these kernels are taken by name alone. `flash_attn_3` and `flash_attn_4` call the same
packages and change nothing else. Not yet run on a GPU.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch.nn import attention

from nnscaler_ring.core.kernels.aten_flash import AtenFlash
from nnscaler_ring.core.kernels.contract import AttentionKernel, Problem
from nnscaler_ring.core.kernels.flash_form import FlashKernel
from nnscaler_ring.core.kernels.registry import offer_of

if TYPE_CHECKING:
    from nnscaler_ring.core.kernels.flash_attn import FlashAttn


@dataclass(frozen=True)
class Mounted:
    """A kernel of `KERNELS`: torch's name of an implementation, and the package behind it."""

    name: str
    implementation: str
    package: FlashAttn

    def supports(self, problem: Problem) -> str | None:
        """What the package supports, through torch's operator."""
        return self.limits(problem) or self.package.supports(problem) or self._not_offered()

    def limits(self, problem: Problem) -> str | None:
        """What it refuses where torch and the package have it."""
        if problem.softcap:
            return "torch's operator has no softcap"
        return self.package.limits(problem)

    def prepared(self, problem: Problem) -> AttentionKernel:
        """Torch's operator, once the package is mounted."""
        if attention.current_flash_attention_impl() != self.implementation:
            try:
                attention.activate_flash_attention_impl(self.implementation)
            except (ImportError, OSError, RuntimeError, ValueError) as error:
                raise ValueError(
                    f"kernel={self.name!r}: torch {torch.__version__} could not mount "
                    f"{self.implementation} ({type(error).__name__}: {error}); "
                    f"kernel={self.package.name!r} calls the same package without torch."
                ) from error
        return FlashKernel(self.name, AtenFlash(), problem, self.package.head_dims_of(problem))

    def _not_offered(self) -> str | None:
        # New in torch 2.11.
        offers: list[str] = getattr(attention, "list_flash_attention_impls", list)()
        if self.implementation not in offers:
            return f"torch {torch.__version__} offers to mount {offers or 'nothing'}"
        if self.implementation == "FA4":
            return _newer_than_torch(importlib.metadata.version("flash-attn-4"))
        return None


def _newer_than_torch(version: str) -> str | None:
    """Since 4.0.0b19 its forward returns more than the two tensors that torch 2.13 unpacks."""
    torch_release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    beta = re.fullmatch(r"4\.0\.0b(\d+)", version)
    if torch_release <= (2, 13) and not (beta and int(beta[1]) <= 18):
        return f"torch {torch.__version__} reads the results of 4.0.0b18 or older, not {version}"
    return None


def _package(name: str) -> FlashAttn:
    """The kernel that calls the same package without torch."""
    return cast("FlashAttn", offer_of(name))


MOUNTED = {
    offer.name: offer
    for offer in (
        Mounted("torch_fa3", "FA3", _package("flash_attn_3")),
        Mounted("torch_fa4", "FA4", _package("flash_attn_4")),
    )
}
"""By kernel name."""
