"""What a SparK run of the recipe has learnt, drawn on the two photos that come with scikit-learn.

    python benchmarks/spark_pictures.py RUN docs/spark-reconstructions.png

RUN is a run folder of recipes/spark.py. The photos are china.jpg (danielbuechele on Flickr) and flower.jpg (vultilion
on Flickr), both CC BY 2.0; two square pieces of each are shown.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from sklearn.datasets import load_sample_image
from torch import Tensor

from leaven.backbones import create
from leaven.pretext.spark import SparK, sample_mask
from leaven.recipes.common import checkpoint
from leaven.recipes.common.masked import CAPTION, reconstruction_columns
from leaven.recipes.common.plots import image_table

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pieces(side: int) -> Tensor:
    """The left and the right square of each photo, (4, 3, side, side), normalised."""
    found = []
    for name in ("china.jpg", "flower.jpg"):
        photo = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1).float() / 255
        height = photo.shape[1]
        found += [photo[:, :, :height], photo[:, :, -height:]]
    small = F.interpolate(torch.stack(found), (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    return (small - mean) / std


def load_spark(run: Path) -> tuple[SparK, int]:
    """The objective as the run left it, in eval mode, and the side of its images."""
    settings = yaml.safe_load((run / "config.yaml").read_text())
    names = ("mask_ratio", "decoder_width", "densify_norm", "backend", "stages", "mask_cell")
    spark = SparK(create(settings["backbone"]), **{name: settings[name] for name in names})
    spark.load_state_dict(checkpoint.load(checkpoint.listing(run / "checkpoints")[0])["model"])
    return spark.eval(), settings["image_size"][0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    spark, side = load_spark(args.run)
    photos = pieces(side)
    mask = sample_mask(
        len(photos), spark.mask_grid(side, side), spark.mask_ratio, torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        columns = reconstruction_columns(spark, photos, mask)
    image_table(columns, args.picture, mean=MEAN, std=STD, caption=CAPTION)


if __name__ == "__main__":
    main()
