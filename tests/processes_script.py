"""What the tests of many processes run in each of them: several fits, whose results go to files of each rank."""

import operator
import os
import signal
import sys
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae

MOMENTS = "exp_avg", "exp_avg_sq"  # of Adam
LATENT, N = 2, 22  # in batches of 7, 7, 7 and 1: two processes have 3 and 4 of each, and of the last one none and 1


class Given(nn.Module):
    """Probabilistic PCA, whose noise comes with the data, so that all processes see the same.

    With a `size`, its scale is a global latent.
    """

    num_inputs = 2

    def __init__(self, size=N):
        super().__init__()
        self.size = size
        # Not in the order of memory, by which fused optimizers go.
        self.loadings = nn.Parameter(torch.linspace(-1, 1, 3 * LATENT).reshape(3, LATENT).t())
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.encoder = nn.Linear(3, 2 * LATENT)
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("running", torch.zeros(3))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("late", torch.zeros(3))  # changes from the third step on
        self.register_buffer("bound", torch.tensor([torch.inf, 0.1, torch.nan]))
        self.register_buffer("mask", torch.tensor([True, False]))

    def model(self, x, noise):
        log_scale = self.log_scale
        if self.size is not None:
            log_scale = pyro.sample("log_scale", dist.Normal(0.0, 1.0).expand([]))
        with pyro_vae.programs.data_plate(x, self.size):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.loadings, log_scale.exp()).to_event(1), obs=x)

    def guide(self, x, noise):
        if self.size is not None:
            pyro.sample("log_scale", dist.Delta(self.log_scale))
        if self.training:
            self.running.lerp_(x.mean(0), 0.1)
            self.steps += 1
            self.late.lerp_(x.mean(0), 0.1 * (self.steps > 2).double())
        with pyro_vae.programs.data_plate(x, self.size):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            drawn = loc + log_scale.exp() * noise
            density = dist.Normal(loc, log_scale.exp()).to_event(1).log_prob(drawn)
            pyro.sample("z", dist.Delta(drawn, log_density=density, event_dim=1))


def given(size=N):
    torch.manual_seed(0)
    return Given(size).double()


def given_data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 3, generator=generator).double(), torch.randn(N, LATENT, generator=generator).double()


def fit_given(out, program, data, devices, **options):
    # AdamW would shrink the parameter that is not used if that had a gradient of zeros, and not none.
    options = {"batch_size": 7, "epochs": 5, "lr": 0.05, "optimizer": torch.optim.AdamW, "seed": 0} | options
    return pyro_vae.fit(
        program, data, out=out, devices=devices, device="cpu", precision="64-true", progress=False, **options
    )


def results(fitted):
    """Weights, buffers, and the figures of each epoch."""
    figures = fitted.history[["loss", "elbo", "rate", "distortion"]].to_numpy()
    return {**fitted.program.state_dict(), "figures": torch.tensor(figures)}


class Backward(Trace_ELBO):
    """Calls backward itself."""

    def loss_and_grads(self, model, guide, *args):
        loss = self.differentiable_loss(model, guide, *args)
        loss.backward()
        return loss.item()


class Kept:
    """AdamW, which can be looked at afterwards."""

    def __call__(self, parameters, lr):
        self.parameters, self.optimizer = list(parameters), torch.optim.AdamW(parameters, lr=lr)
        return self.optimizer

    def held(self):
        """How many numbers of each parameter's shard, and of its state, this process holds."""
        state = self.optimizer.state
        return {
            tuple(shard.shape): [tensor.to_local().numel() for tensor in (shard, *map(entry.get, MOMENTS))]
            for shard, entry in state.items()
        }


def fit_all(folder, devices, kept):
    """As of one process: of data in memory and a global latent; of a data set, without one; resumed; and in shards."""
    yield "memory", fit_given(folder / "memory", given(), given_data(), devices)
    dataset = torch.utils.data.TensorDataset(*given_data())
    yield "data set", fit_given(folder / "set", given(size=None), dataset, devices, lr_schedule="cosine")
    yield "resumed", fit_given(folder / "resumed", given(), given_data(), devices, resume=True)
    sharded = {"strategy": "fsdp", "resume": True}
    yield "resumed in shards", fit_given(folder / "resumed in shards", given(), given_data(), devices, **sharded)
    sharded = {"strategy": "fsdp", "estimator": Backward(), "optimizer": kept}
    yield "shards", fit_given(folder / "shards", given(), given_data(), devices, **sharded)


