"""NumPyro's `SVI` with an epoch as one jitted `fori_loop`: data on the device, batches gathered in the loop.

The networks are those of `jax.example_libraries.stax`, as in NumPyro's own VAE example, and start as PyTorch's do. The
loss is read back once an epoch.
"""

import math
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.example_libraries import stax
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO

LAYOUT = ("NHWC", "HWIO", "NHWC")


def uniform(fan_in):
    """What PyTorch starts weights and biases with."""
    return lambda key, shape: jax.random.uniform(key, shape, minval=-(fan_in**-0.5), maxval=fan_in**-0.5)


def dense(fan_in, width):
    return stax.Dense(width, W_init=uniform(fan_in), b_init=uniform(fan_in))


def networks(work):
    """Encoder and decoder as pairs of functions."""
    return _convolutional(work) if work.convolutional else _perceptrons(work)


def _perceptrons(work):
    activation = {"ReLU": stax.Relu, "Tanh": stax.Tanh}[work.activation]

    def perceptron(*widths):
        layers = [dense(widths[0], widths[1])]
        for width, following in pairwise(widths[1:]):
            layers += [activation, dense(width, following)]
        return stax.serial(*layers)

    pixels = math.prod(work.event_shape)
    return perceptron(pixels, *work.hidden, 2 * work.latent), perceptron(work.latent, *work.hidden[::-1], pixels)


def _convolutional(work):
    def options(fan_in):
        return {"strides": (2, 2), "padding": "SAME", "W_init": uniform(fan_in), "b_init": uniform(fan_in)}

    down, up, channels = [], [], (1, *work.hidden)
    for fewer, more in pairwise(channels):
        down += [stax.GeneralConv(LAYOUT, more, (4, 4), **options(16 * fewer)), stax.Relu]
        up = [stax.Relu, stax.GeneralConvTranspose(LAYOUT, fewer, (4, 4), **options(16 * fewer)), *up]
    side = math.isqrt(work.features // work.hidden[-1])
    shaped = (
        lambda key, shape: ((*shape[:-1], side, side, work.hidden[-1]), ()),
        lambda params, inputs, **_: inputs.reshape(*inputs.shape[:-1], side, side, work.hidden[-1]),
    )
    encoder = stax.serial(*down, stax.Flatten, dense(work.features, 2 * work.latent))
    return encoder, stax.serial(dense(work.latent, work.features), up[0], shaped, *up[1:])


def programs(work):
    """Model and guide."""
    encoder, decoder = networks(work)
    shape = (work.batch_size, *((28, 28, 1) if work.convolutional else work.event_shape))

    def model(x):
        decode = numpyro.module("decoder", decoder, (work.batch_size, work.latent))
        with numpyro.plate("data", work.batch_size):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([work.latent]).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(len(shape) - 1), obs=x)

    def guide(x):
        encode = numpyro.module("encoder", encoder, shape)
        with numpyro.plate("data", work.batch_size):
            mean, log_variance = jnp.split(encode(x), 2, -1)
            numpyro.sample("z", dist.Normal(mean, jnp.exp(0.5 * log_variance)).to_event(1))

    return model, guide, shape


def trainer(work, x):
    """Epochs that are one call each; with convolutions, a call a step."""
    model, guide, shape = programs(work)
    loss = Trace_ELBO() if work.particles == 1 else RenyiELBO(alpha=0, num_particles=work.particles)
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), loss)
    x = jnp.asarray(x.numpy()).reshape(-1, *shape[1:])
    state = svi.init(jax.random.key(0), jnp.zeros(shape))
    epoch = (_by_steps if work.convolutional else _in_one)(svi, work.batch_size)
    key = jax.random.key(1)

    def run():
        nonlocal state, key
        key, order = jax.random.split(key)
        state, total = epoch(state, order, x)
        return float(total) / len(x)

    return run


def _update(svi, state, x, rows):
    return svi.update(state, x[rows] / jnp.float32(255))


def _in_one(svi, batch_size):
    def epoch(state, key, x):
        rows = jax.random.permutation(key, len(x)).reshape(-1, batch_size)

        def step(index, carry):
            state, loss = _update(svi, carry[0], x, rows[index])
            return state, carry[1] + loss

        return jax.lax.fori_loop(0, len(rows), step, (state, 0.0))

    return jax.jit(epoch, donate_argnums=0)


def _by_steps(svi, batch_size):
    """XLA's convolutions take nine times as long within a loop, on a CPU; so the loop is Python's."""
    update = jax.jit(partial(_update, svi), donate_argnums=0)

    def epoch(state, key, x):
        total = 0.0
        for rows in jax.random.permutation(key, len(x)).reshape(-1, batch_size):
            state, loss = update(state, x, rows)
            total = total + loss
        return state, total

    return epoch
