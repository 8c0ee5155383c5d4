"""The demonstration's text: real documents, cut into sequences that are the same everywhere."""

import itertools

import pytest
import torch

from nnscaler_ring.tools.demo.text import PIECES, Corpus, check_length, draw_sample, load_corpus


def test_the_standard_library_is_text():
    corpus = load_corpus()
    assert len(corpus.documents) > 50
    assert any(b"def dataclass(" in document for document in corpus.documents)
    check_length(corpus, 100_000)


def test_a_file_is_its_paragraphs(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"one\r\ntwo\r\n\r\n\r\nthree\n\n\n\nfour")
    assert load_corpus(path).documents == (b"one\ntwo\n\n", b"\nthree\n\n", b"four\n\n")


def test_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="text must be a readable file"):
        load_corpus(tmp_path / "missing")
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="at least two bytes, got none in .*empty"):
        load_corpus(tmp_path / "empty")
    with pytest.raises(ValueError, match="longer than a sequence of 4 tokens, got 4 bytes"):
        check_length(Corpus("here", (b"abcd",)), 4)


def test_targets_are_the_next_bytes_of_the_same_document():
    documents = (b"abcdefghijklmnopqrstuvwxyz", b"0123456789", b"AB")
    sample = draw_sample(Corpus("here", documents), 50, seed=1, step=2)
    assert len(sample.inputs) == len(sample.targets) == 50
    bounds = sample.cu_seqlens.tolist()
    assert (bounds[0], bounds[-1]) == (0, 50)
    assert len(bounds) - 1 >= PIECES
    for start, stop in itertools.pairwise(bounds):
        piece = bytes([*sample.inputs[start:stop].tolist(), sample.targets[stop - 1].item()])
        assert any(piece in document for document in documents), piece
        assert bytes(sample.targets[start:stop].tolist()) == piece[1:]


def test_samples_depend_on_seed_and_step_alone():
    corpus = load_corpus()
    first, again, other_step, other_seed = (
        draw_sample(corpus, 64, seed=seed, step=step).inputs
        for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other_step)
    assert not torch.equal(first, other_seed)
