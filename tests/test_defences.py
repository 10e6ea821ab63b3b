"""Defences by name, with options."""

from __future__ import annotations

import uuid

import pytest
from torch import nn

from evaluation.networks import NonLocal
from ramdefense.defences import defence, defences, register_defence
from ramdefense.segmenter import PyTorchSegmenter


@pytest.fixture
def segmenter() -> PyTorchSegmenter:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), NonLocal(4, 4))
    return PyTorchSegmenter(model, nb_classes=4, input_shape=(3, 6, 6))


def test_none_is_the_segmenter_itself_and_ram_is_there(segmenter) -> None:
    assert defence("none")(segmenter) is segmenter
    assert {"none", "ram"} <= set(defences())


def test_options_in_the_name(segmenter) -> None:
    defended = defence("ram:suppression=cap,max_attention=2/N,dropout=0.25,seed=7")(segmenter)
    refinement = defended.model.refinement
    assert (refinement.suppression, refinement.max_attention, refinement.dropout) == ("cap", "2/N", 0.25)
    assert defended.model.seed == 7


@pytest.mark.parametrize(
    ("name", "said"),
    [("rma", "did you mean 'ram'"), ("ram:droput=0.1", "droput.*dropout"), ("ram:dropout", "KEY=VALUE"),
     ("none:dropout=0.1", "none.*dropout")],
)  # fmt: skip
def test_a_wrong_name_says_what_would_be_right(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        defence(name)


def test_a_name_is_given_once() -> None:
    name = f"mine-{uuid.uuid4()}"
    register_defence(name)(lambda segmenter: segmenter)
    with pytest.raises(ValueError, match="already"):
        register_defence(name)(lambda segmenter: segmenter)
