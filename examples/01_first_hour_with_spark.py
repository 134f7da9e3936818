# %% [markdown]
# # A first hour with SparK
#
# SparK hides most of an image from a convolutional network and lets a small decoder predict what is missing. No
# labels are needed. What remains at the end is the backbone you began with, with better weights.
#
# This notebook pre-trains a small ResNet, looks at what it fills in, loads the weights into plain timm, and
# fine-tunes on a few labels. The data are scikit-learn's handwritten digits, so that nothing has to be
# downloaded. Digits show that everything works. They are no evidence that the method helps: for that, take images
# of your own.

# %%
import os

import matplotlib.pyplot as plt
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from leaven.backbones import load_around_classifier
from leaven.pretext import SparK, extract_features, kshot_indices, linear_probe
from leaven.pretext.spark import sample_mask

smoke = bool(os.environ.get("SMOKE"))  # a short run that only shows that everything works
torch.manual_seed(0)
plt.style.use("seaborn-v0_8-colorblind")
plt.rcParams["figure.dpi"] = 90

# %% [markdown]
# ## Images and a backbone
#
# Digits are 8x8 pixels. The network sees them at 32x32, in three channels, with mean 0 and standard deviation 1.

# %%
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
images = F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
images = (images - images.mean()) / images.std()
labels = torch.tensor(digits.target)
train = slice(0, 128 if smoke else 1400)
train_images, train_labels = images[train], labels[train]
test = slice(1400, 1480 if smoke else None)
test_images, test_labels = images[test], labels[test]
print(f"{len(train_images)} images to learn from, {len(test_images)} to test on")

# %% [markdown]
# Any convolutional backbone of timm will do. This one is a thin ResNet. `output_stride=8` keeps its last map at
# an eighth of the image's side, as images of 32 pixels need; for photos leave it out.

# %%
settings = {"channels": (32, 64, 128, 256), "output_stride": 8}
backbone = timm.create_model("resnet10t", num_classes=0, **settings)

# %% [markdown]
# ## Pre-training
#
# `SparK` is an `nn.Module` that owns the backbone and the decoder. Called on a batch it gives a loss; the rest is
# your own loop. The cells of the mask have the size of a pixel of the last map, here 8x8. Of the sixteen cells of
# an image six stay visible.

# %%
spark = SparK(backbone, decoder_width=64)
optimizer = torch.optim.AdamW(spark.parameters(), lr=1e-3, weight_decay=0.05)
loader = torch.utils.data.DataLoader(train_images, batch_size=64, shuffle=True, drop_last=True)
losses = []
for _ in range(1 if smoke else 10):
    for batch in loader:
        loss = spark(batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

# %%
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(losses)
axes.set(xlabel="update", ylabel="loss on hidden cells", ylim=(0, None))
axes.grid(alpha=0.3)
figure.savefig("spark_loss.png")
print(f"loss {losses[0]:.2f} at the first update, {losses[-1]:.2f} at the last")

# %% [markdown]
# The loss compares cells that were standardised, each to mean 0 and standard deviation 1. A network that predicts
# zeros everywhere has a loss near 1.
#
# ## What it fills in
#
# These test digits were not trained on. Visible cells are as they were, hidden ones are predicted. What is
# predicted is the pattern within a cell; for the picture, its mean and deviation are taken from the original.

# %%
shown = test_images[:6]
mask = sample_mask(len(shown), spark.mask_grid(32, 32), 0.6, torch.Generator().manual_seed(0))
seen = F.interpolate(mask[:, None].float(), size=(32, 32)).bool()
filled = spark.eval().reconstruct(shown, mask)

rows = {"original": shown, "seen": shown.where(seen, torch.nan), "predicted": filled}
figure, grid = plt.subplots(3, len(shown), figsize=(7, 3.7), layout="constrained")
for axes_row, (name, pictures) in zip(grid, rows.items(), strict=True):
    for axes, picture in zip(axes_row, pictures, strict=True):
        axes.imshow(picture[0], cmap="gray", vmin=shown.min(), vmax=shown.max())
        axes.set(xticks=[], yticks=[], facecolor="tab:blue")
    axes_row[0].set_ylabel(name)
figure.savefig("spark_reconstructions.png")

# %% [markdown]
# ## Into plain timm
#
# The backbone was a plain timm network all along. `export` writes its weights, and timm loads them strictly:
# every key and every shape agrees.

# %%
spark.export("backbone.safetensors")
plain = timm.create_model("resnet10t", num_classes=0, **settings)
plain.load_state_dict(load_file("backbone.safetensors"))

# %% [markdown]
# ## Are the features any good?
#
# A linear probe trains a logistic regression on frozen features. Beside it stands the same network with weights
# that were never trained.


# %%
def probe(network: torch.nn.Module) -> float:
    known, asked = extract_features(network, train_images), extract_features(network, test_images)
    return linear_probe(known, train_labels, asked, test_labels)


untrained = timm.create_model("resnet10t", num_classes=0, **settings)
print(f"linear probe, untrained:   {probe(untrained):.1%}")
print(f"linear probe, pre-trained: {probe(plain):.1%}")

# %% [markdown]
# ## Fine-tuning with few labels
#
# Five labelled digits of each class, and the whole network is trained, once from fresh weights and once from the
# pre-trained ones. `load_around_classifier` loads strictly too, but for the classifier, which the file does not
# have.

# %%
chosen = kshot_indices(train_labels, 5, seed=0)
few_images, few_labels = train_images[chosen], train_labels[chosen]


def fine_tuned(weights: str | None, seed: int) -> float:
    torch.manual_seed(seed)
    model = timm.create_model("resnet10t", num_classes=10, **settings)
    if weights is not None:
        load_around_classifier(model, weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    for _ in range(2 if smoke else 30):
        loss = F.cross_entropy(model(few_images), few_labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return (model.eval()(test_images).argmax(1) == test_labels).float().mean().item()


for name, weights in (("fresh weights", None), ("pre-trained", "backbone.safetensors")):
    scores = [fine_tuned(weights, seed) for seed in range(1 if smoke else 3)]
    print(f"{name:>13}: " + ", ".join(f"{score:.1%}" for score in scores))

# %% [markdown]
# One number for each seed. Whatever they say, they say it of digits.
#
# ## Where to go from here
#
# - The same on your own images, with resume, several GPUs and a log: `accelerate launch recipes/spark.py
#   --backbone resnet50 --data PATH/OF/IMAGES`, then `recipes/train.py --init ...`.
# - A backbone that SparK cannot run exactly, because it has attention for instance, is refused in one line that
#   names the layer.
# - Tian et al., *Designing BERT for Convolutional Networks*, ICLR 2023, is the paper.
