"""Table 10: LoRA rank in the warm-up, on nano.

    python benchmarks/reproduce/table10.py --data DATASETS --trunk runs/nano --out runs/reproduce

The warm-up from the trunk with adapters of the language model only, vision tower and connector frozen; ``full`` trains
all weights.
"""

from __future__ import annotations

from typing import Any

import common

RANKS = (8, 16, 32)
PAPER = {8: 65.5, 16: 65.7, 32: 65.1}


def main() -> None:
    arguments = common.arguments(__doc__, seeds=1)
    base = common.trunk(arguments)
    scores: dict[str, list[float]] = {}
    for name in (*map(str, RANKS), "full"):
        lora = None if name == "full" else {"rank": int(name), "alpha": 2 * int(name), "dropout": 0.0}
        for seed in range(arguments.seeds):
            folder = arguments.out / "table10" / f"{name}-seed{seed}"
            values = {"seed": seed, "warmup.lora": lora, "warmup.teacher_weight": 0.0}
            common.variant(base, common.TRUNK, folder, arguments.data, "warmup", **values)
            scores.setdefault(name, []).append(common.score(folder / "warmup", arguments.data)["mean"])
    lines = ["| LoRA rank | nano, mean P@1 of 8 tasks | paper 2B (avg.) |", "| --- | --- | --- |"]
    lines += [
        f"| {name} | {common.spread(values)} | {PAPER.get(int(name)) if name != 'full' else '-'} |"
        for name, values in scores.items()
    ]

    def draw(axes: Any) -> None:
        axes.bar(list(scores), [sum(one) / len(one) for one in scores.values()])
        axes.set(xlabel="LoRA rank", ylabel="mean P@1", title="Table 10 on nano")

    common.finish("table10", "\n".join(lines), {"table": 10, "scores": scores, "paper": PAPER}, draw)


if __name__ == "__main__":
    main()
