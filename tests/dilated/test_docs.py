"""docs/dilated.md names every argument of the classes."""

import inspect
import re
from pathlib import Path

import pytest

from nnscaler_ring.dilated import (
    RingAdvancedDistributedDilatedAttention,
    RingDilatedAttention,
    RingMultiheadDilatedAttention,
)

TEXT = (Path(__file__).parents[2] / "docs" / "dilated.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`(\w+)[`=]", TEXT[TEXT.index("### Every argument") :]))


@pytest.mark.parametrize(
    "kind",
    [RingDilatedAttention, RingMultiheadDilatedAttention, RingAdvancedDistributedDilatedAttention],
)
def test_every_argument_is_named(kind):
    for function in (kind.__init__, RingMultiheadDilatedAttention.forward):
        arguments = {name for name in inspect.signature(function).parameters if name[0] != "_"}
        assert arguments - {"self", "query", "key", "value", "is_causal"} <= NAMED
