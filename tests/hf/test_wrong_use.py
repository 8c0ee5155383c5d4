"""Wrong use of nnscaler_ring.hf is an error with a remedy, never another result."""

import copy

import pytest

pytest.importorskip("transformers", reason="needs transformers: the hf extra")

import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForSequenceClassification

from nnscaler_ring import set_agreement_timeout
from nnscaler_ring.hf import NAME, apply_ring_attention, shard_batch
from tests.hf.architectures import ARCHITECTURES, REFUSED, SMALL, Architecture
from tests.hf.comparison import TOKENS, make_batch


def build(name="llama", **more):
    return ARCHITECTURES[name].build("eager", **more)


def prepared(name="llama"):
    return apply_ring_attention(build(name), None)


def forward(model, batch=None, **more):
    batch = shard_batch(model, batch or make_batch("dense"))
    num_items = batch.pop("num_items")
    return model(**batch, num_items_in_batch=num_items, use_cache=False, **more)


# Models


@pytest.mark.parametrize("name", REFUSED)
def test_layers_without_attention_over_all_keys(name):
    architecture, message = REFUSED[name]
    if not architecture.exists:
        pytest.skip(f"this transformers has no {name}")
    with pytest.raises(ValueError, match=message):
        apply_ring_attention(architecture.build("eager"), None)


OTHERS = {
    "mamba": (
        Architecture("MambaForCausalLM", "MambaConfig", {"state_size": 4}),
        r"layers \[0, 1\] .* do not attend through transformers' attention interface",
    ),
    "lfm2": (
        Architecture("Lfm2ForCausalLM", "Lfm2Config", {"full_attn_idxs": [1]}),
        r"layers \[0\] are 'conv'",
    ),
    "falcon_h1": (
        Architecture(
            "FalconH1ForCausalLM",
            "FalconH1Config",
            {"mamba_d_ssm": 16, "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_d_state": 8},
        ),
        r"conv1d is a Conv1d: it mixes neighbouring tokens",
    ),
    "t5": (
        Architecture("T5ForConditionalGeneration", "T5Config", {"num_layers": 1, "d_model": 32}),
        "cross attention",
    ),
    "bert": (
        Architecture("BertForMaskedLM", "BertConfig", {}, since_5=True),
        "is not causal; bidirectional models are not supported",
    ),
    "gemma3": (
        Architecture(
            "Gemma3ForConditionalGeneration",
            "Gemma3Config",
            {
                "text_config": {**SMALL, "sliding_window": 7},
                "vision_config": {
                    **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
                    **{"image_size": 28, "patch_size": 14, "intermediate_size": 16},
                },
            },
            small=False,
        ),
        "has parts for images or sound",
    ),
    "bloom": (
        Architecture("BloomForCausalLM", "BloomConfig", {"n_head": 4}),
        "BloomModel.forward takes no position_ids",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_in_which_tokens_meet_elsewhere(name):
    architecture, message = OTHERS[name]
    if not architecture.exists:
        pytest.skip(f"this transformers has no {name}")
    with pytest.raises(ValueError, match=message):
        apply_ring_attention(architecture.build("eager"), None)


def test_a_head_that_reads_one_place_of_the_sequence():
    model = LlamaForSequenceClassification(LlamaConfig(**SMALL))
    with pytest.raises(ValueError, match="the head of LlamaForSequenceClassification may read"):
        apply_ring_attention(model, None)


@pytest.mark.parametrize("option", ["output_router_logits", "output_attentions"])
def test_options_of_the_configuration(option):
    model = build("qwen3_moe")
    setattr(model.config, option, True)
    with pytest.raises(ValueError, match=f"config.{option} is True"):
        apply_ring_attention(model, None)


def test_a_routers_loss_switched_on_afterwards():
    model = prepared("qwen3_moe")
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits must be False"):
        forward(model)


def test_a_window_that_is_not_passed(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaAttention

    model = build()
    model.config.sliding_window = 4
    with pytest.raises(ValueError, match="LlamaAttention.* passes no sliding_window"):
        apply_ring_attention(model, None)
    model.config.sliding_window = None

    def forward(self, hidden_states, attention_interface=None):
        return attention_interface(self, hidden_states, sinks=None, scaling=1.0)

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    monkeypatch.setattr("nnscaler_ring.hf.attention_calls._call_in", uncached())
    with pytest.raises(ValueError, match="passes sinks to attention") as error:
        apply_ring_attention(model, None)
    assert "passes no **kwargs to attention" in str(error.value)


def uncached():
    from nnscaler_ring.hf import attention_calls

    return attention_calls._call_in.__wrapped__


@pytest.mark.parametrize("argument", ["layout", "packed_layout", "exchange"])
def test_unknown_words(argument):
    with pytest.raises(ValueError, match=f"{argument} must be one of"):
        apply_ring_attention(build(), None, **{argument: "spiral"})


def test_not_a_transformers_model():
    with pytest.raises(TypeError, match="model must be or hold a transformers model"):
        apply_ring_attention(nn.Linear(2, 2), None)


def test_a_model_that_nobody_has_prepared():
    with pytest.raises(ValueError, match=r"call nnscaler_ring.hf.apply_ring_attention\(model"):
        shard_batch(build(), make_batch("dense"))
    named = build(attn_implementation=None)
    named.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match="LlamaAttention .* must be prepared"):
        named(input_ids=make_batch("dense")["input_ids"])


def test_architectures_that_were_not_compared_are_named_in_the_log(caplog):
    model = Architecture("OPTForCausalLM", "OPTConfig").build("eager")
    apply_ring_attention(model, None)
    assert "OPTForCausalLM (model_type 'opt') passes the checks" in caplog.text
    caplog.clear()
    prepared()
    assert caplog.text == ""


# A model that changed


def test_another_attention_afterwards():
    model = prepared()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation must stay 'nnscaler_ring', got"):
        forward(model)


def test_a_layer_replaced_afterwards():
    model = prepared()
    model.model.layers[1].self_attn = build().model.layers[1].self_attn
    with pytest.raises(ValueError, match="attention layers must stay those"):
        forward(model)
    forward(apply_ring_attention(model, None))


def test_a_layer_added_afterwards():
    model = prepared()
    model.model.layers.append(build(num_hidden_layers=3).model.layers[2])
    model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="attention layers must stay those .* 2 of them, got 3"):
        forward(model)


def test_copies_stay_prepared():
    model = prepared()
    copied = copy.deepcopy(model)
    assert torch.equal(forward(copied).logits, forward(model).logits)
    copied.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="must stay 'nnscaler_ring'"):
        forward(copied)
    forward(model)


