"""LoRA on all layers, or on the upper ones alone, whose rows below other deltas share: metric against cost.

    python benchmarks/layers.py --data ../shared/data --log runs.jsonl [--rows 400] [--render FOLDER]

``train`` with its defaults and ``--layers``, 400 rows to learn from and 400 others to choose by, test rows that neither
sees. Every figure is a line of ``--log``, appended as soon as it is known; the same command continues. The cost is that
of seven such deltas asked about one text, in passes of the encoder: 1 + 6 · share of the layers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from training_defaults import SETS, append, cells, read_log, spread

import bertology_serve as bs
from bertology_serve.export.installation import environment

DELTAS = 7
CHOICES = ("trec6", "snips", "ag_news", "sst2")


def main() -> None:
    """Measures what the log does not hold yet, or renders it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--sets", nargs="*", choices=[own.name for own in SETS], default=CHOICES)
    parser.add_argument("--counts", type=int, nargs="*", help="upper layers; default: all, a third, one")
    parser.add_argument("--render", type=Path, metavar="FOLDER")
    asked = parser.parse_args()
    if asked.render:
        lines = read_log(asked.log)
        asked.render.mkdir(parents=True, exist_ok=True)
        (asked.render / "layers.md").write_text("\n".join(page(lines)) + "\n", encoding="utf-8")
        draw(lines, asked.render / "layers.png")
        return
    encoder = bs.Encoder(asked.backbone)
    depth = encoder.depth
    for cell in cells(asked.data, asked.seeds, [asked.rows], asked.sets):
        for count in asked.counts or (depth, depth // 3, 1):
            key = {"set": cell.set.name, "rows": cell.size, "seed": cell.seed, "layers": count, "depth": depth}
            if any(key.items() <= line.items() for line in read_log(asked.log)):
                continue
            method, began = bs.Lora(layers=None if count == depth else tuple(range(depth - count, depth))), _cpu()
            delta = bs.train(encoder, cell.train, eval=cell.dev, task=cell.set.task, method=method, seed=cell.seed)
            metric = next(iter(bs.evaluate(delta, cell.test, encoder).metrics.values()))
            line = {**key, "metric": metric, "cpu_s": round(_cpu() - began, 2), "is_probe": not delta.specs}
            append(asked.log, {**line, "tested_on": len(cell.test), "load": os.getloadavg()[0], **environment()})


def _cpu() -> float:
    return time.process_time()


def page(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The table."""
    last, depth = lines[-1], lines[-1]["depth"]
    counts = sorted({line["layers"] for line in lines}, reverse=True)
    yield "# LoRA on fewer layers"
    yield ""
    yield (
        f"`python benchmarks/layers.py`, {lines[0]['date'][:10]}. {last['cpu']}, one thread. {last['rows']} rows to "
        "learn from, as many to choose by. Test accuracy in percent, mean ± standard deviation over seeds; in brackets "
        f"how often the probe was published. Cost: {DELTAS} such deltas asked about one text, in passes of the encoder."
    )
    yield ""
    yield f"| set | seeds | {' | '.join(f'{count} of {depth} layers' for count in counts)} |"
    yield "|---" * (2 + len(counts)) + "|"
    for name in dict.fromkeys(line["set"] for line in lines):
        found = [_of(lines, name, count) for count in counts]
        cells_of = [
            spread([100 * line["metric"] for line in own]) + f" ({sum(line['is_probe'] for line in own)})"
            if own
            else ""
            for own in found
        ]
        yield f"| {name} | {len(found[0])} | {' | '.join(cells_of)} |"
    yield f"| cost | | {' | '.join(f'{cost(count, depth):.1f}' for count in counts)} |"
    spent = (statistics.fmean(line["cpu_s"] for line in lines if line["layers"] == count) for count in counts)
    yield f"| training, CPU seconds | | {' | '.join(f'{seconds:.0f}' for seconds in spent)} |"


def cost(count: int, depth: int) -> float:
    """Passes of the encoder."""
    return 1 + (DELTAS - 1) * count / depth


def _of(lines: Sequence[dict[str, Any]], name: str, count: int) -> list[dict[str, Any]]:
    return [line for line in lines if line["set"] == name and line["layers"] == count]


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Metric over cost, one line a set."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(5.5, 3.8), dpi=120)
    panel, depth = figure.add_subplot(), lines[-1]["depth"]
    counts = sorted({line["layers"] for line in lines})
    for name in dict.fromkeys(line["set"] for line in lines):
        found = [[100 * line["metric"] for line in _of(lines, name, count)] for count in counts]
        points = [(cost(count, depth), values) for count, values in zip(counts, found, strict=True) if values]
        panel.errorbar(
            [at for at, _ in points],
            [statistics.fmean(values) for _, values in points],
            [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points],
            marker="o", markersize=3, capsize=2, label=name,
        )  # fmt: skip
    panel.set(xlabel=f"cost of {DELTAS} deltas on one text, passes of the encoder", ylabel="test accuracy, percent")
    panel.set_title("LoRA on the upper layers alone", fontsize=10)
    panel.legend(fontsize=7)
    figure.savefig(path, bbox_inches="tight")


if __name__ == "__main__":
    main()
