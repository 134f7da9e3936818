"""The flags of recipes that keep an average of the weights."""

from dataclasses import dataclass

from leaven.callbacks import EMA
from leaven.recipes.common.flags import UserError, flag
from leaven.recipes.common.start import LoopSettings


@dataclass
class AverageSettings(LoopSettings):
    """The weights' moving average; `ema` among the callbacks asks for it, too."""

    model_ema_decay: float | None = flag(None, "decay of the weights' moving average; none: no average")
    model_ema_warmup: bool = flag(False, "let that decay grow with the updates; for short runs")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_ema_warmup and self.model_ema_decay is None:
            raise UserError("--model-ema-warmup is of an average: add --model-ema-decay or --callbacks ema")
        if self.model_ema_decay is not None and not 0 <= self.model_ema_decay <= 1:
            raise UserError(f"--model-ema-decay must be between 0 and 1, got {self.model_ema_decay}")

    def about_average(self, updates: int) -> list[str]:
        """A line where the run is too short for the average to leave the weights that it began with."""
        if self.model_ema_decay is None or self.model_ema_warmup:
            return []
        if updates * (1 - self.model_ema_decay) >= 1:
            return []
        return [
            f"an average with decay {self.model_ema_decay:g} hardly moves in {updates} updates: "
            "add --model-ema-warmup, or lower --model-ema-decay"
        ]

    def average(self) -> EMA | None:
        """The average, to be attached, if one is wanted."""
        if self.model_ema_decay is None:
            return None
        return EMA(self.model_ema_decay, self.model_ema_warmup)
