"""The trainer of Hugging Face's transformers, with an estimator in place of backpropagation."""

from typing import Any

import torch

try:
    import transformers
except ImportError as error:
    raise ImportError(
        f"prograde.torch.transformers needs {error.name}: pip install 'prograde[transformers]'"
    ) from None

from prograde.estimators import Estimator
from prograde.torch._step import value_and_grad


class Trainer(transformers.Trainer):
    """`transformers.Trainer` whose gradients come from an estimator.

        trainer = transformers.Trainer(model, args, ...)                              # before
        trainer = prograde.torch.transformers.Trainer(model, args, ..., estimator=estimator)

    Only `training_step` is another one: it calls `prograde.torch.value_and_grad` on
    `compute_loss`. Optimizers, schedules, clipping, accumulation, evaluation, checkpoints and
    callbacks are those of transformers.

    **Arguments:** those of `transformers.Trainer`, and `estimator`, such as
    `WeightPerturbation(LowRank(rank=1))`. Tangents and dropout masks come from `args.seed` and the
    number of the step. A run that is resumed goes on with them.

    **Bias, variance and cost:** those of the estimator. Each new shape of a batch is compiled: pad
    batches to a few lengths (`pad_to_multiple_of`), and drop the last one where it is smaller.

    **Errors:** those of `prograde.torch.value_and_grad`. Half precision through `args.bf16` or
    `args.fp16` is autocast, which is refused: load the model in bfloat16.

    **Source:** forward gradients, arXiv 2202.08587; fine-tuning with them, arXiv 2308.13894.

    Examples:
        >>> import tempfile, torch, transformers, prograde as pg
        >>> from prograde.torch.transformers import Trainer
        >>> sizes = dict(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8)
        >>> model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
        >>> ids = torch.arange(8)
        >>> args = transformers.TrainingArguments(
        ...     tempfile.mkdtemp(), max_steps=2, report_to=[], disable_tqdm=True, save_steps=9)
        >>> data = [{"input_ids": ids, "labels": ids}] * 16
        >>> estimator = pg.WeightPerturbation(pg.LowRank(rank=1))
        >>> trainer = Trainer(model, args, train_dataset=data, estimator=estimator)
        >>> trainer.train().global_step  # doctest: +ELLIPSIS
        {...
        2
    """

    def __init__(self, *args: Any, estimator: Estimator, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.step = value_and_grad(self.model, self._loss, estimator, seed=self.args.seed)

    def _loss(self, model: Any, inputs: Any, num_items: Any, parts: int) -> torch.Tensor:
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items)
        counted = self.model_accepts_loss_kwargs and num_items is not None
        return loss if counted or self.compute_loss_func is not None else loss / parts

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Estimates the gradients of a batch, and returns its loss."""
        model.train()
        parts = self.current_gradient_accumulation_steps
        if self.step.calls == 0:
            self.step.calls = self.state.global_step * parts
        return self.step(self._prepare_inputs(inputs), num_items_in_batch, parts)