def test_what_is_saved_does_not_name_the_attention(tmp_path):
    prepared().save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert AutoConfig.from_pretrained(tmp_path).model_type == "llama"


# Batches


def test_an_unsharded_batch():
    with pytest.raises(ValueError, match="LlamaAttention .* got a batch that is not sharded"):
        prepared()(input_ids=make_batch("dense")["input_ids"], use_cache=False)


def test_a_batch_sharded_twice():
    model = prepared()
    with pytest.raises(ValueError, match="got one that is sharded already"):
        shard_batch(model, shard_batch(model, make_batch("dense")))


def test_left_padding_and_holes():
    batch = make_batch("padded")
    with pytest.raises(ValueError, match="set tokenizer.padding_side = 'right'"):
        shard_batch(prepared(), {**batch, "attention_mask": batch["attention_mask"].flip(1)})
    with pytest.raises(ValueError, match="labels must be -100 where attention_mask is 0"):
        shard_batch(prepared(), {**batch, "labels": batch["input_ids"]})


def test_masks_that_reach_the_layers():
    model = prepared()
    batch = make_batch("padded")
    mine = shard_batch(model, batch)
    del mine["num_items"], mine["labels"], mine["shift_labels"]
    with pytest.raises(ValueError, match="attention_mask must not reach the attention layers"):
        model(**mine, attention_mask=batch["attention_mask"], use_cache=False)
    square = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool)
    with pytest.raises(ValueError, match="must get no attention_mask"):
        model(**mine, attention_mask=square, use_cache=False)
    with pytest.raises(ValueError, match="masks of four dimensions are not supported"):
        shard_batch(model, {**batch, "attention_mask": square})


