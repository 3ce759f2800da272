"""The memory that a run needs, by part and phase, from the shape of its model.

Counts the tensors that are in memory together at the peak of each phase. Memory of the interpreter,
of libraries and of a GPU's context, and what an allocator keeps between tensors, are not counted.
"""

from dataclasses import dataclass

import torch

from tunedlens.config import BASELINES
from tunedlens.devices import SPARE
from tunedlens.engine.backend import DTYPES
from tunedlens.engine.decoding import chunk_tokens, max_chunk_tokens
from tunedlens.evaluation.estimates import GROUPS
from tunedlens.model import ModelShape
from tunedlens.training.plan import Costs, TrainPlan
from tunedlens.training.sharding import divide
from tunedlens.training.validation import BLOCKS_AT_A_TIME

FIRST_PASS, STEP, TABLE = "first pass", "a step", "table"

_COPIES = 7
"""Arrays of L · d_model² numbers that `PreconditionedMuon` keeps: two lenses and five arrays of
its state."""
_STEP_COPIES, _LOW_RANK_STEP_COPIES = 6, 10
"""Additional arrays of this size at the peak of a step, when its gradient is no longer needed."""
_SOLUTION_COPIES = 9
"""Arrays of L · d_model² numbers in float64 at the peak of `PreconditionedMuon.initialise`; the
sums take two and a half of them."""
_JACOBIAN_COPIES = 7
_GATHERED_COPIES = 2
"""Of the weights of a block, when they have come from all processes and are put in place."""
_BLOCK_ARRAYS = 4
"""The number of arrays, each as large as the largest one in a block, that a block holds at once."""
_LAYER_ARRAYS = 5
"""Arrays of the states of the layers that are processed together, such as translated states and
gradients."""
_TABLE_ARRAYS = {"cpu": 3, "cuda": 5}
"""Arrays as large as a chunk's logits while the table is computed."""

Parts = dict[str, float]
"""Bytes by part."""


@dataclass(frozen=True)
class Memory:
    """Bytes by part in every phase of a run, for one process."""

    device: dict[str, Parts]
    """On the device, by phase."""
    host: float
    """Bytes of the sums that a run on a GPU keeps in the memory of the CPU."""

    @property
    def parts(self) -> list[str]:
        """All parts, in the order in which a run allocates them."""
        return list(dict.fromkeys(part for phase in self.device.values() for part in phase))

    @property
    def peak(self) -> float:
        """Bytes on the device at the peak of the run."""
        return max(sum(parts.values()) for parts in self.device.values())


