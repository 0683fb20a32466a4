"""The trainer of transformers: with exact gradients it trains as its own does."""

import pytest
from needs_torch import torch

import prograde as pg

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

from prograde.torch.transformers import Trainer  # noqa: E402


def model(rate=0.0):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8,
        resid_pdrop=rate, embd_pdrop=rate, attn_pdrop=rate,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


@pytest.fixture
def data():
    ids = torch.randint(0, 20, (24, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": x, "labels": x} for x in ids]


def arguments(folder, **options):
    return transformers.TrainingArguments(
        folder, report_to=[], disable_tqdm=True, per_device_train_batch_size=4, use_cpu=True,
        learning_rate=1e-2, **options,
    )  # fmt: skip


def test_exact_gradients_train_as_the_trainer_of_transformers(tmp_path, data):
    args = arguments(tmp_path, max_steps=3, gradient_accumulation_steps=2, save_strategy="no")
    theirs, ours = model(), model()
    want = transformers.Trainer(theirs, args, train_dataset=data).train()
    found = Trainer(ours, args, train_dataset=data, estimator=pg.Backprop()).train()
    assert found.training_loss == pytest.approx(want.training_loss, rel=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_resumed_run_goes_on_as_one_that_was_not_stopped(tmp_path, data):
    estimator = pg.WeightPerturbation(pg.LowRank(rank=1))
    args = arguments(tmp_path, max_steps=4, save_steps=2)
    whole = model(0.1)
    Trainer(whole, args, train_dataset=data, estimator=estimator).train()
    resumed = model(0.1)
    Trainer(resumed, args, train_dataset=data, estimator=estimator).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
