"""Tiny models with random weights, one for each architecture, built from configurations alone."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

OLD = int(transformers.__version__.split(".")[0]) < 5
VOCABULARY = 97
WINDOW = 7  # tokens that a sliding layer sees
CHUNK = 8  # tokens of a chunk of Llama 4

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT: dict[str, Any] = {
    **EXPERTS,
    **{"head_dim": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 12},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 10, "n_routed_experts": 4},
    **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
}
SLIDING_FULL = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Architecture:
    """A model class, its configuration class, and what the configuration has beside SMALL."""

    model: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    small: bool = True
    since_5: bool = False  # before, transformers' model lacks what is needed

    @property
    def exists(self) -> bool:
        """Whether this transformers has it."""
        return hasattr(transformers, self.model) and not (OLD and self.since_5)

    def build(self, attention: str, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
        """The model with random weights, the same in every process and for every `attention`."""
        options = {**(SMALL if self.small else {}), **self.options, **more}
        if OLD and "rope_parameters" in options:
            options["rope_scaling"] = _old_rope(options.pop("rope_parameters"))
        config = getattr(transformers, self.config)(**options)
        config._experts_implementation = "eager"  # the grouped product has no float64
        config._attn_implementation = attention
        torch.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, self.model)(config).to(dtype)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(_values(name, p, generator))
        return model


def _old_rope(parameters: dict[str, Any]) -> dict[str, Any] | None:
    """The same for a configuration of transformers 4."""
    kind = parameters["rope_type"]
    if kind == "default":
        return None
    names = ("short_factor", "long_factor") if kind == "longrope" else ("factor",)
    return {"type": kind, **{name: parameters[name] for name in names}}


def _values(name: str, p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random also where models begin with zeros or ones, so that sinks, gates and norms count."""
    noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    if p.dim() > 1:
        return noise * 0.3
    return noise * 0.5 + (1.0 if "norm" in name and "bias" not in name else 0.0)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", "LlamaConfig"),
    "qwen2": Architecture(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config"),
    "mistral": Architecture("MistralForCausalLM", "MistralConfig", {"sliding_window": WINDOW}),
    "gemma2": Architecture(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {
            **{"sliding_window": WINDOW, "query_pre_attn_scalar": 8},
            **{"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
        },
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **{"sliding_window": WINDOW, "query_pre_attn_scalar": 8, "num_hidden_layers": 3},
            "layer_types": ["sliding_attention", *SLIDING_FULL],
        },
    ),
    "gpt_oss": Architecture(
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **{"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
            "layer_types": SLIDING_FULL,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "phi3": Architecture(
        "Phi3ForCausalLM",
        "Phi3Config",
        {"sliding_window": WINDOW, "original_max_position_embeddings": 512},
    ),
    # Its sequence is longer than what it was trained on first, and a shard is shorter.
    "phi3_longrope": Architecture(
        "Phi3ForCausalLM",
        "Phi3Config",
        {
            "original_max_position_embeddings": 20,
            "rope_parameters": {
                **{"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0},
                **{"original_max_position_embeddings": 20, "partial_rotary_factor": 1.0},
                **{"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 4.0, 6.0, 8.0]},
            },
        },
    ),
    "llama_dynamic": Architecture(
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "max_position_embeddings": 20,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        },
    ),
    "olmo3": Architecture(
        "Olmo3ForCausalLM",
        "Olmo3Config",
        {"sliding_window": WINDOW, "layer_types": SLIDING_FULL},
    ),
    "deepseek_v3": Architecture("DeepseekV3ForCausalLM", "DeepseekV3Config", LATENT),
    "llama4": Architecture(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **{"num_hidden_layers": 4, "intermediate_size_mlp": 48, "attention_chunk_size": CHUNK},
            **{"num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2},
            "no_rope_layers": [1, 1, 1, 0],
            "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
        },
    ),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**EXPERTS, "num_experts": 4}
    ),
    "glm4_moe": Architecture(
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {
            **EXPERTS,
            **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1},
            **{"first_k_dense_replace": 1, "n_shared_experts": 1},
        },
    ),
    "smollm3": Architecture("SmolLM3ForCausalLM", "SmolLM3Config"),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            **{"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4},
            **{"n_positions": 512, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
            **{"bos_token_id": 1, "eos_token_id": 2},
        },
        small=False,
        since_5=True,
    ),
}

NO_DROPOUT: dict[str, Any] = {
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    **{"hidden_dropout": 0.0, "embedding_dropout": 0.0, "residual_dropout": 0.0},
}
# For which no option is needed but that nothing is random; by model_type.
PLAIN = [
    *("apertus", "arcee", "bitnet", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "glm"),
    *("glm4", "gpt_bigcode", "gpt_neox", "granite", "granitemoe", "helium", "hunyuan_v1_dense"),
    *("hunyuan_v1_moe", "ministral", "mixtral", "olmo", "olmo2", "olmoe", "persimmon", "phi"),
    *("seed_oss", "starcoder2", "vaultgemma"),
]
ARCHITECTURES.update(
    {
        kind: Architecture(
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind], CONFIG_MAPPING_NAMES[kind], NO_DROPOUT
        )
        for kind in PLAIN
        if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    }
)

REFUSED: dict[str, tuple[Architecture, str]] = {
    "qwen3_next": (
        Architecture(
            "Qwen3NextForCausalLM",
            "Qwen3NextConfig",
            {
                **EXPERTS,
                **{"layer_types": ["linear_attention", "full_attention"], "num_experts": 4},
                **{"linear_num_key_heads": 2, "linear_num_value_heads": 2},
                **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
                "shared_expert_intermediate_size": 16,
            },
        ),
        r"layers \[0\] are 'linear_attention'",
    ),
    "deepseek_v32": (
        Architecture(
            "DeepseekV32ForCausalLM",
            "DeepseekV32Config",
            {**LATENT, "index_topk": 8, "index_n_heads": 2, "index_head_dim": 8},
        ),
        "indices",
    ),
}

Build = Callable[[str], Any]