class MemoryModel:
    """Counts the memory of a process, the first one if layers are divided.

    Args:
        plan: the plan of the run.
        shape: the shape of the model.
        device: cpu or cuda.
        processes: the number of processes that share the steps.
        spread: the number of devices that the weights of the model are spread over.
        limit: the memory of the device in bytes. It decides where the sums of the first pass are
            kept.
    """

    def __init__(
        self,
        plan: TrainPlan,
        shape: ModelShape,
        device: str,
        *,
        processes: int = 1,
        spread: int = 1,
        limit: float = float("inf"),
    ) -> None:
        self._plan, self._shape, self._device = plan, shape, torch.device(device)
        self._processes, self._spread, self._limit = processes, spread, limit
        self._model_bytes = 4 if plan.model.dtype == "float32" else 2
        self._product_bytes = DTYPES[plan.precision].itemsize
        points = plan.points(shape.n_layers)
        self._points = len(points)
        self._is_divided = bool(plan.shard_layers) and processes > 1
        layers = sorted({point.layer for point in points})
        own = divide(layers, processes)[0] if self._is_divided else layers
        self._own = sum(point.layer in own for point in points)
        """The number of points whose translators the process trains."""
        self._elements = self._own * shape.d_model * (shape.d_model + 1)
        """The number of elements in these translators."""
        self._blocks = -(-plan.batch_size // processes)
        self._micro_blocks = min(plan.micro_batch_size or self._blocks, self._blocks)

    def memory(self) -> Memory:
        """The memory of every phase of the run."""
        kept = self._kept()
        phases, host = {}, 0.0
        if self._plan.fit == "jacobian":
            phases[FIRST_PASS] = kept | self._jacobian()
        elif self._plan.fit not in BASELINES:
            first_pass, host = self._first_pass(sum(kept.values()))
            phases[FIRST_PASS] = kept | first_pass
        if self._plan.budget:
            phases[STEP] = kept | self._step()
        phases[TABLE] = kept | self._table()
        return Memory(phases, host)

    def _kept(self) -> Parts:
        """Bytes by part that a run holds from its first to its last step."""
        plan, shape = self._plan, self._shape
        rows = -(-shape.vocab_size // 8) * 8
        width = shape.d_model + 1 + 2 * (shape.has_bias or rows > shape.vocab_size)
        is_shared = self._model_bytes == 4 and not shape.is_scaled and not plan.model.fsdp
        copies = {"sgd": 2, "muon": 2}.get(plan.fit, _COPIES)
        return {
            f"model in {plan.model.dtype}": shape.weights * self._model_bytes / self._spread,
            **({"weights gathered": self._gathered()} if plan.model.fsdp else {}),
            "unembedding in float32": 0 if is_shared else 4 * shape.vocab_size * shape.d_model,
            "unembedding of the objective": rows * -(-width // 8) * 8 * self._product_bytes,
            "translators and optimizer": 4 * copies * self._elements,
        }

    def _gathered(self) -> float:
        """Bytes of the whole weights in a process of FSDP: the head, and twice what is gathered."""
        shape = self._shape
        head = shape.vocab_size * shape.d_model
        embedding = shape.weights - shape.block_weights - head
        largest = max(shape.block_weights / shape.n_layers, embedding)
        return self._model_bytes * (head + _GATHERED_COPIES * largest)

    def _states(self, blocks: int) -> tuple[float, float]:
        """Bytes of the states of some blocks: in float32, and at the peak of the forward pass."""
        plan, shape = self._plan, self._shape
        tokens = blocks * plan.corpus.seq_len
        states = 4 * tokens * (self._points + 1) * shape.d_model
        captured = shape.n_layers * len(plan.all_sites) + 1
        computed = tokens * captured * shape.d_model * self._model_bytes
        return states, max(states, computed) if self._model_bytes == 4 else states + computed

    def _exchanged(self, blocks: int) -> tuple[float, float]:
        """Bytes that the owner of layers receives from all processes, and those at the peak."""
        if not self._is_divided:
            return 0.0, 0.0
        n, d_model = self._processes, self._shape.d_model
        numbers = 4 * blocks * self._plan.corpus.seq_len * d_model
        sent = numbers * (self._points + n)  # every owner also gets the model's side
        received = numbers * n * (self._own + 1)
        return received, sent + 2 * received

    def _block(self, blocks: int) -> float:
        """Bytes of the activations of one block of the model."""
        tokens = blocks * self._plan.corpus.seq_len
        itemsize = min(self._model_bytes, self._product_bytes)
        return _BLOCK_ARRAYS * tokens * self._shape.widest * itemsize

    def _first_pass(self, kept: float) -> tuple[Parts, float]:
        """The memory of the closed form, at the larger of two peaks: summing or solving."""
        states, computed = self._states(min(self._micro_blocks, BLOCKS_AT_A_TIME))
        block = self._block(min(self._micro_blocks, BLOCKS_AT_A_TIME))
        n, pending = self._elements, 8 * self._elements
        is_fixed = self._plan.bias_only or self._plan.ridge is not None
        summing = (pending + 16 * n) * (1 if is_fixed else 2) + 8 * n
        solving = pending + 8 * _SOLUTION_COPIES * n - 8 * n
        on_device = self._device.type == "cpu" or (
            SPARE * 16 * n <= self._limit - kept - pending - states
        )
        host = 0.0
        if not on_device:
            host = max(summing - 2 * pending, solving - pending)
            summing, solving = 2 * pending, pending + 4 * n
        received, exchanging = self._exchanged(min(self._micro_blocks, BLOCKS_AT_A_TIME))
        held = states + received + max(computed, exchanging)
        at_sum = {"states": held, "activations of a block": block, "sums": summing}
        at_solution = {"states": states + received, "activations of a block": 0.0, "sums": solving}
        largest = max(at_sum, at_solution, key=lambda parts: sum(parts.values()))
        name = "sums of least squares and their solution"
        return {
            "states": largest["states"],
            "activations of a block": largest["activations of a block"],
            name: largest["sums"],
        }, host

    def _jacobian(self) -> Parts:
        """The memory of the mean Jacobian; its graph holds the activations of every block."""
        tokens = self._micro_blocks * self._plan.corpus.seq_len
        layer = tokens * (12 * self._shape.d_model + 4 * self._shape.widest)
        states, _ = self._states(self._micro_blocks)
        return {
            "states": 2 * states,
            "graph of all blocks": layer * self._shape.n_layers * self._model_bytes,
            "sums of the Jacobian": 4 * _JACOBIAN_COPIES * self._elements,
        }

    def _step(self) -> Parts:
        """The memory of a step at its peak: forward pass, exchange, gradients or optimizer."""
        plan, d_model = self._plan, self._shape.d_model
        blocks = self._blocks if plan.vocab_sample else self._micro_blocks
        states, _ = self._states(blocks)
        micro, computed = self._states(self._micro_blocks)
        block = self._block(self._micro_blocks)
        received, exchanging = self._exchanged(self._micro_blocks)
        tokens = (
            self._micro_blocks * plan.corpus.seq_len * (self._processes if self._is_divided else 1)
        )
        model_sides = 4 * blocks * plan.corpus.seq_len * d_model
        together = max(tokens, min(max_chunk_tokens(self._device), self._own * tokens))
        # Gradients that are added up over processes are copied twice.
        is_reduced = self._processes > 1 and not self._is_divided
        gradients = 4.0 * self._elements * (3 if is_reduced else 1)
        copies = _STEP_COPIES if plan.low_rank is None else _LOW_RANK_STEP_COPIES
        if plan.fit in BASELINES:
            copies = 3
        logits = self._logits(self._product_bytes)
        moments = [
            {"states": states - micro + computed, "activations of a block": block},
            {"states": states + model_sides + exchanging},
            {"states": states + model_sides + received, "gradients": gradients}
            | {"temporary arrays of a layer": 4.0 * _LAYER_ARRAYS * together * d_model},
            {"states": 0.0, "gradients": 4.0 * copies * self._elements},
        ]
        largest = max(moments, key=lambda parts: sum(parts.values()))
        return largest | {"logits": logits}

    def _logits(self, itemsize: int) -> float:
        """Bytes of a chunk of logits."""
        shape = self._shape
        return chunk_tokens(shape.vocab_size, self._device) * shape.vocab_size * itemsize

    def _table(self) -> Parts:
        """The memory of the final evaluation of the logit lens and the trained lens, in float32."""
        plan, shape = self._plan, self._shape
        total = Costs(plan, shape).table_tokens(plan.budget) // (plan.corpus.seq_len - 1)
        blocks = min(plan.micro_batch_size or BLOCKS_AT_A_TIME, total)
        states, computed = self._states(blocks)
        distributions = 8 * (2 * self._points + 1) * shape.vocab_size
        tokens = blocks * plan.corpus.seq_len
        chunk = min(tokens, chunk_tokens(shape.vocab_size, self._device))
        logits = 4 * chunk * shape.vocab_size * _TABLE_ARRAYS[self._device.type]
        whole = 4.0 * self._points * shape.d_model * (shape.d_model + 1)
        return ({"lens of all layers": whole} if self._is_divided else {}) | {
            "states": computed + states * self._model_bytes / 4,
            "logits": self._logits(self._product_bytes) + logits,
            "unembedding of the table": 4 * shape.vocab_size * shape.d_model,
            "mean distributions": (GROUPS + min(GROUPS, total)) * distributions,
        }
