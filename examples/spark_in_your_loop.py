# %% [markdown]
# # SparK in a loop of your own
#
# Masked pre-training of a small network on scikit-learn's digits, in plain PyTorch. The objective is one line of the
# loop, the callbacks are another. About a minute on two CPU cores; `SMOKE=1` makes it a few seconds.

# %%
import os

import matplotlib.pyplot as plt
import timm
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from leaven.callbacks import EMA, attach
from leaven.pretext import SparK, extract_features, linear_probe
from leaven.pretext.spark import sample_mask

epochs = 1 if os.environ.get("SMOKE") else 20
torch.manual_seed(0)

# %% [markdown]
# Digits are 8x8; they are shown to the network at 32x32, in three channels.

# %%
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
images = torch.nn.functional.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
images = (images - images.mean()) / images.std()
labels = torch.tensor(digits.target)
train, test = slice(0, 1400), slice(1400, None)

# %% [markdown]
# The last map of `resnet10t` has reduction 32. Maps up to reduction 8 allow mask cells of 8 px, sixteen per image.

# %%
spark = SparK("resnet10t", decoder_width=64, stages=(4, 8), mask_cell=8)
optimizer = torch.optim.AdamW(spark.parameters(), lr=1e-3, weight_decay=0.05)
loader = torch.utils.data.DataLoader(images[train], batch_size=64, shuffle=True, drop_last=True)
losses = []
with attach(spark, optimizer, EMA(decay=0.99), total_steps=epochs * len(loader)) as attached:
    for _ in range(epochs):
        for batch in loader:
            loss = spark(batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
print(f"masked loss {losses[0]:.3f} -> {losses[-1]:.3f} after {attached.progress.step} updates")

# %% [markdown]
# What it fills in. Visible patches are kept, hidden ones are predicted.

# %%
shown = images[test][:4]
mask = sample_mask(4, spark.mask_grid(32, 32), 0.6, torch.Generator().manual_seed(0))
seen = mask.repeat_interleave(8, 1).repeat_interleave(8, 2).unsqueeze(1)
figure, axes = plt.subplots(3, 4, figsize=(6, 4.5))
spark.eval()
for row, pictures in zip(axes, (shown, shown * seen, spark.reconstruct(shown, mask)), strict=True):
    for axis, picture in zip(row, pictures, strict=True):
        axis.imshow(picture[0], cmap="gray")
        axis.axis("off")
figure.savefig("spark_reconstructions.png")

# %% [markdown]
# The backbone is a plain timm network all along, and so are the weights that leave it.

# %%
spark.export("resnet10t.safetensors")
backbone = timm.create_model("resnet10t", num_classes=0)
backbone.load_state_dict(load_file("resnet10t.safetensors"))
features = extract_features(backbone, images)
print(f"linear probe {linear_probe(features[train], labels[train], features[test], labels[test]):.3f}")
print("digits show that it runs; they are no evidence that it helps")
