"""Batches of many lengths become batches of a few, and no loss changes."""

import pytest
import torch
from against_peft import pair
from conftest import DEVICE

from lorapar.buckets import BucketCollator
from lorapar_kernels.testing import assert_close


def batch_of(tokens=5, **more):
    ids = torch.arange(3, 3 + 2 * tokens).view(2, tokens)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()} | more


class Collator:
    """Of transformers' kind: the features are the batch."""

    def __init__(self, pad_token_id=None, tokenizer=None):
        if pad_token_id is not None:
            self.pad_token_id = pad_token_id
        if tokenizer is not None:
            self.tokenizer = tokenizer

    def __call__(self, features):
        return dict(features)


@pytest.mark.parametrize(
    "tokens, padded", [(1, 4), (3, 4), (4, 4), (5, 8), (8, 8), (9, 9), (40, 40)]
)
def test_every_length_becomes_the_next_bucket(tokens, padded):
    batch = BucketCollator(Collator(), [8, 4])(batch_of(tokens))
    assert {key: tuple(value.shape) for key, value in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (2, padded)
    )


def test_what_is_there_stays_and_what_is_added_counts_for_nothing():
    plain, batch = batch_of(5), BucketCollator(Collator(), [8], pad_token_id=7)(batch_of(5))
    for key, fill in (("input_ids", 7), ("attention_mask", 0), ("labels", -100)):
        assert torch.equal(batch[key][:, :5], plain[key]), key
        assert batch[key].dtype == plain[key].dtype
        assert (batch[key][:, 5:] == fill).all() and batch[key].shape == (2, 8), key


@pytest.mark.parametrize(
    "given, collators, tokenizers, used",
    [(9, 5, 4, 9), (0, 5, 4, 0), (None, 5, 4, 5), (None, 0, 4, 0), (None, None, 4, 4),
     (None, None, None, 0)],
)  # fmt: skip
def test_whose_pad_token(given, collators, tokenizers, used):
    tokenizer = type("Tokenizer", (), {"pad_token_id": tokenizers})()
    buckets = BucketCollator(Collator(collators, tokenizer), [8], pad_token_id=given)
    assert (buckets(batch_of(5))["input_ids"][:, 5:] == used).all()


def test_a_longer_batch_is_not_touched():
    batch = batch_of(9)
    got = BucketCollator(Collator(), [4, 8])(batch)
    assert all(got[key] is value for key, value in batch.items())


def test_all_that_has_tokens_and_nothing_else():
    more = {
        "position_ids": torch.arange(5).expand(2, 5),
        "features": torch.randn(2, 5, 3),
        "mask": torch.ones(2, 5, dtype=torch.bool),
        "per_example": torch.ones(2),
        "per_class": torch.ones(2, 4),
        "five": torch.ones(5),
        "names": ["a", "b"],
        "count": 5,
    }
    batch = BucketCollator(Collator(), [8])(batch_of(5, **more))
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 0, 0]] * 2
    assert batch["features"].shape == (2, 8, 3) and not batch["features"][:, 5:].any()
    assert torch.equal(batch["features"][:, :5], more["features"])
    assert batch["mask"].dtype == torch.bool and batch["mask"].sum() == 10
    for key in ("per_example", "per_class", "five", "names", "count"):
        assert batch[key] is more[key], key


def test_the_loss_and_the_gradients_are_the_same():
    model, _ = pair()
    losses, gradients = [], []
    for collator in (Collator(), BucketCollator(Collator(), [16], pad_token_id=0)):
        batch = {key: value.to(DEVICE) for key, value in collator(batch_of(5)).items()}
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        )
    assert_close("loss", *losses)
    for name, values in gradients[0].items():
        assert_close(name, gradients[1][name], values)


@pytest.mark.parametrize("lengths", [[], [0, 4], [-1]])
def test_lengths_must_be_positive(lengths):
    with pytest.raises(ValueError, match="lengths must be positive, got"):
        BucketCollator(Collator(), lengths)


def test_padding_free_batches_are_refused():
    batch = batch_of(5, cu_seq_lens_q=torch.tensor([0, 2, 5]))
    with pytest.raises(ValueError, match="padding-free; give the trainer packing=True"):
        BucketCollator(Collator(), [8])(batch)


@pytest.mark.parametrize("padding_free", [False, True])
def test_around_the_collator_of_trl(padding_free):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    own = DataCollatorForLanguageModeling(pad_token_id=6, padding_free=padding_free)
    buckets = BucketCollator(own, [8])
    features = [{"input_ids": [3, 4, 5]}, {"input_ids": [3, 4, 5, 7, 8]}]
    if padding_free:
        with pytest.raises(ValueError, match="padding-free"):
            buckets(features)
        return
    batch = buckets(features)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6, 6, 6, 6, 6], [3, 4, 5, 7, 8, 6, 6, 6]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 5]
    assert (batch["labels"] == -100).sum(1).tolist() == [5, 3]
