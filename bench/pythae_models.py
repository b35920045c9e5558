"The same networks in pythae's models, with the same weights: what people use instead."

import contextlib
import io
import logging

import torch
from pythae.data.datasets import BaseDataset
from pythae.models import VAE, VAMP, VAEConfig, VAMPConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from torch import nn

logging.getLogger("pythae").setLevel(logging.ERROR)


class Encoder(BaseEncoder):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        mu, logvar = self.net(x.flatten(1)).chunk(2, -1)
        return ModelOutput(embedding=mu, log_covariance=logvar)


class Decoder(BaseDecoder):
    def __init__(self, net, x_shape):
        super().__init__()
        self.net, self.x_shape = nn.Sequential(net, nn.Sigmoid()), x_shape

    def forward(self, z):
        return ModelOutput(reconstruction=self.net(z).unflatten(1, self.x_shape))


def like(model, x_shape):
    "pythae's VAE, or VAMP, with the networks of one of ours."
    K = len(model.prior.pseudo_inputs) if hasattr(model.prior, "pseudo_inputs") else None
    of, config = (VAMP, VAMPConfig) if K else (VAE, VAEConfig)
    c = config(
        input_dim=x_shape,
        latent_dim=model.prior().mu.shape[1],
        reconstruction_loss="bce",
        **(dict(number_components=K) if K else {}),
    )
    other = of(c, Encoder(model.encoder.net), Decoder(model.decoder.net, x_shape))
    if K:
        linear = next(m for m in other.pseudo_inputs.modules() if isinstance(m, nn.Linear))
        with torch.no_grad():
            linear.weight.copy_(model.prior.pseudo_inputs.flatten(1).T)
            linear.bias.zero_()
    return other


def trainer(model, x, folder, batch_size=100, lr=5e-4):
    "pythae's trainer of a model, ready for its train_step: one epoch."
    with contextlib.redirect_stdout(io.StringIO()):
        t = BaseTrainer(
            model,
            BaseDataset(x, torch.zeros(len(x))),
            training_config=BaseTrainerConfig(
                output_dir=folder, per_device_train_batch_size=batch_size, learning_rate=lr, no_cuda=True
            ),
        )
        t.prepare_training()
        t.callback_handler.callbacks.clear()  # no progress bars
    return t
