# %% [markdown]
# # ScaleKD: a transformer teaches a ResNet
#
# Distillation by logits tells a student what the teacher answers. ScaleKD also tells it what the teacher sees:
# small projectors turn the student's last two maps into tokens, the first of them pass through the teacher's own
# frozen last blocks, and both are compared with the teacher's last map. Any student will do. When training is
# over, projectors and teacher are dropped and the student is a plain network.
#
# Here the teacher is a small ViT that is trained on the spot, on scikit-learn's digits. Digits show that
# everything works, and are no evidence for the method.

# %%
import os

import matplotlib.pyplot as plt
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from leaven.pretext import ScaleKD, Supervised, kshot_indices

smoke = bool(os.environ.get("SMOKE"))  # a short run that only shows that everything works
plt.style.use("seaborn-v0_8-colorblind")
plt.rcParams["figure.dpi"] = 90

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
images = F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
images = (images - images.mean()) / images.std()
labels = torch.tensor(digits.target)
train_images, train_labels = images[:1400], labels[:1400]
test = slice(1400, 1450 if smoke else None)
test_images, test_labels = images[test], labels[test]


@torch.no_grad()
def accuracy(network: torch.nn.Module) -> float:
    right = network.eval()(test_images).argmax(1) == test_labels
    network.train()
    return right.float().mean().item()


# %% [markdown]
# ## The teacher
#
# With your own data you would load a trained ViT, Swin, DINOv2 or the like from timm. Here a ViT of four blocks
# learns all labelled digits. A tenth of its time is warm-up.

# %%
torch.manual_seed(0)
teacher = timm.create_model(
    "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=128, depth=4, num_heads=2,
    class_token=False, global_pool="avg", num_classes=10,
)  # fmt: skip
optimizer = torch.optim.AdamW(teacher.parameters(), weight_decay=0.05)
steps = 4 if smoke else 350
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps, pct_start=0.1)
for _ in range(steps):
    rows = torch.randint(len(train_images), (64,))
    F.cross_entropy(teacher(train_images[rows]), train_labels[rows]).backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
print(f"teacher: {accuracy(teacher):.1%}")

# %% [markdown]
# ## A student, with and without it
#
# One student learns from fifty labelled digits. The other sees all training images, with no label but the
# teacher's guess: a teacher needs no labels. `Supervised` and `ScaleKD` are objectives with the same face. Called
# on images and labels they give a loss, and `backbone` is the network. So one loop serves both.

# %%
few = kshot_indices(train_labels, 5, seed=0)
steps = 4 if smoke else 80


def student() -> torch.nn.Module:
    torch.manual_seed(1)
    return timm.create_model("resnet10t", num_classes=10)


def train(
    objective: torch.nn.Module, pool: torch.Tensor, targets: torch.Tensor
) -> tuple[list[tuple[int, float]], dict[str, list[float]]]:
    """Accuracies by update, and what the loss was made of."""
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(2)
    scores, parts = [], {}
    for step in range(1, steps + 1):
        rows = torch.randint(len(pool), (32,), generator=generator)
        out = objective(pool[rows], targets[rows])
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        for name, value in out.logs.items():
            parts.setdefault(name, []).append(float(value))
        if step % (steps // 4) == 0:
            scores.append((step, accuracy(objective.backbone)))
    return scores, parts


alone, _ = train(Supervised(student()), train_images[few], train_labels[few])

with torch.no_grad():
    guesses = teacher.eval()(train_images).argmax(1)
distil = ScaleKD(student(), teacher, image_size=32)
taught, parts = train(distil, train_images, guesses)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
left.plot(*zip(*alone, strict=True), "-o", markersize=4, label="fifty labels")
left.plot(*zip(*taught, strict=True), "--s", markersize=4, label="ScaleKD, no labels")
left.set(xlabel="update", ylabel="accuracy on test images")
left.legend()
names = {"ce": "guesses", "kd": "logits", "spatial4": "last map", "frequency4": "last map without its mean"}
for (key, name), style in zip(names.items(), ("-", "--", "-.", ":"), strict=True):
    right.plot(parts[key], style, label=name)
right.set(xlabel="update", ylabel="part of the loss", yscale="log")
right.legend(fontsize=8)
for axes in (left, right):
    axes.grid(alpha=0.3)
figure.savefig("scalekd.png")
print(f"fifty labels {alone[-1][1]:.1%}, ScaleKD {taught[-1][1]:.1%}")

# %% [markdown]
# The comparison is of what there is to learn from, not of methods: the teacher has seen all labels, and its
# student all images. The student may well surpass so small a teacher, since a ResNet takes to small images more
# easily.
#
# ## Out comes a plain network
#
# The teacher was never among the parameters, so it is in no checkpoint and no optimizer. `export` writes the
# student alone.

# %%
distil.export("student.safetensors")
plain = timm.create_model("resnet10t", num_classes=10)
plain.load_state_dict(load_file("student.safetensors"))
print(f"loaded into timm: {accuracy(plain):.1%}")

# %% [markdown]
# ## In your own training
#
# - Images come as the student wants them, and are converted for a teacher with another mean, deviation or size.
# - Where images stay as they are from epoch to epoch, `write_targets` computes the teacher's part once and keeps
#   it on disk.
# - `recipes/scalekd.py` does all of it, on one GPU or several.
# - Fan et al., *ScaleKD: Strong Vision Transformers Could Be Excellent Teachers*, NeurIPS 2024, is the paper.
