"""Cross-entropy over a large vocabulary: ours, the naive one, and torch's own `linear_cross_entropy`.

    python benchmarks/loss.py --positions 512 4096 --dtypes fp32 bf16

Random hidden states and a random output matrix of 262,208 rows. `frozen`: the gradient of the hidden states alone;
`trained`: that of the matrix as well. Each contender runs in a process of its own, forward and backward; seconds are
the median of the repeats, memory the most that was resident less what was before the loss. Errors are relative, of the
hidden states' gradient and of the loss against the naive one in float64 on the first 64 positions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 262_208
CHECKED = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def naive(hidden_ND: Tensor, matrix_VD: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden_ND, matrix_VD).float(), labels_N, reduction="sum")


def torchs(hidden_ND: Tensor, matrix_VD: Tensor, labels_N: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=128, acc_policy="accurate", acc_dtype=torch.float32)
    return F.linear_cross_entropy(hidden_ND, matrix_VD, labels_N, reduction="sum", options=options)


def ours() -> Loss:
    from lingraft.training.cross_entropy import FrozenMatrixLoss, Scratch, TrainedMatrixLoss

    scratch = Scratch()  # a stage's, for all its steps

    def loss(hidden_ND: Tensor, matrix_VD: Tensor, labels_N: Tensor) -> Tensor:
        if matrix_VD.requires_grad:
            return TrainedMatrixLoss.apply(hidden_ND, matrix_VD, labels_N, None, 1.0, scratch, False)
        return FrozenMatrixLoss.apply(hidden_ND, None, matrix_VD, labels_N, None, [], scratch)

    return loss


CONTENDERS: dict[str, Callable[[], Loss]] = {"ours": ours, "naive": lambda: naive, "torch": lambda: torchs}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--positions", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", help="run one contender in this process (used by the benchmark itself)")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run(**json.loads(arguments.one))))
        return
    print(
        "| positions | dtype | matrix | loss | seconds | memory GB | error of loss | of gradient | ours: time, memory |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for positions in arguments.positions:
        for dtype in arguments.dtypes:
            for trained in (False, True):
                compare(positions, arguments.width, dtype, trained, arguments.repeats)


def compare(positions: int, width: int, dtype: str, trained: bool, repeats: int) -> None:
    found: dict[str, dict[str, float]] = {}
    for name in CONTENDERS:
        one = {"name": name, "positions": positions, "width": width, "dtype": dtype, "trained": trained}
        command = [sys.executable, __file__, "--one", json.dumps(one | {"repeats": repeats})]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    for name, result in found.items():
        ratio = ""
        if name != "ours":
            ratio = " × , ".join(f"{found['ours'][key] / result[key]:.2f}" for key in ("seconds", "memory")) + " ×"
        print(
            f"| {positions} | {dtype} | {'trained' if trained else 'frozen'} | {name} | {result['seconds']:.2f} | "
            f"{result['memory']:.2f} | {result['loss_error']:.1e} | {result['gradient_error']:.1e} | {ratio} |",
            flush=True,
        )


def run(name: str, positions: int, width: int, dtype: str, trained: bool, repeats: int) -> dict[str, float]:
    """Seconds, GB and errors of one contender."""
    from lingraft.model.rows import drop_gradient
    from lingraft.training.watch import peak_memory_gb, reset_peak_memory

    torch.manual_seed(0)
    # ours keeps a trained matrix in float32, whatever the hidden states are; the others want one dtype
    kind = torch.float32 if trained and name == "ours" else DTYPES[dtype]
    matrix_VD = torch.nn.Parameter(torch.randn(ROWS, width).mul_(0.1).to(DTYPES[dtype]).to(kind), requires_grad=trained)
    hidden_ND = torch.randn(positions, width).to(DTYPES[dtype]).requires_grad_()
    labels_N = torch.randint(0, ROWS, (positions,))
    loss = CONTENDERS[name]()
    reset_peak_memory()
    before = peak_memory_gb()
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        loss(hidden_ND, matrix_VD, labels_N).backward()
        seconds.append(time.perf_counter() - begin)
        hidden_ND.grad = None
        drop_gradient(matrix_VD)  # as the loop does: ours keeps its memory for the next step, the others have none
    memory = peak_memory_gb() - before
    loss_error, gradient_error = errors(loss, hidden_ND, matrix_VD, labels_N)
    return {
        "seconds": statistics.median(seconds[1:]),
        "memory": memory,
        "loss_error": loss_error,
        "gradient_error": gradient_error,
    }


def errors(loss: Loss, hidden_ND: Tensor, matrix_VD: Tensor, labels_N: Tensor) -> tuple[float, float]:
    """Relative errors of the loss and of the hidden states' gradient, on a few positions."""
    few = hidden_ND[:CHECKED].detach().requires_grad_()
    value = loss(few, matrix_VD, labels_N[:CHECKED])
    value.backward()
    exact = few.detach().double().requires_grad_()
    total = naive64(exact, matrix_VD.detach(), labels_N[:CHECKED])
    total.backward()
    assert few.grad is not None
    assert exact.grad is not None
    gradient = (few.grad.double() - exact.grad).norm() / exact.grad.norm()
    return abs(float(value) - float(total)) / float(total), float(gradient)


def naive64(hidden_ND: Tensor, matrix_VD: Tensor, labels_N: Tensor) -> Tensor:
    logits_NV = torch.cat([hidden_ND @ block.double().t() for block in matrix_VD.split(8192)], dim=1)
    return F.cross_entropy(logits_NV, labels_N, reduction="sum")


if __name__ == "__main__":
    main()
