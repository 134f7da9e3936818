"""What the recipes that train without labels share: an average of the weights, and kNN on the way."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from leaven.backbones import save
from leaven.callbacks import EMA, Callback, KNNProbe
from leaven.recipes.common.batches import Images, user_errors
from leaven.recipes.common.curriculum import CurriculumSettings
from leaven.recipes.common.data import Data
from leaven.recipes.common.flags import UserError, flag
from leaven.recipes.common.probes import labelled, unfit
from leaven.recipes.common.run_folder import RunFolder
from leaven.recipes.common.schedule import Plan


@dataclass
class PretrainSettings(CurriculumSettings):
    """The flags of these recipes."""

    probe_images: int = flag(5000, "labelled images at most, of each part, for kNN and linear probe")
    eval_every: int = flag(1, "epochs between measurements of the callback knn")

    FREE = CurriculumSettings.FREE | {"probe_images", "eval_every"}
    CALLBACKS = ("efficienttrain", "ema", "knn")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_every != 1 and "knn" not in self.callbacks:
            raise UserError("--eval-every is of kNN during training: add --callbacks knn")


def check_labels(settings: PretrainSettings, data: Data) -> None:
    """Whether the callback knn, if it is wanted, has something to learn from: to be asked before anything runs.

    Raises:
        UserError: it has not.
    """
    if "knn" in settings.callbacks and (why := unfit(data, settings.probe_images)):
        raise UserError(f"--callbacks knn: {why}; give labelled images, or leave it out")


def observers(settings: PretrainSettings, images: Images, plan: Plan) -> tuple[EMA | None, list[Callback]]:
    """The average, and it with the kNN probe as far as they are wanted, to be attached."""
    average = settings.average()
    found: list[Callback] = [] if average is None else [average]
    if "knn" in settings.callbacks:
        bank, queries = labelled(images, settings.probe_images)
        every = settings.eval_every * plan.updates_per_epoch
        found.append(
            KNNProbe(bank, queries, every, k=min(20, len(bank[1])), recalibrate=images.calibration())
        )
    return average, found


def save_all(backbones: dict[str, nn.Module], run: RunFolder, name: str, metadata: dict[str, Any]) -> None:
    """Write the trained backbone, and the averaged one beside it."""
    with user_errors(OSError):
        save(backbones["trained backbone"], run.backbone, name=name, metadata=metadata)
        if (averaged := backbones.get("averaged backbone")) is not None:
            save(averaged, run.path / "backbone-ema.safetensors", name=name, metadata=metadata)
