"""What a training loop over ranks needs beside its model.

Gradient sums, parameters sharded with FSDP2, checkpoints, shards of a sequence, activation
checkpointing that repeats no message, and tensor-parallel parameters. Nothing here knows a model:
`nnscaler_ring.models` and `nnscaler_ring.dilated` use it, and so can any other.
"""

from nnscaler_ring.training.checkpoints import TrainingCheckpoints
from nnscaler_ring.training.fsdp import shard_parameters
from nnscaler_ring.training.gradients import sum_gradients
from nnscaler_ring.training.shards import even_shard_lens, positions_of_shard

__all__ = [
    "TrainingCheckpoints",
    "even_shard_lens",
    "positions_of_shard",
    "shard_parameters",
    "sum_gradients",
]
