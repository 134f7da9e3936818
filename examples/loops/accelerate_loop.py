# %% [markdown]
# # Callbacks in an accelerate loop
#
# As plain_pytorch.py. Surgery (EvoNorm) must come before `prepare`; all the rest may come before or after it. The
# whole set is one object to register for checkpoints.

# %%
import os

import timm
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from leaven.callbacks import EMA, EvoNorm, TrAct, attach, updates
from leaven.curricula import EfficientTrain

epochs = 2 if os.environ.get("SMOKE") else 20
accelerator = Accelerator(cpu=True)
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
total = updates(loader, epochs, accelerator.gradient_accumulation_steps, accelerator.num_processes)

attached = attach(model, optimizer, EvoNorm(), TrAct(), curriculum, ema, total_steps=total)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
accelerator.register_for_checkpointing(attached)

for _ in range(epochs):
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = torch.nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
accelerator.save_state("checkpoint")

# %%
averaged = ema.module
with torch.no_grad():
    accuracy = (averaged(test[0]).argmax(1) == test[1]).float().mean()
print(f"loss {loss:.5f}, accuracy of the averaged weights {accuracy:.3f}, last size {curriculum.size}")
save_file(accelerator.unwrap_model(model).state_dict(), "accelerate_loop.safetensors")
