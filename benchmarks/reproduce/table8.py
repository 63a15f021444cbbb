"""Table 8: number and kind of hard negatives in the last stage, judged against rule-based, on nano.

    python benchmarks/reproduce/table8.py --data DATASETS --trunk runs/nano --out runs/reproduce

Goes on from the seeds of table 7.  Both kinds come from the same list of 20 candidates: rule-based takes all but the
one labelled positive, judged leaves out what the judge found relevant.  n = 0 trains the same steps with in-batch
negatives only.
"""

from __future__ import annotations

from typing import Any

import common

COUNTS = (0, 4, 8, 12)
PAPER = {"judged": {0: 68.1, 4: 69.5, 8: 69.9, 12: 70.0}, "rule-based": {0: 68.1, 4: 67.6, 8: 68.6, 12: 68.5}}


def main() -> None:
    arguments = common.arguments(__doc__, seeds=1)
    base = common.trunk(arguments)
    data = common.one_label_each(arguments.data, arguments.out / "data")
    scores: dict[str, dict[int, list[float]]] = {kind: {n: [] for n in COUNTS} for kind in PAPER}
    for seed in range(arguments.seeds):
        truth = {"seed": seed, "judge.truth": str(arguments.data)}
        before = arguments.out / "table7" / f"seed{seed}"
        common.variant(base, common.TRUNK, before, data, "judge", **truth)
        done = (*common.TRUNK, "warmup", "mine", "hard_negatives", "retrieve")
        for kind in scores:
            for n in COUNTS:
                values = {
                    **truth,
                    "finetune.loss.num_negatives": n,
                    "finetune.fill_from_mined": False,
                    "finetune.loss.fill": "repeat",
                }
                values |= {"finetune.keep_labelled": False, "finetune.loss.batch_size": 48}
                if kind == "rule-based":
                    values["judge"] = None
                if n == 0 and kind != "judged":
                    scores[kind][n].append(scores["judged"][n][-1])  # without negatives there is one kind only
                    continue
                stages = done if kind == "rule-based" else (*done, "judge")
                folder = arguments.out / "table8" / f"seed{seed}-{kind}-{n}"
                common.variant(before, stages, folder, data, "finetune", **values)
                scores[kind][n].append(common.score(folder / "finetune", arguments.data)["mean"])
    lines = [
        "| hard negatives | judged, nano | rule-based, nano | judged, paper (avg.) | rule-based, paper (avg.) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for n in COUNTS:
        cells = [common.spread(scores[kind][n]) for kind in PAPER] + [str(PAPER[kind][n]) for kind in PAPER]
        lines.append(f"| {n} | {' | '.join(cells)} |")

    def draw(axes: Any) -> None:
        for kind, by_count in scores.items():
            axes.plot(COUNTS, [sum(one) / len(one) for one in by_count.values()], "o-", label=kind)
        axes.set(xlabel="hard negatives a row", ylabel="mean P@1", title="Table 8 on nano", xticks=COUNTS)
        axes.legend()

    common.finish("table8", "\n".join(lines), {"table": 8, "scores": scores, "paper": PAPER}, draw)


if __name__ == "__main__":
    main()
