# %% [markdown]
# # Callbacks in a loop of your own
#
# You have a training loop and want to keep it. `attach` binds callbacks to the hooks that every loop calls
# already: the model's forward pass, its gradients, the optimizer's step. Nothing else changes, be it plain
# PyTorch as here, accelerate, Lightning or HF Trainer (`examples/loops` has one script for each).
#
# The data are scikit-learn's handwritten digits. They show that everything works, and are no evidence that it
# helps.

# %%
import os

import matplotlib.pyplot as plt
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from leaven.callbacks import EMA, Callback, KNNProbe, TrAct, attach, updates
from leaven.curricula import EfficientTrain

smoke = bool(os.environ.get("SMOKE"))  # a short run that only shows that everything works
plt.style.use("seaborn-v0_8-colorblind")
plt.rcParams["figure.dpi"] = 90

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
images = F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
images = (images - images.mean()) / images.std()
labels = torch.tensor(digits.target)
n_train = 100 if smoke else 1400
train_images, train_labels = images[:n_train], labels[:n_train]
test = slice(1400, 1450 if smoke else None)
test_images, test_labels = images[test], labels[test]

# %% [markdown]
# ## The loop
#
# This is an ordinary loop. The only new thing is the `with` line, which takes the callbacks off again at the end.
#
# - `EMA` keeps averaged weights beside the model.
# - `KNNProbe` tells every few updates how well nearest neighbours classify the test images by the backbone's
#   features.
# - `TrAct` makes the first layer learn faster, by its gradient alone.
# - `EfficientTrain` shows the network small images with low frequencies first, and whole images at the end.
#
# `updates` counts the optimizer's updates. Everything that is scheduled follows from this number.

# %%
epochs = 2 if smoke else 5
loader = DataLoader(
    TensorDataset(train_images, train_labels),
    batch_size=100,
    shuffle=True,
    generator=torch.Generator().manual_seed(0),
)

torch.manual_seed(0)
model = timm.create_model("resnet10t", num_classes=10)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
ema = EMA(decay=0.9)
every = 1 if smoke else 7
probe = KNNProbe(train=(train_images, train_labels), test=(test_images, test_labels), every=every)
curriculum = EfficientTrain(image_size=32)

with attach(
    model, optimizer, ema, probe, TrAct(), curriculum, total_steps=updates(loader, epochs)
) as attached:
    print(attached)
    for epoch in range(epochs):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        logs = {"loss": loss.item(), **attached.logs()}
        print(f"epoch {epoch + 1}:", ", ".join(f"{name} {value:.3g}" for name, value in logs.items()))

# %% [markdown]
# Afterwards the callbacks still have what they found: the averaged network is an ordinary module in eval mode.


# %%
@torch.no_grad()
def accuracy(network: torch.nn.Module) -> float:
    return (network.eval()(test_images).argmax(1) == test_labels).float().mean().item()


print(f"accuracy {accuracy(model):.1%}, of the averaged weights {accuracy(ema.module):.1%}")

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(*zip(*probe.history, strict=True), marker="o", markersize=4)
axes.set(xlabel="update", ylabel="kNN accuracy")
axes.grid(alpha=0.3)
figure.savefig("knn_probe.png")

# %% [markdown]
# ## A callback of your own
#
# Subclass `Callback`. `setup` is called once and may register hooks; what it returns is undone at the end.
# `update` is called after every applied update: a step that a gradient scaler skipped does not count, nor does a
# micro-batch of gradient accumulation.


# %%
class GradientNorm(Callback):
    """Keeps the norm of the gradient of every update."""

    order = 85  # observers come after everything that changes gradients

    def setup(self, model, optimizers, progress):
        self.model, self.history = model, []
        return ()

    def update(self):
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.history.append(torch.nn.utils.get_total_norm(gradients).item())


# %% [markdown]
# ## Stop and resume
#
# `attached` has one `state_dict` for all callbacks and the count of updates. It goes into the checkpoint beside
# model and optimizer. The shuffling is keyed by the epoch here, so that a resumed run sees the same batches.


# %%
def train(first: int, last: int, checkpoint: dict | None = None) -> tuple[dict, list[float]]:
    """Epochs `first` to `last` of a run of `epochs`: the checkpoint at the end, and the norms of the gradients."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    norms, curriculum = GradientNorm(), EfficientTrain(image_size=32)
    total = updates(loader, epochs)
    with attach(model, optimizer, EMA(decay=0.9), TrAct(), curriculum, norms, total_steps=total) as attached:
        parts = {"model": model, "optimizer": optimizer, "attached": attached}
        if checkpoint is not None:
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
        for epoch in range(first, last):
            loader.generator.manual_seed(epoch)
            for x, y in loader:
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        return {name: part.state_dict() for name, part in parts.items()}, norms.history


half, first_norms = train(0, epochs // 2)
torch.save(half, "checkpoint.pt")
resumed, more_norms = train(epochs // 2, epochs, torch.load("checkpoint.pt"))
whole, norms = train(0, epochs)

same = all(torch.equal(whole["model"][key], resumed["model"][key]) for key in whole["model"])
print(f"resumed weights are those of the uninterrupted run, bit for bit: {same}")

# %%
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(norms, linewidth=4, alpha=0.3, label="uninterrupted")
axes.plot(first_norms + more_norms, linewidth=1, color="black", label="stopped and resumed")
axes.axvline(len(first_norms), color="grey", linestyle="dotted", label="stop")
axes.set(xlabel="update", ylabel="norm of the gradient", yscale="log")
axes.legend()
figure.savefig("gradient_norm.png")

# %% [markdown]
# The two curves lie on each other. Where they jump, the images have just grown from 16 to 32 pixels.
#
# ## Good to know
#
# - Two callbacks that want the same thing, such as the first layer's gradient, are refused when they are
#   attached.
# - A callback that finds nothing to act on says so in a warning.
# - Call the model itself: hooks run on `model(x)`, not on `model.forward(x)`.
# - With accelerate, `accelerator.register_for_checkpointing(attached)` does what the checkpoint did here.
