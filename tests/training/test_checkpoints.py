"""Checkpoints: a resumed run continues bit for bit, also after torchrun restarted its ranks."""

import json
import os
import pickle
import random
import subprocess
import sys
import time
from collections import Counter, OrderedDict, deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from nnscaler_ring.dilated import RingAdvancedDistributedDilatedAttention, TrainingCheckpoints
from nnscaler_ring.models import Transformer, TransformerConfig
from nnscaler_ring.training import (
    even_shard_lens,
    shard_parameters,
    sum_gradients,
    tensor_files,
)
from nnscaler_ring.training.plain_states import decode, encode
from tests.ranks import rank_environment

ROOT = Path(__file__).parents[2]


def begin(folder, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    checkpoints = TrainingCheckpoints(folder, model, optimizer, interval=2, **options)
    return model, optimizer, checkpoints


def train(folder, steps, **options):
    """Losses by step, from where the run is resumed."""
    model, optimizer, checkpoints = begin(folder, **options)
    losses = {}
    for step in range(checkpoints.resume() + 1, steps + 1):
        loss = model(torch.randn(5, 4)).square().mean() * random.random()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[step] = loss.item()
        checkpoints.after_step(step)
    return losses


def test_resumed_run_is_the_same(tmp_path):
    random.seed(0)
    whole = train(tmp_path / "whole", 8)
    random.seed(0)
    first = train(tmp_path / "parts", 5)
    random.seed(9)
    rest = train(tmp_path / "parts", 8)
    assert list(rest) == [5, 6, 7, 8]  # from the checkpoint after step 4
    assert first[5] == rest[5]
    assert {**first, **rest} == whole


def test_only_whole_checkpoints_are_resumed_and_old_ones_go(tmp_path):
    train(tmp_path, 7)
    (tmp_path / "unfinished-8").mkdir()
    _, _, checkpoints = begin(tmp_path)
    assert checkpoints.steps_saved() == [4, 6]
    assert checkpoints.resume() == 6
    assert begin(tmp_path, auto_resume=False)[2].resume() == 0
    assert begin(tmp_path / "none")[2].resume() == 0
    (tmp_path / "step-6" / "rank-0-of-1.json").unlink()
    with pytest.warns(UserWarning, match=r"rank-0-of-1.json cannot be read.*from step 4 instead"):
        assert checkpoints.resume() == 4
    with pytest.raises(ValueError, match="interval must be at least 1 step"):
        TrainingCheckpoints(tmp_path, nn.Linear(1, 1), None, interval=0)


# What is saved beside the model.


def train_with_everything(folder, steps):
    """As `train`, with a scheduler, numpy's generators and a loader; losses and learning rates."""
    model, optimizer, _ = begin(folder)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5], gamma=0.1)
    generator, loader = np.random.default_rng(3), Loader()
    own = torch.Generator().manual_seed(4)
    states = {"scheduler": scheduler, "generator": generator, "loader": loader, "own": own}
    checkpoints = TrainingCheckpoints(folder, model, optimizer, interval=2, states=states)
    seen = {}
    for step in range(checkpoints.resume() + 1, steps + 1):
        x = loader.next() * np.random.rand() + generator.random()
        x = torch.full((1, 4), float(x)) + torch.randn(1, 4, generator=own)
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        seen[step] = loss.item(), optimizer.param_groups[0]["lr"]
        checkpoints.after_step(step)
    return seen


class Loader:
    """Counts, and keeps what a loader might."""

    def __init__(self):
        self.state = {"seen": 0, "order": (3, 1), "by number": {1: np.float64(0.5)}, "rest": None}

    def next(self):
        self.state["seen"] += 1
        return self.state["seen"]

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        assert type(state["order"]) is tuple and type(state["by number"][1]) is np.float64
        self.state = state


def test_schedulers_loaders_and_numpy_go_on(tmp_path):
    np.random.seed(0)
    whole = train_with_everything(tmp_path / "whole", 8)
    np.random.seed(0)
    first = train_with_everything(tmp_path / "parts", 5)
    np.random.seed(9)
    rest = train_with_everything(tmp_path / "parts", 8)
    assert list(rest) == [5, 6, 7, 8]
    assert {**first, **rest} == whole


