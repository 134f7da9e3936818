"""The one training loop, on accelerate. It does not know which method it trains."""

import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import send_to_device, set_seed
from torch import Tensor, nn
from torch.optim import Optimizer

from leaven.callbacks import Attached
from leaven.pretext import Output
from leaven.recipes.common.card import command
from leaven.recipes.common.data import KeyedLoader
from leaven.recipes.common.flags import UserError, to_yaml
from leaven.recipes.common.launcher import stop_with_launcher
from leaven.recipes.common.optimizer import clips_itself
from leaven.recipes.common.progress import Progress, peak_memory
from leaven.recipes.common.resume import Training
from leaven.recipes.common.run_folder import RunFolder
from leaven.recipes.common.sampler import random_bits
from leaven.recipes.common.schedule import Plan, learning_rate, set_schedule, weight_decay
from leaven.recipes.common.signals import StopRequest, exit_code, shield_worker
from leaven.recipes.common.start import LoopSettings, on_main

# The loss of one micro-batch: (the prepared objective, what the loader gave, on the device, with labels last; a
# generator on the CPU, keyed by (seed, update, micro-step, process)).
Forward = Callable[[nn.Module, Any, torch.Generator], Output]


class NonFiniteLoss(UserError):
    """The loss or the gradient is NaN or infinite."""


