# %% [markdown]
# # Deep kernel machines
#
# Make a Bayesian network infinitely wide, and it becomes a Gaussian process: it says how sure it is, and it no
# longer learns features. A deep kernel machine is a limit in which it still does. Its layers are Gram matrices
# over a few inducing points, and each is learnt. nu says how strongly it is held to that of the infinitely wide
# network: nu = infinity is the Gaussian process.

# %%
import math
import os

import matplotlib.pyplot as plt
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from leaven.bayes import Calibration, DeepKernelMachine, DKMHead, calibration
from leaven.bayes.deep_kernel_machine import fit

smoke = bool(os.environ.get("SMOKE"))  # a short run that only shows that everything works
plt.style.use("seaborn-v0_8-colorblind")
plt.rcParams["figure.dpi"] = 90

# %% [markdown]
# ## One dimension: bands and nu
#
# A function that waves slowly on the left and jumps on the right, with a gap in the data. No single lengthscale
# suits both halves.

# %%
generator = torch.Generator().manual_seed(0)
x = torch.cat([torch.linspace(-2, -0.2, 45), torch.linspace(0.4, 2, 45)]).unsqueeze(1)
clean = torch.where(x < 0.3, torch.sin(3 * x), torch.where(x < 1.2, -1.0, 1.0))
y = clean + 0.1 * torch.randn(x.shape, generator=generator)
grid = torch.linspace(-2.5, 2.5, 201).unsqueeze(1)

bands = {}
for nu in (0.1, 10.0, math.inf):
    torch.manual_seed(0)
    machine = DeepKernelMachine(1, 1, depth=3, n_inducing=40, nu=nu)
    fit(machine, x, y, steps=5 if smoke else 600, lr=0.02)
    with torch.no_grad():
        bands[nu] = machine(grid), machine.expected_log_prob(machine(x), y).mean().item()

# %%
figure, panels = plt.subplots(1, 3, figsize=(9, 3), sharey=True, layout="constrained")
for axes, (nu, (prediction, fitted)) in zip(panels, bands.items(), strict=True):
    mean = prediction.mean[:, 0]
    spread = 2 * (prediction.variance[:, 0] + prediction.noise).sqrt()
    axes.fill_between(grid[:, 0], mean - spread, mean + spread, alpha=0.3, label="two standard deviations")
    axes.plot(grid, mean, label="mean")
    axes.plot(x, y, ".", color="black", markersize=3, label="data")
    axes.set_title("nu = infinity" if math.isinf(nu) else f"nu = {nu:g}", fontsize=10)
    axes.set(xlabel="x", ylim=(-3, 3))
    axes.grid(alpha=0.3)
    print(f"nu = {nu:g}: log likelihood of the training points {fitted:.2f} nats each")
panels[0].set_ylabel("y")
panels[0].legend(fontsize=7, loc="upper left")
figure.savefig("bands.png")

# %% [markdown]
# A small nu fits closer. Whether closer is better only held-out data can tell: `recipes/dkm.py --nu 1,100,inf`
# chooses it there.
#
# ## A head on a backbone
#
# `DKMHead` takes the place of a classifier. Here the images are scikit-learn's digits under heavy noise, so that
# there is something to be unsure about. First a small ResNet is trained in the ordinary way.

# %%
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
images = F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
images = (images - images.mean()) / images.std()
images = images + 2.5 * torch.randn(images.shape, generator=generator)
labels = torch.tensor(digits.target)
train_images, train_labels = images[:800], labels[:800]
test = slice(800, 900 if smoke else None)
test_images, test_labels = images[test], labels[test]

torch.manual_seed(0)
backbone = timm.create_model("resnet10t", num_classes=10, channels=(32, 64, 128, 256))
optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-3, weight_decay=0.05)
for _ in range(2 if smoke else 250):
    rows = torch.randint(len(train_images), (64,))
    F.cross_entropy(backbone(train_images[rows]), train_labels[rows]).backward()
    optimizer.step()
    optimizer.zero_grad()

# %% [markdown]
# Then its features are frozen, and the head is trained on them. The features have already fitted these images. So
# the images for the head are others, as they should be: of those kept apart, half are for the head and half to
# judge.

# %%
half = len(test_images) // 2
head_images, head_labels = test_images[:half], test_labels[:half]
judged_images, judged_labels = test_images[half:], test_labels[half:]

head = DKMHead(backbone, 10, n_data=half, n_inducing=20 if smoke else 60)
head.init_inducing(head_images.split(64))
optimizer = torch.optim.Adam(head.param_groups(lr=0.03))
for _ in range(2 if smoke else 400):
    rows = torch.randint(half, (64,))
    head(head_images[rows], head_labels[rows]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

# %% [markdown]
# ## Does it know how sure it is?
#
# Of all images about which a classifier is 80 % sure, it should be right on 80 %. The diagram shows how often it
# is. Below the diagonal it is too sure of itself, above it not sure enough.

# %%
with torch.no_grad():
    softmax = backbone.eval()(judged_images).softmax(1)
    machine = head.eval().predict(judged_images).probs()
scores = {
    "softmax": calibration(softmax, judged_labels, bins=8),
    "deep kernel machine": calibration(machine, judged_labels, bins=8),
}
for name, score in scores.items():
    print(f"{name}: {score}")


# %%
def reliability(axes: plt.Axes, score: Calibration, **style: str) -> None:
    """Accuracy over confidence; the larger a point, the more images it stands for."""
    bins = [each for each in score.bins if each.images]
    confidence, accuracy = [each.confidence for each in bins], [each.accuracy for each in bins]
    axes.plot(confidence, accuracy, **style)
    axes.scatter(confidence, accuracy, [2 + 300 * each.images / score.images for each in bins], alpha=0.5)


figure, axes = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
axes.plot([0, 1], [0, 1], color="grey", linestyle="dotted")
for (name, score), line in zip(scores.items(), ("-", "--"), strict=True):
    reliability(axes, score, label=f"{name}, ECE {score.ece:.3f}", linestyle=line)
axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.03))
axes.grid(alpha=0.3)
axes.legend(loc="upper left", fontsize=8)
figure.savefig("reliability.png")

# %% [markdown]
# The comparison is not a fair one: the head has seen images that the classifier has not. And digits under noise
# are no evidence. `benchmarks/dkm_head.py` compares heads on the same images.
#
# ## In your own work
#
# - `DKMHead("resnet50", classes, n_data=...)` takes any backbone; `freeze=False` trains it too, and wants
#   measuring.
# - `recipes/dkm.py` runs tables and images, with splits and seeds, and chooses nu.
# - Yang et al., *A theory of representation learning gives a deep generalisation of kernel methods*, ICML 2023,
#   is the paper.
