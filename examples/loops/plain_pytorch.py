# %% [markdown]
# # Callbacks in a loop of your own
#
# EfficientTrain, TrAct, EvoNorm and EMA on a small network and scikit-learn's digits. The four scripts of this folder
# do the same in four loops. In each of them the callbacks are one statement, and the loop is as it always was. A
# minute on two CPU cores; `SMOKE=1` makes it a few seconds.

# %%
import os

import timm
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from leaven.callbacks import EMA, EvoNorm, TrAct, attach, updates
from leaven.curricula import EfficientTrain

epochs = 2 if os.environ.get("SMOKE") else 20
torch.manual_seed(0)

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
images = torch.nn.functional.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
images, labels = (images - images.mean()) / images.std(), torch.tensor(digits.target)
train, test = torch.utils.data.TensorDataset(images[:1400], labels[:1400]), (images[1400:], labels[1400:])
loader = torch.utils.data.DataLoader(
    train, batch_size=100
)  # not shuffled: the same batches in all four scripts

# %%
model = timm.create_model("resnet10t", num_classes=10)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
ema = EMA(decay=0.9)
curriculum = EfficientTrain(image_size=32)

with attach(model, optimizer, EvoNorm(), TrAct(), curriculum, ema, total_steps=updates(loader, epochs)):
    for _ in range(epochs):
        for x, y in loader:
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

# %%
averaged = ema.module
with torch.no_grad():
    accuracy = (averaged(test[0]).argmax(1) == test[1]).float().mean()
print(f"loss {loss:.5f}, accuracy of the averaged weights {accuracy:.3f}, last size {curriculum.size}")
save_file(model.state_dict(), "plain_pytorch.safetensors")
