"""``newllm eval NAME --harness lm_eval``: tasks of EleutherAI's evaluation harness."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from newllm.cli.loading import Dtype


@dataclass
class HarnessOptions:
    """Run tasks of lm-evaluation-harness, each of whose prompts is read by a fresh state.

    Nothing is fetched: tasks whose texts do not lie on this machine end with an error. RULER's
    niah_single_1, niah_multikey_2, niah_multikey_3, ruler_vt, ruler_cwe and ruler_fwe make theirs themselves.
    Appends a row for each metric.

    Args:
        model: folder or hub id of a causal model.
        harness: which one.
        tasks: its names of tasks, with commas between them.
        lengths: tokens of prompts, for tasks that make their own, such as 512,1k.
        limit: samples of a task (null: all).
        batch_size: prompts side by side.
        max_length: most tokens of a prompt (null: the longest of lengths, or the harness's own).
        dtype: of the weights (auto: the checkpoint's).
        device: where to run.
        rows: the file of results.
        seed: of the harness.
    """

    model: str
    harness: Literal["lm_eval"] = field(kw_only=True)
    tasks: str = field(kw_only=True)
    lengths: str | None = None
    limit: int | None = None
    batch_size: int = 1
    max_length: int | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    rows: str = "runs/recall.jsonl"
    seed: int = 0


def run(options: HarnessOptions) -> None:
    """Measure, write, print."""
    from newllm.cli.eval_recall import parse_lengths
    from newllm.cli.loading import checked_device, quiet
    from newllm.evaluation.rows import RowFile, weights_digest
    from newllm.hub import model_folder
    from newllm.models.files import load_model, load_tokenizer
    from newllm.runs import commit

    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise RuntimeError(
            "harness lm_eval needs a package: pip install 'newllm[eval]'" + f" ({error})"
        ) from error
    quiet()
    folder = model_folder(options.model)
    model = load_model(folder, dtype=options.dtype).to(checked_device(options.device)).eval()
    lengths = parse_lengths(options.lengths) if options.lengths else None
    longest = options.max_length or (max(lengths) + _ANSWER if lengths else None)
    harness = HFLM(
        pretrained=model, tokenizer=load_tokenizer(folder), batch_size=options.batch_size, max_length=longest
    )
    metadata: dict[str, Any] = {"tokenizer": str(folder)}
    if lengths:
        metadata["max_seq_lengths"] = lengths
    found = simple_evaluate(
        model=harness, tasks=options.tasks.split(","), limit=options.limit, metadata=metadata,
        random_seed=options.seed, numpy_random_seed=options.seed, torch_random_seed=options.seed,
        fewshot_random_seed=options.seed,
    )  # fmt: skip
    rows = RowFile(options.rows)
    facts = {"model": options.model, "weights": weights_digest(model), "memory": "on", "commit": commit()}
    for row in harness_rows(found, facts | {"depth": None, "seed": options.seed}):
        rows.append(row)
        print(f"{row['suite']} {row['metric']}: {row['score']:.4f} of {row['samples']} samples", flush=True)


_ANSWER = 256
_Z95 = 1.959964


def harness_rows(found: dict[str, Any], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each task and metric of the harness's results; -1 stands for what was not measured."""
    rows = []
    for task, metrics in found["results"].items():
        samples = found["n-samples"].get(task, {}).get("effective")
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, float) or value < 0:
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            half = _Z95 * error if isinstance(error, float) else None
            # Perplexities and the like have no upper end; all that is better when higher is a share.
            shares = found.get("higher_is_better", {}).get(task, {}).get(metric, True)
            rows.append(
                {
                    "suite": f"lm_eval:{task}", "metric": metric, **facts,
                    "length": int(metric) if metric.isdecimal() else None, "samples": samples, "score": value,
                    "ci95": None if half is None else _interval(value, half, 1.0 if shares else math.inf),
                }
            )  # fmt: skip
    return rows


def _interval(value: float, half: float, most: float) -> tuple[float, float]:
    return max(0.0, value - half), min(most, value + half)
