# %% [markdown]
# # A curriculum of frequencies
#
# EfficientTrain begins with small images and ends with whole ones. Small images cost less, so the run gets
# shorter. How images are made small matters to it: the Fourier crop keeps all low frequencies exactly as they are
# and drops the rest.
#
# This notebook shows what the crop keeps, draws the schedule and trains with it.

# %%
import os

import matplotlib.pyplot as plt
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images

from leaven.callbacks import attach
from leaven.curricula import ET, ET_PP, EfficientTrain, fourier_crop, resize

smoke = bool(os.environ.get("SMOKE"))  # a short run that only shows that everything works
plt.style.use("seaborn-v0_8-colorblind")
plt.rcParams["figure.dpi"] = 75

# %% [markdown]
# ## What the crop keeps
#
# A photo of 224x224 pixels, made small in three ways. The spectrum below each picture is of the picture above,
# drawn on the axes of the original: 0 in the middle, high frequencies outside. (Photo: china.jpg by
# danielbuechele, CC BY 2.0, as it comes with scikit-learn.)

# %%
photo = torch.tensor(load_sample_images().images[0]).permute(2, 0, 1) / 255
photo = F.interpolate(photo[None, :, :, 107:534], size=(224, 224), mode="bicubic", antialias=True)
photo = photo.clamp(0, 1)

small = {
    "Fourier crop": fourier_crop(photo, 96),
    "bilinear, antialiased": resize(photo, 96, "bilinear"),
    "bilinear, plain": F.interpolate(photo, size=(96, 96), mode="bilinear"),
}


def spectrum(image: torch.Tensor) -> torch.Tensor:
    """Amplitudes of the grey image, zero frequency in the middle; independent of the number of pixels."""
    return torch.fft.fftshift(torch.fft.fft2(image[0].mean(0), norm="forward").abs())


figure, grid = plt.subplots(2, 4, figsize=(8.6, 4.2), layout="constrained")
for axes, (name, image) in zip(grid.T, {"original": photo, **small}.items(), strict=True):
    side = image.shape[-1]
    axes[0].imshow(image[0].permute(1, 2, 0).clamp(0, 1))
    axes[0].set_title(f"{name}\n{side}x{side}", fontsize=10)
    axes[0].axis("off")
    edges = (-side / 2, side / 2, -side / 2, side / 2)
    drawn = axes[1].imshow(spectrum(image).log10(), extent=edges, vmin=-5, vmax=-1.5, cmap="cividis")
    axes[1].set(xlim=(-112, 112), ylim=(-112, 112), xticks=(-112, -48, 0, 48, 112), yticks=())
    axes[1].set_facecolor("white")
grid[1, 0].set_ylabel("spectrum")
figure.supxlabel("cycles per image", fontsize=10)
figure.colorbar(drawn, ax=grid[1, :], label="log10 of the amplitude", shrink=0.9)
figure.savefig("fourier_crop.png")

# %% [markdown]
# The pictures look alike, and the difference is in the spectra. Divide each by the original's, ring by ring.
#
# The Fourier crop is at 1 up to the border of its square: nothing that fits is changed. An antialiased resize
# dampens the upper half of what it could keep. A plain resize lets high frequencies fold back into low ones,
# where the network takes them for content.

# %%
frequency = torch.arange(96) - 48
ring = (frequency[:, None].square() + frequency.square()).sqrt().round().long().flatten()


def by_ring(amplitudes: torch.Tensor) -> torch.Tensor:
    """Sums of squares over rings of radius 0 to 47."""
    return torch.zeros(96).index_add(0, ring, amplitudes.square().flatten())[:48]


original = by_ring(spectrum(photo)[64:160, 64:160])
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
for (name, image), line in zip(small.items(), ("-", "--", ":"), strict=True):
    axes.plot((by_ring(spectrum(image)) / original).sqrt(), line, linewidth=2, label=name)
axes.set(xlabel="cycles per image", ylabel="amplitude over the original's", ylim=(0, None))
axes.grid(alpha=0.3)
axes.legend()
figure.savefig("frequency_response.png")

# %% [markdown]
# ## The schedule
#
# `ET` is EfficientTrain's, `ET_PP` that of EfficientTrain++; both are made for 224 pixels and scaled to other
# sizes. The first counts updates. The second counts computation, so that its small images last longer.
# Augmentation grows with the images. A schedule is a pure function of progress: a run resumes in the middle of it
# without further state.

# %%
progress = torch.linspace(0, 1, 500)
figure, (upper, lower) = plt.subplots(2, 1, figsize=(6, 4), sharex=True, layout="constrained")
for (name, schedule), line in zip({"ET": ET, "ET_PP": ET_PP}.items(), ("-", "--"), strict=True):
    label = f"{name}: {schedule.speedup():.2f} times less computation"
    upper.plot(progress, [schedule.at(float(t)).size for t in progress], line, linewidth=2, label=label)
    lower.plot(progress, [schedule.strength(float(t)) for t in progress], line, linewidth=2)
upper.set(ylabel="image side in pixels", ylim=(0, 240))
lower.set(xlabel="share of the updates", ylabel="strength of\naugmentation", ylim=(-0.05, 1.05))
upper.legend(loc="lower right")
for axes in (upper, lower):
    axes.grid(alpha=0.3)
figure.savefig("schedule.png")

# %% [markdown]
# "Less computation" takes an image to cost its area. Small images cost more than that on most machines, so
# measure before you promise: `schedule.speedup(cost)` takes your own measured cost of an image of each size.
#
# ## A short training
#
# One more callback on one line. In training mode the network sees small images first; in eval mode it sees whole
# ones. The data are scikit-learn's digits at 32 pixels. They show that it works; they are no evidence for the
# method.

# %%
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
images = F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
images = (images - images.mean()) / images.std()
labels = torch.tensor(digits.target)
test = slice(1400, 1450 if smoke else None)
test_images, test_labels = images[test], labels[test]
steps = 4 if smoke else 160


def train(*callbacks: EfficientTrain) -> list[tuple[int, float]]:
    """Accuracy on the test images by update."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    found = []
    with attach(model, optimizer, *callbacks, total_steps=steps):
        for step in range(1, steps + 1):
            rows = torch.randint(1400, (64,))
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % (steps // 4) == 0:
                with torch.no_grad():
                    right = model.eval()(test_images).argmax(1) == test_labels
                found.append((step, right.float().mean().item()))
                model.train()
    return found


curriculum = EfficientTrain(ET, image_size=32, multiple=8)
print(curriculum, f"{curriculum.speedup():.2f} times less computation")
whole, grown = train(), train(curriculum)

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(*zip(*whole, strict=True), "-o", markersize=4, label="whole images")
axes.plot(*zip(*grown, strict=True), "--s", markersize=4, label="EfficientTrain")
axes.set(xlabel="update", ylabel="accuracy on whole test images", ylim=(0, 1))
axes.grid(alpha=0.3)
axes.legend()
figure.savefig("curriculum.png")
print(f"at the end: whole images {whole[-1][1]:.1%}, EfficientTrain {grown[-1][1]:.1%}")

# %% [markdown]
# While it trains on small images, it is behind on whole ones, which it has not seen yet. The last fifth of the
# updates is at full size and closes most of the gap.
#
# In a recipe it is `--callbacks efficienttrain`; `recipes/schedule_search.py` looks for the sizes that suit your
# own data and network. Wang et al., *EfficientTrain*, ICCV 2023, and *EfficientTrain++*, TPAMI 2024, are the
# papers.
