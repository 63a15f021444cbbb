"""Table 7: what each stage adds, on nano, over three random seeds.

    python benchmarks/reproduce/table7.py --data DATASETS --trunk runs/nano --out runs/reproduce

Every query keeps one labelled positive (`common.one_label_each`); the judge knows the others.  Per seed: warm-up from
the trunk, mining, training with mined negatives, retrieval, judging, fine-tuning; P@1 on the test tasks after each of
the three trainings.
"""

from __future__ import annotations

from typing import Any

import common

STAGES = {"warmup": "Warm-up", "hard_negatives": "+ Global-HNM", "finetune": "+ MLLM-Judge-FT"}
PAPER = {"warmup": (62.9, 68.4), "hard_negatives": (65.4, 70.7), "finetune": (68.0, 72.1)}


def main() -> None:
    arguments = common.arguments(__doc__, seeds=3)
    base = common.trunk(arguments)
    data = common.one_label_each(arguments.data, arguments.out / "data")
    runs = []
    for seed in range(arguments.seeds):
        folder = arguments.out / "table7" / f"seed{seed}"
        judge = {"judge.truth": str(arguments.data)}
        common.variant(base, common.TRUNK, folder, data, "finetune", seed=seed, **judge)
        runs.append({stage: common.score(folder / stage, arguments.data) for stage in STAGES})
    lines = [
        f"| stage | nano, mean P@1 of 8 tasks, {arguments.seeds} seeds | paper 2B, MMEB | paper 2B, VisDoc |",
        "| --- | --- | --- | --- |",
    ]
    for stage, title in STAGES.items():
        ours = common.spread([one[stage]["mean"] for one in runs])
        lines.append(f"| {title} | {ours} | {PAPER[stage][0]} | {PAPER[stage][1]} |")

    def draw(axes: Any) -> None:
        for seed, one in enumerate(runs):
            axes.plot(list(STAGES.values()), [one[stage]["mean"] for stage in STAGES], "o-", label=f"seed {seed}")
        axes.set(ylabel="mean P@1", title="Table 7 on nano")
        axes.legend()

    common.finish("table7", "\n".join(lines), {"table": 7, "runs": runs, "paper": PAPER}, draw)


if __name__ == "__main__":
    main()
