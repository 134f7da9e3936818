# %% [markdown]
# # Searching for a layer
#
# BatchNorm followed by ReLU is one way to normalise and activate. EvoNorm writes such layers as small graphs of
# primitives and lets evolution look for better ones. This notebook shows the graphs, the checks that most of them fail,
# a search of a few dozen candidates, and the best of them in a backbone.

# %%
import os
from collections import Counter
from pathlib import Path
from random import Random

import matplotlib.pyplot as plt
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from leaven.callbacks import EvoNorm, attach
from leaven.callbacks.evonorm import NAMED, Genome, SearchSpace
from leaven.callbacks.evonorm.checks import FreeChecks
from leaven.callbacks.evonorm.evolution import AgeingEvolution
from leaven.callbacks.evonorm.judging import Budget, Task, judge
from leaven.callbacks.evonorm.search import search

smoke = bool(os.environ.get("SMOKE"))  # a short run that only shows that everything works
plt.style.use("seaborn-v0_8-colorblind")
plt.rcParams["figure.dpi"] = 90

# %% [markdown]
# ## A layer is a graph
#
# A `Genome` is a list of nodes. Each is a primitive with its inputs, which lie before it; the last one is the output. The
# published layers have names. In formulas x is the input and v0, v1 are parameters for each channel. s is a standard
# deviation, r a root mean square, and the letters below it say over which axes: b over the batch, w and h over the map, g
# over a group of channels. A scale and a shift for each channel follow every layer.


# %%
def show(formulas: dict[str, str], path: str) -> None:
    """Formulas below each other, as mathematics."""
    figure = plt.figure(figsize=(7, 0.65 * len(formulas)))
    for i, (name, formula) in enumerate(formulas.items()):
        height = 1 - (i + 0.5) / len(formulas)
        figure.text(0.02, height, name, va="center", fontsize=10)
        figure.text(0.3, height, f"${formula}$", va="center", fontsize=14)
    figure.savefig(path)


show({name: Genome.named(name).formula(latex=True) for name in NAMED}, "published.png")
print(Genome.named("evonorm_s0").to_json())

# %% [markdown]
# ## Most graphs are no layers
#
# Graphs drawn at random mostly do nothing useful. One small batch, without any training, is enough to tell: `FreeChecks`
# says why a graph cannot be a layer, or nothing if it can. The search space is the S series, whose statistics are of one
# image alone.

# %%
space, checks, rng = SearchSpace("S"), FreeChecks(), Random(0)
drawn = 200 if smoke else 3000
reasons = Counter(checks(space.random(rng)) or "worth a trial" for _ in range(drawn))

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
names, counts = (
    zip(*reason_counts, strict=True) if (reason_counts := reasons.most_common()[::-1]) else ((), ())
)
colours = ["#D55E00" if name == "worth a trial" else "#0072B2" for name in names]
axes.barh(names, [100 * count / drawn for count in counts], color=colours)
axes.set(xlabel=f"% of {drawn} random graphs")
figure.savefig("checks.png")

# %% [markdown]
# ## What a candidate is worth
#
# It is put into a small network, which is trained for a moment and scored on images kept apart. Before that, the gradient
# is pushed uphill for a few steps: where it explodes, the candidate is rejected. Here one small network and scikit-learn's
# digits have to do. Digits show that it works, and are no evidence for what it finds.

# %%
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
images = (images - images.mean()) / images.std()
labels = torch.tensor(digits.target)
task = Task(images[:1000], labels[:1000], images[1000:1400], labels[1000:1400], classes=10)
budget = Budget(steps=8 if smoke else 60, batch_size=32, quality_steps=0, stability_steps=2 if smoke else 5)


def score(genome: str) -> dict:
    return judge(Genome.from_json(genome), task, budget, anchors=["mobilenet"])


for name in ("bn_relu", "evonorm_s0"):
    print(name, score(Genome.named(name).to_json()))