def test_tensors_that_nobody_knows_how_to_cut():
    batch = make_batch("dense")
    with pytest.raises(ValueError, match=r"advantages \[2, 37\] has a dimension of 37 tokens"):
        shard_batch(prepared(), {**batch, "advantages": torch.zeros(2, TOKENS)})
    with pytest.raises(ValueError, match="token_type_ids must be 0"):
        shard_batch(prepared(), {**batch, "token_type_ids": torch.ones(2, TOKENS)})
    with pytest.raises(ValueError, match=r"labels must be \[batch, tokens\] = \[2, 37\]"):
        shard_batch(prepared(), {**batch, "labels": torch.zeros(2, TOKENS - 1)})
    with pytest.raises(ValueError, match="logits_to_keep must not be in a batch"):
        shard_batch(prepared(), {**batch, "logits_to_keep": 1})
    with pytest.raises(ValueError, match="batch must have input_ids or inputs_embeds"):
        shard_batch(prepared(), {"labels": batch["labels"]})
    assert shard_batch(prepared(), {**batch, "weights": torch.ones(2)})["weights"].shape == (2,)


def test_documents_that_do_not_fit():
    batch = {"input_ids": make_batch("packed")["input_ids"]}
    bounds = torch.tensor([0, 11, TOKENS], dtype=torch.int32)
    with pytest.raises(ValueError, match="must both be there, and the same"):
        shard_batch(prepared(), {**batch, "cu_seq_lens_q": bounds})
    wrong = {"cu_seq_lens_q": bounds - 1, "cu_seq_lens_k": bounds - 1}
    with pytest.raises(ValueError, match="cu_seq_lens_q must rise from 0 to the 37 tokens"):
        shard_batch(prepared(), {**batch, **wrong})
    model = prepared()
    mine = shard_batch(model, batch)
    del mine["num_items"]
    with pytest.raises(ValueError, match="must go into shard_batch"):
        model(**mine, cu_seq_lens_q=bounds, use_cache=False)


def test_losses_of_one_shard():
    model = prepared()
    batch = shard_batch(model, make_batch("dense"))
    with pytest.raises(ValueError, match="num_items must not be passed to the model"):
        model(**batch, use_cache=False)
    del batch["num_items"]
    with pytest.raises(ValueError, match="num_items_in_batch must be passed"):
        model(**batch, use_cache=False)


def test_probabilities_and_caches():
    model = prepared()
    with pytest.raises(ValueError, match="output_attentions must be False"):
        forward(model, output_attentions=True)
    batch = shard_batch(model, {"input_ids": make_batch("dense")["input_ids"]})
    del batch["num_items"]
    cache = model(**batch, use_cache=True).past_key_values
    with pytest.raises(NotImplementedError, match="must have as many keys as queries, got 37"):
        model(**batch, past_key_values=cache)


# Ranks


def shard_other_batches(ranks, wrong):
    set_agreement_timeout(torch.distributed.group.WORLD, 25.0)
    model = apply_ring_attention(build(), ranks)
    batch = make_batch("dense")
    if ranks.index(torch.distributed.get_rank()) == 1:
        if wrong == "samples":
            batch["input_ids"] = batch["input_ids"].flip(0)
        else:
            batch["attention_mask"] = torch.ones(2, 1, 1, TOKENS)
    try:
        shard_batch(model, batch)
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_with_different_samples(pool):
    first, second = pool.run(2, shard_other_batches, "samples", timeout=240)
    assert "batch must be the same on all ranks that share a sequence" in first
    assert "give the ranks of one group the same samples" in second


def test_a_rank_that_refuses_its_batch(pool):
    first, second = pool.run(2, shard_other_batches, "mask", timeout=240)
    assert first.startswith("rank 1 refused its batch: attention_mask must be [batch, tokens]")
    assert second.startswith("attention_mask must be [batch, tokens]")


def too_short(ranks):
    set_agreement_timeout(torch.distributed.group.WORLD, 25.0)
    model = apply_ring_attention(build(), ranks)
    with pytest.raises(ValueError, match="batch must have a token for each of the 2 ranks, got 1"):
        shard_batch(model, make_batch("dense", tokens=1))


def test_fewer_tokens_than_ranks(pool):
    pool.run(2, too_short, timeout=240)
