"""Stage 1, which the paper motivates but does not measure: what compression breaks, and how fast training mends it.

    python benchmarks/reproduce/restoration.py --data DATASETS --trunk runs/nano --out runs/reproduce

A language model learns to write with all visual tokens (s = 1); compression is inserted (s = 2) without training; then
it is trained on, with compression and, as a control, without.  Loss: mean next-token loss of the answers on ``test``,
in nats, over tasks whose answer depends on the picture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch

from quarterlight.data.conversations import from_task
from quarterlight.data.retrieval import RetrievalDataset, with_instructions
from quarterlight.models.checkpoint import load_backbone
from quarterlight.training.restore import ConversationTokenizer, PackCollator, RestoreRecipe, hold_out, next_token_loss

SOURCES = {"emoji": "i2t", "icons_mdi": "i2t", "easy_vqa": "it2t"}
QUESTION = "What is this?"
LOSS = RestoreRecipe(max_tokens=256, packs_per_device=16, max_tiles=1, eval_every=0, eval_conversations=400)


@torch.inference_mode()
def held_out_loss(folder: Path, data: Path, s: int) -> dict[str, float]:
    """Mean loss by dataset, and over all of them, of the model in a folder, run with compression ``s``."""
    model, processor = load_backbone(folder, visual_token_compression=s, language_head=True)
    tasks = [with_instructions(RetrievalDataset(data / name).load(task, "test")) for name, task in SOURCES.items()]
    collate = PackCollator(processor, LOSS)
    totals = {}
    held_out = hold_out(
        [from_task(task, question=QUESTION) for task in tasks], ConversationTokenizer(processor, 1), LOSS
    )
    for label, packs in held_out.items():
        batches = [collate(packs[first : first + 16]) for first in range(0, len(packs), 16)]
        totals[label.split("/")[0]] = (
            sum(float(next_token_loss(model, batch)) for batch in batches),
            sum(len(batch["labels"]) for batch in batches),
        )
    losses = {name: loss / count for name, (loss, count) in totals.items()}
    return losses | {"all": sum(loss for loss, _ in totals.values()) / sum(count for _, count in totals.values())}


def draw(phases: Mapping[str, Mapping[str, float]], axes: Any) -> None:
    """Loss by phase; the last is a control beside the others, not what followed them, so no line leads to it."""
    *course, control = phases.values()
    for name in control:
        (line,) = axes.plot(range(len(course)), [one[name] for one in course], "o-", label=name)
        axes.plot(len(course), control[name], "o", color=line.get_color(), fillstyle="none")
    axes.axvline(len(course) - 0.5, color="0.8", linewidth=1)
    axes.set(ylabel="next-token loss, nats", title="Restoration on nano", xticks=range(len(phases)))
    axes.set_xticklabels([phase.replace(" with", "\nwith").replace(": ", ":\n") for phase in phases], fontsize=8)
    axes.legend(ncols=len(control), loc="lower center", bbox_to_anchor=(0.5, 0.2))


def main() -> None:
    arguments = common.arguments(__doc__, steps=250, more=150)
    base = common.trunk(arguments, last="tower")
    data = [{"dataset": name, "task": task, "question": QUESTION} for name, task in SOURCES.items()]

    def train(
        folder: Path, before: Path, stages: tuple[str, ...], s: int, steps: int, rate: float, **more: Any
    ) -> Path:
        values = {"restore.data": data, "restore.loss.eval_every": 0, "restore.optimizer.num_steps": steps}
        values |= {"restore.optimizer.learning_rate": rate, "restore.optimizer.warmup_steps": steps // 10}
        values |= {"model.visual_token_compression": s, **more}
        return common.variant(before, stages, folder, arguments.data, "restore", **values)

    out = arguments.out / "restoration"
    vanilla = train(out / "vanilla", base, common.TRUNK[:3], 1, arguments.steps, 1e-3)
    loss = partial(held_out_loss, data=arguments.data)
    phases = {"trained with s = 1": loss(vanilla, s=1), "s = 2 inserted": loss(vanilla, s=2)}
    after = {}
    for s in (2, 1):
        # a model that begins with the checkpoint: no stage of the trunk comes before
        start = {"model": {"checkpoint": str(vanilla), "visual_token_compression": s, "attn_implementation": "eager"}}
        start |= {"teacher": None, "tower": None, "warmup.teacher_weight": 0.0}
        after[s] = train(out / f"more-s{s}", base, (), s, arguments.more, 3e-4, **start)
    phases |= {"restored with s = 2": loss(after[2], s=2), "control: as long with s = 1": loss(after[1], s=1)}
    names = [*SOURCES, "all"]
    lines = [f"| next-token loss, nats | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    lines += [f"| {phase} | {' | '.join(f'{one[name]:.3f}' for name in names)} |" for phase, one in phases.items()]
    steps = {"steps": arguments.steps, "more": arguments.more}

    common.finish(
        "restoration", "\n".join(lines), {"experiment": "restoration", **steps, "losses": phases}, partial(draw, phases)
    )
    print(json.dumps(steps))


if __name__ == "__main__":
    main()
