"""A delta trained by peft and transformers' Trainer, its logits decoded and measured by the same functions as ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from benchmarks.train_vs_peft.clock import Clock
from benchmarks.train_vs_peft.features import Sequences, features, sequences
from benchmarks.train_vs_peft.works import BATCH, OPTIONS, Work
from bertology_serve.encoder.loading import locate
from bertology_serve.tasks.base import Answer
from bertology_serve.tasks.spec import QUESTION_ANSWERING, TOKEN_CLASSIFICATION

MODELS = {
    QUESTION_ANSWERING: (transformers.AutoModelForQuestionAnswering, "QUESTION_ANS"),
    TOKEN_CLASSIFICATION: (transformers.AutoModelForTokenClassification, "TOKEN_CLS"),
}
ONE_TEXT = (transformers.AutoModelForSequenceClassification, "SEQ_CLS")
AT_ONCE = 32


def theirs(work: Work, backbone: str, folder: Path) -> dict[str, Any]:
    """Metrics, tokens, Trainer's seconds and the processor seconds of its steps."""
    path = locate(backbone)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    transformers.set_seed(work.seed)
    model = _model(work, path)
    rows = [row for record in work.train for row in features(tokenizer, work, record)]
    clock = Clock()
    trainer = transformers.Trainer(
        model, _arguments(work, folder), train_dataset=rows, data_collator=_collator(work, tokenizer), callbacks=[clock]
    )
    done = trainer.train()
    tokens = work.epochs * sum(len(row["input_ids"]) for row in rows)
    metrics = work.official(_answers(model.eval(), tokenizer, work))
    return {"metrics": metrics, "tokens": tokens, "seconds": done.metrics["train_runtime"], "cpu": clock.seconds}


def _model(work: Work, path: str) -> Any:
    """The encoder with HuggingFace's head and peft's delta."""
    kind, task_type = MODELS.get(work.known.task, ONE_TEXT)
    if work.known.task == QUESTION_ANSWERING:
        model = kind.from_pretrained(path, trust_remote_code=False)
    else:
        model = kind.from_pretrained(path, num_labels=len(work.labels) or 1, trust_remote_code=False)
    return peft.get_peft_model(model, _delta(work.method, task_type, model))


def _delta(method: str, task_type: str, model: torch.nn.Module) -> peft.PeftConfig:
    """peft's own form of a method with our sizes; its IA3 scales the attention's output too, which ours does not."""
    options = OPTIONS[method]
    if method == "lora":
        targets = {name.rpartition(".")[2] for name, _ in model.named_modules()} & {"query", "value", "q", "v"}
        return peft.LoraConfig(
            task_type=task_type, r=options["rank"], lora_alpha=options["alpha"], target_modules=sorted(targets)
        )
    if method == "ia3":
        return peft.IA3Config(task_type=task_type)
    kind = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[method]
    return kind(task_type=task_type, num_virtual_tokens=options["length"])


def _arguments(work: Work, folder: Path) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=work.epochs, per_device_train_batch_size=BATCH, seed=work.seed,
        learning_rate=work.rate, weight_decay=0.01, warmup_steps=0.06, max_grad_norm=1.0, use_cpu=True,
        lr_scheduler_type="linear", report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip


def _collator(work: Work, tokenizer: Any) -> Any:
    if work.known.task == TOKEN_CLASSIFICATION:
        return transformers.DataCollatorForTokenClassification(tokenizer)
    return transformers.DataCollatorWithPadding(tokenizer)


@torch.inference_mode()
def _answers(model: Any, tokenizer: Any, work: Work) -> list[Answer]:
    """The answer to each measured row."""
    answers: list[Answer] = []
    for start in range(0, len(work.dev), AT_ONCE):
        records = work.dev[start : start + AT_ONCE]
        batch = [sequences(tokenizer, work, record) for record in records]
        outputs = iter(_outputs(model, tokenizer, batch))
        for example, found in zip(work.examples(records), batch, strict=True):
            own = [next(outputs) for _ in found.encodings]
            answers.append(work.task.decode(example, found.encodings, own))
    return answers


def _outputs(model: Any, tokenizer: Any, batch: list[Sequences]) -> list[Tensor]:
    """One tensor a sequence: [C], or [length, C] where every token is answered for."""
    inputs = [row for found in batch for row in found.inputs]
    out = model(**tokenizer.pad(inputs, return_tensors="pt"))
    logits = torch.stack([out.start_logits, out.end_logits], 2) if "start_logits" in out else out.logits
    lengths = [len(row["input_ids"]) for row in inputs]
    return [row[:length] if row.dim() == 2 else row for row, length in zip(logits, lengths, strict=True)]
