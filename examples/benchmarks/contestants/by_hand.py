"""The textbook's loop in PyTorch, with data in memory and Adam in one kernel; and its matrix products alone."""

import math
from statistics import fmean

import torch
from torch.nn import functional as F

from .work import batches, networks


def trainer(work, x):
    """Epochs whose loss is read back at each step. With one particle the KL divergence is the closed form."""
    encoder, decoder = networks(work)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3, fused=True)
    loss_of = elbo if work.particles == 1 else importance_weighted

    def step(batch):
        loss = loss_of(encoder, decoder, batch, work.particles)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return lambda: fmean(map(step, batches(x, work.batch_size)))


def elbo(encoder, decoder, x, _):
    mean, log_variance = encoder(x).chunk(2, -1)
    z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
    distortion = F.binary_cross_entropy_with_logits(decoder(z), x, reduction="sum")
    rate = -0.5 * torch.sum(1 + log_variance - mean**2 - log_variance.exp())
    return (distortion + rate) / len(x)


def importance_weighted(encoder, decoder, x, particles):
    return -(log_weights(decoder, *encoder(x).chunk(2, -1), x, particles).logsumexp(0) - math.log(particles)).mean()


def log_weights(decoder, mean, log_variance, x, particles):
    """log p(x, z) - log q(z given x), of shape `(particles, len(x))`."""
    noise = torch.randn(particles, *mean.shape)
    z = mean + noise * torch.exp(0.5 * log_variance)
    logits = decoder(z)
    log_likelihood = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
    return log_likelihood + 0.5 * (noise**2 - z**2 + log_variance).sum(-1)  # the normals' constants cancel


def log_likelihood(work, x, particles, at_once=50, batch_size=20):
    """A function that gives the mean log-likelihood of `x`, by chunks of particles and of images."""
    encoder, decoder = networks(work)

    @torch.inference_mode()
    def evaluate():
        parts = []
        for batch in x.split(batch_size):
            batch = batch.float().div_(255)
            moments = encoder(batch).chunk(2, -1)
            chunks = [min(at_once, particles - first) for first in range(0, particles, at_once)]
            sums = [log_weights(decoder, *moments, batch, chunk).logsumexp(0) for chunk in chunks]
            parts.append(torch.stack(sums).logsumexp(0) - math.log(particles))
        return torch.cat(parts).mean().item()

    return evaluate


def products(work, x):
    """What no loop can do without: the matrix products of an epoch, forward and backward, on the same operands."""
    rows = work.batch_size
    layers = [layer.weight.detach() for network in networks(work) for layer in network if hasattr(layer, "weight")]
    inputs = [torch.rand(rows, weight.shape[1]) for weight in layers]
    outputs = [torch.rand(rows, weight.shape[0]) for weight in layers]
    gradients = [torch.empty_like(weight) for weight in layers]

    def epoch():
        for _ in range(len(x) // rows):
            for index, weight in enumerate(layers):
                torch.mm(inputs[index], weight.T, out=outputs[index])
                torch.mm(outputs[index].T, inputs[index], out=gradients[index])
                if index > 0:  # nobody asks for the gradient of the images
                    torch.mm(outputs[index], weight, out=inputs[index])
        return math.nan

    return epoch
