# %% [markdown]
# # Callbacks in Hugging Face's Trainer
#
# As plain_pytorch.py. `AsTrainerCallback` is one of the Trainer's callbacks; `model=` names the part of the model
# that the callbacks are for. Needs `pip install "leaven[hf]"`.

# %%
import os

import timm
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn
from transformers import Trainer, TrainingArguments

from leaven.callbacks import EMA, EvoNorm, TrAct
from leaven.callbacks.hf import AsTrainerCallback
from leaven.curricula import EfficientTrain

epochs = 2 if os.environ.get("SMOKE") else 20
torch.manual_seed(0)

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
images = torch.nn.functional.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
images, labels = (images - images.mean()) / images.std(), torch.tensor(digits.target)
train = [{"pixel_values": x, "labels": y} for x, y in zip(images[:1400], labels[:1400], strict=True)]
test = (images[1400:], labels[1400:])


# %%
class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = timm.create_model("resnet10t", num_classes=10)

    def forward(self, pixel_values, labels=None):
        logits = self.net(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


model = Classifier()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
ema = EMA(decay=0.9)
curriculum = EfficientTrain(image_size=32)
arguments = TrainingArguments(
    output_dir="hf_trainer",
    num_train_epochs=epochs,
    per_device_train_batch_size=100,
    train_sampling_strategy="sequential",  # the same batches in all four scripts
    max_grad_norm=0,
    lr_scheduler_type="constant",
    use_cpu=True,
    report_to="none",
    disable_tqdm=True,
    save_strategy="no",
)
callbacks = [AsTrainerCallback(EvoNorm(), TrAct(), curriculum, ema, model="net")]
Trainer(model, arguments, train_dataset=train, optimizers=(optimizer, None), callbacks=callbacks).train()

# %%
averaged = ema.module
with torch.no_grad():
    accuracy = (averaged(test[0]).argmax(1) == test[1]).float().mean()
print(f"accuracy of the averaged weights {accuracy:.3f}, last size {curriculum.size}")
save_file(model.net.state_dict(), "hf_trainer.safetensors")
