"""A many-rank attention on one device: what it computes, what it holds, what it would take.

Nothing here talks to another process.
"""

from nnscaler_ring.core.sizes import Sizes
from nnscaler_ring.simulator.call import SimulatedCall
from nnscaler_ring.simulator.inputs import GeneratedInputs, WholeInputs
from nnscaler_ring.simulator.profiler import MemoryProfile, RingAttentionMemoryProfiler
from nnscaler_ring.simulator.score_options import ScoreOptions
from nnscaler_ring.simulator.simulator import Results, RingAttentionSimulator, Share

__all__ = [
    "GeneratedInputs",
    "MemoryProfile",
    "Results",
    "RingAttentionMemoryProfiler",
    "RingAttentionSimulator",
    "ScoreOptions",
    "Share",
    "SimulatedCall",
    "Sizes",
    "WholeInputs",
]