class Drawing(Trace_ELBO):
    """Remembers the noise of each step's latents."""

    def __init__(self):
        super().__init__()
        self.drawn = []

    def differentiable_loss(self, model, guide, *args):
        trace = pyro.poutine.trace(guide).get_trace(*args)
        z = trace.nodes["z"]
        self.drawn.append(((z["value"] - z["fn"].mean) / z["fn"].variance.sqrt()).detach())
        return super().differentiable_loss(model, pyro.poutine.replay(guide, trace=trace), *args)


def fit_vae(folder, devices, **options):
    """A run whose processes draw noise of their own, whose weights differ at first, and that nobody has seeded."""
    data = torch.rand(40, 4, 4, generator=torch.Generator().manual_seed(2)).round()
    drawing = Drawing()
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # Fabric has started the others with another one
    out = folder / ("vae" if first else "written by another")
    options = {"epochs": 4, "batch_size": 16, "progress": True, "out": out} | options
    vae = pyro_vae.build((4, 4), latent=2)
    weight = vae.posterior.net.layers[0].weight
    weight.data = weight.data.t().contiguous().t()  # not in the order of memory
    fitted = pyro_vae.fit(vae, data, valid=data, estimator=drawing, device="cpu", devices=devices, **options)
    return fitted, drawing.drawn


class Interrupting(Trace_ELBO):
    """Presses Ctrl-C in the second process, in the last of four steps."""

    taken = 0

    def differentiable_loss(self, model, guide, *args):
        self.taken += 1
        if self.taken == 4 and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return super().differentiable_loss(model, guide, *args)


def ends(call):
    """How a call ends."""
    try:
        call()
    except (KeyboardInterrupt, ValueError) as error:
        return f"{type(error).__name__} {error}"
    return "done"


class Diverging(Drawing):
    """Gives NaN in the second process from the third step on."""

    def differentiable_loss(self, model, guide, *args):
        loss = super().differentiable_loss(model, guide, *args)
        return loss * torch.nan if torch.distributed.get_rank() == 1 and len(self.drawn) > 3 else loss


class Dying(Drawing):
    """Ends the second process in the third step, while the first one is busy for longer than its launcher waits."""

    def differentiable_loss(self, model, guide, *args):
        if len(self.drawn) == 3:
            if torch.distributed.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(11)  # the launcher looks every five seconds
        return super().differentiable_loss(model, guide, *args)


def fail(folder, how):
    """Runs that end in every process."""
    data = torch.rand(40, 4, 4, generator=torch.Generator().manual_seed(2)).round()
    vae = pyro_vae.build((4, 4), latent=2)
    if how == "diverge":
        pyro_vae.fit(vae, data, estimator=Diverging(), batch_size=16, device="cpu", devices=2, out=folder / "vae")
    if how == "die":
        pyro_vae.fit(vae, data, estimator=Dying(), batch_size=16, device="cpu", devices=2)
    if how == "differ":  # the other process has started as the first one has
        data = data[:39] if "LOCAL_RANK" in os.environ else data
        pyro_vae.fit(vae, data, batch_size=16, device="cpu", devices=2)


def compile_in_shards(folder):
    """A compiled step whose gradients go to shards."""
    fitted = fit_given(folder / "compiled", given(), given_data(), 2, strategy="fsdp", compile=True)
    torch.save(results(fitted), folder / f"rank{torch.distributed.get_rank()}.pt")


def main(folder, devices):
    kept = Kept()
    fits = dict(fit_all(folder, devices, kept))
    found = {name: results(fitted) for name, fitted in fits.items()}
    own = list(fits["shards"].program.parameters())
    found["held"] = kept.held(), all(map(operator.is_, own, kept.parameters))
    fitted, drawn = fit_vae(folder, devices)
    found["vae"] = {**results(fitted), "valid": torch.tensor(fitted.history.valid_elbo.to_numpy())}
    interrupting = {"estimator": Interrupting(), "epochs": 1}
    found["interrupted"] = ends(lambda: fit_given(folder / "last", given(), given_data(), 2, **interrupting))
    found["three"] = ends(lambda: fit_given(folder / "three", given(), given_data(), 3))
    torch.save((found, drawn), folder / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    if sys.argv[2].isdigit():
        main(Path(sys.argv[1]), int(sys.argv[2]))
    elif sys.argv[2] == "compile":
        compile_in_shards(Path(sys.argv[1]))
    else:
        fail(Path(sys.argv[1]), sys.argv[2])
