# %% [markdown]
# # Searching for a layer
#
# BatchNorm followed by ReLU is one way to normalise and activate. EvoNorm writes such layers as small graphs of
# primitives and lets evolution look for better ones. This notebook shows the graphs, the checks that most of them
# fail, a search of a few dozen candidates, and the best of them in a backbone.

# %%
import os
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random

import matplotlib.pyplot as plt
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from leaven.callbacks import EvoNorm, attach
from leaven.callbacks.evonorm import (
    NAMED,
    AgeingEvolution,
    Budget,
    FreeChecks,
    Genome,
    SearchSpace,
    Task,
    judge,
    search,
)

smoke = bool(os.environ.get("SMOKE"))  # a short run that only shows that everything works
plt.style.use("seaborn-v0_8-colorblind")
plt.rcParams["figure.dpi"] = 90

# %% [markdown]
# ## A layer is a graph
#
# A `Genome` is a list of nodes. Each is a primitive with its inputs, which lie before it; the last one is the
# output. The published layers have names. In formulas x is the input and v0, v1 are parameters for each channel.
# s is a standard deviation, r a root mean square, and the letters below it say over which axes: b over the batch,
# w and h over the map, g over a group of channels. A scale and a shift for each channel follow every layer.


# %%
def show(genomes: dict[str, Genome], path: str) -> None:
    """Formulas below each other, as mathematics."""
    figure, axes = plt.subplots(figsize=(7, 0.6 * len(genomes)), layout="constrained")
    axes.axis("off")
    for i, (name, genome) in enumerate(genomes.items()):
        formula = genome.formula(latex=True).replace(r"\frac", r"\dfrac")
        height = 1 - (i + 0.5) / len(genomes)
        axes.text(0.02, height, name, va="center", fontsize=10)
        axes.text(0.25, height, f"${formula}$", va="center", fontsize=13)
    figure.savefig(path)


show({name: Genome.named(name) for name in NAMED}, "published.png")
print(Genome.named("evonorm_s0").to_json())

# %% [markdown]
# ## Most graphs are no layers
#
# Graphs drawn at random mostly do nothing useful. One small batch, without any training, is enough to tell:
# `FreeChecks` says why a graph cannot be a layer, or nothing if it can. The search space is the S series, whose
# statistics are of one image alone.

# %%
space, checks, rng = SearchSpace("S"), FreeChecks(), Random(0)
drawn = 200 if smoke else 3000
reasons = Counter(checks(space.random(rng)) or "worth a trial" for _ in range(drawn))

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
names, counts = zip(*reversed(reasons.most_common()), strict=True)
colours = ["#D55E00" if name == "worth a trial" else "#0072B2" for name in names]
axes.barh(names, [100 * count / drawn for count in counts], color=colours)
axes.set(xlabel=f"% of {drawn} random graphs")
figure.savefig("checks.png")

# %% [markdown]
# ## What a candidate is worth
#
# It is put into a small network, which is trained for a moment and scored on images kept apart. Before that, the
# gradient is pushed uphill for a few steps: where it explodes, the candidate is rejected. Here one small network
# and scikit-learn's digits have to do. Digits show that it works, and are no evidence for what it finds.

# %%
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
images = (images - images.mean()) / images.std()
labels = torch.tensor(digits.target)
task = Task(images[:1000], labels[:1000], images[1000:1400], labels[1000:1400], classes=10)
budget = Budget(steps=8 if smoke else 60, batch_size=32, quality_steps=0, stability_steps=2 if smoke else 5)
score = partial(judge, task=task, budget=budget, anchors=["mobilenet"])
for name in ("bn_relu", "evonorm_s0"):
    print(name, score(Genome.named(name).to_json()))

# %% [markdown]
# ## The search
#
# Ageing evolution: the winner of a tournament has one node changed, and the oldest member leaves. It begins with
# the published S layers, so that there is something that learns. `search` asks for candidates and has them
# judged, one after another here, on a process pool or a cluster with `executor`; with `journal` a stopped search
# goes on where it was.

# %%
start = [Genome.named(name) for name in ("evonorm_s0", "evonorm_s1", "evonorm_s2")]
evolution = AgeingEvolution(space, population=6, tournament=1.0, start=start, accept=checks)
search(evolution, score, candidates=4 if smoke else 36, round_size=3)

print(f"{evolution.looked_at} graphs looked at; rejected while being judged: {len(evolution.rejected)}")

# %%
numbers = [member.candidate.number for member in evolution.history]
scores = [member.mean for member in evolution.history]
best_so_far = torch.tensor(scores).cummax(0).values

figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
axes.plot(numbers, scores, "o", markersize=5, label="candidate")
axes.plot(numbers, best_so_far, drawstyle="steps-post", color="#D55E00", label="best so far")
axes.set(xlabel="candidate", ylabel="accuracy on images kept apart", ylim=(0, 1))
axes.grid(alpha=0.3)
axes.legend(loc="center left")
figure.savefig("search.png")

# %% [markdown]
# The best three. Scores of so short a training are noisy: a real search trains longer, and trains its best again,
# with several seeds (`recipes/evonorm_search.py --rerank`).

# %%
show({f"{member.mean:.3f}": member.candidate.genome for member in evolution.best(3)}, "found.png")

# %% [markdown]
# ## Into a backbone
#
# A genome is a line of JSON. `EvoNorm` puts it where a network has BatchNorm and its activation, when it is
# attached. The images that are scored on now were kept apart from the search, too.

# %%
best = evolution.best()[0].candidate.genome
Path("layer.json").write_text(best.to_json())

images = F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
test = slice(1400, 1450 if smoke else None)
steps = 2 if smoke else 50


def train(*callbacks: EvoNorm) -> float:
    """Accuracy of a thin ResNet on the test images."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=10, channels=(32, 64, 128, 256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with attach(model, optimizer, *callbacks, total_steps=steps):
        for _ in range(steps):
            rows = torch.randint(1400, (64,))
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    with torch.no_grad():
        return (model.eval()(images[test]).argmax(1) == labels[test]).float().mean().item()


found = EvoNorm(genome="layer.json")
print(
    f"BatchNorm and ReLU {train():.1%}, EvoNorm-S0 {train(EvoNorm('s0')):.1%}, the best found {train(found):.1%}"
)
print(found.report)

# %% [markdown]
# A layer that wins sixty updates of one small network need not win elsewhere. That is why the paper scores every
# candidate in three networks, and why its best are trained again before anybody believes them.
#
# Liu et al., *Evolving Normalization-Activation Layers*, NeurIPS 2020, is the paper; it judges thousands of
# candidates on CIFAR-10. `recipes/evonorm_search.py` does that on your own images.