def fit(
    accelerator: Accelerator,
    objective: nn.Module,
    optimizer: Optimizer,
    loader: KeyedLoader,
    forward: Forward,
    plan: Plan,
    settings: LoopSettings,
    run: RunFolder,
    callbacks: Attached | None = None,
) -> None:
    """Train `objective` in place, from the start or the newest checkpoint, to the end of the plan.

    SIGTERM or SIGINT on any process: all finish the same update, save and exit with 128 + its number.
    Resuming a finished run trains no more, so that what follows the training can be done again.

    Args:
        accelerator, settings, run: from `start`.
        objective: moved to the device, and wrapped in here only.
        optimizer: of the objective's parameters.
        loader: this process's batches; its sampler is the position in the data.
        forward: the loss of one micro-batch.
        plan: how many updates.
        callbacks: attached to the same objective and optimizer.

    Raises:
        NonFiniteLoss: before it touches the weights; the last checkpoint stays.
        CheckpointError: one cannot be written or read.
        UserError: the checkpoint belongs to other settings.
        SystemExit: after a signal.
    """
    if settings.channels_last:
        objective.to(memory_format=torch.channels_last)
    if settings.compile:
        objective.compile()
    for line in plan.about_warmup:
        accelerator.print(line)
    model, stepper = accelerator.prepare(objective, optimizer)
    model.train()
    # From here on the global generators differ between processes, and do not depend on what was done before.
    set_seed(int(random_bits(settings.seed, 0, accelerator.process_index, "training", 1)[0]) % 2**32)
    training = Training(
        accelerator, objective, optimizer, loader.batch_sampler, callbacks, plan, settings, run
    )
    update, signum = training.resume(), 0
    on_main(lambda: _record(run, settings, update))
    stop_with_launcher()
    show = accelerator.is_main_process
    with StopRequest() as stop, _workers(loader), Progress(plan.total, update, show=show) as progress:
        while update < plan.total and not signum:
            epoch_end = (update // plan.updates_per_epoch + 1) * plan.updates_per_epoch
            with closing(iter(loader)) as batches:  # type: ignore[type-var]
                while update < epoch_end and not signum:
                    row, signum = _update(training, model, stepper, batches, forward, update, stop)
                    update += 1
                    if show:
                        run.log(row)
                        progress(row)
                    accelerator.log(row, step=update)
            if update == epoch_end:
                loader.batch_sampler.next_epoch()
            due = update == epoch_end and (update // plan.updates_per_epoch) % settings.save_every == 0
            if due or signum or update == plan.total:
                training.save(update)
        signum = signum or _agreed(accelerator, stop)  # it came during the last update or its save
    if signum:
        accelerator.print(
            f"stopped by signal {signum}: update {update} of {plan.total} is saved; "
            f"go on with --resume {shlex.quote(str(run.path))}"
        )
        accelerator.end_training()
        sys.exit(exit_code(signum))
    # accelerate's autocast around the forward pass would stay: what was judged before in float32 is so afterwards.
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    vars(objective).pop("forward", None)


def _update(
    training: Training,
    model: nn.Module,
    stepper: AcceleratedOptimizer,
    batches: Iterator[Any],
    forward: Forward,
    update: int,
    stop: StopRequest,
) -> tuple[dict[str, Any], int]:
    """One optimizer update: its row of the log and the signal to stop for (0: none), the same everywhere."""
    accelerator, plan, settings = training.accelerator, training.plan, training.settings
    started = time.perf_counter()
    position = plan.position(update)
    lr = learning_rate(position, plan, settings.lr, shape=settings.sched)
    end = settings.weight_decay if settings.weight_decay_end is None else settings.weight_decay_end
    decay = weight_decay(position, plan, settings.weight_decay, end)
    set_schedule(training.optimizer, lr, decay)
    stepper.zero_grad()
    tensors, images, waited = _gradients(training, model, batches, forward, update)
    norm = _clip(accelerator, training.optimizer, stepper, settings.clip_grad)
    logs, norms, signum = _exchange(accelerator, tensors, norm, stop.signum)
    # Infinite gradients are how a GradScaler finds its scale: it skips the step by itself.
    if not math.isfinite(logs["loss"]) or (accelerator.scaler is None and not math.isfinite(norms)):
        what = f"loss is {logs['loss']}" if not math.isfinite(logs["loss"]) else f"gradient norm is {norms}"
        raise NonFiniteLoss(
            f"{what} at update {update + 1} of {plan.total}; stopped before the weights took it, the "
            f"checkpoints in {training.run.checkpoints} are untouched; try a lower --lr, longer "
            "--warmup-epochs or --clip-grad"
        )
    stepper.step()
    seconds = time.perf_counter() - started
    row = {
        "step": update + 1,
        "epoch": (update + 1) / plan.updates_per_epoch,
        **logs,
        "lr": lr,
        "weight_decay": decay,
        "grad_norm": norms if math.isfinite(norms) else None,
        **({} if accelerator.scaler is None else {"skipped": bool(stepper.step_was_skipped)}),
        **(training.callbacks.logs() if training.callbacks is not None else {}),
        "step_s": seconds,
        "data_s": waited,
        "images_per_s": images * accelerator.num_processes / seconds,
        "peak_memory_mib": peak_memory(accelerator.device),
    }
    return row, signum


def _gradients(
    training: Training, model: nn.Module, batches: Iterator[Any], forward: Forward, update: int
) -> tuple[dict[str, Tensor], int, float]:
    """Gradients of one update: mean logs over its micro-batches, images seen, seconds without data."""
    accelerator, plan, settings = training.accelerator, training.plan, training.settings
    logs: list[dict[str, Tensor]] = []
    images, waited = 0, 0.0
    micro_steps, process = plan.micro_steps(update), accelerator.process_index
    for micro in range(micro_steps):
        asked = time.perf_counter()
        replay = partial(keyed_generator, settings.seed, update, micro, f"replay {process}")
        batch = plan.extend(next(batches), update, replay)
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        waited += time.perf_counter() - asked
        generator = keyed_generator(settings.seed, update, micro, f"process {process}")
        last = micro == micro_steps - 1
        with nullcontext() if last else accelerator.no_sync(model):
            output = forward(model, batch, generator)
            accelerator.backward(output.loss / micro_steps)
        values = {"loss": output.loss, **output.logs}
        logs.append(
            {k: torch.as_tensor(v).detach().float().to(accelerator.device) for k, v in values.items()}
        )
        images += len(batch[-1])
    return {name: torch.stack([each[name] for each in logs]).mean() for name in logs[0]}, images, waited


def keyed_generator(seed: int, update: int, micro: int, purpose: str) -> torch.Generator:
    """A CPU generator for what an objective draws by itself, such as masks; no state to resume."""
    return torch.Generator().manual_seed(int(random_bits(seed, update, micro, purpose, 1)[0]))


def _clip(
    accelerator: Accelerator, optimizer: Optimizer, stepper: AcceleratedOptimizer, limit: float | None
) -> Tensor:
    """The gradient norm over all parameters before clipping; clips, unless the optimizer will."""
    accelerator.unscale_gradients(stepper)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if limit is not None and not clips_itself(optimizer):
        return nn.utils.clip_grad_norm_(parameters, limit)
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def _exchange(
    accelerator: Accelerator, logs: dict[str, Tensor], norm: Tensor, signum: int
) -> tuple[dict[str, float], float, int]:
    """The one exchange of an update: mean logs over the processes, and a signal that any of them received."""
    local = torch.stack([norm.float(), norm.new_tensor(float(signum)).float(), *logs.values()])
    gathered: Tensor = accelerator.gather(local.unsqueeze(0))
    everyone = gathered.cpu()  # the update's one wait for the device
    means = everyone[:, 2:].mean(0).tolist()
    return dict(zip(logs, means, strict=True)), float(everyone[0, 0]), int(everyone[:, 1].max())


def _agreed(accelerator: Accelerator, stop: StopRequest) -> int:
    """A signal that any process received, 0 for none; the same on all."""
    received = torch.tensor([stop.signum], device=accelerator.device)
    return int(accelerator.gather(received).max())


def _record(run: RunFolder, settings: LoopSettings, update: int) -> None:
    """Write the settings, less those of this one start; take back log lines that will come again."""
    settings = replace(settings, resume=None, resume_changed=False, output_dir=None, dry_run=False)
    made_by = run.made_by or (
        run.recipe,
        " ".join(command().splitlines()),
    )  # a run that goes on was made by its first command
    run.write(run.config, "".join(f"# {line}\n" for line in made_by) + to_yaml(settings))
    run.forget_after(update)


@contextmanager
def _workers(loader: KeyedLoader) -> Iterator[None]:
    """Let the loader's workers outlive signals, and end them here, on every way out.

    Since they ignore SIGTERM, a worker left to Python's exit would be waited for without end.
    """
    loader.worker_init_fn = shield_worker
    try:
        yield
    finally:
        iterator, loader._iterator = loader._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]