def test_states_that_cannot_be_saved_or_do_not_fit(tmp_path):
    model, optimizer, _ = begin(tmp_path)
    with pytest.raises(TypeError, match=r"states\['x'\] must have state_dict and load_state_dict"):
        TrainingCheckpoints(tmp_path, model, optimizer, states={"x": 3})
    bad = SimpleNamespace(state_dict=lambda: {"a": [object()]}, load_state_dict=print)
    checkpoints = TrainingCheckpoints(tmp_path, model, optimizer, states={"bad": bad})
    with pytest.raises(TypeError, match=r"the state 'bad'\['a'\]\[0\] must be made of numbers"):
        checkpoints.save(2)
    assert list(tmp_path.iterdir()) == []
    begin(tmp_path)[2].save(2)
    with pytest.raises(ValueError, match=r"states must have the checkpoint's names, \[\]"):
        checkpoints.resume()
    other = nn.Sequential(nn.Linear(4, 9))
    other_optimizer = torch.optim.AdamW(other.parameters())
    with pytest.raises(ValueError, match="model.0.bias must have the same shape in the model"):
        TrainingCheckpoints(tmp_path, other, other_optimizer).resume()
    with pytest.raises(ValueError, match="optimizer must have the checkpoint's groups"):
        TrainingCheckpoints(
            tmp_path, model, torch.optim.AdamW(list(model.parameters())[1:])
        ).resume()
    with pytest.raises(ValueError, match="optimizer must have the model's parameters alone"):
        TrainingCheckpoints(tmp_path, model, other_optimizer).save(3)


