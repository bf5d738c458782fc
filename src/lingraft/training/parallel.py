"""How several processes share a stage. Each takes its part of a step's micro-batches; their gradients are summed.

    ddp     every process holds everything
    fsdp    the processes share out the layers, each of which is gathered while it is used (PyTorch's FSDP2), and the
            gradients and the optimiser's states of whatever trains. Vocabulary matrices, which are used as a whole,
            and layers in 4 bits stay whole in every process
    zero2   every process holds the weights; they share out gradients and the optimiser's states, and keep the latter in
            CPU memory (DeepSpeed's ZeRO-2 with offload, arXiv 1910.02054, 2101.06840)

Whichever it is, a step learns the same, and so do one process and several, but for the rounding of sums.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DeviceMesh, DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

from lingraft import processes
from lingraft.errors import TrainingError
from lingraft.model.load import to_device
from lingraft.model.rows import drop_gradient
from lingraft.training.batches import IGNORED, MicroBatch
from lingraft.training.optimizer import clip_gradients, make_optimizer
from lingraft.training.settings import StageSettings

# torch 2.13 has renamed them
reduce_scatter: Any = getattr(distributed, "reduce_scatter_single", distributed.reduce_scatter_tensor)
all_gather: Any = getattr(distributed, "all_gather_single", distributed.all_gather_into_tensor)


class Parallel:
    """One process, or several that each hold everything.

    loss_scale: what the loss is multiplied by so that the processes' gradients add up to the step's.
    """

    loss_scale = 1.0

    def __init__(self) -> None:
        self.size = processes.size()
        self.rank = processes.rank() if self.size > 1 else 0
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def place(self, model: PreTrainedModel, settings: StageSettings) -> None:
        """Bring the model to where it trains; quantised ones are loaded there."""
        if settings.quantise == "none":
            to_device(model, self.device)

    def shard(self, model: PreTrainedModel, loss_model: nn.Module, settings: StageSettings) -> None:
        """Share the model's parameters out, where they are to be: they are other objects then, under the old names."""

    def prepare(
        self, loss_model: nn.Module, groups: list[dict[str, Any]], settings: StageSettings
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """What is called for the loss, and the optimiser of `groups`."""
        return loss_model, make_optimizer(groups, settings)

    def share(self, step: list[MicroBatch]) -> list[MicroBatch]:
        """This process's micro-batches of a step."""
        return step[self.rank :: self.size]

    def backward(self, loss: Tensor, last: bool) -> None:
        """Make a micro-batch's gradients; `last` is the step's last one here."""
        loss.backward()

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> float:
        """Sum the gradients over the processes and clip their norm, which is returned as it was before."""
        return clip_gradients(self._sum_gradients(list(parameters)), limit)

    def _sum_gradients(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Sum them over the processes; returns what has the sums."""
        if self.size > 1:
            self._complete(parameters)
            sums = [distributed.all_reduce(p.grad, async_op=True) for p in parameters if p.grad is not None]
            for work in sums:
                work.wait()  # type: ignore[union-attr]
        return parameters

    def _complete(self, parameters: list[nn.Parameter]) -> None:
        """Give zeros to parameters that had a gradient elsewhere only."""
        used = self.most(*(p.grad is not None for p in parameters))
        for parameter, anywhere in zip(parameters, used, strict=True):
            if anywhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take an optimiser step with the clipped gradients and drop them."""
        optimizer.step()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                drop_gradient(parameter)

    def sum(self, number: float) -> float:
        """The sum of the processes' numbers."""
        return self._reduce([number], distributed.ReduceOp.SUM)[0]

    def most(self, *numbers: float) -> list[float]:
        """Of each number the largest that a process has. True counts as 1: whether any process says so."""
        return self._reduce([float(number) for number in numbers], distributed.ReduceOp.MAX)

    def _reduce(self, numbers: list[float], by: Any) -> list[float]:
        if self.size == 1:
            return numbers
        values = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(values, by)
        return values.tolist()

    # --------------------------------------------------------------------------- to and from checkpoints

    def stepped(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Mapping[str, Tensor]:
        """The tensors that the optimiser has states for, by a name."""
        return parameters

    def state(self, value: Tensor) -> Tensor:
        """A state of the optimiser as a part of the whole one."""
        return value

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor that may be shared out, for the first process; the others get an empty one.

        Every process has to call this, for the same tensors in the same order.
        """
        if not isinstance(tensor, DTensor):
            return tensor.detach()
        full: Tensor = tensor.full_tensor().detach()
        return full.cpu() if self.first else full.new_empty(0)

    @torch.no_grad()
    def fill(self, tensor: Tensor, whole: Tensor) -> None:
        """Write what `whole` gave back into the tensor, in every process."""
        if isinstance(tensor, DTensor):
            mine = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.to_local().copy_(mine.to_local())
        else:
            tensor.copy_(whole)

    def filled(self) -> None:
        """Called when parameters and states have been filled from a checkpoint."""

    def close(self) -> None:
        """Let go of the model."""


@dataclass(frozen=True)
class _Rows:
    """A parameter that is whole in every process, and the rows of it that this process steps.

    padded: the parameter's memory, in as many equal parts as there are processes. own: this process's part, less the
    padding, as a part of the parameter.
    """

    parameter: nn.Parameter
    padded: Tensor
    own: nn.Parameter

    @classmethod
    def of(cls, parameter: nn.Parameter, mesh: DeviceMesh) -> _Rows:
        rows, count = len(parameter), math.ceil(len(parameter) / mesh.size())
        padded = _padded(parameter.data, count * mesh.size())
        parameter.data = padded[:rows]
        first = min(mesh.get_rank() * count, rows)
        own = DTensor.from_local(
            padded[first : min(first + count, rows)],
            mesh,
            [Shard(0)],
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        return cls(parameter, padded, nn.Parameter(own))

    def reduce(self) -> None:
        """Sum the parameter's gradient over the processes into that of the own rows."""
        gradient, self.parameter.grad = self.parameter.grad, None
        if gradient is not None:
            part = torch.empty_like(self._part())
            reduce_scatter(part, _padded(gradient, len(self.padded)))
            spec: Any = self.own.data
            own = part[: len(spec.to_local())]
            self.own.grad = DTensor.from_local(
                own, spec.device_mesh, spec.placements, run_check=False, shape=spec.shape, stride=spec.stride()
            )

    def gather(self) -> None:
        """Bring the other processes' rows up to date."""
        all_gather(self.padded, self._part())

    def _part(self) -> Tensor:
        mesh = self.own.data.device_mesh  # type: ignore[attr-defined]
        return self.padded.chunk(mesh.size())[mesh.get_rank()]


class _EquallyMany(Parallel):
    """Processes that meet in every micro-batch."""

    def share(self, step: list[MicroBatch]) -> list[MicroBatch]:
        """All have equally many, some of them an unlearnt one at the end."""
        mine = super().share(step)
        if len(mine) < math.ceil(len(step) / self.size):
            shortest = step[-1]
            silent = torch.full_like(shortest.labels_BT, IGNORED)
            mine.append(MicroBatch(shortest.input_ids_BT, silent, shortest.position_ids_BT, (), 0))
        return mine


def _padded(tensor: Tensor, rows: int) -> Tensor:
    """The tensor with zero rows added up to `rows`; itself where it has as many."""
    missing = rows - len(tensor)
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor


class _FullyShardedParallel(_EquallyMany):
    def place(self, model: PreTrainedModel, settings: StageSettings) -> None:
        """Layers go to the device one by one, when they are shared out."""

    def shard(self, model: PreTrainedModel, loss_model: nn.Module, settings: StageSettings) -> None:
        self.mesh = DeviceMesh(self.device.type, list(range(self.size)))
        decoder: Any = model.get_decoder()
        layers = decoder.layers if settings.quantise == "none" else []
        inside = {parameter for layer in layers for parameter in layer.parameters()}
        for layer in layers:
            fully_shard(layer, mesh=self.mesh)
            if settings.layers == "all":
                layer.float()  # as it trains; before it was shared out, it would be so large in every process
        fully_shard(loss_model, mesh=self.mesh, ignored_params=set(loss_model.parameters()) - inside)
        for module in loss_model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        loss_model.to(self.device)

    def prepare(
        self, loss_model: nn.Module, groups: list[dict[str, Any]], settings: StageSettings
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        whole = [p for group in groups for p in group["params"] if not isinstance(p, DTensor)]
        self.rows = {parameter: _Rows.of(parameter, self.mesh) for parameter in whole}
        groups = [group | {"params": self._stepped(group["params"])} for group in groups]
        return super().prepare(loss_model, groups, settings)

    def _stepped(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        return [self.rows[p].own if p in self.rows else p for p in parameters]

    def _sum_gradients(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Those of the layers have been summed in the backward pass."""
        self._complete(list(self.rows))
        for rows in self.rows.values():
            rows.reduce()
        return self._stepped(parameters)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        super().step(optimizer)
        for rows in self.rows.values():
            rows.gather()

    def stepped(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Mapping[str, Tensor]:
        return dict(zip(parameters, self._stepped(parameters.values()), strict=True))


class _ZeroParallel(_EquallyMany):
    def __init__(self) -> None:
        super().__init__()
        self.loss_scale = float(self.size)  # DeepSpeed takes the mean over processes

    def prepare(
        self, loss_model: nn.Module, groups: list[dict[str, Any]], settings: StageSettings
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        try:
            import deepspeed
        except ImportError as error:
            raise TrainingError(
                f"stage {settings.name}: parallel: zero2 needs DeepSpeed; install lingraft[deepspeed], or set ddp or "
                "fsdp"
            ) from error
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        config = {
            "train_micro_batch_size_per_gpu": 1,  # not used: a step's micro-batches are counted by `backward`
            "gradient_clipping": settings.clip,
            # buffers of 500 million values, its default, would take 2 GB
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 5e7},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW is as good there, and needs no compiler
        }
        optimizer = make_optimizer(groups, settings)
        self.engine: Any = deepspeed.initialize(model=loss_model, optimizer=optimizer, config=config)[0]
        return self.engine, self.engine.optimizer.optimizer

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> float:
        """The norm; the gradients are clipped in `step`."""
        norm = float(self.engine.optimizer.scaled_global_norm())
        return norm if norm >= 0 else math.nan  # DeepSpeed's word for one that is not finite

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.engine.step()

    def stepped(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Mapping[str, Tensor]:
        return {str(group["name"]): group["params"][0] for group in optimizer.param_groups}

    def state(self, value: Tensor) -> Tensor:
        mesh = DeviceMesh("cpu", list(range(self.size)))
        return DTensor.from_local(value, mesh, [Shard(0)]) if value.dim() else value

    def filled(self) -> None:
        self.engine.optimizer.refresh_fp32_params()

    def close(self) -> None:
        self.engine.destroy()


def parallel_for(settings: StageSettings) -> Parallel:
    """The way that a stage asks for; one process is alone, whatever it asks for.

    Raises:
        TrainingError: the stage can't train so.
    """
    ways = {"ddp": Parallel, "fsdp": _FullyShardedParallel, "zero2": _ZeroParallel}
    return ways[settings.parallel]() if processes.size() > 1 else Parallel()
