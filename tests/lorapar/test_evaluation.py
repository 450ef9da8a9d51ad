"""Generation is what the model gives alone; accuracies come with counts and intervals."""

import pytest
import torch
from conftest import make_tiny_model

from lorapar.evaluation import gain, generate, wilson


def test_left_padding_changes_nothing(tokenizer):
    """D16: a batch of unequal prompts gives what each prompt gives alone."""
    model = make_tiny_model()
    prompts = [[1, 5, 9], [1, 7, 8, 9, 30, 31, 32, 33], [1]]
    together = generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=3)
    alone = [generate(model, tokenizer, [p], max_new_tokens=6)[0] for p in prompts]
    assert together == alone and len(set(alone)) > 1


def test_order_survives_sorting_by_length(tokenizer):
    model = make_tiny_model()
    prompts = [[1] + [5] * n for n in (9, 2, 7, 1)]
    seen = []
    got = generate(model, tokenizer, prompts, max_new_tokens=3, batch_size=2, advance=seen.append)
    assert got == [generate(model, tokenizer, [p], max_new_tokens=3)[0] for p in prompts]
    assert seen == [2, 2]


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),  # from scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
    [(0, 10, 0.0, 0.27753), (3, 10, 0.10779, 0.60322), (150, 300, 0.44378, 0.55622),
     (300, 300, 0.98736, 1.0)],
)  # fmt: skip
def test_wilson(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=1e-4)


def test_gain_is_paired():
    before = {"outcomes": [0, 0, 1, 1] * 25}
    after = {"outcomes": [1, 0, 1, 1] * 25}
    mean, low, high = gain(before, after)
    assert (mean, low, high) == pytest.approx((0.25, 0.16, 0.33), abs=0.01)
    worse = gain(after, before)
    assert worse == pytest.approx((-mean, -high, -low))
    mean, low, high = gain({"outcomes": [0] * 50}, {"outcomes": [1] * 50})
    assert mean == high == 1 and 0.85 < low < 0.95  # never a width of zero
    with pytest.raises(ValueError):
        gain(before, {"outcomes": [1]})


def test_generation_is_greedy_whatever_the_model_says(tokenizer):
    model = make_tiny_model()
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    first, second = (generate(model, tokenizer, [[1, 5]], max_new_tokens=8) for _ in "12")
    assert first == second and torch.is_grad_enabled()
