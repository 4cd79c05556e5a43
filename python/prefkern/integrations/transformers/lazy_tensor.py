"""Logits that do not exist yet: a tensor subclass that is answered from hidden states, or made real when it must be.

Every lazy tensor knows how it came about: by the head, or by a function of another one. What prefkern can answer, it
answers from `Rows`; for anything else that way is gone again with real tensors, from the model's own output layer on,
so that what a trainer gets is what it would have had without prefkern.
"""

import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor

from prefkern.integrations.transformers.lazy_rows import Rows

Kind = Literal["logits", "logps", "probs", "probs * logps", "probs * logits", "turned"]
"""What a lazy tensor stands for; 'turned' are logits with the vocabulary as their second of three dimensions."""

_QUIET = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
_MACHINERY = (_QUIET[1], *(str(Path(torch.__file__).parent / name) for name in ("_tensor.py", "overrides.py")))
_NO_TORCH_FUNCTION = torch._C.DisableTorchFunctionSubclass


class RealLogitsWarning(UserWarning):
    """Logits had to be made after all; the message names the line of the program that asked for them."""


class Book:
    """What happened to the logits of one output layer."""

    def __init__(self) -> None:
        self.made_real = 0
        self.answered = 0
        self._told: set[tuple[str, int]] = set()

    def tell(self, asked: str, shape: torch.Size, dtype: torch.dtype) -> None:
        """Counts logits that had to be made, and warns once for each line that asks for some."""
        self.made_real += 1
        file, line = calling_line()
        if (file, line) in self._told:
            return
        self._told.add((file, line))
        warnings.warn_explicit(
            f"prefkern: {asked} needs the logits themselves, so that they were made: {tuple(shape)}, "
            f"{shape.numel() * dtype.itemsize / 1e6:.3g} MB. Results are the model's own; memory and time are not "
            "saved at this line",
            RealLogitsWarning,
            file,
            line,
        )


class Origin(NamedTuple):
    """Where the logits come from: the output layer's own product, and the book that is kept."""

    product: Callable[[Tensor], Tensor]
    book: Book

    def make(self, cell: "Cell", asked: str) -> Tensor:
        cell.rows.check()
        self.book.tell(asked, cell.shape, cell.dtype)
        return self.product(cell.rows.hidden)


class Memory:
    """The lazy tensors that would be views of one memory, and how often it was changed for real."""

    def __init__(self) -> None:
        self.changes = 0
        self._members: list[weakref.ref[LazyLogits]] = []

    def add(self, member: "LazyLogits") -> None:
        self._members = [each for each in self._members if each() is not None]
        self._members.append(weakref.ref(member))

    def others(self, member: "LazyLogits") -> list["LazyLogits"]:
        found = (each() for each in self._members)
        return [each for each in found if each is not None and each is not member]


class Cell:
    """What a lazy tensor stands for and how it came about. The tensor is a shell around it."""

    def __init__(
        self,
        kind: Kind,
        rows: Rows,
        dtype: torch.dtype,
        origin: Origin,
        *,
        parent: "Cell | None" = None,
        function: Callable[[Tensor], Tensor] | None = None,
        factor: float = 1.0,
        memory: Memory | None = None,
    ) -> None:
        self.kind, self.rows, self.dtype, self.origin, self.factor = kind, rows, dtype, origin, factor
        self.memory = Memory() if memory is None else memory
        self.made: Tensor | None = None
        self.whole: tuple[Cell, Any] | None = None
        """The cell, and the index into it, that this one is a row of, where all rows are about to be asked for."""
        self._selected: tuple[bool, Tensor, Tensor] | None = None
        """Tokens and their logits, from the last gather, and whether these have a gradient."""
        self._parent, self._function = parent, function
        self._changes = 0 if parent is None else parent.memory.changes
        self._logsumexp: tuple[bool, Tensor] | None = None

    @property
    def shape(self) -> torch.Size:
        shape = self.rows.shape
        return torch.Size((shape[0], shape[2], shape[1])) if self.kind == "turned" else shape

    @property
    def leaves(self) -> list[Tensor]:
        return [self.rows.hidden, *self.rows.leaves]

    def real(self, asked: str) -> Tensor:
        """Returns the real tensor, made at the first call of the output layer's own product; ``asked`` names what
        needs it."""
        if self.made is None:
            with torch.set_grad_enabled(any(leaf.requires_grad for leaf in self.leaves)):
                if self._parent is None or self._function is None:
                    self.made = self.origin.make(self, asked)
                else:
                    if self._parent.memory is not self.memory and self._parent.memory.changes != self._changes:
                        _refuse_stale("a change in place")
                    self.made = self._function(self._parent.real(asked))
        return self.made

    def logsumexp(self) -> Tensor:
        """Returns the logarithm of the sum of exponentials of each row: one pass for all rows of the whole."""
        if self.whole is not None:
            cell, index = self.whole
            found: Tensor = cell.logsumexp()[index]
            return found
        grad = torch.is_grad_enabled()
        if self._logsumexp is None or self._logsumexp[0] < grad:
            self._logsumexp = grad, self._sum_of_exponentials()
        return self._logsumexp[1]

    def _sum_of_exponentials(self) -> Tensor:
        known = self._selected
        if known is not None and known[1].shape[-1] == 1 and known[0] >= torch.is_grad_enabled():
            _, token, z = known
        else:
            token = self.rows.hidden.new_zeros((*self.rows.hidden.shape[:-1], 1), dtype=torch.int64)
            z = self.rows.logits_at(token)
        return z.squeeze(-1) - self.rows.stats(token.squeeze(-1)).logps

    def logits_at(self, index: Tensor) -> Tensor:
        """Returns the logits of tokens ``[..., K]``."""
        self._selected = torch.is_grad_enabled(), index, self.rows.logits_at(index)
        return self._selected[2]

    def logps(self, index: Tensor) -> Tensor:
        """Returns the log-probabilities of tokens ``[..., K]``."""
        if self._one_of_many():
            return self.rows.logits_at(index) - self.logsumexp().unsqueeze(-1)
        if index.shape[-1] == 1:
            return self.rows.stats(index.squeeze(-1)).logps.unsqueeze(-1)
        return self.rows.stats(index).logps

    def _one_of_many(self) -> bool:
        """Whether all rows of a larger one are asked for the same, one after the other."""
        return self.whole is not None and (self.whole[1] is not ... or self.whole[0]._one_of_many())


