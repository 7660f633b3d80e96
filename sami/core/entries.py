"""The programs that train, and what the rest of the project knows of each: one row for each."""

import importlib
from collections.abc import Collection
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """A program that trains.

    Attributes:
        script: its file.
        name: of its folder in configs/, and of its runs in a report.
        config: the dataclass in the script that configures it.
        group: a group of fields that no entry above it has.
        exports: what its runs leave behind: ``NAME.safetensors``, with NAME as the header's key.
        makes: what that file holds, for a sentence. Entries with the same ``exports`` say the same.
        title: heading of its runs in a report.
        images: what its runs draw while they train; empty if nothing.
        measures: what its runs measure on held-out images, and the heading of each.
    """

    script: str
    name: str
    config: str
    group: str
    exports: str
    makes: str
    title: str
    images: str = ""
    measures: dict[str, str] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """Name of the file that a run exports."""
        return f"{self.exports}.safetensors"

    @property
    def module(self) -> str:
        """Import path of the script."""
        return self.script.removesuffix(".py").replace("/", ".")

    @property
    def config_class(self) -> type:
        """The dataclass that configures it; imports the script, which nobody else may."""
        return getattr(importlib.import_module(self.module), self.config)


ENTRIES = {
    entry.script: entry
    for entry in (
        Entry(
            script="sami/pretrain.py",
            name="pretrain",
            config="PretrainConfig",
            group="mask",
            exports="encoder",
            makes="an encoder of stage 1",
            title="Stage 1: pretraining",
            images="masked input, target, result",
            measures={
                "val_r2": "r2, held out",
                "val_knn": "k-NN, held out",
                "val_linear": "linear probe, held out",
            },
        ),
        Entry(
            script="finetune/train.py",
            name="finetune",
            config="FinetuneConfig",
            group="prompt",
            exports="model",
            makes="a model of stage 2",
            title="Stage 2: finetuning",
            images="true masks, by box, by click",
            measures={
                "val_miou_box": "mIoU by box, held out",
                "val_miou_1_click": "mIoU by 1 click, held out",
                "val_miou_3_clicks": "mIoU by 3 clicks, held out",
            },
        ),
        Entry(
            script="finetune/distill.py",
            name="distill",
            config="DistillConfig",
            group="distill",
            exports="model",
            makes="a model of stage 2",
            title="Distillation of SAM's encoder",
            images="embeddings and masks of teacher and student",
            measures={
                "val_mse": "mse of the embedding, held out",
                "val_r2": "r2 of the embedding, held out",
                "val_miou_teacher_1_click": "mIoU to the teacher's masks by 1 click, held out",
                "val_miou_teacher_pair_300": "mIoU to the teacher's masks by a pair 300 px apart, "
                "held out",
            },
        ),
        Entry(
            script="finetune/classify.py",
            name="classify",
            config="ClassifyConfig",
            group="augment",
            exports="classifier",
            makes="a classifier",
            title="Classification",
            measures={"val_top1": "top-1, held out"},
        ),
    )
}


def entry_of_groups(groups: Collection[str]) -> Entry | None:
    """The entry that is configured by these groups of fields."""
    found = [entry for entry in ENTRIES.values() if entry.group in groups]
    return found[-1] if found else None


def exporters(exports: Collection[str]) -> list[Entry]:
    """The entries whose runs leave one of these behind."""
    return [entry for entry in ENTRIES.values() if entry.exports in exports]
