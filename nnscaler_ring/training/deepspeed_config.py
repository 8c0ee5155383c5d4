"""A configuration for `deepspeed.initialize` from this package's arguments."""

from __future__ import annotations

from typing import Any

MB = 10**6


def make_deepspeed_config(
    *,
    embed_dim: int,
    zero_stage: int,
    cpu_offload: bool = False,
    nvme_path: str | None = None,
    compress_gradients: bool = False,
    bucket_megabytes: float = 25,
    overlap_communication: bool = True,
    dtype: str = "float32",
    micro_batch: int = 1,
) -> dict[str, Any]:
    """Make the dictionary; data-parallel ranks are those of all mesh dimensions but tensor.

    DeepSpeed takes the mean of gradients over its ranks: multiply the loss by their number, where
    it is a rank's part of the whole loss.
    """
    bucket = int(bucket_megabytes * MB / 2)  # DeepSpeed counts elements; of two bytes
    zero: dict[str, Any] = {
        "stage": zero_stage,
        "overlap_comm": overlap_communication,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    place = {"device": "nvme", "nvme_path": nvme_path} if nvme_path else {"device": "cpu"}
    if cpu_offload or nvme_path:
        zero["offload_optimizer"] = dict(place)
        if zero_stage == 3:
            zero["offload_param"] = dict(place)
    if zero_stage == 3:
        zero["stage3_prefetch_bucket_size"] = bucket
        zero["stage3_param_persistence_threshold"] = 10 * embed_dim
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
    }
    if compress_gradients:
        config["communication_data_type"] = "bf16"
    return config


def require_deepspeed() -> None:
    """Refuse to go on without DeepSpeed.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "use_deepspeed=True needs DeepSpeed; pip install deepspeed, or leave it out: "
            "zero_stage then shards parameters with torch's FSDP2."
        ) from error
