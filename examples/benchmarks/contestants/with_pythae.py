"""Pythae: its `VAE` and an epoch of its `BaseTrainer`, which is how its users train.

The trainer's `DataLoader` collates images one by one, of floats in memory, in the main process. Progress bars are left
out, and Adam is in one kernel, which the trainer's configuration can ask for.
"""

import tempfile

import torch
from pythae.data.datasets import BaseDataset
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from pythae.trainers.training_callbacks import CallbackHandler, TrainingCallback

from .work import networks


class Encoder(BaseEncoder):
    """Mean and log-variance, by their names in Pythae."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        """What `VAE` asks of an encoder."""
        mean, log_variance = self.network(x).chunk(2, -1)
        return ModelOutput(embedding=mean, log_covariance=log_variance)


class Decoder(BaseDecoder):
    """Probabilities, which Pythae's cross-entropy takes."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, z):
        """What `VAE` asks of a decoder."""
        return ModelOutput(reconstruction=self.network(z).sigmoid())


def trainer(work, x):
    """Epochs of the trainer's `train_step`, which reads the loss back at each step."""
    encoder, decoder = networks(work)
    settings = VAEConfig(input_dim=work.event_shape, latent_dim=work.latent, reconstruction_loss="bce")
    model = VAE(settings, Encoder(encoder), Decoder(decoder))
    config = BaseTrainerConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=work.batch_size,
        learning_rate=1e-3,
        optimizer_params={"fused": True},
        no_cuda=True,
    )
    data = BaseDataset(x.float().div_(255).reshape(-1, *work.event_shape), torch.zeros(len(x)))
    trainer = BaseTrainer(model, data, training_config=config)
    trainer.set_optimizer()
    trainer.callback_handler = CallbackHandler([TrainingCallback()], model)
    return lambda: trainer.train_step(1)