class LazyLogits(Tensor):
    """Logits that do not exist yet. Its strides are 0, as it has no memory: kernels that would read it are not
    chosen for it."""

    box: list[Cell]
    """Holds the cell: another one after a change in place, for the tensor and for its place in the graph."""
    stale: str
    """Says which change in place of other logits in the same memory this one did not follow."""

    @staticmethod
    def of(cell: Cell) -> "LazyLogits":
        """Returns a tensor that stands for the cell, with the gradient of its hidden states and its head."""
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in cell.leaves):
            made: LazyLogits = _Born.apply([cell], *cell.leaves)
        else:
            made = _shell([cell])
        cell.memory.add(made)
        return made

    @property
    def cell(self) -> Cell:
        return self.box[0]

    @property
    def adopted(self) -> bool:
        """Whether it came out of somebody's autograd function, so that its gradient is that function's business."""
        with _NO_TORCH_FUNCTION():
            return self.requires_grad and "_Born" not in type(self.grad_fn).__name__

    def refuse_stale(self) -> None:
        if self.stale:
            _refuse_stale(self.stale)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from prefkern.integrations.transformers.lazy_dispatch import answer

        return answer(function, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Below autograd, where only numbers count: what got here did not pass `__torch_function__`."""
        if function is torch.ops.aten.detach.default:
            return _shell(args[0].box)
        name = str(function).removesuffix(".default")
        return function(*real(args, name, detach=True), **real(kwargs or {}, name, detach=True))


def _shell(box: list[Cell]) -> LazyLogits:
    cell = box[0]
    made = torch.Tensor._make_wrapper_subclass(
        LazyLogits,
        cell.shape,
        strides=(0,) * len(cell.shape),
        dtype=cell.dtype,
        device=cell.rows.hidden.device,
    )
    made.box, made.stale = box, ""
    return made


class _Born(torch.autograd.Function):
    """Gives a lazy tensor its place in the graph: a gradient that reaches it as a tensor goes on to its leaves."""

    @staticmethod
    def forward(ctx: Any, box: list[Cell], *leaves: Tensor) -> LazyLogits:
        ctx.box, ctx.leaves = box, leaves
        ctx.set_materialize_grads(False)
        return _shell(box)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        needed = [leaf for leaf, need in zip(ctx.leaves, ctx.needs_input_grad[1:], strict=True) if need]
        with torch.enable_grad():
            made = ctx.box[0].real("a gradient")
        found = iter(torch.autograd.grad(made, needed, grad.to(made.dtype), retain_graph=True, allow_unused=True))
        return None, *(next(found) if need else None for need in ctx.needs_input_grad[1:])


def _refuse_stale(change: str) -> NoReturn:
    raise RuntimeError(
        f"prefkern.lazy_logits: these logits share memory with others that were changed in place ({change}), which "
        "logits that do not exist cannot follow: use the changed ones, or write `logits = logits / temperature` in "
        "place of "
        "`logits.div_(temperature)`"
    )


class _Real(torch.autograd.Function):
    """Real numbers in place of a lazy tensor, whose gradient is the tensor's."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyLogits, made: Tensor) -> Tensor:
        return made.view_as(made)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def real(value: Any, asked: str, *, detach: bool = False) -> Any:
    """Returns a structure of arguments with every lazy tensor in it made real."""
    if isinstance(value, LazyLogits):
        value.refuse_stale()
        made = value.cell.real(asked)
        if detach:
            return made.detach()
        return _Real.apply(value, made.detach()) if value.adopted else made
    if isinstance(value, dict):
        return {key: real(each, asked, detach=detach) for key, each in value.items()}
    if isinstance(value, list | tuple):
        items = [real(each, asked, detach=detach) for each in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def asked_by_torch_distributed() -> bool:
    """Whether the innermost code outside of the machinery of tensor subclasses is that of FSDP or DDP."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_MACHINERY):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")).startswith("torch.distributed")


def calling_line() -> tuple[str, int]:
    """Returns file and line of the innermost code that is neither torch's nor this folder's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_QUIET):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
