"""Embeddings by multiple negatives ranking, beside sentence-transformers with peft: same pairs, batches, rates, steps.

    python benchmarks/contrastive.py --train ../shared/data/mnli/train.jsonl.gz --eval ../shared/data/stsb/dev.jsonl.gz

Pairs are those of natural language inference whose second sentence follows from the first; what is measured is the
Spearman correlation on scored pairs. Steps take turns, in one process of one thread, and are counted in processor
seconds: neighbours do not count. Tokenising is counted on both sides. Both train LoRA of rank 8 on query and value,
with AdamW, the same schedule and clipping; theirs keeps the encoder's dropout, as its trainer does. The loss of the
first batch, dropout apart, is compared before. Needs sentence-transformers and peft.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from torch.nn.utils import clip_grad_norm_

import bertology_serve
from bertology_serve.data.records import Record, read_records
from bertology_serve.encoder.encoder import Encoder
from bertology_serve.encoder.loading import locate
from bertology_serve.tasks.metrics import spearman
from bertology_serve.training.batches import Source
from bertology_serve.training.evaluation import measure
from bertology_serve.training.methods import factor
from bertology_serve.training.train import prepare
from bertology_serve.training.train_config import TrainConfig
from bertology_serve.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results"
RATE = 1e-3


class Theirs:
    """sentence-transformers' model with peft's LoRA, its loss, and the loop of its trainer without what logs."""

    def __init__(self, path: str, seed: int, max_length: int, config: TrainConfig, steps: int) -> None:
        from peft import LoraConfig
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

        torch.manual_seed(seed)
        self.model = SentenceTransformer(path, device="cpu")
        self.model.max_seq_length = max_length
        self.model.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]))
        self.loss = MultipleNegativesRankingLoss(self.model)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, weight_decay=config.optim.weight_decay)
        self.config, self.steps, self.step = config, steps, 0

    def value(self, pairs: Sequence[tuple[str, str]]) -> torch.Tensor:
        """The loss of a batch."""
        features = [self.model.preprocess([pair[side] for pair in pairs]) for side in (0, 1)]
        return self.loss(features, None)

    def learn(self, pairs: Sequence[tuple[str, str]]) -> float:
        """One step."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * factor(self.step, self.steps, self.config.optim.warmup, self.config.optim.schedule)
        loss = self.value(pairs)
        loss.backward()
        clip_grad_norm_(self.parameters, self.config.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item()

    def spearman(self, records: Sequence[Record]) -> float:
        """The correlation of the cosine with the scores."""
        self.model.eval()
        a, b = (
            self.model.encode([r.fields[side] for r in records], convert_to_tensor=True, show_progress_bar=False)
            for side in ("text", "text_pair")
        )
        cosine = torch.nn.functional.cosine_similarity(a, b)
        return spearman([float(r.fields["score"]) for r in records], cosine.tolist())


def run(encoder: Encoder, path: str, train: Source, dev: Source, steps: int, batch: int, seed: int) -> dict[str, float]:
    """One seed of both sides."""
    config = TrainConfig.of(
        "embedding", batch_size=batch, max_steps=steps, seed=seed, learning_rate=RATE, keep="last", epochs=1
    )
    started = time.process_time()
    made = prepare(config, encoder, train, dev)
    share = steps * batch / len(train.records)  # of what was tokenised, what is trained on
    ours = (time.process_time() - started) * share
    trainer, theirs = Trainer(made.live, made.task, made.items, config), Theirs(path, seed, 128, config, steps)
    before = measure(made.live, made.task, made.dev, config.machine.max_tokens)["spearman"]
    trainer.live.train()
    other, first = 0.0, 0.0
    for step in range(steps):
        items = [trainer.items[i] for i in trainer.sampler.take(batch)]
        pairs = [(item.example.text, item.example.text_pair) for item in items]
        if step == 0:
            theirs.model.eval()
            with torch.no_grad():
                first = float(theirs.value(pairs))
        started = time.process_time()
        loss = trainer.gradient(items)
        trainer._update(loss)
        ours += time.process_time() - started
        if step == 0 and abs(loss - first) > 1e-4:
            raise SystemExit(f"the losses differ: {loss:.6f} here, {first:.6f} there")
        started = time.process_time()
        theirs.learn(pairs)
        other += time.process_time() - started
    found = {
        "seed": seed,
        "first_loss": first,
        "before": before,
        "ours": measure(made.live, made.task, made.dev, config.machine.max_tokens)["spearman"],
        "theirs": theirs.spearman(dev.records),
        "our_seconds_a_step": ours / steps,
        "their_seconds_a_step": other / steps,
        "ratio": other / ours,
    }
    print({name: round(value, 4) for name, value in found.items()}, flush=True)
    return found


def processor() -> str:
    """The processor's own name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    """Runs all seeds, and writes ``results/contrastive.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="minilm", help="what both load")
    parser.add_argument("--train", required=True, help="records with text_a, text_b and label")
    parser.add_argument("--eval", required=True, help="records with text_a, text_b and a number as label")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--most", type=int, default=500, help="scored pairs")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import peft
    import sentence_transformers

    encoder = Encoder.load(given.backbone)
    encoder.prepack(True)
    path = locate(given.backbone)
    rows = [record for record in read_records(given.train) if record.fields["label"] in ("entailment", "0", 0)]
    pairs = [Record({"text": r.fields["text_a"], "positive": r.fields["text_b"]}, r.where) for r in rows]
    names = {"text": "text_a", "text_pair": "text_b", "score": "label"}
    dev = Source("scored pairs", read_records(given.eval, names)[: given.most])
    train = Source("entailed pairs", pairs)
    found = []
    for seed in range(given.seeds):
        found.append(run(encoder, path, train, dev, given.steps, given.batch_size, seed))
        told = {
            "pairs": len(pairs), "steps": given.steps, "batch_size": given.batch_size, "scored_pairs": len(dev.records),
            "ratio": statistics.median(one["ratio"] for one in found), "seeds": found, "threads": 1,
            "processor": processor(), "date": datetime.now(UTC).date().isoformat(),
            "versions": {
                "bertology-serve": bertology_serve.__version__, "torch": str(torch.__version__),
                "transformers": transformers.__version__, "peft": peft.__version__,
                "sentence-transformers": sentence_transformers.__version__,
            },
        }  # fmt: skip
        (RESULTS / "contrastive.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
