"""The loop: batches in, steps of the optimizer, what is told and saved on the way."""

import contextlib
import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from fms.distributed.fsdp import at_rest
from fms.training.checkpoint import Checkpoints, load, random_state, restore_random
from fms.training.config import TrainConfig
from fms.training.copies import Copies
from fms.training.loss import IGNORED
from fms.training.metrics import Metrics
from fms.training.objective import Batch
from fms.training.optim import clip, make_optimizer, make_schedule, step_at_once, steps_at_once
from fms.training.parallel import attention_kernels, last_of_step
from fms.training.ranks import rank, summed, world
from fms.training.signals import Stop


class NonFiniteError(ValueError):
    """Gradients were NaN or infinite."""


class Trainer:
    """A run: `root` is an `LMLoss`, sharded or not; `data` gives `batches(batch_size)` and its state.

    `place` is this rank's number among those that see different data, and how many they are. `held_out()` gives
    batches that are not trained on. `prepare(batch, seed)` changes a batch before it is used, as masking does.
    `sample(root)` gives text to look at. Raises `ValueError` if another run has the output directory.
    """

    def __init__(
        self,
        root: Any,
        data: Any,
        config: TrainConfig,
        device: torch.device,
        mesh: Any = None,
        place: tuple[int, int] = (0, 1),
        held_out: Callable[[], Iterable[Batch]] | None = None,
        prepare: Callable[[Batch, int], Batch] | None = None,
        sample: Callable[[Any], str] | None = None,
    ):
        self.root, self.data, self.config, self.device, self.mesh = root, data, config, device, mesh
        self.place, self.held_out, self.prepare, self.sample = place, held_out, prepare, sample
        self.optimizer = make_optimizer(root.model, config.lr, config.weight_decay, (config.beta1, config.beta2))
        low = config.mixed_precision == "bf16" and not isinstance(root, FSDPModule)
        self.copies = Copies(root) if low else None
        self.fused = steps_at_once(self.optimizer)
        self.share = make_schedule(config.schedule, config.steps, config.warmup, config.least_lr, config.decay)
        self.checkpoints = Checkpoints(config.output, config.keep)
        output = Path(self.checkpoints.output) if rank() == 0 else None
        self.metrics = Metrics(output, root.model, config.seq_len, device, world(), config.tensorboard)
        self.step = self.tokens = self.new_tokens = 0
        self.saved = -1
        self.window = torch.zeros(2, dtype=torch.float64, device=device)  # loss and labels since the last report
        self.lost = torch.zeros(2, device=device)  # steps without a finite gradient: in a row now, and at the worst
        self.norm = torch.zeros((), device=device)
        self.asked = Late(device)

    def run(self) -> int:
        """Train to the last step, or until a signal. Returns the exit code, 0, 143 or 130; all is saved then."""
        c = self.config
        torch.manual_seed(c.seed + self.place[0])  # ranks that share a model draw the same dropout
        self.resume()
        self.root.train()
        try:
            with Stop() as stop, profiler(c.profile if rank() == 0 else None) as tick:
                batches = self.endless()
                if not self.step:  # what there was before
                    if c.eval_steps:
                        self.evaluate()
                    if c.sample_steps:
                        self.show()
                while self.step < c.steps and not self.told(stop):
                    self.one_step(batches, stop)
                    tick()
                    if self.step % c.report_steps == 0 or self.step == c.steps:
                        self.report()
                    if c.eval_steps and self.step % c.eval_steps == 0 and self.step < c.steps:
                        self.evaluate()
                    if c.sample_steps and self.step % c.sample_steps == 0:
                        self.show()
                    if c.checkpoint_steps and self.step % c.checkpoint_steps == 0:
                        self.save()
                if self.step > self.saved:
                    self.save()
                code = self.told(stop)
                if not code:
                    self.evaluate()
            self.checkpoints.wait()
        finally:
            self.close()
        return code

    def one_step(self, batches: Iterator[Batch], stop: Stop) -> None:
        """Gradients of `accumulate` batches, and a step of the optimizer: of the mean over all their labels."""
        step = [self.ready(batch, n) for n, batch in enumerate(itertools.islice(batches, self.config.accumulate))]
        counted = torch.stack([self.root.count(batch) for batch in step]).sum()
        labels, asked = summed(torch.stack((counted, torch.full_like(counted, stop.code)))).unbind()  # no copy: no wait
        self.asked.put(asked)
        scale = world() / labels.clamp(min=1)  # FSDP takes the mean of data ranks; labels count once for each of a tp
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for n, batch in enumerate(step):
            last_of_step(self.root, n + 1 == len(step))
            with self.computing():
                part = self.root(batch)
                (part * scale).backward()  # inside: blocks that are computed again need the same weights
            if self.copies is not None and not (self.fused and len(step) == 1):
                self.copies.add_up()
            loss += part.detach()
        finite = self.update()
        self.window += torch.stack((loss, counted.double())).where(finite, 0)
        self.step += 1
        self.new_tokens += sum(batch["input_ids"].numel() for batch in step) * self.place[1]

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        with self.precision(), attention_kernels(self.device):
            yield

    def precision(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.copies is None else self.copies.used()

    def update(self) -> Tensor:
        """Clip, and step unless the gradient is not finite, which nobody waits to know."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * self.share(self.step)
        if self.fused:
            self.norm = step_at_once(self.optimizer, self.config.clip, {} if self.copies is None else self.copies.made)
            finite = self.norm.isfinite()
        else:
            self.norm = clip(self.optimizer, self.config.clip)
            finite = self.norm.isfinite()
            self.optimizer.grad_scale, self.optimizer.found_inf = None, (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
            if self.copies is not None:
                self.copies.changed()
        row = (self.lost[0] + 1).where(~finite, 0)
        self.lost = torch.stack((row, self.lost[1].maximum(row)))
        self.optimizer.zero_grad()
        return finite

    def told(self, stop: Stop) -> int:
        """The exit code that a signal to any rank asks for; all ranks say the same."""
        if world() == 1:
            return stop.code
        return (stop.code or 143) if self.asked.get() else 0

    def endless(self) -> Iterator[Batch]:
        while True:
            some = False
            for batch in self.data.batches(self.config.batch_size):
                some = True
                yield batch
            if not some:
                raise ValueError(f"{self.config.dataset_path}: the data has less than one batch for each rank")

    def ready(self, batch: Batch, n: int, held_out: bool = False) -> Batch:
        """On the device, prepared by what follows from the seed, the step, the batch's number and the rank alone."""
        batch = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        if self.prepare is not None:
            key = ("held out", n) if held_out else (self.config.seed, self.step, n)
            batch = self.prepare(batch, random.Random(repr((*key, self.place[0]))).getrandbits(62))
        if self.device.type == "cuda":  # from pinned memory, or the copy waits for the step before
            batch = {name: value.pin_memory() for name, value in batch.items()}
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def report(self) -> None:
        self.check()
        loss, labels = summed(self.window.clone()).tolist()
        self.tokens += self.new_tokens
        norm, lr = float(self.norm), self.optimizer.param_groups[0]["lr"]
        mean = loss / labels if labels else float("nan")
        self.metrics.report(self.step, self.tokens, self.new_tokens, loss=mean, grad_norm=norm, lr=lr)
        self.window.zero_()
        self.new_tokens = 0

    def check(self) -> None:
        """Raise `NonFiniteError` if more steps in a row were lost than may be."""
        row = int(self.lost[1])
        if row > self.config.skip_nonfinite:
            raise NonFiniteError(
                f"up to step {self.step} the gradient was NaN or infinite {row} time{'s' * (row > 1)} in a row; none "
                "of it was saved. A lower lr, a longer warmup or clip may help; skip_nonfinite=N leaves N out"
            )

    def evaluate(self) -> float | None:
        """The mean loss on held-out data; ranks whose data ends earlier wait with batches that do not count."""
        if self.held_out is None:
            return None
        begun = time.perf_counter()
        self.root.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        batch: Batch = {"input_ids": torch.zeros(1, 2, dtype=torch.int64)}
        batches = iter(self.held_out())
        with torch.no_grad(), self.computing():
            for n in range(self.config.eval_batches):
                found = next(batches, None)
                if not summed(torch.tensor(float(found is not None), device=self.device)):
                    break
                batch = found or batch | {"labels": torch.full_like(batch["input_ids"], IGNORED)}
                there = self.ready(batch, n, held_out=True)
                if found is None:
                    there["labels"].fill_(IGNORED)
                sums += torch.stack((self.root(there).double(), self.root.count(there).double()))
        self.root.train()
        loss, labels = summed(sums).tolist()
        if not labels:
            raise ValueError(f"{self.config.eval_path}: the held-out data has no label that counts")
        self.metrics.write({"step": self.step, "eval_loss": loss / labels})
        self.metrics.pause(time.perf_counter() - begun)
        return loss / labels

    def show(self) -> None:
        if self.sample is not None:
            begun = time.perf_counter()
            self.root.eval()
            with torch.no_grad(), self.precision():
                self.metrics.say(self.sample(self.root))
            self.root.train()
            at_rest(self.root)
            self.metrics.pause(time.perf_counter() - begun)

    def save(self) -> None:
        self.check()
        begun = time.perf_counter()
        data = self.data.state_dict()
        shared = {"world": world(), "places": self.place[1], "tokens": self.tokens, "config": self.config.as_dict()}
        own = {"random": random_state(), "window": self.window.tolist(), "new_tokens": self.new_tokens, "data": data}
        self.checkpoints.save(self.root.model, self.optimizer, self.step, shared | {"data": data}, own)
        self.saved = self.step
        self.metrics.pause(time.perf_counter() - begun)

    def resume(self) -> None:
        asked = self.config.resume
        if asked == "never" and (there := self.checkpoints.steps()):
            raise ValueError(f"{self.config.output} has a run of {there[-1]} steps: resume it, or choose another")
        path = None if asked == "never" else self.checkpoints.last_good() if asked == "auto" else Path(asked)
        if path is None:
            self.metrics.resume(0)
            return
        shared, own = load(path.expanduser(), self.root.model, self.optimizer)
        if self.copies is not None:
            self.copies.changed()
        self.step, self.tokens = shared["step"], shared["tokens"]
        self.metrics.resume(self.step)
        self.saved = self.step if asked == "auto" else -1
        if own is not None:
            restore_random(own["random"])
            self.window += torch.tensor(own["window"], dtype=torch.float64, device=self.device)
            self.new_tokens = own["new_tokens"]
        self.data.load_state_dict((own or shared)["data"])
        self.metrics.say(f"goes on from {path} at step {self.step}")

    def close(self) -> None:
        self.checkpoints.close()
        self.metrics.close()


class Late:
    """A number from the device, read when it is there: on a GPU that is a step later, and no wait."""

    def __init__(self, device: torch.device):
        self.event = torch.cuda.Event() if device.type == "cuda" else None
        self.host = torch.zeros((), pin_memory=self.event is not None)

    def put(self, value: Tensor) -> None:
        self.host.copy_(value, non_blocking=self.event is not None)
        if self.event is not None:
            self.event.record()

    def get(self) -> float:
        if self.event is not None:
            self.event.synchronize()
        return self.host.item()


@contextlib.contextmanager
def profiler(directory: str | None) -> Iterator[Callable[[], None]]:
    """Writes a timeline of the steps 5 to 7, as the Chrome tracing format has it; what it gives is called each step."""
    if directory is None:
        yield lambda: None
        return
    from torch.profiler import profile, schedule

    out = Path(directory).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    course = schedule(wait=3, warmup=1, active=3, repeat=1)
    ready = lambda trace: trace.export_chrome_trace(str(out / "trace.json"))
    with profile(schedule=course, on_trace_ready=ready) as running:
        yield running.step
