"""LoRA adapters of a small causal language model, trained without backpropagation.

A Llama of two layers learns the letters of messages about billing and delivery by backprop. Then
adapters of PEFT, which alone are trainable, learn messages about accounts by forward gradients.

    pip install '.[transformers]'
"""

import csv
import tempfile
import warnings
from pathlib import Path

import peft
import torch
import transformers

import prograde as pg
from prograde.torch.transformers import Trainer

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
with open(Path(__file__).parents[1] / "messages.csv") as file:
    rows = list(csv.DictReader(file))


def examples(*labels):
    texts = [row["text"] for row in rows if row["label"] in labels]
    ids = torch.tensor([list(text.encode()[:64].ljust(64)) for text in texts]).clamp(max=127)
    return [{"input_ids": x, "labels": x} for x in ids]


def loss_of(model, data):
    batch = {name: torch.stack([x[name] for x in data[:64]]) for name in data[0]}
    with torch.no_grad():
        return model(**batch).loss.item()


def arguments(steps, rate):
    return transformers.TrainingArguments(
        tempfile.mkdtemp(), max_steps=steps, learning_rate=rate, per_device_train_batch_size=16,
        lr_scheduler_type="constant", report_to=[], save_strategy="no", use_cpu=True,
        logging_steps=100,
    )  # fmt: skip


transformers.set_seed(0)
sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_attention_heads=2, **sizes))
transformers.Trainer(
    model, arguments(300, 3e-3), train_dataset=examples("billing", "delivery")
).train()

new = examples("account")
model = peft.get_peft_model(
    model, peft.LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=["q_proj", "v_proj"])
)
before = loss_of(model, new)
estimator = pg.WeightPerturbation(pg.Normal(), num_tangents=16)
trainer = Trainer(model, arguments(200, 1e-2), train_dataset=new, estimator=estimator)
trainer.train()
after = loss_of(model, new)
model.print_trainable_parameters()
print(f"loss on messages about accounts: {before:.2f} before, {after:.2f} after")
assert after < before - 0.1
