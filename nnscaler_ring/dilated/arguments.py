"""Arguments that cannot be honoured: each is refused by name, with its reason."""

from __future__ import annotations

REASONS = {
    "dropout": "the op computes dilated attention without dropout of probabilities; drop the "
    "module's output instead",
    "use_tf32": "TF32 is a setting of the whole process; call "
    "torch.set_float32_matmul_precision('high')",
    "block_size": "the exchange chooses the length of messages and the kernel that of blocks",
    "use_checkpointing": "the backward pass always computes the scores again; keeping them would "
    "take O(tokens^2)",
    "need_weights": "the probabilities are the whole score matrix, which is never built; call "
    "wrap_dilated_attn_func with return_lse=True for the softmax normaliser",
    "key_padding_mask": "every token takes part; shards of different lengths need no padding, give "
    "shard_lens",
    "attn_mask": "the mask follows from segment_lengths, dilation_rates and is_causal",
    "average_attn_weights": "no weights are returned",
    "use_8bit_optimizer": "a layer owns no optimizer; give the training loop one, for example "
    "bitsandbytes.optim.AdamW8bit",
}


def refuse_unless(name: str, value: object, only: object) -> None:
    """Refuse every value but the only one that can be honoured.

    Raises:
        NotImplementedError: there is another value.
    """
    if value != only or type(value) is not type(only):
        if isinstance(only, float) and value == only:
            return
        raise NotImplementedError(f"{name} must be {only}, got {value!r}: {REASONS[name]}.")


def refuse_unless_none(name: str, value: object) -> None:
    """Refuse every value.

    Raises:
        NotImplementedError: there is one.
    """
    if value is not None:
        got = "a tensor" if hasattr(value, "shape") else repr(value)
        raise NotImplementedError(f"{name} must be None, got {got}: {REASONS[name]}.")
