# %% [markdown]
# # Features of a diffusion model
#
# A diffusion model learns to remove noise from images. To do so its blocks must know what is in them. So its
# intermediate activations can be classified: add noise of some timestep to an image, run the network up to some
# block, pool the map. Which timestep and block are best has to be tried; here the whole grid is tried at once.
#
# The data are scikit-learn's digits. They show that everything works, and are no evidence for the method.

# %%
import os

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from leaven.pretext.diffusion import Denoiser, DiffusionFeatures, UNet, block_names, ridge_grid

smoke = bool(os.environ.get("SMOKE"))  # a short run that only shows that everything works
torch.manual_seed(0)
plt.style.use("seaborn-v0_8-colorblind")
plt.rcParams["figure.dpi"] = 90

# %% [markdown]
# ## Train the denoiser
#
# Diffusion models want images in [-1, 1]. The U-Net is ADM's, made very small. `Denoiser` is the objective: it
# draws a timestep and noise for every image, and the loss is the error of the predicted noise.

# %%
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
images = F.interpolate(images, size=(16, 16), mode="bilinear")
labels = torch.tensor(digits.target)
if smoke:
    images, labels = images[:160], labels[:160]

denoiser = Denoiser(UNet(in_chans=1, width=16))
optimizer = torch.optim.AdamW(denoiser.parameters(), lr=2e-3)
steps = 4 if smoke else 400
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
train_images = images[: len(images) * 3 // 4]
losses = []
for _ in range(steps):
    batch = train_images[torch.randint(len(train_images), (64,))]
    loss = denoiser(batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} at the first update, {sum(losses[-4:]) / 4:.3f} over the last four")

# %% [markdown]
# ## What it has learnt to see
#
# The upper row is noise turned into images. It shows what so little training is worth. The lower rows are what
# the features will be taken from: one test digit at several timesteps.

# %%
times = (0, 50, 100, 200, 400, 700)
drawn = denoiser.sample((6, 1, 16, 16), steps=5 if smoke else 50, generator=torch.Generator().manual_seed(0))
noise = torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(1))
noisy = denoiser.schedule.add_noise(images[-1:].expand(6, -1, -1, -1), noise, torch.tensor(times))

figure, grid = plt.subplots(2, 6, figsize=(7, 2.8), layout="constrained")
for axes, picture in zip(grid.flat, torch.cat([drawn, noisy]), strict=True):
    axes.imshow(picture[0], cmap="gray", vmin=-1, vmax=1)
    axes.set(xticks=[], yticks=[])
for axes, t in zip(grid[1], times, strict=True):
    axes.set_xlabel(f"t = {t}")
grid[0, 0].set_ylabel("drawn")
grid[1, 0].set_ylabel("noisy")
figure.savefig("diffusion_images.png")

# %% [markdown]
# ## The grid
#
# `DiffusionFeatures` gives a map for every cell of the grid: timestep and block. Noise belongs to an image, told
# by its index, so that features do not depend on batches. "clean" is the image without noise. `ridge_grid` trains
# a linear classifier for every cell, in closed form. The cell is chosen on validation images and reported on test
# images.

# %%
features = DiffusionFeatures(
    denoiser.backbone,
    denoiser.schedule,
    blocks="auto",
    timesteps=(20, 50, 100, 200, 400),
    pool=2,
    include_clean=True,
)
known = len(train_images)
parts = {"learn": slice(0, known // 2), "choose": slice(known // 2, known), "report": slice(known, None)}
indices = torch.arange(len(images))
maps = {name: features(images[part], indices[part]) for name, part in parts.items()}

learn, choose, report = ((maps[name], labels[part]) for name, part in parts.items())
scored = ridge_grid(*learn, choose, report)
best = scored[0]
print(
    f"best cell: {best.cell}; accuracy {best.accuracy[0]:.1%} on validation and {best.accuracy[1]:.1%} on test images"
)

# %%
blocks, columns = block_names(denoiser.backbone), features.times
table = torch.zeros(len(blocks), len(columns))
for each in scored:  # best penalty first
    place = blocks.index(each.cell.block), columns.index(each.cell.t)
    table[place] = max(table[place], torch.tensor(100 * each.accuracy[0]))

figure, axes = plt.subplots(figsize=(6.5, 4.6), layout="constrained")
drawn = axes.imshow(table, cmap="cividis", aspect="auto")
axes.set_xticks(range(len(columns)), columns)
axes.set_yticks(range(len(blocks)), blocks, fontsize=8)
for y in range(len(blocks)):
    for x in range(len(columns)):
        colour = "white" if table[y, x] < table.mean() else "black"
        axes.text(x, y, f"{table[y, x]:.0f}", ha="center", va="center", fontsize=8, color=colour)
axes.set(xlabel="timestep", ylabel="block, from the input to the output")
figure.colorbar(drawn, label="accuracy on validation images, %")
figure.savefig("diffusion_grid.png")

# %% [markdown]
# ## In your own work
#
# - The first argument may be a U-Net or a DiT of diffusers (`pip install "leaven[diffusion]"`), or ADM's
#   checkpoint.
# - `write_features` computes a data set's features once, `FeatureCache` reads them.
# - `recipes/diffusion_features.py` does all of this; `fit_heads` trains the paper's attention head on a cell.
# - Mukhopadhyay et al., *Diffusion Models Beat GANs on Image Classification*, 2023, is the paper.
