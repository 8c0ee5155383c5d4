"""Trainers over sharded sequences train as one process does."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs transformers: the hf extra")
pytest.importorskip("trl", reason="needs trl, accelerate and datasets: the dev extra")

import torch

from nnscaler_ring.hf import apply_ring_attention
from tests.hf import training
from tests.ranks import run_fresh

TIMEOUT = 400  # seconds
ROUNDING = 2e-6  # of losses and weights in float32; steps move the weights by 1e-2


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert len(found["losses"]) == len(expected["losses"]) > 0
    assert found["losses"] == pytest.approx(expected["losses"], abs=ROUNDING, rel=1e-6)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    for name, value in expected["weights"].items():
        assert (found["weights"][name] - value).abs().max() <= ROUNDING, name


@pytest.mark.parametrize("name", ["gpt_oss", pytest.param("llama", marks=pytest.mark.full)])
def test_trainer(pair, tmp_path, name):
    expected = training.train(None, name, str(tmp_path / "one"), False)
    moved = [
        (a - b).abs().max()
        for a, b in zip(
            expected["trained"]["weights"].values(),
            training.build(name, None, False).state_dict().values(),
            strict=True,
        )
    ]
    assert max(moved) > 1000 * ROUNDING
    folder = str(tmp_path / "two")
    for found in pair.run(2, training.train, name, folder, True, timeout=TIMEOUT):
        for phase in ("trained", "resumed"):
            assert_same(found[phase], expected[phase])
        assert found["evaluation"] == pytest.approx(expected["evaluation"], abs=ROUNDING)
    assert Path(folder, "checkpoint-2").is_dir()


def test_packed_documents_of_trl(pair, tmp_path):
    expected = training.train_packed(None, str(tmp_path / "one"), False)
    for found in pair.run(2, training.train_packed, str(tmp_path / "two"), True, timeout=TIMEOUT):
        assert_same(found, expected)
        assert found["evaluation"] == pytest.approx(expected["evaluation"], abs=ROUNDING)


@pytest.mark.full
def test_groups_with_samples_of_their_own(pool, tmp_path):
    # The Trainer's evaluation is a mean over batches, so that they must be the same.
    one = {"per_device_eval_batch_size": 1}
    expected = training.train(None, "llama", str(tmp_path / "one"), False, **one)
    for found in pool.run(4, training.train_in_groups, str(tmp_path / "four"), timeout=TIMEOUT):
        assert_same(found, expected["trained"])
        assert found["evaluation"] == pytest.approx(expected["evaluation"], abs=ROUNDING)


@pytest.mark.full
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_the_mesh_of_accelerate(tmp_path, name):
    expected = training.train(None, name, str(tmp_path / "one"), False)
    folder = str(tmp_path / "two")
    outcomes = run_fresh(
        2,
        training.train_on_the_mesh_of_accelerate,
        name,
        folder,
        timeout_seconds=60,
        answer_seconds=TIMEOUT,
    )
    for outcome in outcomes:
        assert outcome.kind == "result", outcome.describe()
        assert_same(outcome.value, expected["trained"])
        assert outcome.value["evaluation"] == pytest.approx(expected["evaluation"], abs=ROUNDING)


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs accelerate sees the ranks")
def test_processes_that_would_train_alone(tmp_path):
    for outcome in run_fresh(2, training.train_each_alone, str(tmp_path), answer_seconds=TIMEOUT):
        assert outcome.value == (
            "the arguments must know of all 2 ranks, got world_size=1: each would train alone; "
            "without GPUs pass use_cpu=True."
        )


REFUSED = {
    "average_tokens_across_devices=False": {"average_tokens_across_devices": False},
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_make_another_run(tmp_path, name):
    training.join_accelerate()
    with pytest.raises(ValueError, match=f"{name} is not supported over sharded sequences"):
        trainer(tmp_path, **REFUSED[name])


def test_a_loss_function_of_ones_own(tmp_path):
    training.join_accelerate()
    with pytest.raises(ValueError, match="compute_loss_func is not supported"):
        training.RingTrainer(
            training.build("llama", None, True),
            training.arguments(str(tmp_path)),
            compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.loss,
        )


def test_a_model_that_is_not_prepared(tmp_path):
    training.join_accelerate()
    with pytest.raises(ValueError, match="call nnscaler_ring.hf.apply_ring_attention"):
        training.RingTrainer(
            training.build("llama", None, False), training.arguments(str(tmp_path))
        )


def test_predictions(tmp_path):
    training.join_accelerate()
    made = trainer(tmp_path)
    with pytest.raises(NotImplementedError, match="prediction_loss_only must be True"):
        made.prediction_step(made.model, {}, False)


def test_batches_past_the_training_loop(tmp_path):
    training.join_accelerate()
    made = trainer(tmp_path)
    with pytest.raises(ValueError, match="batches must come through get_batch_samples"):
        made.compute_loss(made.model, training.collate([training.Samples(1)[0]]))
    with torch.no_grad():
        loss = made.compute_loss(made.model, training.collate([training.Samples(1)[0]]))
    assert loss > 0


def trainer(folder: Path, **more: Any) -> Any:
    return training.RingTrainer(
        apply_ring_attention(training.build("llama", None, False), None),
        training.arguments(str(folder), **more),
        train_dataset=training.Samples(2),
        data_collator=training.collate,
    )
