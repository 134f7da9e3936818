# %% [markdown]
# # TrAct: a first layer that learns faster
#
# The gradient of a weight is a sum of inputs. In a first layer the inputs are pixels, and neighbouring pixels are
# nearly the same. So most of the gradient goes into what all patches share, and little into edges and colours.
# TrAct multiplies the gradient of the first layer by (C + lam I)^-1, where C is the second moment of the patches.
# What varies little in the images is then learnt as fast as what varies much. The forward pass, the other layers
# and the file with the weights stay as they are.

# %%
import os

import matplotlib.pyplot as plt
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images

from leaven.callbacks import TrAct, attach, patch_second_moment
from leaven.pretext import RotNet

smoke = bool(os.environ.get("SMOKE"))  # a short run that only shows that everything works
plt.style.use("seaborn-v0_8-colorblind")
plt.rcParams["figure.dpi"] = 90

# %% [markdown]
# ## Something to learn without labels
#
# Crops of the two photos that come with scikit-learn (china.jpg by danielbuechele, flower.jpg by vultilion, both
# CC BY 2.0), each turned by a quarter, a half, three quarters or not at all. The network tells which: this is
# RotNet. Two photos are enough to look at a first layer, and are no evidence for the method.

# %%
photos = [torch.tensor(photo).permute(2, 0, 1) / 255 for photo in load_sample_images().images]
mean = torch.stack([photo.mean((1, 2)) for photo in photos]).mean(0).view(3, 1, 1)
std = torch.stack([photo.std((1, 2)) for photo in photos]).mean(0).view(3, 1, 1)
photos = [(photo - mean) / std for photo in photos]


def crops(count: int, generator: torch.Generator, side: int = 48) -> torch.Tensor:
    """Square crops (B, 3, side, side) at random places of both photos."""
    found = []
    for number in range(count):
        photo = photos[number % 2]
        top = torch.randint(photo.shape[1] - side, (), generator=generator)
        left = torch.randint(photo.shape[2] - side, (), generator=generator)
        found.append(photo[:, top : top + side, left : left + side])
    return torch.stack(found)


# %% [markdown]
# ## What the first layer sees
#
# The network is a thin ResNet whose first layer has filters of 7x7 pixels. C, the second moment of its patches,
# has 147 directions. A few of them have nearly all of the variance.


# %%
def fresh() -> RotNet:
    torch.manual_seed(0)
    return RotNet(timm.create_model("resnet10t", num_classes=0, stem_type="", channels=(32, 64, 64, 64)))


conv = fresh().backbone.conv1
total, count = patch_second_moment(crops(64, torch.Generator().manual_seed(0)), conv)
values = torch.linalg.eigvalsh((total / count)[0]).flip(0)

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(range(1, len(values) + 1), values, linewidth=2, label="variance of the patches")
axes.plot(
    range(1, len(values) + 1),
    values / (values + 0.1),
    "--",
    linewidth=2,
    label="the same under TrAct, lam = 0.1",
)
axes.set(xlabel="direction", ylabel="variance", yscale="log")
axes.grid(alpha=0.3)
axes.legend()
figure.savefig("patches.png")

# %% [markdown]
# ## Training, with and without
#
# The two runs share weights, crops and learning rate. The callback is the only difference.

# %%
steps = 4 if smoke else 150


def train(*callbacks: TrAct) -> tuple[torch.Tensor, list[float]]:
    """The first layer's filters and the losses."""
    rotnet, losses = fresh(), []
    optimizer = torch.optim.SGD(rotnet.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(1)
    with attach(rotnet, optimizer, *callbacks, total_steps=steps):
        for _ in range(steps):
            loss = rotnet(crops(24, generator)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
    return rotnet.backbone.conv1.weight.detach(), losses


start = fresh().backbone.conv1.weight.detach()
without, losses_without = train()
tract, losses_tract = train(TrAct())

# %%
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for losses, style, name in ((losses_without, "-", "without"), (losses_tract, "--", "TrAct")):
    smooth = torch.tensor(losses).unfold(0, max(1, steps // 10), 1).mean(1)
    axes.plot(range(steps - len(smooth) + 1, steps + 1), smooth, style, linewidth=2, label=name)
axes.set(xlabel="update", ylabel=f"loss, mean of {max(1, steps // 10)} updates")
axes.grid(alpha=0.3)
axes.legend()
figure.savefig("tract_loss.png")

# %% [markdown]
# One learning rate for both, not tuned for either. `benchmarks/tract.py` is the fair comparison, on real images.
#
# ## The filters
#
# After so few updates a filter is still mostly the noise it began with. So look at what the updates have added to
# it, for 24 of the filters. Without TrAct it is smooth: mean colours and slow changes, which is where the patches
# vary most. With TrAct the fine directions have been learnt too.


# %%
def tiled(filters: torch.Tensor) -> torch.Tensor:
    """The first 24 filters (N, 3, 7, 7) as a picture of four rows, each filter at its own contrast."""
    filters = filters[:24]
    scaled = 0.5 + 0.5 * filters / filters.abs().amax((1, 2, 3), keepdim=True)
    framed = F.pad(scaled, (1, 1, 1, 1), value=1.0).unflatten(0, (4, 6))
    return framed.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)


figure, grid = plt.subplots(1, 2, figsize=(7.5, 2.8), layout="constrained")
for axes, (name, filters) in zip(grid, {"without": without, "TrAct": tract}.items(), strict=True):
    axes.imshow(tiled(filters - start))
    axes.set_title(f"added to the filters, {name}", fontsize=10)
    axes.axis("off")
    moved = (filters - start).norm() / start.norm()
    print(f"{name:>7}: the first layer moved by {moved:.2f} of its length")
figure.savefig("filters.png")

# %% [markdown]
# ## In your own training
#
# - `attach(model, optimizer, TrAct(), total_steps=...)` finds the first layer by following an image through the
#   model. `TrAct(layers=["patch_embed.proj"])` names it.
# - Images must be normalised to mean 0 and standard deviation 1: `lam` is in units of their variance. The paper
#   takes 0.1, 0.05 for short and 0.2 for long runs.
# - Only a gradient changes. The optimizer, mixed precision, DDP and the exported file know nothing of it.
# - Petersen et al., *TrAct: Making First-layer Pre-Activations Trainable*, NeurIPS 2024, is the paper.