def test_a_state_comes_back_as_it_was():
    value = {
        "numbers": [1, 1.5, True, None, -(2**70), float("inf")],
        "kinds": (deque([1]), {2}, OrderedDict(a=1), Counter({5: 2}), b"x", torch.bfloat16),
        "array": np.arange(6, dtype=np.uint32).reshape(2, 3),
        "tensors": [torch.tensor(3.0, dtype=torch.bfloat16), torch.empty(0, 2), torch.eye(2)],
        3: {"@": "not a kind"},
    }
    found = decode(json.loads(json.dumps(encode(value, "x"))))
    assert found.keys() == value.keys() and found["numbers"] == value["numbers"]
    assert found["kinds"] == value["kinds"] and found[3] == value[3]
    assert list(map(type, found["kinds"])) == list(map(type, value["kinds"]))
    assert found["array"].dtype == np.uint32 and (found["array"] == value["array"]).all()
    for x, y in zip(found["tensors"], value["tensors"], strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


# Damage.


def flip(path):
    """64 bytes in the middle of the numbers."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(byte ^ 255 for byte in data[middle : middle + 64])
    path.write_bytes(data)


DAMAGES = {
    "flipped": lambda folder: flip(folder / "rank-0-of-1.safetensors"),
    "flipped states": lambda folder: flip(folder / "rank-0-of-1.json"),
    "truncated": lambda folder: os.truncate(folder / "rank-0-of-1.safetensors", 100),
    "no index": lambda folder: (folder / "checkpoint.json").unlink(),
    "index flipped": lambda folder: flip(folder / "checkpoint.json"),
    "no sums": lambda folder: (folder / "SHA256SUMS").unlink(),
    "sums of elsewhere": lambda folder: (folder / "SHA256SUMS").write_text("0  ../x\n"),
    "binary sums": lambda folder: (folder / "SHA256SUMS").write_bytes(b"\xff\xfe"),
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    train(tmp_path, 4)
    model, _, checkpoints = begin(tmp_path)
    checkpoints.load(2)
    expected = model.state_dict()["0.weight"].clone()
    DAMAGES[damage](tmp_path / "step-4")
    model, _, checkpoints = begin(tmp_path)
    with pytest.warns(UserWarning, match=r"step-4 is damaged: .*; resumed from step 2 instead"):
        assert checkpoints.resume() == 2
    assert torch.equal(model.state_dict()["0.weight"], expected)
    with pytest.raises(ValueError, match="step-4 is damaged"):
        checkpoints.load(4)
    DAMAGES[damage](tmp_path / "step-2")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"must have a whole checkpoint to resume from; .*step-2"):
        checkpoints.resume()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    checkpoints.save(4)  # over the damaged one
    assert begin(tmp_path)[2].resume() == 4


def test_there_is_always_a_whole_checkpoint(tmp_path, monkeypatch):
    """A disk that fills at any of the writes, and an end between the two renames."""
    _, _, checkpoints = begin(tmp_path)
    checkpoints.save(2)
    for kept in range(4):
        real, calls = tensor_files._to_disk, iter(range(9))

        def full(file, real=real, calls=calls, kept=kept):
            if next(calls) == kept:
                raise OSError(28, "No space left on device")
            real(file)

        monkeypatch.setattr(tensor_files, "_to_disk", full)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(2)
        monkeypatch.setattr(tensor_files, "_to_disk", real)
        assert [path.name for path in tmp_path.iterdir()] == ["step-2"]
        assert checkpoints.resume() == 2
    (tmp_path / "step-2").rename(tmp_path / "replaced-2")
    assert checkpoints.resume() == 2
    checkpoints.save(2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


def test_a_run_from_an_earlier_step_puts_later_checkpoints_aside(tmp_path, caplog):
    train(tmp_path, 6)
    checkpoints = begin(tmp_path, auto_resume=False)[2]
    assert checkpoints.resume() == 0
    checkpoints.save(2)
    assert "is now" in caplog.text
    assert checkpoints.steps_saved() == [2]
    assert {path.name for path in tmp_path.iterdir()} == {"step-2", "abandoned-4", "abandoned-6"}


def test_no_pickle_is_read(tmp_path, monkeypatch):
    """Nothing is unpickled, whatever lies in the folder."""
    train(tmp_path, 2)
    (tmp_path / "step-2" / ".metadata").write_bytes(b"cos\nsystem\n(S'false'\ntR.")

    def refuse(*args, **kwargs):
        raise AssertionError("a file was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert begin(tmp_path)[2].resume() == 2


def test_files_of_tensors_are_read_by_others(tmp_path):
    """The header, as the format's page describes it."""
    x = {"a": torch.arange(3, dtype=torch.int16), "b": torch.randn(2, 2).T, "none": torch.empty(0)}
    digest = tensor_files.write_tensors(tmp_path / "x.safetensors", x)
    assert digest == tensor_files.file_digest(tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header["b"]["dtype"] == "F32" and header["a"]["shape"] == [3]
    start, stop = header["b"]["data_offsets"]
    numbers = np.frombuffer(data[8 + length :][start:stop], dtype="<f4").reshape(2, 2)
    assert (numbers == x["b"].numpy()).all()
    file = tensor_files.TensorFile(tmp_path / "x.safetensors")
    assert all(torch.equal(file.read(name), value) for name, value in x.items())


# Ranks.


def of_size(pool, size):
    """A pool of so many ranks: checkpoints are of the whole world."""
    if pool.size != size:
        pool.close()
        pool.size = size
    return pool


def model_of(ranks, kind):
    torch.manual_seed(0)
    config = TransformerConfig(17, 12, 1, num_heads=2, num_kv_heads=1, head_dim=6, hidden=10)
    model = Transformer(config, process_group=ranks).double()
    if kind == "sharded" and ranks:
        shard_parameters(model, DeviceMesh("cpu", ranks))
    return model


def losses_of(ranks, folder, kind, steps, report=False):
    """The loss of all tokens after each step, from where the run is resumed."""
    model = model_of(ranks, kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
    checkpoints = TrainingCheckpoints(
        folder, model, optimizer, interval=2, states={"scheduler": scheduler}
    )
    lens = even_shard_lens(13, ranks)
    block = ranks.index(dist.get_rank()) if ranks else 0
    rows = slice(sum(lens[:block]), sum(lens[: block + 1]))
    losses = {}
    torch.manual_seed(7)
    for step in range(checkpoints.resume() + 1, steps + 1):
        text = torch.randint(17, (1, 14))  # the same draw on every rank
        logits = model(text[:, :-1][:, rows], shard_lens=lens)
        labels = text[:, 1:][:, rows].flatten()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum") / 13
        loss.backward()
        if kind != "sharded":
            sum_gradients(model, ranks)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        total = loss.detach().clone()
        if ranks:
            dist.all_reduce(total)
        losses[step] = total.item()
        if report and dist.get_rank() == 0:
            sys.stdout.write(json.dumps([step, losses[step]]) + "\n")
            sys.stdout.flush()
        checkpoints.after_step(step)
    return losses


def states_that_differ(ranks, folder, save):
    """What a rank's own state is after resuming, or the words that refuse it."""
    model = model_of(ranks, "alike")
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"seen": dist.get_rank()}
    loader = SimpleNamespace(state_dict=lambda: state, load_state_dict=state.update)
    checkpoints = TrainingCheckpoints(folder, model, optimizer, states={"loader": loader})
    if save:
        checkpoints.save(1)
    try:
        checkpoints.resume()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return state["seen"]


def both_kinds(ranks, folder, steps):
    losses = [losses_of(ranks, folder / kind, kind, steps) for kind in ("alike", "sharded")]
    return losses, states_that_differ(ranks, folder / "states", len(ranks) == 4)


def test_resumed_on_another_number_of_ranks(pool, tmp_path):
    """4 ranks, then 2, then 3: the loss curve of one device that was never interrupted."""
    expected = losses_of(None, tmp_path / "alone", "alike", 6)
    found = [{}, {}]
    for size, steps in ((4, 2), (2, 4), (3, 6)):
        results = of_size(pool, size).run(size, both_kinds, tmp_path / "ranks", steps, timeout=180)
        assert all(losses == results[0][0] for losses, _ in results)
        for rank, (_, told) in enumerate(results):
            if size == 4:
                assert told == rank
                continue
            differs = "the state 'loader' differs between the 4 ranks that wrote the checkpoint"
            assert f"{differs}, so {size} ranks cannot take it up; resume on 4 ranks" in told
        for kind, losses in zip(found, results[0][0], strict=True):
            assert list(losses) == [steps - 1, steps]
            kind.update(losses)
    for kind in found:
        assert list(kind) == list(expected)
        for step, loss in kind.items():
            assert abs(loss - expected[step]) <= 1e-11 * expected[step], step


def across_meshes(ranks, folder):
    """Parameters and optimizer states of a mesh, resumed on it and on others: largest differences.

    FSDP2 over tensor parallelism shards one dimension twice.
    """

    def begin_on(sizes):
        mesh = DeviceMesh("cpu", torch.tensor(ranks).view(*sizes.values()), mesh_dim_names=[*sizes])
        torch.manual_seed(len(sizes))
        module = RingAdvancedDistributedDilatedAttention(
            20, 10, [4, 16], [1, 2], mesh=mesh, num_kv_heads=2, dtype=torch.float64
        )
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        return module, optimizer, TrainingCheckpoints(folder, module, optimizer)

    def whole(module, optimizer):
        found = {n: p.full_tensor().clone() for n, p in module.named_parameters()}
        for name, parameter in module.named_parameters():
            state = optimizer.state[parameter]["exp_avg"]
            found[f"{name} exp_avg"] = state.full_tensor().clone()
        return found

    module, optimizer, checkpoints = begin_on({"sequence": 2, "tensor": 2})
    module(torch.ones(1, 3, 20, dtype=torch.float64))[0].square().sum().backward()
    optimizer.step()
    expected = whole(module, optimizer)
    checkpoints.save(1)
    differences = []
    for sizes in ({"sequence": 2, "tensor": 2}, {"sequence": 4}, {"data": 2, "sequence": 2}):
        module, optimizer, checkpoints = begin_on(sizes)
        assert checkpoints.resume() == 1
        found = whole(module, optimizer)
        assert found.keys() == expected.keys()
        differences.append(max((found[n] - expected[n]).abs().max().item() for n in expected))
    return differences


def test_resumed_on_another_mesh(pool, tmp_path):
    for differences in of_size(pool, 4).run(4, across_meshes, tmp_path, timeout=120):
        assert differences == [0, 0, 0]


def one_rank_fails(ranks, folder):
    """Words on each rank when rank 1's disk fills, and what can be resumed then."""
    model = model_of(ranks, "alike")
    model.register_buffer("own", torch.tensor([float(dist.get_rank())]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    checkpoints = TrainingCheckpoints(folder, model, optimizer)
    checkpoints.save(2)
    real = tensor_files._to_disk

    def full(file):
        raise OSError(28, "No space left on device")

    if dist.get_rank() == 1:
        tensor_files._to_disk = full
    try:
        checkpoints.save(3)
        told = None
    except (OSError, RuntimeError) as error:
        told = str(error)
    finally:
        tensor_files._to_disk = real
    model.own.zero_()
    return told, checkpoints.resume(), model.own.item()


def test_one_verdict(pool, tmp_path):
    results = pool.run(pool.size, one_rank_fails, tmp_path)
    for rank, (told, step, own) in enumerate(results):
        assert "No space left on device" in told and step == 2
        assert own == rank  # a tensor that differs from rank to rank is each rank's own
        if rank != 1:
            assert "saving the checkpoint after step 3 failed on rank 1: OSError" in told
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


# Ranks that die.


def run_example(folder, *arguments):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with rank_environment():
        done = subprocess.run(
            [
                sys.executable,
                *torchrun,
                "--max-restarts",
                "1",
                str(ROOT / "examples" / "dilated_training.py"),
                *("--folder", str(folder), "--steps", "10", "--checkpoint-interval", "4"),
                *arguments,
            ],
            capture_output=True,
            text=True,
            timeout=240,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # as the example says
            },
        )
    assert done.returncode == 0, done.stderr
    lines = (folder / "losses.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


@pytest.mark.full
def test_a_rank_dies_and_torchrun_restarts(tmp_path):
    """The loss curve continues bit for bit."""
    whole = run_example(tmp_path / "whole")
    assert [step for step, _ in whole] == list(range(1, 11))
    assert whole[-1][1] < whole[0][1]
    broken = run_example(tmp_path / "broken", "--fail-at", "7")
    assert (tmp_path / "broken" / "failed").exists()
    # Rank 1 died after step 7; steps 5 to 7 are done again from the checkpoint after step 4.
    assert [step for step, _ in broken] == [*range(1, 8), *range(5, 11)]
    assert set(broken) == set(whole)


KILLED = """
import sys
import torch
import torch.distributed as dist
from tests.training.test_checkpoints import losses_of

rank, size, folder, steps = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
store = dist.FileStore(sys.argv[5], size)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
torch.set_num_threads(1)
losses_of(list(range(size)), folder, "sharded", steps, report=True)
dist.destroy_process_group()
"""


@pytest.mark.full
def test_killed_at_random(tmp_path):
    """Ranks are killed 20 times, in the middle of whatever they do; then the run is finished."""
    draw, steps, seen, stops = random.Random(0), 40, {}, set()

    def start(attempt):
        (tmp_path / "stores").mkdir(exist_ok=True)
        arguments = ["2", str(tmp_path / "run"), str(steps), str(tmp_path / f"stores/{attempt}")]
        with rank_environment():
            return [
                subprocess.Popen(
                    [sys.executable, "-c", KILLED, str(rank), *arguments],
                    stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    env={**os.environ, "PYTHONPATH": str(ROOT)},
                )
                for rank in (1, 0)
            ]

    def note(line):
        step, loss = json.loads(line)
        assert seen.setdefault(step, loss) == loss, step  # bit for bit, done again or not
        stops.add(step)

    for attempt in range(20):
        processes = start(attempt)
        note(processes[1].stdout.readline())  # the ranks have begun
        time.sleep(draw.uniform(0, 0.15))
        for process in draw.sample(processes, 2):
            process.kill()
        rest = processes[1].communicate()[0]
        for line in rest.splitlines(keepends=True):
            if line.endswith("\n"):
                note(line)
    processes = start("last")
    for line in processes[1].stdout:
        note(line)
    assert [process.wait(60) for process in processes] == [0, 0]
    assert sorted(seen) == list(range(1, steps + 1))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {f"step-{steps - 2}", f"step-{steps}"}
