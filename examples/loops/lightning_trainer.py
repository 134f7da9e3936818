# %% [markdown]
# # Callbacks in Lightning
#
# As plain_pytorch.py. `AsLightning` is one of Lightning's callbacks; it needs the name of the network that
# `training_step` calls. Needs `pip install "leaven[lightning]"`.

# %%
import os

import lightning.pytorch as pl
import timm
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from leaven.callbacks import EMA, EvoNorm, TrAct
from leaven.callbacks.lightning import AsLightning
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
class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = timm.create_model("resnet10t", num_classes=10)

    def training_step(self, batch, index):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


ema = EMA(decay=0.9)
curriculum = EfficientTrain(image_size=32)
classifier = Classifier()
trainer = pl.Trainer(
    max_epochs=epochs,
    accelerator="cpu",
    logger=False,
    enable_model_summary=False,
    enable_progress_bar=False,
    callbacks=[AsLightning(EvoNorm(), TrAct(), curriculum, ema, model="net")],
)
trainer.fit(classifier, loader)

# %%
averaged = ema.module
with torch.no_grad():
    accuracy = (averaged(test[0]).argmax(1) == test[1]).float().mean()
print(f"accuracy of the averaged weights {accuracy:.3f}, last size {curriculum.size}")
save_file(classifier.net.state_dict(), "lightning_trainer.safetensors")
